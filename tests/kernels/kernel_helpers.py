"""Inputs and the tolerance rule that all op tests share.

SGL_TEST_DEVICE   where the ops run, by default cpu; inputs are drawn on the CPU, the same for every device
SGL_TEST_SMALL=1  fewer and shorter cases for slow executors (Triton's interpreter, an emulator of CUDA):
                  every value of every axis stays, not every combination
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

DEVICE = os.environ.get("SGL_TEST_DEVICE", "cpu")
SMALL = os.environ.get("SGL_TEST_SMALL", "0") not in ("", "0")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# (query heads, KV heads, head dim): ratios 1 to 9; every head dim of the design and odd ones.
GEOMETRIES = [
    (4, 4, 64),
    (16, 8, 128),
    (6, 2, 80),
    (8, 2, 96),
    (5, 1, 20),
    (14, 2, 64),
    (8, 1, 16),
    (9, 1, 256),
    (4, 2, 7),
]

# Factories of the tests. Nothing sets torch's default device: that would hide an op that forgets its own.
arange = partial(torch.arange, device=DEVICE)
empty = partial(torch.empty, device=DEVICE)
full = partial(torch.full, device=DEVICE)
ones = partial(torch.ones, device=DEVICE)
tensor = partial(torch.tensor, device=DEVICE)
zeros = partial(torch.zeros, device=DEVICE)
int32 = partial(tensor, dtype=torch.int32)


def span(start: int, stop: int | None = None, batch: int = 1) -> Tensor:
    """(batch, positions) int32: start to stop, or 0 to start, for each request alike."""
    bounds = (0, start) if stop is None else (start, stop)
    return arange(*bounds, dtype=torch.int32).repeat(batch, 1)


def size(usual: int, small: int) -> int:
    return small if SMALL else usual


def combinations(*axes: Sequence) -> list[tuple]:
    """Every combination of the axes; in a small run every value of each axis, in as few cases as possible."""
    if not SMALL:
        return list(itertools.product(*axes))
    return [tuple(axis[i % len(axis)] for axis in axes) for i in range(max(map(len, axes)))]


def missing_kernel(what: str) -> None:
    """In CI, kernels that did not compile are a failure, not a reason to test less."""
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(f"{what}, and CI is set", pytrace=False)
    pytest.skip(what)


def assert_as_accurate(name: str, ours: Tensor, truth: Tensor, plain: Tensor, unit: float = 0.0) -> None:
    """Relative error against fp64 at most twice that of the plain same-dtype version, plus 4 ulp.

    `unit` is the smallest size that counts as one: 1 for logarithms, whose absolute error is what matters.
    """
    assert ours.shape == truth.shape, f"{name}: {tuple(ours.shape)} against {tuple(truth.shape)}"
    assert truth.abs().max() > 0, f"{name}: an all-zero truth proves nothing"
    error, plain_error = relative_error(ours, truth, unit), relative_error(plain, truth, unit)
    allowed = 2 * plain_error + 4 * torch.finfo(ours.dtype).eps
    assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g}"


def relative_error(result: Tensor, truth: Tensor, unit: float = 0.0) -> float:
    return float((result.double() - truth).abs().max() / truth.abs().max().clamp(min=unit))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed)).to(dtype).to(DEVICE)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=seeded(seed)).to(DEVICE)


def permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=seeded(seed)).to(DEVICE)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells -0.0 from 0.0 and NaN from NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(t: Tensor) -> Tensor:
    return t.reshape(-1).contiguous().view(torch.uint8)


def decode_inputs(
    batch: int, heads: int, kv_heads: int, dim: int, slots: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(batch, heads, dim, seed=1, dtype=dtype),
        normal(batch, kv_heads, slots, dim, seed=2, dtype=dtype),
        normal(batch, kv_heads, slots, dim, seed=3, dtype=dtype),
    )
