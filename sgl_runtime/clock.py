"""Wall-clock seconds per stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch


class Clock:
    """Adds up the seconds of named stages; on CUDA it waits for the device at both ends of a stage."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._wait = device.type == "cuda"

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside the ``with`` block to ``seconds[name]``."""
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        if self._wait:
            torch.cuda.synchronize()
        return perf_counter()
