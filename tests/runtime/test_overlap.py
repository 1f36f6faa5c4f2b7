"""Two schedules, one result; what is discarded, raised or interrupted on the way harms nothing later."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from threading import Event
from typing import Any

import pytest
import torch

from sgl_runtime import SGLConfig, SGLPipeline
from sgl_runtime.engine import VLM
from sgl_runtime.errors import MemoryLimitError
from sgl_runtime.overlap import Cancelled, Task, Worker

from . import slow

CONFIG = SGLConfig(max_new_tokens=6, prune_layer=2, keep_ratio=0.3)
SCHEDULES = ["throughput", "latency"]
LAYOUTS = ["tIttt", "tItttItIIt", "IttItt", "tttttttItttttttt"]
SOON = 20  # seconds; only a test that fails waits as long


@pytest.fixture
def pipe(small_model: torch.nn.Module, large_model: torch.nn.Module) -> SGLPipeline:
    return SGLPipeline.from_models(small_model, large_model, CONFIG)


def configured(pipe: SGLPipeline, **changes: Any) -> SGLPipeline:
    return pipe.with_config(replace(CONFIG, **changes))


def record(pipe: SGLPipeline, seed: int = 0) -> dict[str, Any]:
    """Everything but the timings of a run, to the bit."""
    inputs = slow.make_inputs(LAYOUTS[seed % len(LAYOUTS)], seed=seed)
    result = pipe.generate(inputs, inputs).to_dict()
    del result["timings"]
    return result


def before(patch: pytest.MonkeyPatch, target: Any, name: str, action: Callable[[], None]) -> None:
    """Make ``target.name`` do ``action`` first."""
    real = getattr(target, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        action()
        return real(*args, **kwargs)

    patch.setattr(target, name, both)


def wait(event: Event) -> None:
    assert event.wait(SOON)


@pytest.mark.parametrize("keep_ratio", [0.3, 1.0])
@pytest.mark.parametrize("draft", [True, False])
def test_schedules_agree(pipe: SGLPipeline, keep_ratio: float, draft: bool) -> None:
    """Also when some exit, and what they leave behind is discarded at whatever point it has reached."""
    changes = {"keep_ratio": keep_ratio, "draft": draft}
    free = [record(configured(pipe, **changes), seed) for seed in range(6)]
    threshold = sorted(result["decision_score"] for result in free)[3]
    throughput, latency = (
        configured(pipe, exit_threshold=threshold, schedule=schedule, **changes) for schedule in SCHEDULES
    )
    one, other = ([record(p, seed) for seed in range(6)] for p in (throughput, latency))
    assert one == other
    assert [result["exited"] for result in one].count(True) == 3
    assert free == [record(configured(pipe, schedule="latency", **changes), seed) for seed in range(6)]


def test_timings_have_the_same_stages(pipe: SGLPipeline) -> None:
    inputs = slow.make_inputs()
    one, other = (configured(pipe, schedule=s).generate(inputs, inputs).timings for s in SCHEDULES)
    assert one.keys() == other.keys()
    assert all(seconds > 0 for seconds in other.values())


def test_the_large_vlm_works_while_the_small_one_answers(
    pipe: SGLPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = record(pipe)
    encoding, begun = Event(), Event()
    before(monkeypatch, pipe.large, "encode", encoding.set)
    before(monkeypatch, pipe.large.steps, "lower", begun.set)
    with monkeypatch.context() as patch:
        before(patch, pipe.small.steps, "step", lambda: wait(begun))
        assert record(configured(pipe, schedule="latency")) == expected
    encoding.clear()
    before(
        monkeypatch, pipe.small.steps, "step", lambda: pytest.fail("too soon") if encoding.is_set() else None
    )
    assert record(configured(pipe, schedule="throughput")) == expected
    assert encoding.is_set()


def test_an_exit_neither_waits_nor_begins_layers(pipe: SGLPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    leaving = configured(pipe, schedule="latency", exit_threshold=0.0)
    expected = record(pipe)
    started, released = Event(), Event()
    calls: list[str] = []
    with monkeypatch.context() as patch:
        before(patch, pipe.large, "encode", lambda: (started.set(), wait(released)))
        before(patch, pipe.large, "begin", lambda: calls.append("begin"))
        before(patch, pipe.small, "answer", lambda: wait(started))
        inputs = slow.make_inputs(LAYOUTS[0])
        result = leaving.generate(inputs, inputs)  # and returns, though the vision tower has not
        assert result.exited
        assert not any(stage.startswith("large") for stage in result.timings)
        task = pipe._worker._last
        released.set()
        assert isinstance(task._future.exception(SOON), Cancelled)
    assert not calls
    assert record(configured(pipe, schedule="latency")) == expected
    assert record(pipe) == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_next_request_waits_for_what_was_discarded(
    pipe: SGLPipeline, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exit leaves the large VLM in the middle of its layers, which use the memory of the next run."""
    expected = record(pipe, 1)
    entered, released, order = Event(), Event(), list[str]()

    def hold() -> None:
        if not entered.is_set():
            entered.set()
            wait(released)
            order.append("discarded")

    before(monkeypatch, pipe.large.steps, "lower", hold)
    with monkeypatch.context() as patch:
        before(patch, pipe.small, "answer", lambda: wait(entered))
        assert record(configured(pipe, schedule="latency", exit_threshold=0.0), 0)["exited"]
    before(monkeypatch, pipe.large, "encode", lambda: order.append("next"))
    real_join, real_start = Worker.join, Worker.start

    def release_and_join(worker: Worker) -> None:
        released.set()
        real_join(worker)

    def start_and_release(worker: Worker, *args: Any) -> Any:
        task = real_start(worker, *args)
        released.set()
        return task

    monkeypatch.setattr(Worker, "join", release_and_join)
    monkeypatch.setattr(Worker, "start", start_and_release)
    assert record(configured(pipe, schedule=schedule), 1) == expected
    assert order == ["discarded", "next"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stage", ["encode", "begin"])
def test_an_error_of_the_large_vlm_counts_when_it_is_needed(
    pipe: SGLPipeline, schedule: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, raised = record(pipe), Event()

    def fail() -> None:
        raised.set()
        raise ZeroDivisionError("made up")

    with monkeypatch.context() as patch:
        before(patch, pipe.large, stage, fail)
        with pytest.raises(ZeroDivisionError, match="made up"):
            record(configured(pipe, schedule=schedule))
        if schedule == "latency":
            raised.clear()
            before(patch, pipe.small, "answer", lambda: wait(raised))
        leaving = record(configured(pipe, schedule=schedule, exit_threshold=0.0))
        assert leaving["exited"]
        assert leaving["token_ids"] == expected["small_token_ids"]
    assert record(configured(pipe, schedule=schedule)) == expected


def vlm_of(pipe: SGLPipeline, name: str) -> VLM:
    return pipe.small if name == "small" else pipe.large


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("draft", [True, False])
@pytest.mark.parametrize(
    ("name", "step"),
    [("small", "guided"), ("small", "step"), ("small", "upper"), ("large", "upper"), ("large", "step")],
)
def test_an_interrupt_leaves_the_pipeline_usable(
    pipe: SGLPipeline, schedule: str, draft: bool, name: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = configured(pipe, schedule=schedule, draft=draft)
    expected = [record(pipe, seed) for seed in range(2)]
    calls: list[str] = []

    def interrupt() -> None:
        calls.append(step)
        if len(calls) == (2 if step == "step" else 1):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        before(patch, vlm_of(pipe, name).steps, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            record(pipe, 1)
    assert [record(pipe, seed) for seed in range(2)] == expected
    inputs = [slow.make_inputs(LAYOUTS[seed], seed=seed) for seed in range(2)]
    results = pipe.generate_batch([(one, one) for one in inputs])
    assert [result.token_ids for result in results] == [one["token_ids"] for one in expected]


def test_an_interrupt_while_waiting_for_the_large_vlm(
    pipe: SGLPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    latency = configured(pipe, schedule="latency")
    expected, released = record(latency), Event()
    with monkeypatch.context() as patch:
        before(patch, pipe.large, "begin", lambda: wait(released))
        before(patch, Task, "result", lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            record(latency, 1)
    released.set()
    assert record(latency) == expected
    assert record(pipe) == expected


def out_of_memory() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("name", "part", "method"),
    [
        ("small", "", "encode"),
        ("small", "steps", "guided"),
        ("small", "steps", "step"),
        ("large", "", "encode"),
        ("large", "steps", "lower"),
        ("large", "steps", "step"),
    ],
)
def test_out_of_memory(
    pipe: SGLPipeline, schedule: str, name: str, part: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = configured(pipe, schedule=schedule)
    expected = record(pipe)
    vlm = vlm_of(pipe, name)
    with monkeypatch.context() as patch:
        before(patch, vlm.steps if part else vlm, method, out_of_memory)
        with pytest.raises(MemoryLimitError) as caught:
            record(pipe)
    message = str(caught.value)
    assert "Memory ran out with 1 requests (max_batch=8, max_prompt_tokens=4096, max_new_tokens=6;" in message
    for owner, size in (("small", pipe.small), ("large", pipe.large)):
        assert f"{size.memory.allocated / 2**20:.0f} MiB in the {owner}" in message
    assert "1152921504606846976 bytes" in message
    assert "Lower max_batch, max_prompt_tokens or keep_ratio" in message
    assert record(pipe) == expected


def test_other_runtime_errors_stay_what_they_are(pipe: SGLPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    before(monkeypatch, pipe.large, "encode", lambda: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size") as caught:
        record(pipe)
    assert not isinstance(caught.value, MemoryLimitError)


def test_worker_runs_one_task_at_a_time() -> None:
    worker, order, released = Worker(torch.device("cpu")), list[int](), Event()
    first = worker.start(lambda task: (wait(released), task.check(), order.append(1)))
    first.discard()
    released.set()
    second = worker.start(lambda _: order.append(2) or 5)
    assert second.result() == 5
    assert order == [2]
    with pytest.raises(Cancelled):
        first.result()
    worker.join()
    worker.join()


def test_an_interrupted_wait_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, released, done = Worker(torch.device("cpu")), Event(), list[bool]()
    task = worker.start(lambda _: (wait(released), done.append(True)))
    with monkeypatch.context() as patch:
        patch.setattr(task._future, "exception", lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            worker.join()
    released.set()
    worker.join()
    assert done == [True]
