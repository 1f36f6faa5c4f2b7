"""Checks of arguments: each error names the op, quotes what came and says what was expected."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 1024  # kMaxHeadDim of csrc/cpu/kernels.h


def check_heads(op: str, heads: int, kv_heads: int, dim: int) -> None:
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"{op}: {heads} query heads over {kv_heads} KV heads, expected a whole multiple")
    if not 0 < dim <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head dim is {dim}, expected 1 to {MAX_HEAD_DIM}")


def check_lens(op: str, seq_lens: Tensor, batch: int) -> None:
    if seq_lens.dim() != 1 or seq_lens.shape[0] != batch:
        bad_shape(op, "seq_lens", seq_lens, f"(batch {batch},)")
    if seq_lens.dtype != torch.int32:
        bad_dtype(op, "seq_lens", seq_lens, "int32")


def check_visual(op: str, visual_index: Tensor, batch: int) -> None:
    if visual_index.dim() != 2 or visual_index.shape[0] != batch:
        bad_shape(op, "visual_index", visual_index, f"(batch {batch}, visual slots)")
    if visual_index.dtype != torch.int32:
        bad_dtype(op, "visual_index", visual_index, "int32")


def check_mass(
    op: str, mass: Tensor | None, head_mass: Tensor | None, batch: int, heads: int, slots: int
) -> None:
    if mass is not None:
        if mass.shape != (batch, slots):
            bad_shape(op, "mass", mass, f"(batch {batch}, visual slots {slots})")
        check_accumulator(op, "mass", mass)
    if head_mass is not None:
        if head_mass.shape != (batch, heads, slots):
            bad_shape(
                op, "head_mass", head_mass, f"(batch {batch}, query heads {heads}, visual slots {slots})"
            )
        check_accumulator(op, "head_mass", head_mass)


def check_accumulator(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        bad_dtype(op, name, tensor, "float32")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        bad_stride(op, name, tensor)


def check_selection(
    op: str,
    mass: Tensor,
    visual_index: Tensor,
    seq_lens: Tensor,
    num_keep: int | Tensor,
    out_len: int | None,
) -> int:
    if mass.dim() != 2:
        bad_shape(op, "mass", mass, "(batch, visual slots)")
    if mass.dtype != torch.float32:
        bad_dtype(op, "mass", mass, "float32")
    batch = mass.shape[0]
    if visual_index.shape != mass.shape:
        bad_shape(op, "visual_index", visual_index, f"the shape of mass, {dims(mass)}")
    check_visual(op, visual_index, batch)
    check_lens(op, seq_lens, batch)
    if isinstance(num_keep, Tensor):
        if num_keep.dim() != 1 or num_keep.shape[0] != batch:
            bad_shape(op, "num_keep", num_keep, f"an int or (batch {batch},)")
        if num_keep.dtype != torch.int32:
            bad_dtype(op, "num_keep", num_keep, "int32")
        check_devices(op, mass, visual_index, seq_lens, num_keep)
    else:
        if isinstance(num_keep, float):
            raise TypeError(
                f"{op}: num_keep is {num_keep}, expected an int; use max(1, int(N_v * keep_ratio))"
            )
        if num_keep < 0:
            raise ValueError(f"{op}: num_keep is {num_keep}, expected 0 or more")
        check_devices(op, mass, visual_index, seq_lens)
    if out_len is not None and out_len < 0:
        raise ValueError(f"{op}: out_len is {out_len}, expected 0 or more")
    return batch


def check_logits(op: str, logits: Tensor) -> None:
    if logits.dim() < 1 or logits.shape[-1] == 0:
        bad_shape(op, "logits", logits, "(..., vocabulary) with at least one token")
    if logits.dtype not in FLOATS:
        bad_dtype(op, "logits", logits, "float32, bfloat16 or float16")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        bad_stride(op, "logits", logits)


def check_devices(op: str, first: Tensor, *others: Tensor | None) -> None:
    device = first.device
    for other in others:
        if other is not None and other.device != device:
            raise ValueError(
                f"{op}: tensors on {device} and {other.device}, expected one device; move them together"
            )


def dims(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def bad_shape(op: str, name: str, tensor: Tensor, expected: str) -> NoReturn:
    raise ValueError(f"{op}: {name} has shape {dims(tensor)}, expected {expected}")


def bad_dtype(op: str, name: str, tensor: Tensor, expected: str) -> NoReturn:
    raise TypeError(f"{op}: {name} is {tensor.dtype}, expected {expected}; convert it with .to()")


def bad_stride(op: str, name: str, tensor: Tensor) -> NoReturn:
    raise ValueError(
        f"{op}: {name} has strides {tuple(tensor.stride())}, expected 1 in the last dimension; "
        "call .contiguous()"
    )
