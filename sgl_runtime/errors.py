"""Errors a caller can act on. Every message says what came, what was expected and what to do."""

from __future__ import annotations

from typing import Any


class SGLError(ValueError):
    """Base of all errors raised on bad input; the command line turns it into exit code 2."""


class ConfigError(SGLError):
    """A setting is out of range, contradicts the model, or asks for something that is not available yet."""


class CheckpointError(SGLError):
    """A checkpoint is missing, damaged, not safetensors, or of a model that is not supported."""


class ImageError(SGLError):
    """An image is missing, damaged, too large, or not an image."""


class DataError(SGLError):
    """A data set is missing, has broken rows, or is of a layout that is not known."""


class PromptError(SGLError):
    """Prompt, images and model do not go together."""


class NumericalError(SGLError):
    """A stage produced NaN or infinite values."""


class MemoryLimitError(SGLError):
    """Something does not fit into the device's memory; the message says how large it is and what to lower."""


class BatchError(SGLError):
    """Some requests of a batch failed; the others finished.

    Attributes
    ----------
    results : one per request, None where it failed
    errors : the error of each request that failed, by its number in the batch
    """

    def __init__(self, results: list[Any], errors: dict[int, SGLError]) -> None:
        self.results = results
        self.errors = errors
        told = [f"Request {number}: {error}" for number, error in sorted(errors.items())]
        super().__init__("\n".join(told))
