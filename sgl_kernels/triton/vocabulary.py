"""greedy_token and token_logprobs: log-softmax at one token of each row, the vocabulary split over programs.

A program of the first launch owns one row and BLOCK_TOKENS tokens, which it reads once into registers; it
leaves their largest logit, the sum of exponentials and the first id that has the largest. A program of the
second launch combines the blocks of one row, 12 bytes each, and reads one logit more when the token is given.
Blocks start at multiples of BLOCK_TOKENS, so how a row is split follows from the vocabulary only. So does how
a block lies in registers: where the vocabulary is a multiple of 16, rows are read 16 bytes at a time, and are
copied first if they are not aligned; else neighbouring threads read neighbouring logits, aligned or not.
"""

from __future__ import annotations

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

NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=ANY_ALIGNMENT)
def block_kernel(
    logits,  # (rows, V)
    maxima,  # (rows, blocks)
    sums,  # (rows, blocks)
    best,  # (rows, blocks)
    row_stride,
    vocabulary,
    blocks,
    unknown,  # 0, which the compiler is not told
    BLOCK_TOKENS: tl.constexpr,
    ALIGNED: tl.constexpr,
    FIND_BEST: tl.constexpr,
):
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64)
    token = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    start = row * row_stride
    if ALIGNED:
        vocabulary = vocabulary // 16 * 16
    else:
        start += unknown
    is_token = token < vocabulary
    logit = tl.load(logits + start + token, mask=is_token, other=float("-inf")).to(tl.float32)
    is_number = logit == logit
    largest = tl.max(tl.where(is_number, logit, float("-inf")), 0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)  # -inf less -inf would be NaN
    place = tl.program_id(0)
    tl.store(maxima + place, largest)
    tl.store(sums + place, tl.sum(tl.exp(logit - shift), 0))
    if FIND_BEST:
        tl.store(best + place, tl.min(tl.where(is_token & (logit == largest), token, NO_TOKEN), 0))


@triton.jit(do_not_specialize=ANY_ALIGNMENT)
def finish_kernel(
    logits,  # (rows, V)
    targets,  # (rows,)
    maxima,  # (rows, blocks)
    sums,  # (rows, blocks)
    best,  # (rows, blocks)
    tokens,  # (rows,)
    logprobs,  # (rows,)
    row_stride,
    target_stride,
    vocabulary,
    blocks,
    BLOCKS: tl.constexpr,
    FIND_BEST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    is_block = block < blocks
    block_max = tl.load(maxima + row * blocks + block, mask=is_block, other=float("-inf"))
    block_sum = tl.load(sums + row * blocks + block, mask=is_block, other=0.0)
    largest = tl.max(block_max, 0)
    # Where every logit is -inf this is NaN, as the logarithm of no probability at all is.
    total = tl.sum(tl.where(is_block, tl.exp(block_max - largest) * block_sum, 0.0), 0)
    if FIND_BEST:
        token = tl.load(best + row * blocks + block, mask=is_block & (block_max == largest), other=NO_TOKEN)
        token = tl.min(token, 0)
        tl.store(tokens + row, tl.where(token == NO_TOKEN, 0, token).to(tl.int64))
        tl.store(logprobs + row, -tl.log(total))
    else:
        target = tl.load(targets + row * target_stride).to(tl.int64)
        inside = (target >= 0) & (target < vocabulary)
        logit = tl.load(logits + row * row_stride + target, mask=inside, other=0.0).to(tl.float32)
        logprob = (logit - largest) - tl.log(total)
        logprob = tl.where(inside, logprob, float("nan"))
        tl.store(logprobs + row, tl.where(target == -1, 0.0, logprob))


def greedy_token(logits: Tensor, token: Tensor, logprob: Tensor) -> None:
    """`torch.ops.sgl_vlm.greedy_token`; the public function of the same name tells what it computes."""
    require(token.dtype == torch.int64 and token.is_contiguous(), "greedy_token", "token int64, contiguous")
    require(token.shape == logits.shape[:1], "greedy_token", "one token for each row")
    _run("greedy_token", logits, None, token, logprob)


def token_logprobs(logits: Tensor, targets: Tensor, logprob: Tensor) -> None:
    """`torch.ops.sgl_vlm.token_logprobs`; the public function of the same name tells what it computes."""
    integers = targets.dtype in (torch.int64, torch.int32)
    require(integers and targets.shape == logits.shape[:1], "token_logprobs", "one target for each row")
    _run("token_logprobs", logits, targets, None, logprob)


def _run(op: str, logits: Tensor, targets: Tensor | None, token: Tensor | None, logprob: Tensor) -> None:
    require(logits.dim() == 2 and logits.dtype in FLOATS, op, "logits (rows, V) of a float dtype")
    rows, vocabulary = logits.shape
    require(vocabulary > 0 and rows_contiguous(logits), op, "logits contiguous in the vocabulary")
    fits = logprob.shape == (rows,) and logprob.dtype == torch.float32 and logprob.is_contiguous()
    require(fits, op, "logprob (rows,) float32, contiguous")
    if rows == 0:
        return
    aligned = vocabulary % 16 == 0
    if aligned and (logits.data_ptr() % 16 or (rows > 1 and logits.stride(0) % 16)):
        logits = logits.clone(memory_format=torch.contiguous_format)
    row_stride = logits.stride(0) if rows > 1 else vocabulary
    device = logits.device
    sizes = launching.config("vocabulary", f"{logits.dtype.itemsize * 8} bit", device)
    blocks = ceil_div(vocabulary, sizes["BLOCK_TOKENS"])
    maxima, sums = torch.empty((2, rows, blocks), dtype=torch.float32, device=device)
    best = torch.empty((rows, blocks), dtype=torch.int32, device=device) if targets is None else maxima
    launching.launch(
        block_kernel,
        (rows * blocks,),
        device,
        *(logits, maxima, sums, best, row_stride, vocabulary, blocks, 0),
        BLOCK_TOKENS=sizes["BLOCK_TOKENS"],
        ALIGNED=aligned,
        FIND_BEST=targets is None,
        num_warps=sizes["block_warps"],
    )
    launching.launch(
        finish_kernel,
        (rows,),
        device,
        *(logits, logprob if targets is None else targets, maxima, sums, best),
        *(logprob if token is None else token, logprob),
        *(row_stride, 0 if targets is None else targets.stride(0), vocabulary, blocks),
        BLOCKS=power_of_two(blocks),
        FIND_BEST=targets is None,
        num_warps=1,
    )
