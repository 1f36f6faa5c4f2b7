"""Plugins for the frameworks that researchers evaluate VLMs with: see docs/frameworks.md.

Each needs its framework, which is imported with it; nothing else in sgl_runtime imports a plugin.
"""

from __future__ import annotations

from typing import Any


def lmms_eval_manifest() -> Any:
    """Return what lmms-eval must know to find the model ``sgl_vlm``; an entry point in pyproject.toml."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="sgl_vlm", chat_class_path="sgl_runtime.plugins.lmms_eval.SGLVLM")
