"""The GPU targets of the ops: workloads at committed shapes, and for each target the time it allows."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_kernels.bench import workloads
from sgl_kernels.bench.timing import Ceilings
from sgl_kernels.bench.workloads import Cost, Shape, Workload

DTYPE = torch.bfloat16
Medians = Mapping[str, float]  # side -> microseconds


@dataclass(frozen=True)
class Target:
    """`side` may take `limit` microseconds, a function of all sides' medians, its cost and the ceilings."""

    words: str
    limit: Callable[[Medians, Cost, Ceilings], float]
    side: str = ""


@dataclass(frozen=True)
class GpuCase:
    op: str
    shape: Shape
    targets: tuple[Target, ...]
    without: tuple[str, ...] = ()  # stock sides that no target asks for and that take long


def build(case: GpuCase, device: torch.device) -> Workload:
    workload = workloads.build(case.op, case.shape, DTYPE, device)
    stock = {name: call for name, call in workload.stock.items() if name not in case.without}
    workload = dataclasses.replace(workload, stock=stock)
    return with_flash_colsum(workload) if case.op == "prefill_mass" else workload


def cases() -> list[GpuCase]:
    return [*_decode(), *_prefill(), *_prune(), *_vocabulary()]


def shrunk(case: GpuCase) -> GpuCase:
    """The same case at a size that a CPU goes through in milliseconds: a check that everything builds."""
    small = {"B": 2, "Hkv": 1, "D": 16, "S": 48, "N": 32, "R": 4, "C": 16, "V": 50}
    shape = {name: min(value, small.get(name, value)) for name, value in case.shape.items()}
    if "Hq" in shape:
        shape["Hq"] = case.shape["Hq"] // case.shape["Hkv"]
    return dataclasses.replace(case, shape=shape)


def _decode() -> Iterator[GpuCase]:
    for heads, kv_heads, share, extra in ((16, 8, 1.05, 0.5), (64, 8, 1.10, 0.8)):
        for batch in (1, 4, 16):
            for length in (1024, 4096, 8192, 32768):
                shape = {
                    "B": batch,
                    "Hq": heads,
                    "Hkv": kv_heads,
                    "D": 128,
                    "S": length,
                    "N": length * 7 // 8,
                }
                targets = [
                    Target(
                        f"<= {share:g}x or +{extra:g} us of its own time without mass",
                        lambda m, _c, _l, share=share, extra=extra: max(
                            share * m["no mass"], m["no mass"] + extra
                        ),
                    ),
                    Target(
                        "never slower than torch SDPA without mass",
                        lambda m, _c, _l: min(m[name] for name in m if "SDPA" in name),
                    ),
                    Target(">= 5x faster than eager", lambda m, _c, _l: m["eager"] / 5),
                ]
                if 4 * batch * kv_heads * length * 128 > 64 << 20:
                    targets.append(share_of_copy(0.7))
                yield GpuCase("decode_attention", shape, tuple(targets))


def _prefill() -> Iterator[GpuCase]:
    for heads, kv_heads, dim in ((16, 8, 128), (16, 2, 128), (14, 2, 64)):
        for visual in (1792, 4096, 8192):
            shape = {"B": 1, "Hq": heads, "Hkv": kv_heads, "D": dim, "S": visual + 128, "N": visual, "R": 64}
            targets = [
                target
                for side in ("given lse", "")
                for target in (
                    Target(
                        f"{side or 'computing the lse'}: <= 5 us or 3 % of flash attention",
                        lambda m, _c, _l: max(5.0, 0.03 * m["flash attention, no mass"]),
                        side,
                    ),
                    Target(
                        f"{side or 'computing the lse'}: >= 5x faster than flash-colsum",
                        lambda m, _c, _l: m["flash-colsum"] / 5,
                        side,
                    ),
                )
            ]
            yield GpuCase("prefill_mass", shape, tuple(targets), without=("eager full attention",))


def _prune() -> Iterator[GpuCase]:
    for visual in (1792, 4096, 16384):
        for width in (2048, 4096, 8192):
            for ratio in (0.05, 0.2, 0.5):
                shape = {"B": 1, "S": visual + 256, "N": visual, "r": ratio, "C": width}
                targets = [
                    Target("selection <= 8 us", lambda *_: 8.0, "selection"),
                    Target(
                        "<= selection + 1.3x copy of the kept rows",
                        lambda m, _c, _l: m["selection"] + 1.3 * m["plain copy"],
                    ),
                ]
                if 2 * (256 + int(visual * ratio)) * width < 4 << 20:
                    targets.append(
                        Target(
                            ">= 5x faster than topk, sort, cat, index_select",
                            lambda m, _c, _l: m["topk, sort, cat, index_select"] / 5,
                        )
                    )
                yield GpuCase("prune_gather", shape, tuple(targets))


def _vocabulary() -> Iterator[GpuCase]:
    for op, stock in (("greedy_token", "log_softmax, max"), ("token_logprobs", "log_softmax, gather")):
        for vocabulary in (92553, 151936):
            for batch in (1, 4, 16, 64):
                targets = [Target(f">= 3x faster than {stock}", lambda m, _c, _l, stock=stock: m[stock] / 3)]
                if batch >= 16:
                    targets.append(share_of_copy(0.6))
                yield GpuCase(op, {"B": batch, "V": vocabulary}, tuple(targets))


def share_of_copy(share: float) -> Target:
    return Target(
        f">= {share:.0%} of copy bandwidth",
        lambda _m, cost, limit: cost.bytes / (share * limit.copy_bytes_per_s) * 1e6,
    )


def with_flash_colsum(workload: Workload) -> Workload:
    """Add the pip package of that name, where it is installed and takes the shape: one request."""
    if importlib.util.find_spec("flash_colsum") is None or workload.shape["B"] != 1:
        return workload
    from flash_colsum import flash_colsum

    q, k, _, rows, *_ = workload.inputs
    counted = q[:, :, rows[0].long()]  # (1, Hq, R, D)
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # it knows no groups; not timed

    def colsum(*inputs: Tensor) -> object:
        counted, keys = inputs[-2:]
        return flash_colsum(counted, keys, is_causal=True)

    return dataclasses.replace(
        workload,
        inputs=(*workload.inputs, counted, keys),
        stock={**workload.stock, "flash-colsum": colsum},
    )
