"""select_tokens and prune_gather: which positions survive, and the copy of what they hold.

One program per request selects. It reads the masses and positions of the visual tokens and holds them in
registers, as unsigned keys that rise with the mass; the key at the cut is built bit by bit, each bit by one
count over the registers. A second reading, from L2, marks every visual position in scratch of one word per
position, with integer atomics because slots come in any order and may share a position; prefix sums over the
words, after a barrier, turn marks into ascending positions and give ties at the cut to the lowest ones.
The gather is one launch for the hidden states and all extras, which are passed as a table of planes: a launch
per plane would cost more than most extras take to copy, and a table in memory would need a transfer from the
host, which a CUDA graph cannot hold. A program copies about 16 KB of one plane, every byte read and written
once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl_kernels.triton import launching
from sgl_kernels.triton.launching import ANY_ALIGNMENT, ceil_div, power_of_two, require, rows_contiguous

MAX_SLOTS = 32768
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Marks of a position: text has none; the lower bits count the slots whose key is the one at the cut.
BELOW_CUT = tl.constexpr(1 << 20)
ABOVE_CUT = tl.constexpr(1 << 21)


@triton.jit
def load_keys(mass, visual_index, index_slot, n, slots, length):
    """Keys that rise with the mass, and positions: padding is 0, NaN 1, -0.0 as 0.0."""
    at = tl.load(visual_index + n.to(tl.int64) * index_slot, mask=n < slots, other=-1)
    is_slot = (at >= 0) & (at < length)
    bits = tl.load(mass + n, mask=is_slot, other=0.0).to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    key = tl.where((bits >> 31) == 0, bits | 0x80000000, bits ^ 0xFFFFFFFF)
    key = tl.where(magnitude == 0, 0x80000000, key)
    key = tl.where(magnitude > 0x7F800000, 1, key)
    return tl.where(is_slot, key, 0), at


@triton.jit(do_not_specialize=ANY_ALIGNMENT)
def select_kernel(
    mass,  # (B, N)
    visual_index,  # (B, N)
    seq_lens,  # (B,)
    num_keep_each,  # (B,)
    marks,  # (B, out_len + N)
    kept_index,  # (B, out_len)
    kept_lens,  # (B,)
    mass_batch,
    index_batch,
    index_slot,
    lens_stride,
    each_stride,
    max_len,
    num_keep,
    slots,
    out_len,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_EACH: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    mass += b * mass_batch
    visual_index += b * index_batch
    marks += b * (out_len + slots)
    kept_index += b * out_len
    length = tl.minimum(tl.maximum(tl.load(seq_lens + b * lens_stride), 0), max_len)
    # At most N positions are dropped, so nothing from out_len + N on can reach the output.
    bound = tl.minimum(length, out_len + slots)
    i = tl.arange(0, BLOCK)
    for start in range(0, bound, BLOCK):
        tl.store(marks + start + i, tl.zeros([BLOCK], tl.int32), mask=start + i < bound)

    key, _ = load_keys(mass, visual_index, index_slot, tl.arange(0, BLOCK_SLOTS), slots, length)
    keep = num_keep
    if HAS_EACH:
        keep = tl.load(num_keep_each + b * each_stride)
    keep = tl.minimum(tl.maximum(keep, 0), tl.sum((key > 0).to(tl.int32), 0))
    cut = tl.zeros([], tl.uint32)  # becomes the `keep`-th largest key; above all keys where none is kept
    for bit in range(32):
        trial = cut | (tl.full([], 0x80000000, tl.uint32) >> bit)
        cut = tl.where(tl.sum((key >= trial).to(tl.int32), 0) >= keep, trial, cut)
    ties = keep - tl.sum((key > cut).to(tl.int32), 0)

    tl.debug_barrier()
    for start in range(0, slots, BLOCK):
        again, at = load_keys(mass, visual_index, index_slot, start + i, slots, length)
        is_marked = (again > 0) & (at < bound)
        mark = tl.where(again > cut, ABOVE_CUT, BELOW_CUT)
        tl.atomic_or(marks + at, mark, mask=is_marked & (again != cut), sem="relaxed", scope="cta")
        tl.atomic_add(marks + at, 1, mask=is_marked & (again == cut), sem="relaxed", scope="cta")
    tl.debug_barrier()

    count = tl.zeros([], tl.int32)
    ties_before = tl.zeros([], tl.int32)
    for start in range(0, bound, BLOCK):
        is_position = start + i < bound
        mark = tl.load(marks + start + i, mask=is_position, other=BELOW_CUT)
        tied = mark & (BELOW_CUT - 1)
        is_first = ties_before + tl.cumsum(tied, 0) - tied < ties
        is_present = (mark == 0) | ((mark & ABOVE_CUT) != 0) | ((tied > 0) & is_first)
        rank = count + tl.cumsum(is_present.to(tl.int32), 0) - 1
        tl.store(kept_index + rank, start + i, mask=is_present & (rank < out_len))
        count += tl.sum(is_present.to(tl.int32), 0)
        ties_before += tl.sum(tied, 0)
    count = tl.minimum(count, out_len)
    for start in range(0, out_len, BLOCK):
        is_empty = (start + i >= count) & (start + i < out_len)
        tl.store(kept_index + start + i, tl.full([BLOCK], -1, tl.int32), mask=is_empty)
    tl.store(kept_lens + b, count)


@triton.jit(do_not_specialize=ANY_ALIGNMENT)
def gather_kernel(
    kept_index,  # (B, out_len)
    planes,  # of each plane: source (B, S, width), target (B, out_len, width), strides of the source, width
    out_len,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    task = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    for i in tl.static_range(PLANES):
        source, target, batch_stride, position_stride, width = planes[i]
        column_blocks = tl.cdiv(width, COLUMNS[i])
        tasks = column_blocks * tl.cdiv(out_len, ROWS[i])
        if (task >= 0) & (task < tasks):
            row = task // column_blocks * ROWS[i] + tl.arange(0, ROWS[i])
            column = task % column_blocks * COLUMNS[i] + tl.arange(0, COLUMNS[i])
            position = tl.load(kept_index + b * out_len + row, mask=row < out_len, other=-1)
            is_column = (column < width)[None, :]
            from_row = source + b * batch_stride + position.to(tl.int64) * position_stride
            value = tl.load(
                from_row[:, None] + column[None, :], mask=(position >= 0)[:, None] & is_column, other=0
            )
            to_row = target + (b * out_len + row) * width
            tl.store(to_row[:, None] + column[None, :], value, mask=(row < out_len)[:, None] & is_column)
        task -= tasks


def select_tokens(
    mass: Tensor,
    visual_index: Tensor,
    seq_lens: Tensor,
    num_keep: int,
    num_keep_each: Tensor | None,
    kept_index: Tensor,
    kept_lens: Tensor,
) -> None:
    """`torch.ops.sgl_vlm.select_tokens`; the public function of the same name tells what it computes."""
    _select(
        "select_tokens",
        mass,
        visual_index,
        seq_lens,
        num_keep,
        num_keep_each,
        kept_index,
        kept_lens,
        2**31 - 1,
    )


def prune_gather(
    hidden: Tensor,
    mass: Tensor,
    visual_index: Tensor,
    seq_lens: Tensor,
    num_keep: int,
    num_keep_each: Tensor | None,
    extras: Sequence[Tensor],
    hidden_out: Tensor,
    kept_index: Tensor,
    kept_lens: Tensor,
    extras_out: Sequence[Tensor],
) -> None:
    """`torch.ops.sgl_vlm.prune_gather`; the public function of the same name tells what it computes."""
    op = "prune_gather"
    require(hidden.dim() == 3 and hidden.shape[0] == mass.shape[0], op, "hidden (B, S, C)")
    require(len(extras) == len(extras_out), op, "a destination for every extra")
    batch, length = hidden.shape[:2]
    _select(op, mass, visual_index, seq_lens, num_keep, num_keep_each, kept_index, kept_lens, length)
    out_len = kept_index.shape[1]
    sizes = launching.config(op, "gather", hidden.device)
    planes, rows, columns, tasks = [], [], [], 0
    for source, target in zip((hidden, *extras), (hidden_out, *extras_out), strict=True):
        _check_plane(source, target, batch, length, out_len)
        if target.numel() == 0:
            continue
        width = target[0, 0].numel()
        block = min(power_of_two(width), sizes["ROW_BYTES"] // source.itemsize)
        columns.append(block)
        rows.append(max(1, min(sizes["MAX_ROWS"], sizes["BLOCK_BYTES"] // (block * source.itemsize))))
        tasks += ceil_div(out_len, rows[-1]) * ceil_div(width, block)
        integer = INTEGERS[source.itemsize]
        planes.append((source.view(integer), target.view(integer), *source.stride()[:2], width))
    if planes:
        launching.launch(
            gather_kernel,
            (tasks, batch),
            hidden.device,
            *(kept_index, tuple(planes), out_len),
            PLANES=len(planes),
            ROWS=tuple(rows),
            COLUMNS=tuple(columns),
            num_warps=sizes["warps"],
        )


def _select(
    op: str,
    mass: Tensor,
    visual_index: Tensor,
    seq_lens: Tensor,
    num_keep: int,
    num_keep_each: Tensor | None,
    kept_index: Tensor,
    kept_lens: Tensor,
    max_len: int,
) -> None:
    require(
        mass.dim() == 2 and mass.dtype == torch.float32 and rows_contiguous(mass), op, "mass (B, N) float32"
    )
    batch, slots = mass.shape
    require(visual_index.shape == mass.shape, op, "visual_index of the shape of mass")
    launching.require_index(op, "visual_index", visual_index, batch, 2)
    launching.require_index(op, "seq_lens", seq_lens, batch, 1)
    launching.require_index(op, "kept_index", kept_index, batch, 2)
    launching.require_index(op, "kept_lens", kept_lens, batch, 1)
    require(kept_index.is_contiguous() and kept_lens.is_contiguous(), op, "contiguous results")
    if num_keep_each is not None:
        launching.require_index(op, "num_keep_each", num_keep_each, batch, 1)
    if slots > MAX_SLOTS:
        raise ValueError(
            f"{op}: {slots} visual slots, expected at most {MAX_SLOTS} by the Triton kernels; "
            "set SGL_KERNELS_BACKEND=reference for more"
        )
    if batch == 0:
        return
    out_len, block = kept_index.shape[1], max(16, power_of_two(slots))
    shape_class = next(f"{n} slots" for n in (1024, 4096, 16384, MAX_SLOTS) if block <= n)
    sizes = launching.config("select_tokens", shape_class, mass.device)
    each = seq_lens if num_keep_each is None else num_keep_each
    launching.launch(
        select_kernel,
        (batch,),
        mass.device,
        *(mass, visual_index, seq_lens, each),
        torch.empty((batch, out_len + slots), dtype=torch.int32, device=mass.device),
        *(kept_index, kept_lens),
        *(mass.stride(0), *visual_index.stride(), seq_lens.stride(0), each.stride(0)),
        *(max_len, min(num_keep, slots), slots, out_len),
        BLOCK_SLOTS=block,
        BLOCK=sizes["BLOCK"],
        HAS_EACH=num_keep_each is not None,
        num_warps=sizes["warps"],
    )


def _check_plane(source: Tensor, target: Tensor, batch: int, length: int, out_len: int) -> None:
    op = "prune_gather"
    require(source.dim() >= 2 and source.shape[:2] == (batch, length), op, "planes (B, S, ...)")
    require(target.dtype == source.dtype and target.is_contiguous(), op, "contiguous results of their dtype")
    require(target.shape == (batch, out_len, *source.shape[2:]), op, "results (B, S_out, ...)")
    require(source.itemsize in INTEGERS, op, "elements of 1, 2, 4 or 8 bytes")
    row = 1
    for size, stride in zip(reversed(source.shape[2:]), reversed(source.stride()[2:]), strict=True):
        require(size == 1 or stride == row or source.numel() == 0, op, "what one position holds contiguous")
        row *= size
