"""Operations and bytes that a VLM cannot do without, from its configuration: the design, section 6."""

from __future__ import annotations

from typing import Any

from sgl_runtime.config import SGLConfig, num_kept


def vision_flops(config: Any, tiles: int) -> float:
    """Floating-point operations of an InternVLConfig's vision tower and projector for ``tiles`` tiles."""
    vision, text = config.vision_config, config.text_config
    patches = _area(vision.image_size) // _area(vision.patch_size)
    rows, width = patches + 1, vision.hidden_size
    layer = 2 * rows * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * width * rows**2
    embedding = 2 * patches * width * vision.num_channels * _area(vision.patch_size)
    merged, hidden = width / config.downsample_ratio**2, text.hidden_size
    projector = 2 * visual_tokens(config, 1) * (merged * hidden + hidden**2)
    return tiles * (vision.num_hidden_layers * layer + embedding + projector)


def layer_flops(config: Any, rows: int) -> float:
    """Operations of one decoder layer over a prompt of ``rows`` tokens, causal attention included."""
    text = config.text_config
    return 2 * rows * _layer_weights(text) + 2 * text.num_attention_heads * _head_dim(text) * rows**2


def prefill_flops(config: Any, rows: int, *, prune_layer: int | None = None, kept_rows: int = 0) -> float:
    """Operations of a prefill whose layers from ``prune_layer`` on see ``kept_rows``; one row of logits."""
    layers = config.text_config.num_hidden_layers
    full = layers if prune_layer is None else prune_layer
    head = 2 * config.text_config.hidden_size * config.text_config.vocab_size
    return full * layer_flops(config, rows) + (layers - full) * layer_flops(config, kept_rows) + head


def speedup_bounds(
    small: Any, large: Any, tiles: int, text_tokens: int, settings: SGLConfig
) -> dict[str, float]:
    """How much faster than the unpruned large VLM guidance can be, at equal operations per second.

    Vision and prefill of a request of ``tiles`` tiles. "series": the small VLM's operations count; "hidden":
    they do not.
    """
    visual = visual_tokens(large, tiles)
    rows, kept = visual + text_tokens, num_kept(visual, settings.keep_ratio) + text_tokens
    layer = settings.layer_of(large.text_config.num_hidden_layers)
    vision = vision_flops(large, tiles)
    unpruned = vision + prefill_flops(large, rows)
    pruned = vision + prefill_flops(large, rows, prune_layer=layer, kept_rows=kept)
    guide = vision_flops(small, tiles) + prefill_flops(small, rows)
    return {"series": unpruned / (pruned + guide), "hidden": unpruned / pruned}


def decode_bytes(config: Any, slots: float, element_size: int, *, batch: int = 1) -> float:
    """Bytes that a decode step reads: each weight once, keys and values of ``slots`` slots per request."""
    text = config.text_config
    weights = text.num_hidden_layers * _layer_weights(text) + text.hidden_size * text.vocab_size
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * _head_dim(text) * slots * batch
    return (weights + cached) * element_size


def visual_tokens(config: Any, tiles: int) -> int:
    """Visual tokens of ``tiles`` tiles."""
    patches = _area(config.vision_config.image_size) // _area(config.vision_config.patch_size)
    return tiles * round(patches * config.downsample_ratio**2)


def _layer_weights(text: Any) -> int:
    """Elements of a decoder layer's matrices."""
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    return text.hidden_size * (2 * (heads + kv_heads) * _head_dim(text) + 3 * text.intermediate_size)


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _area(size: Any) -> int:
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height * width
