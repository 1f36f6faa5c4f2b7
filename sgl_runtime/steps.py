"""How the decoder's traced functions are run: as they are, compiled, or replayed from CUDA graphs.

A decode step reads and writes static memory only, so one graph per batch bucket holds all of it: layers, mass,
choice of the token, end-of-sequence bookkeeping. On the CPU the same objects call the same functions uncaptured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sgl_runtime import compilation
from sgl_runtime.decoder import Decoder, MassRows, Selection
from sgl_runtime.memory import KVCache, Memory


class Steps:
    """The entry points of a decoder, compiled if asked and captured where there is a GPU."""

    def __init__(self, decoder: Decoder, memory: Memory, *, compiled: bool) -> None:
        self.memory = memory
        self.compiled = compiled
        self.captured = memory.device.type == "cuda"
        wrap = compilation.whole if compiled else _as_it_is
        self._lower = wrap(decoder.lower)
        self._draft_rows = wrap(decoder.draft_rows)
        self._upper = wrap(decoder.upper)
        self._decode = wrap(decoder.decode)
        self._step = wrap(decoder.step)
        self._graphs: dict[tuple[int, bool, bool], StepGraph] = {}
        self._graphs_of: Any = None

    def lower(
        self, hidden: Tensor, cache: KVCache | None, rows: Tensor, stop: int, mass: MassRows | None
    ) -> Tensor:
        """`Decoder.lower`."""
        if self.compiled:
            _vary(hidden, 0, 1)
            _vary(rows, 0)
            if mass is not None:
                for tensor in (mass.text_rows, mass.visual_index, mass.mass[0]):
                    _vary(tensor, 0, 1)
        return self._lower(hidden, cache, rows, stop, mass)

    def draft_rows(
        self, tokens: Tensor, seq_lens: Tensor, cache: KVCache, rows: Tensor, stop: int, columns: Tensor
    ) -> Tensor:
        """`Decoder.draft_rows`."""
        if self.compiled:
            _vary(tokens, 0, 1)
            _vary(seq_lens, 0)
            _vary(rows, 0)
            _vary(columns, 0)
        return self._draft_rows(tokens, seq_lens, cache, rows, stop, columns)

    def upper(
        self,
        hidden: Tensor,
        seq_lens: Tensor,
        cache: KVCache | None,
        rows: Tensor,
        start: int,
        selection: Selection | None,
        draft: Tensor | None,
        columns: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`Decoder.upper`."""
        if self.compiled:
            _vary(hidden, 0, 1)
            for tensor in (seq_lens, rows):
                _vary(tensor, 0)
            if selection is not None:
                _vary(selection.num_keep, 0)
                for tensor in (selection.ranking, selection.visual_index):
                    _vary(tensor, 0, 1)
            if draft is not None:
                _vary(draft, 0, 1)
            _vary(columns, 0)
        return self._upper(hidden, seq_lens, cache, rows, start, selection, draft, columns)

    def prepare(self, batch: int, with_mass: bool) -> None:
        """Capture the decode step of ``batch`` rows, outside of any run: capturing executes it."""
        if self.captured:
            self._graph(batch, with_mass, choose=True)

    def step(self, batch: int, with_mass: bool) -> None:
        """`Decoder.step` for the first ``batch`` rows of the memory."""
        self._graph(batch, with_mass, choose=True)()

    def decode(self, batch: int, with_mass: bool) -> Tensor:
        """`Decoder.decode`: logits (batch, vocabulary), to be copied before the next call."""
        return self._graph(batch, with_mass, choose=False)()

    def _graph(self, batch: int, with_mass: bool, choose: bool) -> StepGraph:
        if self._graphs_of is not self.memory.state:  # laid out anew: what was captured points into the void
            self._graphs.clear()
            self._graphs_of = self.memory.state
        key = (batch, with_mass, choose)
        if key not in self._graphs:
            state, cache = self.memory.state.first(batch), self.memory.cache
            function = self._step if choose else self._decode
            graph = StepGraph(lambda: function(state, cache, with_mass))
            if self.captured:
                self.memory.state.clear()
                graph.capture(compilation.graph_pool())
            self._graphs[key] = graph
        return self._graphs[key]


class StepGraph:
    """A function of no arguments over static tensors; after `capture`, a replay of what it launched."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._graph: Any = None
        self._output: Any = None

    def __call__(self) -> Any:
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._output

    def capture(self, pool: Any) -> None:
        """Run the function three times, then once more into a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            stream
        ):  # compiles, fills caches and sizes workspaces, none of which a graph may
            for _ in range(3):
                self._function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._output = self._function()
        self._graph = graph


class FinishedFlag:
    """Whether all requests have finished, learnt without stopping the device.

    On CUDA `record` starts a copy behind the step just launched and `seen` waits for the copy before that one:
    the device always has a step to work on while the host looks, at the price of one step too many. The first
    look waits, since a prefill may have finished everything. On the CPU the flags are simply read.
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


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _vary(tensor: Tensor, *dims: int) -> None:
    """Tell the compiler which dimensions differ from call to call; a single request stays a case of its own."""
    for dim in dims:
        if tensor.shape[dim] > 1:
            torch._dynamo.mark_dynamic(tensor, dim)
