"""Stages on the CPU; on CUDA against stand-ins for events, and on a real GPU where there is one."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import pytest
import torch

from sgl_runtime.clock import Clock

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_adds_up_in_order_of_first_use() -> None:
    clock = Clock(CPU)
    for name, seconds in (("b", 0.02), ("a", 0.01), ("b", 0.03)):
        with clock.stage(name):
            time.sleep(seconds)
    assert list(clock.seconds) == ["b", "a"]
    assert 0.05 <= clock.seconds["b"] < 0.1
    assert 0.01 <= clock.seconds["a"] < 0.05


def test_what_was_read_does_not_change() -> None:
    clock = Clock(CPU)
    with clock.stage("a"):
        pass
    read = clock.seconds
    with clock.stage("a"):
        time.sleep(0.01)
    assert read["a"] < 0.01 <= clock.seconds["a"]


def test_a_stage_that_raises_counts_for_nothing() -> None:
    clock = Clock(CPU)
    with pytest.raises(ZeroDivisionError), clock.stage("a"):
        1 / 0  # noqa: B018
    assert clock.seconds == {"a": 0.0}


def test_threads_time_stages_at_once() -> None:
    clock = Clock(CPU)
    barrier = threading.Barrier(4)

    def work(own: str) -> None:
        barrier.wait()
        for _ in range(500):
            with clock.stage("shared"), clock.stage(own):
                pass
        with clock.stage(own):
            time.sleep(0.05)

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = clock.seconds
    assert set(seconds) == {"shared", "0", "1", "2", "3"}
    assert all(seconds[str(i)] >= 0.05 for i in range(4))


def test_stages_are_profiler_ranges() -> None:
    clock = Clock(CPU)
    on_cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=on_cpu) as profile, clock.stage("small_prefill"):
        torch.ones(4).sum()
    assert "small_prefill" in {event.key for event in profile.key_averages()}


class Device:
    """A device that works off what its streams were given when someone waits, a millisecond per record."""

    def __init__(self) -> None:
        self.now, self.waits, self.stream, self.ranges = 0.0, 0, "main", []
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.done = False

            def record(self, stream: str) -> None:
                device.now += 1.0
                self.time, self.stream = device.now, stream

            def synchronize(self) -> None:
                device.waits += 1
                self.done = True

            def elapsed_time(self, end: Event) -> float:
                assert end.done
                assert end.stream == self.stream
                return end.time - self.time

        self.Event = Event

    @contextmanager
    def range(self, name: str):
        self.ranges.append(name)
        yield
        self.ranges.append(f"end of {name}")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda which: device.stream)
    monkeypatch.setattr(torch.cuda.nvtx, "range", device.range)
    return device


def test_cuda_waits_only_when_read(device: Device) -> None:
    clock = Clock(CUDA)
    with clock.stage("a"):
        device.now += 4.0
    device.stream = "side"
    with clock.stage("b"), clock.stage("a"):
        device.now += 2.0
    assert device.waits == 0
    assert clock.seconds == pytest.approx({"a": 0.008, "b": 0.005})
    assert device.waits == 3
    assert clock.seconds == pytest.approx({"a": 0.008, "b": 0.005})
    assert device.waits == 3
    assert device.ranges == ["a", "end of a", "b", "a", "end of a", "end of b"]


def test_cuda_stage_that_raises(device: Device) -> None:
    clock = Clock(CUDA)
    with pytest.raises(KeyError), clock.stage("a"):
        raise KeyError
    assert clock.seconds == {"a": 0.0}
    assert device.waits == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    clock = Clock(CUDA)
    side = torch.cuda.Stream()
    big = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    with clock.stage("main"):
        for _ in range(20):
            big = (big @ big).clamp_(-1, 1)
    with torch.cuda.stream(side), clock.stage("side"):
        torch.zeros(1, device="cuda")
    queued = time.perf_counter() - began
    seconds = clock.seconds
    assert queued < seconds["main"] <= time.perf_counter() - began
    assert seconds["side"] > 0
