"""Inputs and the tolerance rule that all op tests share."""

from __future__ import annotations

import torch
from torch import Tensor

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
    return torch.randn(*shape, generator=seeded(seed)).to(dtype)


def int32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


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
