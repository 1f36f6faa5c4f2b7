"""prefill_mass: what visual keys receive from the counted rows of a causal prefill, key-stationary.

A program of `received_kernel` owns one query head and a block of visual slots. It reads those rows of K once
and holds them while it loops over the tiles of the counted rows, whose queries come from L2; a tile of rows
that all lie before the block's first key is skipped. The probabilities are added up per key in registers and
reduced once, at the end: 4 bytes a slot and head. K of the visual tokens thus comes from memory once and from
L2 once per query head of its group; V and the other keys are not read. `fold_kernel` adds the heads up in
their order. Without a log-sum-exp, `denominator_kernel` goes first: a program owns a tile of rows of one KV
head, all query heads of the group flattened, and one split of the keys at absolute positions, and leaves the
largest logit and the sum of exponentials; K up to the last counted row is then read once more for every
BLOCK_ROWS rows. Logits are in units of log2.
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

OP = "prefill_mass"
LOG2E = tl.constexpr(math.log2(math.e))
NO_KEY = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=ANY_ALIGNMENT)
def denominator_kernel(
    q,  # (B, Hq, S, D)
    k,  # (B, Hkv, S, D)
    query_index,  # (B, R)
    maxima,  # (B, Hq, splits, R)
    sums,  # (B, Hq, splits, R)
    q_batch,
    q_head,
    q_position,
    k_batch,
    k_head,
    k_position,
    query_batch,
    query_row,
    kv_heads,
    length,
    rows,
    splits,
    scale,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
):
    split = tl.program_id(0)
    row_blocks = tl.cdiv(GROUP * rows, BLOCK_ROWS)
    kv = tl.program_id(1) // row_blocks
    b = tl.program_id(2).to(tl.int64)
    flat = tl.program_id(1) % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    r = flat % rows
    head = kv * GROUP + flat // rows
    place = query_index + b * query_batch + r.to(tl.int64) * query_row
    position = tl.load(place, mask=flat < GROUP * rows, other=-1)
    counts = (position >= 0) & (position < length)
    position = tl.where(counts, position, -1)
    begin = split * SPLIT_KEYS
    end = tl.minimum(begin + SPLIT_KEYS, tl.max(position, 0) + 1)
    if begin >= end:
        return

    d = tl.arange(0, BLOCK_D)
    is_dim = d < DIM
    place = q + b * q_batch + head.to(tl.int64) * q_head + position.to(tl.int64) * q_position
    queries = tl.load(place[:, None] + d[None, :], mask=counts[:, None] & is_dim[None, :], other=0.0)
    key = tl.arange(0, BLOCK_KEYS)
    k_tile = k + b * k_batch + kv.to(tl.int64) * k_head + begin.to(tl.int64) * k_position
    k_tile += key[:, None] * k_position + d[None, :]
    largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(begin, end, BLOCK_KEYS):
        is_key = start + key < end
        keys = tl.load(k_tile, mask=is_key[:, None] & is_dim[None, :], other=0.0)
        logit = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        logit = tl.where((start + key)[None, :] <= position[:, None], logit, float("-inf"))
        larger = tl.maximum(largest, tl.max(logit, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # -inf less -inf would be NaN
        total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(logit - shift[:, None]), 1)
        largest = larger
        k_tile += BLOCK_KEYS * k_position

    place = ((b * kv_heads * GROUP + head) * splits + split) * rows + r
    tl.store(maxima + place, largest, mask=counts)
    tl.store(sums + place, total, mask=counts)


@triton.jit(do_not_specialize=ANY_ALIGNMENT)
def received_kernel(
    q,  # (B, Hq, S, D)
    k,  # (B, Hkv, S, D)
    query_index,  # (B, R)
    visual_index,  # (B, N)
    lse,  # (B, Hq, S)
    maxima,  # (B, Hq, splits, R)
    sums,  # (B, Hq, splits, R)
    received,  # (B, Hq, N)
    q_batch,
    q_head,
    q_position,
    k_batch,
    k_head,
    k_position,
    query_batch,
    query_row,
    index_batch,
    index_slot,
    lse_batch,
    lse_head,
    lse_position,
    heads,
    length,
    rows,
    splits,
    visual_slots,
    scale,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    head = tl.program_id(0) % heads
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) // heads * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    place = visual_index + b * index_batch + n.to(tl.int64) * index_slot
    at = tl.load(place, mask=n < visual_slots, other=-1)
    is_slot = (at >= 0) & (at < length)
    first_key = tl.min(tl.where(is_slot, at, NO_KEY), 0)
    d = tl.arange(0, BLOCK_D)
    is_dim = d < DIM
    k_rows = k + b * k_batch + (head // GROUP).to(tl.int64) * k_head + at.to(tl.int64) * k_position
    keys = tl.load(k_rows[:, None] + d[None, :], mask=is_slot[:, None] & is_dim[None, :], other=0.0)

    probs = tl.zeros([BLOCK_SLOTS, BLOCK_ROWS], tl.float32)
    row_of_batch = b * heads + head
    for first in range(0, rows, BLOCK_ROWS):
        r = first + tl.arange(0, BLOCK_ROWS)
        row_place = query_index + b * query_batch + r.to(tl.int64) * query_row
        position = tl.load(row_place, mask=r < rows, other=-1)
        counts = (position >= 0) & (position < length)
        position = tl.where(counts, position, -1)
        last_row = tl.max(position, 0)
        if last_row >= first_key:
            wide = position.to(tl.int64)
            q_rows = q + b * q_batch + head.to(tl.int64) * q_head + wide * q_position
            queries = tl.load(q_rows[:, None] + d[None, :], mask=counts[:, None] & is_dim[None, :], other=0.0)
            if HAS_LSE:
                lse_place = lse + b * lse_batch + head.to(tl.int64) * lse_head + wide * lse_position
                shift = tl.load(lse_place, mask=counts, other=0.0) * LOG2E
                factor = tl.full([BLOCK_ROWS], 1.0, tl.float32)
            else:
                largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
                total = tl.zeros([BLOCK_ROWS], tl.float32)
                for first_split in range(0, last_row // SPLIT_KEYS + 1, BLOCK_SPLITS):
                    split = first_split + tl.arange(0, BLOCK_SPLITS)
                    split_place = (row_of_batch * splits + split)[:, None] * rows + r[None, :]
                    is_used = (split * SPLIT_KEYS)[:, None] <= position[None, :]
                    split_max = tl.load(maxima + split_place, mask=is_used, other=float("-inf"))
                    split_sum = tl.load(sums + split_place, mask=is_used, other=0.0)
                    larger = tl.maximum(largest, tl.max(split_max, 0))
                    finite = tl.where(larger == float("-inf"), 0.0, larger)
                    total = total * tl.exp2(largest - finite)
                    total += tl.sum(tl.exp2(split_max - finite[None, :]) * split_sum, 0)
                    largest = larger
                shift = tl.where(largest == float("-inf"), 0.0, largest)
                factor = 1.0 / total
            logit = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale
            prob = tl.exp2(logit - shift[None, :]) * factor[None, :]
            sees = is_slot[:, None] & (at[:, None] <= position[None, :])
            probs += tl.where(sees, prob, 0.0)
    tl.store(received + row_of_batch * visual_slots + n, tl.sum(probs, 1), mask=is_slot)


@triton.jit(do_not_specialize=ANY_ALIGNMENT)
def fold_kernel(
    received,  # (B, Hq, N)
    visual_index,  # (B, N)
    mass,  # (B, N)
    head_mass,  # (B, Hq, N)
    index_batch,
    index_slot,
    mass_batch,
    head_mass_batch,
    head_mass_head,
    heads,
    length,
    visual_slots,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    HAS_HEAD_MASS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    place = visual_index + b * index_batch + n.to(tl.int64) * index_slot
    at = tl.load(place, mask=n < visual_slots, other=-1)
    is_slot = (at >= 0) & (at < length)
    total = tl.zeros([BLOCK_SLOTS], tl.float32)
    for first in range(0, heads, BLOCK_HEADS):
        head = first + tl.arange(0, BLOCK_HEADS)
        is_wanted = (head < heads)[:, None] & is_slot[None, :]
        source = received + (b * heads + head)[:, None] * visual_slots + n[None, :]
        of_head = tl.load(source, mask=is_wanted, other=0.0)
        total += tl.sum(of_head, 0)
        if HAS_HEAD_MASS:
            target = head_mass + b * head_mass_batch
            target += head[:, None].to(tl.int64) * head_mass_head + n[None, :]
            before = tl.load(target, mask=is_wanted, other=0.0)
            tl.store(target, before + of_head, mask=is_wanted)
    mass_place = mass + b * mass_batch + n
    tl.store(mass_place, tl.load(mass_place, mask=is_slot, other=0.0) + total, mask=is_slot)


def prefill_mass(
    q: Tensor,
    k: Tensor,
    query_index: Tensor,
    visual_index: Tensor,
    mass: Tensor,
    head_mass: Tensor | None,
    softmax_lse: Tensor | None,
    softmax_scale: float,
) -> None:
    """`torch.ops.sgl_vlm.prefill_mass`; the public function of the same name tells what it computes."""
    _check(q, k, query_index, visual_index, mass, head_mass, softmax_lse)
    batch, heads, length, dim = q.shape
    kv_heads, rows, slots = k.shape[1], query_index.shape[1], visual_index.shape[1]
    if 0 in (batch, heads, length, rows, slots):
        return
    device, group = q.device, heads // kv_heads
    blocks = launching.config(OP, launching.attention_class(q.dtype, dim), device)
    sizes = {"GROUP": group, "DIM": dim, "BLOCK_D": max(16, power_of_two(dim))}
    sizes["SPLIT_KEYS"] = blocks["SPLIT_KEYS"]
    splits = 0 if softmax_lse is not None else ceil_div(length, blocks["SPLIT_KEYS"])
    scale = softmax_scale * math.log2(math.e)
    maxima, sums = torch.empty((2, batch, heads, splits, rows), dtype=torch.float32, device=device)
    received = torch.empty((batch, heads, slots), dtype=torch.float32, device=device)
    if softmax_lse is None:
        launching.launch(
            denominator_kernel,
            (splits, kv_heads * ceil_div(group * rows, blocks["denominator_rows"]), batch),
            device,
            *(q, k, query_index, maxima, sums),
            *(q.stride()[:3] + k.stride()[:3] + query_index.stride()),
            *(kv_heads, length, rows, splits, scale),
            **sizes,
            BLOCK_ROWS=blocks["denominator_rows"],
            BLOCK_KEYS=blocks["BLOCK_KEYS"],
            num_warps=blocks["denominator_warps"],
            num_stages=blocks["denominator_stages"],
        )
    launching.launch(
        received_kernel,
        (heads * ceil_div(slots, blocks["BLOCK_SLOTS"]), batch),
        device,
        *(q, k, query_index, visual_index, maxima if softmax_lse is None else softmax_lse),
        *(maxima, sums, received),
        *(q.stride()[:3] + k.stride()[:3] + query_index.stride() + visual_index.stride()),
        *((0, 0, 0) if softmax_lse is None else softmax_lse.stride()),
        *(heads, length, rows, splits, slots, scale),
        **sizes,
        BLOCK_SLOTS=blocks["BLOCK_SLOTS"],
        BLOCK_ROWS=blocks["BLOCK_ROWS"],
        BLOCK_SPLITS=blocks["BLOCK_SPLITS"],
        HAS_LSE=softmax_lse is not None,
        num_warps=blocks["received_warps"],
        num_stages=1,
    )
    launching.launch(
        fold_kernel,
        (ceil_div(slots, blocks["fold_slots"]), batch),
        device,
        *(received, visual_index, mass, mass if head_mass is None else head_mass),
        *(visual_index.stride() + mass.stride()[:1]),
        *((0, 0) if head_mass is None else head_mass.stride()[:2]),
        *(heads, length, slots),
        BLOCK_HEADS=min(blocks["fold_heads"], power_of_two(heads)),
        BLOCK_SLOTS=blocks["fold_slots"],
        HAS_HEAD_MASS=head_mass is not None,
        num_warps=blocks["fold_warps"],
    )


def _check(
    q: Tensor,
    k: Tensor,
    query_index: Tensor,
    visual_index: Tensor,
    mass: Tensor,
    head_mass: Tensor | None,
    softmax_lse: Tensor | None,
) -> None:
    require(q.dtype in FLOATS and k.dtype == q.dtype, OP, "one float dtype")
    require(q.dim() == 4 and k.dim() == 4, OP, "q (B, Hq, S, D) and k (B, Hkv, S, D)")
    batch, heads, length, dim = q.shape
    require(k.shape == (batch, k.shape[1], length, dim), OP, "k of q's shape")
    require(k.shape[1] > 0 and heads % k.shape[1] == 0, OP, "query heads a multiple of the KV heads")
    require(rows_contiguous(q) and rows_contiguous(k), OP, "last dimensions contiguous")
    launching.require_head_dim(OP, dim)
    launching.require_index(OP, "query_index", query_index, batch, 2)
    launching.require_index(OP, "visual_index", visual_index, batch, 2)
    launching.require_mass(OP, mass, head_mass, batch, heads, visual_index.shape[1])
    if softmax_lse is not None:
        fits = softmax_lse.shape == (batch, heads, length) and softmax_lse.dtype == torch.float32
        require(fits, OP, f"softmax_lse {(batch, heads, length)} float32")
