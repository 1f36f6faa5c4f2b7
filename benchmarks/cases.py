"""What the op benchmarks time: ours and the baselines on the same tensors, with the target of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

import sgl_kernels
from sgl_kernels import compositions


@dataclass(frozen=True)
class Geometry:
    batch: int
    heads: int
    kv_heads: int
    dim: int
    length: int
    visual: int

    def __str__(self) -> str:
        return (
            f"B={self.batch} Hq={self.heads} Hkv={self.kv_heads} D={self.dim} S={self.length} N={self.visual}"
        )


@dataclass(frozen=True)
class Target:
    """`factor` times our median, less `slack_us`, must not exceed the baseline's."""

    baseline: str
    factor: float
    slack_us: float = 0.0

    def __str__(self) -> str:
        if self.slack_us:
            return f"<= {1 / self.factor:g}x {self.baseline} + {self.slack_us:g} us"
        return f">= {self.factor:g}x {self.baseline}"

    def met(self, ours_us: float, baseline_us: float) -> bool:
        return (ours_us - self.slack_us) * self.factor <= baseline_us


@dataclass(frozen=True)
class Case:
    op: str
    setting: str
    sides: dict[str, Callable[[], object]]  # "ours" first
    targets: list[Target]
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.op} [{self.setting}]"


GEOMETRIES = [Geometry(1, 16, 8, 128, 2048, 1792), Geometry(4, 14, 2, 64, 4096, 3328)]
DTYPES = [torch.float32, torch.bfloat16]
HIDDEN, KEEP_RATIO, TEXT_ROWS, VOCABULARY, ROWS = 4096, 0.2, 64, 151936, 4


SIDES = {
    "decode_attention": (
        "ours",
        "ours, no mass",
        "eager",
        "grouped matmul",
        "SDPA, no mass",
        "SDPA over groups, no mass",
    ),
    "prune_gather": ("ours", "topk, sort, cat, index_select", "plain copy"),
    "prefill_mass": ("ours", "ours, given lse", "eager full attention"),
    "greedy_token": ("ours", "log_softmax, max"),
    "token_logprobs": ("ours", "log_softmax, gather"),
}


def recipes() -> list[tuple[str, Callable[[], Case]]]:
    """(op, how to build the case) of every case. Build one at a time: the largest needs gigabytes."""
    attention = {"decode_attention": decode_case, "prune_gather": prune_case, "prefill_mass": prefill_case}
    vocabulary = {"greedy_token": greedy_case, "token_logprobs": logprobs_case}
    return [
        *((op, partial(f, g, dtype)) for op, f in attention.items() for g in GEOMETRIES for dtype in DTYPES),
        *((op, partial(f, dtype)) for op, f in vocabulary.items() for dtype in DTYPES),
    ]


def decode_case(g: Geometry, dtype: torch.dtype) -> Case:
    q = torch.randn(g.batch, g.heads, g.dim).to(dtype)
    k, v = (torch.randn(g.batch, g.kv_heads, g.length, g.dim).to(dtype) for _ in range(2))
    lens = torch.full((g.batch,), g.length, dtype=torch.int32)
    visual, mass = visual_tokens(g)
    grouped = q.view(g.batch, g.kv_heads, -1, g.dim)

    def ours() -> object:
        return sgl_kernels.decode_attention(q, k, v, lens, visual_index=visual, mass=mass)

    calls = (
        ours,
        lambda: sgl_kernels.decode_attention(q, k, v, lens),
        lambda: compositions.eager_decode(q, k, v, visual, mass),
        lambda: compositions.grouped_decode(q, k, v, visual, mass),
        lambda: scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True),
        lambda: scaled_dot_product_attention(grouped, k, v),
    )
    targets = [Target("eager", 3)]
    targets += [Target(name, 1) for name in ("grouped matmul", "SDPA, no mass", "SDPA over groups, no mass")]
    return case("decode_attention", setting(g, dtype), calls, targets)


