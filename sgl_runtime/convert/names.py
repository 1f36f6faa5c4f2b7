"""What each tensor of the chat format becomes in transformers' own format: a new name, or several parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Split = Callable[[Tensor], list[Tensor]]

_LAYER = r"language_model\.model\.layers\.(\d+)\."
_BLOCK = r"vision_model\.encoder\.layers\.(\d+)\."
_TO_LAYER = r"language_model.model.layers.\1."
_TO_BLOCK = r"vision_tower.encoder.layer.\1."
_INTERNLM2 = {
    r"language_model\.model\.tok_embeddings\.weight": r"language_model.model.embed_tokens.weight",
    r"language_model\.output\.weight": r"language_model.lm_head.weight",
    _LAYER + r"attention\.wo\.(\w+)": _TO_LAYER + r"self_attn.o_proj.\2",
    _LAYER + r"feed_forward\.w1\.weight": _TO_LAYER + r"mlp.gate_proj.weight",
    _LAYER + r"feed_forward\.w2\.weight": _TO_LAYER + r"mlp.down_proj.weight",
    _LAYER + r"feed_forward\.w3\.weight": _TO_LAYER + r"mlp.up_proj.weight",
    _LAYER + r"attention_norm\.weight": _TO_LAYER + r"input_layernorm.weight",
    _LAYER + r"ffn_norm\.weight": _TO_LAYER + r"post_attention_layernorm.weight",
    r"language_model\.model\.norm\.weight": r"language_model.model.norm.weight",
}
_UNCHANGED = {r"(language_model\..*)": r"\1"}
_VISION = {
    r"vision_model\.embeddings\.class_embedding": r"vision_tower.embeddings.cls_token",
    r"vision_model\.embeddings\.position_embedding": r"vision_tower.embeddings.position_embeddings",
    r"vision_model\.embeddings\.patch_embedding\.(\w+)": (
        r"vision_tower.embeddings.patch_embeddings.projection.\1"
    ),
    _BLOCK + r"attn\.proj\.(\w+)": _TO_BLOCK + r"attention.projection_layer.\2",
    _BLOCK + r"attn\.([qk]_norm)\.weight": _TO_BLOCK + r"attention.\2.weight",
    _BLOCK + r"ls([12])": _TO_BLOCK + r"lambda_\2",
    _BLOCK + r"norm1\.(\w+)": _TO_BLOCK + r"layernorm_before.\2",
    _BLOCK + r"norm2\.(\w+)": _TO_BLOCK + r"layernorm_after.\2",
    _BLOCK + r"mlp\.(fc[12])\.(\w+)": _TO_BLOCK + r"mlp.\2.\3",
    r"mlp1\.0\.(\w+)": r"multi_modal_projector.layer_norm.\1",
    r"mlp1\.1\.(\w+)": r"multi_modal_projector.linear_1.\1",
    r"mlp1\.3\.(\w+)": r"multi_modal_projector.linear_2.\1",
}


@dataclass(frozen=True)
class Rule:
    """What one tensor becomes.

    Attributes
    ----------
    targets : names in transformers' own format; none when the tensor is not known
    split : the tensor's parts, one for each of ``targets``
    """

    targets: tuple[str, ...]
    split: Split


def rule(name: str, llm: Mapping[str, Any]) -> Rule:
    """Return what the tensor ``name`` becomes in a checkpoint whose ``llm_config`` is ``llm``."""
    if found := re.fullmatch(_BLOCK + r"attn\.qkv\.(\w+)", name):
        base = found.expand(_TO_BLOCK + "attention.")
        return Rule(_projections(base, found[2]), lambda tensor: list(tensor.chunk(3)))
    internlm2 = llm["model_type"] == "internlm2"
    if internlm2 and (found := re.fullmatch(_LAYER + r"attention\.wqkv\.(\w+)", name)):
        base = found.expand(_TO_LAYER + "self_attn.")
        heads, kv_heads = llm["num_attention_heads"], llm["num_key_value_heads"]
        return Rule(_projections(base, found[2]), lambda tensor: split_wqkv(tensor, heads, kv_heads))
    for pattern, target in {**_VISION, **(_INTERNLM2 if internlm2 else _UNCHANGED)}.items():
        if found := re.fullmatch(pattern, name):
            return Rule((found.expand(target),), lambda tensor: [tensor])
    return Rule((), lambda tensor: [])


def split_wqkv(fused: Tensor, heads: int, kv_heads: int) -> list[Tensor]:
    """Return the query, key and value parts of InternLM2's fused projection.

    Parameters
    ----------
    fused
        (heads + 2 kv_heads) * head_dim rows: for each KV head its query heads, its key head, its value head.
    """
    per_kv = heads // kv_heads
    grouped = fused.unflatten(0, (kv_heads, per_kv + 2, -1))
    return [part.flatten(0, 2) for part in grouped.split([per_kv, 1, 1], dim=1)]


def module_name(target: str) -> str:
    """Return the name in ``InternVLForConditionalGeneration`` of a tensor named ``target`` on disk."""
    if target.startswith("language_model.lm_head."):
        return target.removeprefix("language_model.")
    if target.startswith("language_model.model."):
        return "model.language_model." + target.removeprefix("language_model.model.")
    return "model." + target


def _projections(base: str, kind: str) -> tuple[str, ...]:
    return tuple(f"{base}{letter}_proj.{kind}" for letter in "qkv")
