"""One call of every op, at the sizes asked for: the underlying ops and the public functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kernel_helpers import (
    DEVICE,
    arange,
    decode_inputs,
    empty,
    int32,
    normal,
    relative_error,
    same_bits,
    span,
    tensor,
    uniform,
)
from torch import Tensor

import sgl_kernels
from sgl_kernels import reference


@dataclass(frozen=True)
class Sizes:
    batch: int
    heads: int
    kv_heads: int
    dim: int
    length: int
    visual: int
    rows: int
    hidden: int
    vocabulary: int


TINY = Sizes(2, heads=4, kv_heads=2, dim=16, length=40, visual=20, rows=2, hidden=8, vocabulary=50)
LARGE = Sizes(
    3, heads=16, kv_heads=2, dim=128, length=5000, visual=4096, rows=64, hidden=2048, vocabulary=151936
)

Values = Callable[[int], tuple[Tensor, ...]]


def public_calls(
    sizes: Sizes, dtype: torch.dtype = torch.float32, ops: Any = sgl_kernels
) -> dict[str, tuple[Callable[..., tuple], Values]]:
    """name -> (function of tensors, batch first, that returns all it wrote; its arguments of a seed).

    Seeds differ in values, lengths, positions and counts, not in shapes: what a captured graph must follow.
    """
    n = sizes

    def decode(q: Tensor, k: Tensor, v: Tensor, lens: Tensor, visual: Tensor, mass: Tensor) -> tuple:
        mass, head_mass = mass.clone(), mass[:, None].repeat(1, q.shape[1], 1)
        options = {"visual_index": visual, "mass": mass, "head_mass": head_mass}
        return ops.decode_attention(q, k, v, lens, **options), mass, head_mass

    def decode_alone(q: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> tuple:
        return (ops.decode_attention(q, k, v, lens),)

    def prefill(q: Tensor, k: Tensor, rows: Tensor, visual: Tensor, mass: Tensor, *lse: Tensor) -> tuple:
        mass, head_mass = mass.clone(), mass[:, None].repeat(1, q.shape[1], 1)
        ops.prefill_mass(q, k, rows, visual, mass, head_mass=head_mass, softmax_lse=lse[0] if lse else None)
        return mass, head_mass

    def select(mass: Tensor, visual: Tensor, lens: Tensor) -> tuple:
        return ops.select_tokens(mass, visual, lens, max(1, n.visual // 5), out_len=n.length)

    def prune(hidden: Tensor, ids: Tensor, mass: Tensor, visual: Tensor, lens: Tensor, keep: Tensor) -> tuple:
        extras = (hidden[..., :3], ids)
        *written, extras_out = ops.prune_gather(
            hidden, mass, visual, lens, keep, extras=extras, out_len=n.length - 7
        )
        return *written, *extras_out

    def logprobs(logits: Tensor, targets: Tensor) -> tuple:
        return (ops.token_logprobs(logits, targets),)

    def decode_values(seed: int) -> tuple[Tensor, ...]:
        inputs = decode_inputs(n.batch, n.heads, n.kv_heads, n.dim, n.length, dtype)
        return *(t + seed for t in inputs), lens(seed)

    def prefill_values(seed: int) -> tuple[Tensor, ...]:
        rows = span(n.length - n.rows - seed, n.length - seed, batch=n.batch)
        rows[1::2, 0] = -1
        q = normal(n.batch, n.heads, n.length, n.dim, seed=seed, dtype=dtype)
        k = normal(n.batch, n.kv_heads, n.length, n.dim, seed=seed + 1, dtype=dtype)
        return q, k, rows, visual(seed), little(seed)

    def lens(seed: int) -> Tensor:
        return int32([(n.length - seed, n.length // 2 + 1 + seed, 9 + seed)[b % 3] for b in range(n.batch)])

    def visual(seed: int) -> Tensor:
        return span(seed, seed + n.visual, batch=n.batch)  # what lies past a length is padding

    def mass(seed: int) -> Tensor:
        return uniform(n.batch, n.visual, seed=seed)

    def little(seed: int) -> Tensor:
        return mass(seed) / n.visual  # to be added to, and not so much that it hides what is added

    def lse(seed: int) -> Tensor:
        return normal(n.batch, n.heads, n.length, seed=seed + 2) + 9

    def hidden(seed: int) -> tuple[Tensor, Tensor]:
        ids = arange(n.batch * n.length).reshape(n.batch, n.length) + seed
        return normal(n.batch, n.length, n.hidden, seed=seed, dtype=dtype), ids

    def keep(seed: int) -> Tensor:
        return (arange(n.batch) * 9 + seed + 1).int()

    def logits(seed: int) -> Tensor:
        return normal(n.batch, n.vocabulary, seed=seed, dtype=dtype)

    def targets(seed: int) -> Tensor:
        return (arange(n.batch) * 7 + seed) % n.vocabulary

    return {
        "decode_attention": (decode, lambda s: (*decode_values(s), visual(s), little(s))),
        "decode_attention without mass": (decode_alone, decode_values),
        "prefill_mass": (prefill, prefill_values),
        "prefill_mass given lse": (prefill, lambda s: (*prefill_values(s), lse(s))),
        "select_tokens": (select, lambda s: (mass(s), visual(s), lens(s))),
        "prune_gather": (prune, lambda s: (*hidden(s), mass(s), visual(s), lens(s), keep(s))),
        "greedy_token": (ops.greedy_token, lambda s: (logits(s),)),
        "token_logprobs": (logprobs, lambda s: (logits(s), targets(s))),
    }


CALLS = sorted(public_calls(TINY))


def assert_equals_reference(
    name: str, sizes: Sizes, dtype: torch.dtype, inputs: tuple[Tensor, ...], truth_on: str = DEVICE
) -> None:
    """Floats as close to the reference in fp64 as everywhere in this suite, all else equal to it."""
    results = public_calls(sizes, dtype)[name][0](*inputs)
    wide = [t.to(truth_on, torch.float64 if t.is_floating_point() else t.dtype) for t in inputs]
    truths = public_calls(sizes, dtype, reference)[name][0](*wide)
    for ours, truth in zip((t.to(truth_on) for t in results), truths, strict=True):
        if ours.is_floating_point() and name != "prune_gather":
            allowed = max(4 * torch.finfo(ours.dtype).eps, 4e-6 if "given lse" in name else 2e-6)
            unit = 1.0 if name in ("greedy_token", "token_logprobs") else 0.0
            assert relative_error(ours, truth, unit) < allowed
        else:
            assert same_bits(ours, truth.to(ours.dtype))


def raw_calls() -> list[tuple]:
    """(op, arguments with the destinations) of the underlying ops, each optional argument given and not."""
    ops = torch.ops.sgl_vlm
    q, k, v = decode_inputs(2, 4, 2, 16, 40)
    lens, visual = int32([40, 33]), span(20, batch=2)
    mass, head_mass = uniform(2, 20), uniform(2, 4, 20)
    long_q, rows = normal(2, 4, 40, 16, seed=4), int32([[38, 39, -1], [5, 30, 30]])
    hidden, ids = normal(2, 40, 8), arange(80).reshape(2, 40)
    index, kept, lse = empty(2, 30).int(), empty(2).int(), uniform(2, 4, 40)
    logits = normal(3, 50)
    gathered = [empty(2, 30, 8), empty(2, 30, dtype=torch.int64)]
    return [
        (ops.decode_attention, (q, k, v, lens, visual, mass, head_mass, 0.25, torch.empty_like(q))),
        (ops.decode_attention, (q, k, v, lens, None, None, None, 0.25, torch.empty_like(q))),
        (ops.prefill_mass, (long_q, k, rows, visual, mass, head_mass, None, 0.25)),
        (ops.prefill_mass, (long_q, k, rows, visual, mass, None, lse, 0.25)),
        (ops.select_tokens, (mass, visual, lens, 7, None, index, kept)),
        (ops.select_tokens, (mass, visual, lens, 0, int32([3, 20]), index, kept)),
        (
            ops.prune_gather,
            (
                hidden,
                mass,
                visual,
                lens,
                7,
                None,
                [hidden, ids],
                gathered[0],
                index,
                kept,
                list(map(torch.clone, gathered)),
            ),
        ),
        (ops.greedy_token, (logits, empty(3, dtype=torch.int64), empty(3))),
        (ops.token_logprobs, (logits, tensor([1, -1, 49]), empty(3))),
    ]
