"""Seconds per stage, and a profiler range around each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from time import perf_counter

import torch


class Clock:
    """Adds up the seconds of named stages.

    On CUDA a stage is timed by events on the stream that is current in its thread, without waiting for the
    device; on the CPU by the host's clock. Threads may time stages at once. A stage that raises counts for
    nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._running: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._lock = Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside the ``with`` block to ``seconds[name]``.

        The block is also a range for ``torch.profiler`` and, on CUDA, for NVTX.
        """
        with self._lock:
            self._seconds.setdefault(name, 0.0)
        with ExitStack() as ranges:
            ranges.enter_context(torch.profiler.record_function(name))
            if self._on_gpu:
                ranges.enter_context(torch.cuda.nvtx.range(name))
                start = self._event()
                yield
                with self._lock:
                    self._running.append((name, start, self._event()))
            else:
                began = perf_counter()
                yield
                self._add(name, perf_counter() - began)

    @property
    def seconds(self) -> dict[str, float]:
        """Stage to seconds, in the order in which stages were first entered; waits for stages under way."""
        with self._lock:
            running, self._running = self._running, []
        for name, start, end in running:
            end.synchronize()
            self._add(name, start.elapsed_time(end) / 1000)
        with self._lock:
            return dict(self._seconds)

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _add(self, name: str, seconds: float) -> None:
        with self._lock:
            self._seconds[name] += seconds
