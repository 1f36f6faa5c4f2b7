"""decode_attention: one new row per request against its KV cache, split over the keys.

A program of the first launch owns one KV head and one split of the keys. It reads those rows of K and V from
memory once, through shared memory, and serves all query heads of the group from them, whose queries, sums of
V and softmax statistics stay in registers. It leaves an unnormalised sum of V, the largest logit and the sum
of exponentials, and, when a mass is wanted, the logits: 4 bytes a key and head. The second launch knows the
final denominator. Some of its programs add up the splits of one head; the others own a block of visual slots,
read the logits at those slots once and add the probabilities up, head after head. How a request is split
follows from its own length only. Logits are in units of log2, so that an exponential is one instruction.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl_kernels.triton import launching
from sgl_kernels.triton.launching import (
    ANY_ALIGNMENT,
    FLOATS,
    ceil_div,
    power_of_two,
    require,
    rows_contiguous,
)

OP = "decode_attention"


@triton.jit(do_not_specialize=ANY_ALIGNMENT)
def split_kernel(
    q,  # (B, Hq, D)
    k,  # (B, Hkv, S, D)
    v,  # (B, Hkv, S, D)
    seq_lens,  # (B,)
    partial,  # (B, Hq, splits, D)
    maxima,  # (B, Hq, MAX_SPLITS)
    sums,  # (B, Hq, MAX_SPLITS)
    logits,  # (B, Hq, S)
    q_batch,
    q_head,
    k_batch,
    k_head,
    k_slot,
    v_batch,
    v_head,
    v_slot,
    lens_stride,
    kv_heads,
    slots,
    scale,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    KEEP_LOGITS: tl.constexpr,
):
    split = tl.program_id(0)
    row_blocks: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    kv = tl.program_id(1) // row_blocks
    b = tl.program_id(2).to(tl.int64)
    length = tl.minimum(tl.maximum(tl.load(seq_lens + b * lens_stride), 0), slots)
    split_keys = tl.cdiv(tl.cdiv(length, MAX_SPLITS), MIN_SPLIT) * MIN_SPLIT
    begin = split * split_keys
    if begin >= length:
        return
    end = tl.minimum(begin + split_keys, length)

    row = tl.program_id(1) % row_blocks * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    head = kv * GROUP + row
    is_row = row < GROUP
    is_dim = d < DIM
    queries = tl.load(
        q + b * q_batch + head[:, None] * q_head + d[None, :],
        mask=is_row[:, None] & is_dim[None, :],
        other=0.0,
    )

    total_row = (b * kv_heads * GROUP + head) * MAX_SPLITS + split
    key = tl.arange(0, BLOCK_KEYS)
    k_tile = k + b * k_batch + kv.to(tl.int64) * k_head + begin.to(tl.int64) * k_slot
    v_tile = v + b * v_batch + kv.to(tl.int64) * v_head + begin.to(tl.int64) * v_slot
    k_tile += key[:, None] * k_slot + d[None, :]
    v_tile += key[:, None] * v_slot + d[None, :]
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_KEYS):
        is_key = start + key < end
        keys = tl.load(k_tile, mask=is_key[:, None] & is_dim[None, :], other=0.0)
        values = tl.load(v_tile, mask=is_key[:, None] & is_dim[None, :], other=0.0)
        logit = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if KEEP_LOGITS:
            kept = (b * kv_heads * GROUP + head)[:, None] * slots + (start + key)[None, :]
            tl.store(logits + kept, logit, mask=is_row[:, None] & is_key[None, :])
        logit = tl.where(is_key[None, :], logit, float("-inf"))
        larger = tl.maximum(largest, tl.max(logit, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # -inf less -inf would be NaN
        weight = tl.exp2(logit - shift[:, None])
        decay = tl.exp2(largest - shift)
        total = total * decay + tl.sum(weight, 1)
        output = output * decay[:, None]
        output += tl.dot(weight.to(values.dtype), values, input_precision="ieee")
        largest = larger
        k_tile += BLOCK_KEYS * k_slot
        v_tile += BLOCK_KEYS * v_slot

    tl.store(maxima + total_row, largest, mask=is_row)
    tl.store(sums + total_row, total, mask=is_row)
    # Of splits only as many as the cache can have are stored.
    row_of_partial = (b * kv_heads * GROUP + head) * tl.num_programs(0) + split
    tl.store(
        partial + row_of_partial[:, None] * DIM + d[None, :], output, mask=is_row[:, None] & is_dim[None, :]
    )


@triton.jit(do_not_specialize=ANY_ALIGNMENT)
def combine_kernel(
    partial,  # (B, Hq, splits, D)
    maxima,  # (B, Hq, MAX_SPLITS)
    sums,  # (B, Hq, MAX_SPLITS)
    logits,  # (B, Hq, S)
    seq_lens,  # (B,)
    visual_index,  # (B, N)
    mass,  # (B, N)
    head_mass,  # (B, Hq, N)
    out,  # (B, Hq, D)
    lens_stride,
    index_batch,
    index_slot,
    mass_batch,
    head_mass_batch,
    head_mass_head,
    heads,
    slots,
    splits,
    visual_slots,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    HAS_MASS: tl.constexpr,
    HAS_HEAD_MASS: tl.constexpr,
):
    task = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    length = tl.minimum(tl.maximum(tl.load(seq_lens + b * lens_stride), 0), slots)
    split_keys = tl.cdiv(tl.cdiv(length, MAX_SPLITS), MIN_SPLIT) * MIN_SPLIT
    used = tl.cdiv(length, tl.maximum(split_keys, 1))
    split = tl.arange(0, MAX_SPLITS)
    is_split = split < used

    if task < heads:
        d = tl.arange(0, BLOCK_D)
        is_dim = d < DIM
        row = b * heads + task
        split_max = tl.load(maxima + row * MAX_SPLITS + split, mask=is_split, other=float("-inf"))
        split_sum = tl.load(sums + row * MAX_SPLITS + split, mask=is_split, other=0.0)
        split_output = tl.load(
            partial + (row * splits + split)[:, None] * DIM + d[None, :],
            mask=is_split[:, None] & is_dim[None, :],
            other=0.0,
        )
        largest = tl.max(split_max, 0)
        weight = tl.exp2(split_max - tl.where(largest == float("-inf"), 0.0, largest))
        total = tl.sum(weight * split_sum, 0)
        output = tl.sum(weight[:, None] * split_output, 0) / total
        output = tl.where(length > 0, output, 0.0)
        tl.store(out + row * DIM + d, output.to(out.dtype.element_ty), mask=is_dim)
    else:
        n = (task - heads) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
        is_slot = n < visual_slots
        index_place = visual_index + b * index_batch + n.to(tl.int64) * index_slot
        position = tl.load(index_place, mask=is_slot, other=-1)
        is_slot = (position >= 0) & (position < length)
        received = tl.zeros([BLOCK_SLOTS], tl.float32)
        for first in range(0, heads, BLOCK_HEADS):
            head = first + tl.arange(0, BLOCK_HEADS)
            is_head = head < heads
            row = b * heads + head
            place = row[:, None] * MAX_SPLITS + split[None, :]
            is_place = is_head[:, None] & is_split[None, :]
            split_max = tl.load(maxima + place, mask=is_place, other=float("-inf"))
            split_sum = tl.load(sums + place, mask=is_place, other=0.0)
            is_wanted = is_head[:, None] & is_slot[None, :]
            logit = tl.load(
                logits + row[:, None] * slots + position[None, :], mask=is_wanted, other=float("-inf")
            )
            largest = tl.max(split_max, 1)
            shift = tl.where(largest == float("-inf"), 0.0, largest)
            factor = 1.0 / tl.sum(tl.exp2(split_max - shift[:, None]) * split_sum, 1)
            prob = tl.exp2(logit - shift[:, None]) * factor[:, None]
            prob = tl.where(is_wanted, prob, 0.0)
            received += tl.sum(prob, 0)
            if HAS_HEAD_MASS:
                target = head_mass + b * head_mass_batch
                target += head[:, None].to(tl.int64) * head_mass_head + n[None, :]
                before = tl.load(target, mask=is_wanted, other=0.0)
                tl.store(target, before + prob, mask=is_wanted)
        if HAS_MASS:
            target = mass + b * mass_batch + n
            before = tl.load(target, mask=is_slot, other=0.0)
            tl.store(target, before + received, mask=is_slot)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    visual_index: Tensor | None,
    mass: Tensor | None,
    head_mass: Tensor | None,
    softmax_scale: float,
    out: Tensor,
) -> None:
    """`torch.ops.sgl_vlm.decode_attention`; the public function of the same name tells what it computes."""
    _check(q, k_cache, v_cache, seq_lens, visual_index, mass, head_mass, out)
    batch, heads, dim = q.shape
    kv_heads, slots = k_cache.shape[1:3]
    if out.numel() == 0:
        return
    if slots == 0:
        out.zero_()
        return
    device, group = q.device, heads // kv_heads
    blocks = launching.config(OP, launching.attention_class(q.dtype, dim), device)
    shared = {
        "DIM": dim,
        "BLOCK_D": max(16, power_of_two(dim)),
        "MIN_SPLIT": blocks["MIN_SPLIT"],
        "MAX_SPLITS": blocks["MAX_SPLITS"],
    }
    rows = min(max(blocks["MIN_ROWS"], power_of_two(group)), blocks["MAX_ROWS"])
    splits = min(blocks["MAX_SPLITS"], ceil_div(slots, blocks["MIN_SPLIT"]))
    has_mass = mass is not None or head_mass is not None

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    partial = scratch(batch, heads, splits, dim)
    maxima, sums = scratch(2, batch, heads, blocks["MAX_SPLITS"])
    logits = scratch(batch, heads, slots) if has_mass else partial
    launching.launch(
        split_kernel,
        (splits, kv_heads * ceil_div(group, rows), batch),
        device,
        *(q, k_cache, v_cache, seq_lens, partial, maxima, sums, logits),
        *(q.stride()[:2] + k_cache.stride()[:3] + v_cache.stride()[:3] + seq_lens.stride()),
        *(kv_heads, slots, softmax_scale * math.log2(math.e)),
        **shared,
        GROUP=group,
        ROWS=rows,
        BLOCK_KEYS=blocks["BLOCK_KEYS"],
        KEEP_LOGITS=has_mass,
        num_warps=blocks["split_warps"],
        num_stages=blocks["split_stages"],
    )
    if not has_mass or visual_index is None:
        visual_index = seq_lens[:0, None]
    mass_strides = (0,) if mass is None else mass.stride()[:1]
    head_mass_strides = (0, 0) if head_mass is None else head_mass.stride()[:2]
    launching.launch(
        combine_kernel,
        (heads + ceil_div(visual_index.shape[1] if has_mass else 0, blocks["BLOCK_SLOTS"]), batch),
        device,
        *(partial, maxima, sums, logits, seq_lens, visual_index),
        *(out if mass is None else mass, out if head_mass is None else head_mass, out),
        *(seq_lens.stride() + visual_index.stride() + mass_strides + head_mass_strides),
        *(heads, slots, splits, visual_index.shape[1]),
        **shared,
        BLOCK_HEADS=min(blocks["BLOCK_HEADS"], power_of_two(heads)),
        BLOCK_SLOTS=blocks["BLOCK_SLOTS"],
        HAS_MASS=mass is not None,
        HAS_HEAD_MASS=head_mass is not None,
        num_warps=blocks["combine_warps"],
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_lens: Tensor,
    visual_index: Tensor | None,
    mass: Tensor | None,
    head_mass: Tensor | None,
    out: Tensor,
) -> None:
    require(q.dtype in FLOATS and k.dtype == v.dtype == out.dtype == q.dtype, OP, "one float dtype")
    require(q.dim() == 3 and k.dim() == 4, OP, "q (B, Hq, D) and caches (B, Hkv, S, D)")
    batch, heads, dim = q.shape
    require(k.shape == (batch, k.shape[1], k.shape[2], dim) and v.shape == k.shape, OP, "caches of q's shape")
    require(k.shape[1] > 0 and heads % k.shape[1] == 0, OP, "query heads a multiple of the KV heads")
    require(all(rows_contiguous(t) for t in (q, k, v)), OP, "last dimensions contiguous")
    require(out.shape == q.shape and out.is_contiguous(), OP, "out of q's shape, contiguous")
    launching.require_head_dim(OP, dim)
    launching.require_index(OP, "seq_lens", seq_lens, batch, 1)
    if mass is not None or head_mass is not None:
        require(visual_index is not None, OP, "visual_index with a mass")
        assert visual_index is not None
        launching.require_index(OP, "visual_index", visual_index, batch, 2)
        launching.require_mass(OP, mass, head_mass, batch, heads, visual_index.shape[1])
