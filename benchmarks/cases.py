"""What the CPU benchmarks time: workloads of the package at committed shapes, and the target of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import sgl_kernels
from sgl_kernels.bench import workloads
from sgl_kernels.bench.workloads import Shape, parse_shape


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
    inputs: tuple[Tensor, ...]
    sides: dict[str, Callable[..., object]]  # of the inputs; "ours" first
    targets: list[Target]
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.op} [{self.setting}]"


DTYPES = [torch.float32, torch.bfloat16]
ATTENTION = ["B=1 Hq=16 Hkv=8 D=128 S=2048 N=1792", "B=4 Hq=14 Hkv=2 D=64 S=4096 N=3328"]
TARGETS = {
    "decode_attention": [
        Target("eager", 3),
        Target("grouped matmul", 1),
        Target("SDPA, no mass", 1),
        Target("SDPA over groups, no mass", 1),
    ],
    "prefill_mass": [Target("eager full attention", 10)],
    "prune_gather": [Target("topk, sort, cat, index_select", 1), Target("plain copy", 0.8, slack_us=60)],
    "greedy_token": [Target("log_softmax, max", 2)],
    "token_logprobs": [Target("log_softmax, gather", 1.5)],
}
SHAPES = {
    "decode_attention": ATTENTION,
    "prefill_mass": [f"{shape} R=64" for shape in ATTENTION],
    "prune_gather": ["B=1 S=2048 N=1792 r=0.2 C=4096", "B=4 S=4096 N=3328 r=0.2 C=4096"],
    "greedy_token": ["B=4 V=151936"],
    "token_logprobs": ["B=4 V=151936"],
}
ROUNDS = {"prefill_mass": 2, "prune_gather": 20}


def recipes() -> list[tuple[str, Callable[[], Case]]]:
    """(op, how to build the case) of every case. Build one at a time: the largest needs gigabytes."""
    return [
        (op, partial(build, op, parse_shape(op, shape), dtype))
        for op, shapes in SHAPES.items()
        for shape in shapes
        for dtype in DTYPES
    ]


def side_names(op: str) -> list[str]:
    return list(build(op, parse_shape(op, ""), torch.float32, "meta").sides)


def build(op: str, shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Case:
    workload = workloads.build(op, shape, dtype, torch.device(device))
    ours = {", ".join(filter(None, ("ours", name))): f for name, f in workload.sides(sgl_kernels).items()}
    return Case(
        op, workload.setting, workload.inputs, {**ours, **workload.stock}, TARGETS[op], ROUNDS.get(op, 40)
    )
