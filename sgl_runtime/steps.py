"""How the decoder's traced functions are run: as they are or compiled, called or replayed from CUDA graphs.

A decode step reads and writes static memory only, so one graph per batch bucket holds all of it: layers,
mass, choice of the token, end-of-sequence bookkeeping. A prefill has, where it pays, one per padded length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sgl_runtime import compilation
from sgl_runtime.decoder import Decoder, MassRows, Rows, Selection
from sgl_runtime.graphs import ShapedGraphs, StepGraph
from sgl_runtime.memory import DecodeState, KVCache, Memory


@dataclass(frozen=True, eq=False)
class _Graphs:
    """What was captured for one layout of the memory."""

    prefill: ShapedGraphs = field(default_factory=ShapedGraphs)
    decode: dict[tuple[int, bool, bool], StepGraph] = field(default_factory=dict)


class Steps:
    """The entry points of a decoder, compiled if asked and captured where there is a GPU."""

    def __init__(self, decoder: Decoder, memory: Memory, *, compiled: bool) -> None:
        self.memory = memory
        self.compiled = compiled
        self.captured = memory.device.type == "cuda" and decoder.capturable
        self._num_layers = len(decoder.layers)
        wrap = compilation.whole if compiled else _as_it_is
        self._lower = wrap(decoder.lower)
        self._draft_rows = wrap(decoder.draft_rows)
        self._upper = wrap(decoder.upper)
        self._decode = wrap(decoder.decode)
        self._step = wrap(decoder.step)
        self.warm: set[tuple[Any, ...]] = set()  # kinds of runs that have been tried out
        self._graphs: WeakKeyDictionary[DecodeState, _Graphs] = WeakKeyDictionary()

    def lower(
        self, rows: Rows, cache: KVCache | None, at: Tensor, stop: int, mass: MassRows | None
    ) -> Tensor:
        """`Decoder.lower`."""
        if self.compiled:
            _vary_rows(rows)
            _vary(at, 0)
            if mass is not None:
                for tensor in (mass.text_rows, mass.visual_index, mass.mass[0]):
                    _vary(tensor, 0, 1)
        return self._lower(rows, cache, at, stop, mass)

    def guided(
        self, rows: Rows, cache: KVCache, at: Tensor, text_rows: Tensor, visual_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`Decoder.lower` through all layers with mass: return hidden (B, S, C) and mass (B, S) fp32."""

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            at, text_rows, visual_index, hidden, cos, sin, *planes = inputs
            mass = torch.zeros(visual_index.shape, dtype=torch.float32, device=hidden.device)
            into = MassRows(text_rows, visual_index, [mass] * self._num_layers)
            rows = Rows(hidden, cos, sin, tuple(planes))
            return self.lower(rows, cache, at, self._num_layers, into), mass

        inputs = (at, text_rows, visual_index, rows.hidden, rows.cos, rows.sin, *rows.planes)
        hidden, mass = self._present_graphs().prefill(run, inputs) if self.captured else run(*inputs)
        return hidden, mass

    def draft_rows(
        self,
        tokens: Tensor,
        seq_lens: Tensor,
        next_angle: Tensor,
        cache: KVCache,
        at: Tensor,
        stop: int,
        columns: Tensor,
    ) -> Tensor:
        """`Decoder.draft_rows`."""
        if self.compiled:
            _vary(tokens, 0, 1)
            for tensor in (seq_lens, next_angle, at, columns):
                _vary(tensor, 0)
        return self._draft_rows(tokens, seq_lens, next_angle, cache, at, stop, columns)

    def upper(
        self,
        rows: Rows,
        seq_lens: Tensor,
        next_angle: Tensor,
        cache: KVCache | None,
        at: Tensor,
        start: int,
        selection: Selection | None,
        draft: Tensor | None,
        columns: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`Decoder.upper`."""
        if self.compiled:
            _vary_rows(rows)
            for tensor in (seq_lens, next_angle, at, columns):
                _vary(tensor, 0)
            if selection is not None:
                _vary(selection.num_keep, 0)
                for tensor in (selection.ranking, selection.visual_index):
                    _vary(tensor, 0, 1)
            if draft is not None:
                _vary(draft, 0, 1)
        return self._upper(rows, seq_lens, next_angle, cache, at, start, selection, draft, columns)

    def release(self) -> None:
        """Drop everything captured; it is captured again when needed."""
        self._graphs.clear()

    def prepare(self, batch: int, with_mass: bool, *, choose: bool = True) -> None:
        """Compile and capture the decode step of ``batch`` rows, outside of any run: this executes it.

        It replays nothing: in another thread a graph that shares the pool may be running.
        """
        known = self._present_graphs().decode
        if (self.compiled or self.captured) and (batch, with_mass, choose) not in known:
            self.memory.state.clear()
            graph = self._graph(batch, with_mass, choose)
            if not graph.captured:
                graph()

    def step(self, batch: int, with_mass: bool) -> None:
        """`Decoder.step` for the first ``batch`` rows of the memory."""
        self._graph(batch, with_mass, choose=True)()

    def decode(self, batch: int, with_mass: bool) -> Tensor:
        """`Decoder.decode`: logits (batch, vocabulary), to be copied before the next call."""
        return self._graph(batch, with_mass, choose=False)()

    def _graph(self, batch: int, with_mass: bool, choose: bool) -> StepGraph:
        known = self._present_graphs().decode
        key = (batch, with_mass, choose)
        if key not in known:
            state, cache = self.memory.state.first(batch), self.memory.cache
            function = self._step if choose else self._decode
            graph = StepGraph(lambda: function(state, cache, with_mass))
            if self.captured and choose:  # logits processors run between uncaptured steps
                graph.capture()
            known[key] = graph
        return known[key]

    def _present_graphs(self) -> _Graphs:
        """Return the graphs of the memory as it lies now; those of an earlier layout went with its state."""
        if self.memory.state not in self._graphs:
            self._graphs[self.memory.state] = _Graphs()
        return self._graphs[self.memory.state]


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _vary(tensor: Tensor, *dims: int) -> None:
    """Tell the compiler which dimensions differ from call to call; one request stays a case of its own."""
    for dim in dims:
        if tensor.shape[dim] > 1:
            torch._dynamo.mark_dynamic(tensor, dim)


def _vary_rows(rows: Rows) -> None:
    for tensor in (rows.hidden, rows.cos, rows.sin, *rows.planes):
        _vary(tensor, 0, 1)
