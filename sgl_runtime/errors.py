"""Errors a caller can act on. Every message says what came, what was expected and what to do."""

from __future__ import annotations


class SGLError(ValueError):
    """Base of all errors raised on bad input; the command line turns it into exit code 2."""


class ConfigError(SGLError):
    """A setting is out of range, contradicts the model, or asks for something that is not available yet."""


class CheckpointError(SGLError):
    """A checkpoint is missing, damaged, not safetensors, or of a model that is not supported."""


class ImageError(SGLError):
    """An image is missing, damaged, too large, or not an image."""


class PromptError(SGLError):
    """Prompt, images and model do not go together."""


class NumericalError(SGLError):
    """A stage produced NaN or infinite values."""
