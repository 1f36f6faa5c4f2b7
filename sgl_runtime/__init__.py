"""Small-VLM-guided pruning and early exit for large vision-language models (arXiv 2412.03324).

Importing this package is cheap: torch and transformers load with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgl_runtime.config import SGLConfig
    from sgl_runtime.errors import (
        CheckpointError,
        ConfigError,
        ImageError,
        NumericalError,
        PromptError,
        SGLError,
    )
    from sgl_runtime.pipeline import SGLPipeline, SGLResult
    from sgl_runtime.videos import Video

_HOME = {
    "SGLConfig": "config",
    "SGLPipeline": "pipeline",
    "SGLResult": "pipeline",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "ImageError": "errors",
    "NumericalError": "errors",
    "PromptError": "errors",
    "SGLError": "errors",
    "Video": "videos",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ImageError",
    "NumericalError",
    "PromptError",
    "SGLConfig",
    "SGLError",
    "SGLPipeline",
    "SGLResult",
    "Video",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
