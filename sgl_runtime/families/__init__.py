"""The families of VLMs that the runtime runs. To add one: docs/families.md."""

from __future__ import annotations

from typing import Any

from sgl_runtime.errors import CheckpointError
from sgl_runtime.families.base import Family, Features, Prepared, Preprocessor, Visual
from sgl_runtime.families.gemma3 import Gemma3
from sgl_runtime.families.idefics3 import Idefics3, SmolVLM
from sgl_runtime.families.internvl import InternVL
from sgl_runtime.families.llava import Llava, LlavaNext
from sgl_runtime.families.llava_onevision import LlavaOnevision
from sgl_runtime.families.qwen_vl import Qwen3VL, Qwen3VLMoe, Qwen25VL, QwenVL

FAMILIES: tuple[type[Family], ...] = (
    InternVL,
    QwenVL,
    Qwen25VL,
    Qwen3VL,
    Qwen3VLMoe,
    Llava,
    LlavaNext,
    LlavaOnevision,
    Idefics3,
    SmolVLM,
)
REFUSED: tuple[type[Family], ...] = (Gemma3,)  # known, so that the reason can be told

__all__ = [
    "FAMILIES",
    "REFUSED",
    "Family",
    "Features",
    "Prepared",
    "Preprocessor",
    "Visual",
    "family_of",
]


def family_of(model_type: Any) -> type[Family]:
    """Return the family that reads configurations of ``model_type``.

    Raises
    ------
    CheckpointError
        None does; the message lists those that are supported.
    """
    for family in (*FAMILIES, *REFUSED):
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise CheckpointError(
        f"Models of type {model_type!r} are not supported; supported are {known}. How to add one: "
        "docs/families.md."
    )
