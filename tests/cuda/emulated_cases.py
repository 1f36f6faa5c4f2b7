"""Shapes at which the CUDA launchers choose other kernels than in the op suite, and small cases in full.

Run by test_cuda_kernels.py, which names the emulated library (this file's name keeps it out of a plain
collection).
"""

import ctypes
import itertools
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from kernel_helpers import assert_as_accurate, decode_inputs, int32, normal, relative_error, same_bits

from sgl_kernels import (
    compositions,
    decode_attention,
    greedy_token,
    prefill_mass,
    prune_gather,
    reference,
    registry,
    select_tokens,
    token_logprobs,
)

torch.ops.load_library(os.environ["SGL_TEST_LIBRARY"])
assert registry.has_kernel("decode_attention", "CPU"), "the emulated kernels are not registered"


def decode(op, q, k, v, lens, index, dtype=torch.float32):
    mass = torch.zeros(q.shape[0], index.shape[1], dtype=dtype)
    return op(q, k, v, lens, visual_index=index, mass=mass), mass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(24, 2, 64), (20, 1, 128), (40, 2, 96), (12, 1, 256), (9, 1, 80)]
)
def test_groups_of_more_than_eight_heads(heads, kv_heads, dim, dtype):
    q, k, v = decode_inputs(1, heads, kv_heads, dim, 150, dtype)
    index = torch.arange(10, 140).int()[None]
    ours = decode(decode_attention, q, k, v, int32([150]), index)
    wide = [t.double() for t in (q, k, v)]
    truth = decode(reference.decode_attention, *wide, int32([150]), index, torch.float64)
    plain_mass = torch.zeros_like(ours[1])
    plain = compositions.eager_decode(q, k, v, index, plain_mass)
    assert_as_accurate("out", ours[0], truth[0], plain)
    assert_as_accurate("mass", ours[1], truth[1], plain_mass)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_length_across_splits(dtype):
    lengths = torch.arange(270).int()
    q, k, v = decode_inputs(270, 2, 1, 16, 270, dtype)
    index = torch.arange(270).int().repeat(270, 1)
    ours = decode(decode_attention, q, k, v, lengths, index)
    truth = decode(
        reference.decode_attention, *(t.double() for t in (q, k, v)), lengths, index, torch.float64
    )
    assert relative_error(ours[0], truth[0]) < 4 * torch.finfo(dtype).eps
    assert relative_error(ours[1], truth[1]) < 2e-6
    torch.testing.assert_close(ours[1].sum(1)[1:], torch.full((269,), 2.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("length", [4097, 8192, 8193, 8500])
def test_many_splits_and_longer_ones(length):
    q, k, v = decode_inputs(1, 1, 1, 16, 8500, torch.bfloat16)
    index = torch.arange(8500).int()[None]
    ours = decode(decode_attention, q, k, v, int32([length]), index)
    truth = decode(
        reference.decode_attention, *(t.double() for t in (q, k, v)), int32([length]), index, torch.float64
    )
    assert relative_error(ours[0], truth[0]) < 4 * torch.finfo(torch.bfloat16).eps
    assert relative_error(ours[1], truth[1]) < 2e-6


@pytest.mark.parametrize("given_lse", [False, True])
@pytest.mark.parametrize(("slots", "rows", "dim"), [(2100, 3, 64), (40, 70, 128), (33, 40, 256), (33, 9, 96)])
def test_prefill_blocks(slots, rows, dim, given_lse):
    length = slots + rows
    q, k = (
        normal(1, 4, length, dim, seed=1, dtype=torch.bfloat16),
        normal(1, 2, length, dim, seed=2, dtype=torch.bfloat16),
    )
    query = torch.arange(slots, length).int()[None]
    visual = torch.arange(slots).int()[None]
    lse = None
    if given_lse:
        logits = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * dim**-0.5
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        lse = logits.masked_fill(hidden, -torch.inf).logsumexp(-1).float()
    mass, truth = torch.zeros(1, slots), torch.zeros(1, slots, dtype=torch.float64)
    prefill_mass(q, k, query, visual, mass, softmax_lse=lse)
    reference.prefill_mass(q.double(), k.double(), query, visual, truth)
    assert relative_error(mass, truth) < 3e-6


def test_selection_of_every_small_case():
    """All masses of four slots from five values, every count, positions out of order and named twice."""
    values = torch.tensor([torch.nan, -0.0, 0.0, 2.5])
    mass = torch.stack([values[list(pick)] for pick in itertools.product(range(4), repeat=4)])  # (256, 4)
    index = int32([[7, 2, 9, 4]]).repeat(len(mass), 1)
    index[::7, 1] = -1
    index[::11, 2] = 7
    lens = torch.full((len(mass),), 11).int()
    for keep in range(6):
        each = torch.full((len(mass),), keep).int()
        ours = select_tokens(mass, index, lens, each, out_len=11)
        truth = reference.select_tokens(mass, index, lens, each, out_len=11)
        assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


@pytest.mark.parametrize("slots", [2048, 2049, 4097, 16385, 32768])
def test_selection_of_every_kernel(slots):
    mass = normal(1, slots, seed=3).round(decimals=1)  # many ties
    index = (torch.randperm(slots + 100, generator=torch.Generator().manual_seed(4))[:slots] * 3).int()[None]
    lens = int32([3 * (slots + 100)])
    for keep in (1, slots // 3):
        ours = select_tokens(mass, index, lens, keep, out_len=int(lens))
        truth = reference.select_tokens(mass, index, lens, keep, out_len=int(lens))
        assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


def test_more_planes_than_a_launch_takes():
    hidden, mass = normal(2, 30, 8), normal(2, 20, seed=1)
    index = torch.arange(5, 25).int().repeat(2, 1)
    extras = [normal(2, 30, n + 1, seed=n).to(torch.float16) for n in range(40)]
    ours = prune_gather(hidden, mass, index, int32([30, 28]), 4, extras=extras)
    truth = reference.prune_gather(hidden, mass, index, int32([30, 28]), 4, extras=extras)
    assert same_bits(ours[0], truth[0])
    assert all(same_bits(a, b) for a, b in zip(ours[3], truth[3], strict=True))


def fenced(tensor):
    """A copy that ends where the next page may not be touched: reading past it stops the process."""
    page = mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    room = (size + page - 1) // page * page
    area = mmap.mmap(-1, room + page)
    buffer = (ctypes.c_char * (room + page)).from_buffer(area)
    libc = ctypes.CDLL(None, use_errno=True)
    fence = ctypes.c_void_p(ctypes.addressof(buffer) + room)
    assert libc.mprotect(fence, ctypes.c_size_t(page), 0) == 0, ctypes.get_errno()
    start = (room - size) // 16 * 16  # as aligned as torch's own memory
    flat = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return flat.view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dim", [64, 72, 96, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_read_past_a_tensor(dim, dtype):
    q, k, v = (fenced(t) for t in decode_inputs(1, 6, 2, dim, 133, dtype))
    index, lens, mass = (
        fenced(torch.arange(3, 133).int()[None]),
        fenced(int32([133])),
        fenced(torch.zeros(1, 130)),
    )
    decode_attention(q, k, v, lens, visual_index=index, mass=mass)
    torch.testing.assert_close(mass.sum(), torch.tensor(6.0), rtol=0.2, atol=0)
    rows = fenced(torch.arange(100, 133).int()[None])
    prompt = fenced(normal(1, 6, 133, dim, dtype=dtype))
    prefill_mass(prompt, k, rows, index, mass)
    logits = fenced(normal(3, 4096 + dim, dtype=dtype))
    token, _ = greedy_token(logits)
    assert torch.equal(token, logits.float().argmax(-1))
    assert token_logprobs(logits, fenced(torch.tensor([1, 2, 3]))).isfinite().all()
    kept = prune_gather(fenced(normal(1, 133, dim, dtype=dtype)), mass, index, lens, 9)
    assert int(kept[2]) == 3 + 9
