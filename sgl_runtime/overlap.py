"""Work of the large VLM while the small one answers: a worker thread, on a GPU with a stream of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Cancelled(Exception):
    """Nobody wants the result any more."""


class Task(Generic[T]):
    """Something under way. Ask for its `result`, or `discard` it."""

    def __init__(self, cancelled: threading.Event) -> None:
        self._cancelled = cancelled
        self._future: Future[T] | None = None
        self._event: Any = None

    def check(self) -> None:
        """Raise `Cancelled` when the task was discarded; called by the work itself, between its stages."""
        if self._cancelled.is_set():
            raise Cancelled

    def result(self) -> T:
        """Wait for the work and return what it returned, or raise what it raised."""
        assert self._future is not None
        found = self._future.result()
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
        return found

    def discard(self) -> None:
        """Stop the work before its next stage; it may be under way until the worker is next waited for."""
        self._cancelled.set()


class Worker:
    """Runs one task at a time beside the caller.

    The thread is made with the first task. A task starts after what the caller has launched before, so
    tensors that it leaves behind are not overwritten under the caller's hands.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: ThreadPoolExecutor | None = None
        self._stream: Any = None
        self._last: Task[Any] | None = None

    def start(self, work: Callable[[Task[T]], T], inputs: Iterable[Tensor] = ()) -> Task[T]:
        """Begin ``work(task)``, behind what was started before and of which the end need not be waited for.

        ``inputs`` are tensors of the caller that it reads.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="sgl-large-vlm")
            if self._device.type == "cuda":
                self._stream = torch.cuda.Stream(self._device)
        task: Task[T] = Task(threading.Event())
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            for tensor in inputs:
                tensor.record_stream(self._stream)
        task._future = self._pool.submit(self._run, work, task)
        self._last = task
        return task

    def join(self) -> None:
        """Wait until nothing is under way, whatever became of it."""
        if self._last is not None:
            assert self._last._future is not None
            self._last._future.exception()
            if self._last._event is not None:
                torch.cuda.current_stream(self._device).wait_event(self._last._event)
            self._last = None  # not before, or an interrupt of the wait would be the end of it

    def _run(self, work: Callable[[Task[T]], T], task: Task[T]) -> T:
        if self._stream is None:
            return work(task)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            try:
                return work(task)
            finally:
                task._event = torch.cuda.Event()
                task._event.record(self._stream)
