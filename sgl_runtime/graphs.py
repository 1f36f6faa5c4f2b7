"""CUDA graphs, and looking at a running device from the host. On the CPU the same objects just call.

Graphs share one memory pool: what one leaves in its outputs is overwritten by the next replay, so outputs are
copied, or lie in memory of the caller that the captured function wrote to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

_TIMED_RUNS = 3
_MOST_SHAPES = 64  # each keeps a graph and its inputs; requests of yet other shapes are called
_one_capture = Lock()

Function = Callable[..., tuple[Tensor, ...]]


@cache
def _pool() -> Any:
    return torch.cuda.graph_pool_handle()


@cache
def _capture_stream(device: int) -> Any:
    """One stream of a priority of its own: never one that another thread has got from the common pool."""
    return torch.cuda.Stream(device, priority=-1)


class StepGraph:
    """A function of no arguments over static tensors; after `capture`, a replay of what it launched."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._graph: Any = None
        self._output: Any = None

    @property
    def captured(self) -> bool:
        """Whether a call is a replay."""
        return self._graph is not None

    def __call__(self) -> Any:
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._output

    def capture(self) -> None:
        """Run the function three times, then once more into a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        with _one_capture:  # another thread may launch meanwhile, but not record to the same pool
            stream = _capture_stream(torch.cuda.current_device())
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # it compiles and sizes workspaces, which a graph must not
                for _ in range(3):
                    self._function()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=_pool(), stream=stream, capture_error_mode="thread_local"):
                self._output = self._function()
        self._graph = graph


class ShapedGraphs:
    """A function of tensors, replayed from one graph per shape where that is faster than a call.

    Calling the function again with the same tensors must change nothing: the first call of a shape runs it
    several times.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[torch.Size, ...], tuple[StepGraph, tuple[Tensor, ...]] | None] = {}

    def __call__(self, function: Function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._known:
            if len(self._known) == _MOST_SHAPES:
                return function(*inputs)
            self._known[shapes] = self._faster(function, inputs)
        found = self._known[shapes]
        if found is None:
            return function(*inputs)
        graph, static = found
        for destination, source in zip(static, inputs, strict=True):
            destination.copy_(source)
        return tuple(output.clone() for output in graph())

    def _faster(
        self, function: Function, inputs: tuple[Tensor, ...]
    ) -> tuple[StepGraph, tuple[Tensor, ...]] | None:
        static = tuple(tensor.clone() for tensor in inputs)
        graph = StepGraph(lambda: function(*static))
        graph.capture()
        return (graph, static) if _milliseconds(graph) < _milliseconds(lambda: function(*static)) else None


class FinishedFlag:
    """Whether all requests have finished, learnt without stopping the device.

    On CUDA `record` starts a copy behind the step just launched and `seen` waits for the copy before that
    one: the device always has a step to work on while the host looks, at the price of one step too many. The
    first look waits, since a prefill may have finished everything. On the CPU the flags are simply read.
    """

    def __init__(self, device: torch.device) -> None:
        self._delayed = device.type == "cuda"
        if self._delayed:
            self._seen = [torch.empty((), dtype=torch.bool, pin_memory=True) for _ in "ab"]
            self._copied = [torch.cuda.Event() for _ in "ab"]
        self._records = 0

    def reset(self) -> None:
        """Forget the last run."""
        self._records = 0

    def record(self, finished: Tensor) -> None:
        """Note the flags (B,) as they are after the work launched so far."""
        if self._delayed:
            slot = self._records % 2
            self._seen[slot].copy_(finished.all(), non_blocking=True)
            self._copied[slot].record()
        self._records += 1

    def seen(self, finished: Tensor) -> bool:
        """Whether all had finished at the record before the last; now, on the CPU and before any record."""
        if not self._delayed or self._records == 0:
            return bool(finished.all())
        if self._records == 1:
            return False
        slot = self._records % 2  # that of the record before the last
        self._copied[slot].synchronize()
        return bool(self._seen[slot])


def _milliseconds(function: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    function()
    start.record()
    for _ in range(_TIMED_RUNS):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