def prune_case(g: Geometry, dtype: torch.dtype) -> Case:
    hidden = torch.randn(g.batch, g.length, HIDDEN).to(dtype)
    visual, _ = visual_tokens(g)
    mass = torch.rand(g.batch, g.visual)
    lens = torch.full((g.batch,), g.length, dtype=torch.int32)
    num_keep = max(1, int(g.visual * KEEP_RATIO))
    rows = g.length - g.visual + num_keep
    is_text = torch.ones(g.length, dtype=torch.bool)
    is_text[visual[0].long()] = False
    text = is_text.nonzero()[:, 0].int().repeat(g.batch, 1)
    calls = (
        lambda: sgl_kernels.prune_gather(hidden, mass, visual, lens, num_keep, out_len=rows),
        lambda: compositions.topk_prune(hidden, mass, visual, text, num_keep),
        lambda: hidden[:, :rows].clone(memory_format=torch.contiguous_format),
    )
    targets = [Target("topk, sort, cat, index_select", 1), Target("plain copy", 0.8, slack_us=60)]
    where = f"{setting(g, dtype)} C={HIDDEN} r={KEEP_RATIO}"
    return case("prune_gather", where, calls, targets, rounds=20)


def prefill_case(g: Geometry, dtype: torch.dtype) -> Case:
    q = torch.randn(g.batch, g.heads, g.length, g.dim).to(dtype)
    k, v = (torch.randn(g.batch, g.kv_heads, g.length, g.dim).to(dtype) for _ in range(2))
    rows = torch.arange(g.length - TEXT_ROWS, g.length, dtype=torch.int32).repeat(g.batch, 1)
    visual, mass = visual_tokens(g)
    lse = torch.full((g.batch, g.heads, g.length), 8.0)

    def eager() -> None:
        for b in range(g.batch):  # all at once would need the matrix of every request in memory
            one = slice(b, b + 1)
            compositions.eager_prefill(q[one], k[one], v[one], rows[one], visual[one], mass[one])

    calls = (
        lambda: sgl_kernels.prefill_mass(q, k, rows, visual, mass),
        lambda: sgl_kernels.prefill_mass(q, k, rows, visual, mass, softmax_lse=lse),
        eager,
    )
    where = f"{setting(g, dtype)} rows={TEXT_ROWS}"
    return case("prefill_mass", where, calls, [Target("eager full attention", 10)], rounds=2)


def greedy_case(dtype: torch.dtype) -> Case:
    logits = torch.randn(ROWS, VOCABULARY).to(dtype)
    calls = (
        lambda: sgl_kernels.greedy_token(logits),
        lambda: compositions.log_softmax_greedy(logits),
    )
    where = f"rows={ROWS} V={VOCABULARY} {name_of(dtype)}"
    return case("greedy_token", where, calls, [Target("log_softmax, max", 2)])


def logprobs_case(dtype: torch.dtype) -> Case:
    logits = torch.randn(ROWS, VOCABULARY).to(dtype)
    targets = torch.randint(0, VOCABULARY, (ROWS,))
    calls = (
        lambda: sgl_kernels.token_logprobs(logits, targets),
        lambda: compositions.log_softmax_gather(logits, targets),
    )
    where = f"rows={ROWS} V={VOCABULARY} {name_of(dtype)}"
    return case("token_logprobs", where, calls, [Target("log_softmax, gather", 1.5)])


def case(
    op: str, where: str, calls: tuple[Callable[[], object], ...], targets: list[Target], rounds: int = 40
) -> Case:
    return Case(op, where, dict(zip(SIDES[op], calls, strict=True)), targets, rounds)


def visual_tokens(g: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """One image after 64 text tokens."""
    visual = torch.arange(64, 64 + g.visual, dtype=torch.int32).repeat(g.batch, 1)
    return visual, torch.zeros(g.batch, g.visual)


def setting(g: Geometry, dtype: torch.dtype) -> str:
    return f"{g} {name_of(dtype)}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
