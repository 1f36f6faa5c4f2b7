"""Enough of CUDA graphs for a CPU: what a captured function does is recorded, undone and redone by replays.

What holds on a GPU holds here: a capture changes nothing; a replay reads and writes the tensors of the
capture, whatever the Python objects around them have become; values that Python computed stay as they were;
reading a value back in a capture is an error; and all graphs share a pool, so a replay ruins what others left
in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sgl_runtime import graphs

READS_BACK = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Graph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._calls: list[tuple[Any, tuple, dict, list[torch.Tensor]]] = []
        self._made: list[torch.Tensor] = []  # what lies in the pool
        device.graphs.append(self)

    def replay(self) -> None:
        for graph in self._device.graphs:
            for tensor in graph._made:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        for function, args, kwargs, results in self._calls:
            found = function(*args, **kwargs)
            if results:  # or it wrote to one of its arguments
                for result, value in zip(results, tensors(found), strict=True):
                    result.copy_(value)
        self._device.replays.append(self)


class Capture(TorchDispatchMode):
    """`torch.cuda.graph`."""

    def __init__(self, graph: Graph, pool: Any, stream: Stream, capture_error_mode: str) -> None:
        super().__init__()
        assert pool == "the pool"
        assert capture_error_mode == "thread_local"
        self._graph = graph
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __enter__(self) -> Capture:
        device = self._graph._device
        assert not device.capturing, "beginAllocateToPool: already recording to mempool_id"
        device.capturing = True
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for tensor, value in self._before.values():
            tensor.copy_(value)
        self._graph._device.captures.append(self._graph)
        self._graph._device.capturing = False

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function in READS_BACK:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        kwargs = kwargs or {}
        schema = function._schema
        mine = {tensor.untyped_storage().data_ptr() for tensor in self._graph._made}
        for number, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[number] if number < len(args) else kwargs.get(argument.name)
                for tensor in tensors(value):
                    place = tensor.untyped_storage().data_ptr()
                    if place not in mine and place not in self._before:
                        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                        self._before[place] = whole, whole.clone()
        found = function(*args, **kwargs)
        aliases = [result.alias_info for result in schema.returns]
        fresh = [] if any(alias is not None for alias in aliases) else tensors(found)
        writes = not schema.returns or any(alias is not None and alias.is_write for alias in aliases)
        if fresh or writes:
            self._graph._calls.append((function, args, kwargs, fresh))
            self._graph._made += fresh
        return found


class Stream:
    """`torch.cuda.Stream`."""

    def wait_stream(self, other: Any) -> None:
        """Everything here runs in order anyway."""


class TimedEvent:
    """`torch.cuda.Event`, of a device on which only replays are fast."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def record(self) -> None:
        self.replays = len(self._device.replays)

    def synchronize(self) -> None:
        """Everything here has happened."""

    def elapsed_time(self, end: TimedEvent) -> float:
        replayed = end.replays > self.replays
        return 1.0 if replayed == self._device.replays_are_fast else 2.0


class Device:
    """What was captured and replayed."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []
        self.captures: list[Graph] = []
        self.replays: list[Graph] = []
        self.replays_are_fast = True
        self.capturing = False


@contextmanager
def emulated() -> Iterator[Device]:
    """Put the device where torch.cuda's graphs are."""
    device = Device()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "CUDAGraph": lambda: Graph(device),
            "graph": Capture,
            "graph_pool_handle": lambda: "the pool",
            "Stream": lambda *_, **__: Stream(),
            "current_device": lambda: 0,
            "stream": lambda _: nullcontext(),
            "current_stream": lambda *_: Stream(),
            "Event": lambda enable_timing=False: TimedEvent(device),
        }.items():
            patch.setattr(torch.cuda, name, value)
        graphs._pool.cache_clear()
        graphs._capture_stream.cache_clear()
        yield device
    graphs._pool.cache_clear()
    graphs._capture_stream.cache_clear()


def tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
