"""Checks of arguments: each error names the op, quotes what came and says what was expected."""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 1024  # kMaxHeadDim of csrc/cpu/kernels.h
MAX_COUNT = 2**63 - 1  # what an int in an op's schema holds


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
    check_last_stride(op, name, tensor)
    if _rows_overlap(tensor):
        raise ValueError(
            f"{op}: {name} has strides {tuple(tensor.stride())} for shape {dims(tensor)}, so that rows share "
            "memory, expected rows apart since each is written; allocate it with torch.zeros"
        )


def check_last_stride(op: str, name: str, tensor: Tensor) -> None:
    """Kernels read rows as they lie; one element, or none, lies right with any stride."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1 and tensor.numel() > 0:
        bad_stride(op, name, tensor)


def check_count(op: str, name: str, value: Any, hint: str = "") -> int:
    """An int of at least 0, from any integer type; a symbol of torch.compile stays one."""
    if not isinstance(value, (int, torch.SymInt)):
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{op}: {name} is {value!r}, expected an int{hint}") from None
    if value < 0:
        raise ValueError(f"{op}: {name} is {value}, expected 0 or more")
    if value > MAX_COUNT:
        raise ValueError(f"{op}: {name} is {value}, expected at most {MAX_COUNT}")
    return value


def check_selection(
    op: str,
    mass: Tensor,
    visual_index: Tensor,
    seq_lens: Tensor,
    num_keep: int | Tensor,
) -> tuple[int, Tensor | None]:
    """Return `num_keep` as the ops take it: one count, and the counts of each request if they came."""
    if mass.dim() != 2:
        bad_shape(op, "mass", mass, "(batch, visual slots)")
    if mass.dtype != torch.float32:
        bad_dtype(op, "mass", mass, "float32")
    check_last_stride(op, "mass", mass)
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
        return 0, num_keep
    check_devices(op, mass, visual_index, seq_lens)
    return check_count(op, "num_keep", num_keep, "; use max(1, int(N_v * keep_ratio))"), None


def check_logits(op: str, logits: Tensor) -> None:
    if logits.dim() < 1 or logits.shape[-1] == 0:
        bad_shape(op, "logits", logits, "(..., vocabulary) with at least one token")
    if logits.dtype not in FLOATS:
        bad_dtype(op, "logits", logits, "float32, bfloat16 or float16")
    check_last_stride(op, "logits", logits)


def check_devices(op: str, first: Tensor, *others: Tensor | None) -> None:
    device = first.device
    for other in others:
        if other is not None and other.device != device:
            raise ValueError(
                f"{op}: tensors on {device} and {other.device}, expected one device; move them together"
            )


def _rows_overlap(tensor: Tensor) -> bool:
    """Whether two rows of a tensor of two or three dimensions, last one contiguous, share memory."""
    width = tensor.shape[-1]
    spans = [(n, step) for n, step in zip(tensor.shape[:-1], tensor.stride(), strict=False) if n > 1]
    if tensor.numel() == 0 or not spans:
        return False
    if len(spans) == 1:
        return spans[0][1] < width
    (outer, outer_step), (inner, inner_step) = spans  # apart if one steps over all that the other spans
    nested = inner_step >= width and outer_step >= (inner - 1) * inner_step + width
    swapped = outer_step >= width and inner_step >= (outer - 1) * outer_step + width
    return not (nested or swapped)


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
