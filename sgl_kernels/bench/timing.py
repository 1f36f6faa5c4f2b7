"""Medians of calls in turn, and what the machine can do at best.

Sides of one comparison take turns, so that whatever slows the machine slows all of them. On the CPU a sample
is one call. On CUDA a sample is one replay of a graph that holds many calls, each on the next of several
copies of the inputs which together exceed the L2 cache, so that neither launches nor cache hits are timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Call = Callable[..., object]
Side = TypeVar("Side")

GRAPH_US = 3000.0  # a replay lasts this long at least: starting one takes a few microseconds
MAX_COPIES = 512
CPU_ROUNDS, CUDA_ROUNDS = 40, 30


@dataclass(frozen=True)
class Timing:
    """Microseconds per call. `method` is "clock", "graph", or "events" where a graph could not be captured.

    `rotated_bytes` is what a call touches times the input copies that took turns; on CUDA, inputs were read
    from memory and not from the L2 cache if it exceeds `l2_bytes`.
    """

    median_us: float
    p10_us: float
    p90_us: float
    samples: int
    calls_per_sample: int
    method: str
    rotated_bytes: int
    l2_bytes: int


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in this run: bytes copied (read plus written) and operations, per second.

    Of the 10th percentile of the times, since a ceiling is what a machine does when nothing is in its way.
    """

    copy_bytes_per_s: float
    matmul_flops_per_s: float


def time_sides(
    sides: Mapping[Side, Call],
    inputs: tuple[Tensor, ...],
    rounds: int | None = None,
    touched: int | None = None,
) -> dict[Side, Timing]:
    """Time each side's call of `inputs`, all on one device, in turn.

    Parameters
    ----------
    sides : mapping of a name to a callable
        Functions of the tensors in `inputs`. They may write into them.
    inputs : tuple of Tensor
        One set of arguments; on CUDA it is copied until the copies exceed the L2 cache.
    rounds : int, optional
        Samples of each side; 40 on the CPU and 30 on CUDA when None.
    touched : int, optional
        Bytes of `inputs` that a call touches; all of them when None.
    """
    on_gpu = inputs[0].device.type == "cuda"
    touched = min(touched or _bytes(inputs), _bytes(inputs))
    copies, l2_bytes = _copies(inputs, touched) if on_gpu else ([inputs], 0)
    samplers: dict[Side, _GraphSampler | _ClockSampler] = {
        name: _GraphSampler(call, copies) if on_gpu else _ClockSampler(call, inputs)
        for name, call in sides.items()
    }
    rounds = rounds or (CUDA_ROUNDS if on_gpu else CPU_ROUNDS)
    times: dict[Side, list[float]] = {name: [] for name in sides}
    for warm in range(rounds + 1):
        for name, sampler in samplers.items():
            microseconds = sampler.sample()
            if warm:
                times[name].append(microseconds)
    return {
        name: _timing(times[name], sampler.calls, sampler.method, len(copies) * touched, l2_bytes)
        for name, sampler in samplers.items()
    }


def runnable(
    sides: Mapping[Side, Call], inputs: tuple[Tensor, ...]
) -> tuple[dict[Side, Call], dict[Side, str]]:
    """The sides that can be called here, and why the others cannot: a backend of torch may refuse a shape."""
    runs, refused = {}, {}
    for name, call in sides.items():
        try:
            call(*inputs)
            runs[name] = call
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return runs, refused


def ceilings(
    device: torch.device, dtype: torch.dtype, copied: int | None = None, size: int | None = None
) -> Ceilings:
    """Measure copy bandwidth and matrix product rate.

    Parameters
    ----------
    device : torch.device
    dtype : torch.dtype
        Of the matrix product.
    copied : int, optional
        Bytes of the buffer to copy; 1 GiB on CUDA and 128 MiB on the CPU when None.
    size : int, optional
        Rows and columns of the matrices; 8192 on CUDA and 1024 on the CPU when None.
    """
    on_gpu = device.type == "cuda"
    count = copied or (1 << 30 if on_gpu else 128 << 20)
    size = size or (8192 if on_gpu else 1024)
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    buffers = (source, torch.empty_like(source))
    copy = time_sides({"copy": lambda source, target: target.copy_(source)}, buffers, rounds=20)["copy"]
    del source, buffers
    matrices = tuple(torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = time_sides({"matmul": torch.mm}, matrices, rounds=20)["matmul"]
    return Ceilings(2e6 * count / copy.p10_us, 2e6 * size**3 / product.p10_us)


class _ClockSampler:
    method, calls = "clock", 1

    def __init__(self, call: Call, inputs: tuple[Tensor, ...]):
        self.call, self.inputs = call, inputs

    def sample(self) -> float:
        start = time.perf_counter()
        self.call(*self.inputs)
        return (time.perf_counter() - start) * 1e6


class _GraphSampler:
    method = "graph"

    def __init__(self, call: Call, copies: list[tuple[Tensor, ...]]):
        estimate = self._warm_up(call, copies[0])
        rotations = max(1, round(GRAPH_US / estimate / len(copies)))
        self.calls = rotations * len(copies)
        self.start, self.stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def all_calls() -> None:
            for _ in range(rotations):
                for inputs in copies:
                    call(*inputs)

        self.run: Callable[[], Any] = all_calls
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                all_calls()
            self.run = graph.replay
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # something in it cannot be captured: its launches are then timed as well
            torch.cuda.synchronize()
            self.method = "events"

    def _warm_up(self, call: Call, inputs: tuple[Tensor, ...]) -> float:
        """Microseconds per call, launches included; run where a capture will run, on a side stream."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call(*inputs)
            start.record()
            for _ in range(5):
                call(*inputs)
            stop.record()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        return max(1.0, start.elapsed_time(stop) * 1e3 / 5)

    def sample(self) -> float:
        self.start.record()
        self.run()
        self.stop.record()
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop) * 1e3 / self.calls


def _copies(inputs: tuple[Tensor, ...], touched: int) -> tuple[list[tuple[Tensor, ...]], int]:
    """As many copies as twice the L2 cache takes, in at most a quarter of the memory that is free."""
    device = inputs[0].device
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    room = torch.cuda.mem_get_info(device)[0] // 4 // max(1, _bytes(inputs))
    count = max(1, min(MAX_COPIES, -(-2 * l2_bytes // max(1, touched)), room))
    return [inputs, *(tuple(t.clone() for t in inputs) for _ in range(count - 1))], l2_bytes


def _bytes(inputs: tuple[Tensor, ...]) -> int:
    return sum(t.numel() * t.element_size() for t in inputs)


def _timing(times: list[float], calls: int, method: str, rotated: int, l2_bytes: int) -> Timing:
    deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times
    return Timing(
        statistics.median(times), deciles[0], deciles[-1], len(times), calls, method, rotated, l2_bytes
    )
