"""Captured steps, on an emulated device and on a real one; the flag by which the host learns of the end."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import InternVLForConditionalGeneration

from sgl_runtime import SGLConfig, SGLPipeline
from sgl_runtime.engine import VLM
from sgl_runtime.graphs import FinishedFlag, StepGraph
from sgl_runtime.memory import DecodeState
from sgl_runtime.requests import Answer, Prune, Request

from . import slow, test_golden
from .compare import assert_same_answer
from .emulated_graphs import Device, emulated

LAYOUTS = ["tIttt", "tItttItIIt", "IttItt", "tItttt", "tttttttttttItttttttttttt"]


@pytest.fixture
def device() -> Iterator[Device]:
    with emulated() as device:
        yield device


@pytest.fixture(scope="module")
def model() -> Any:
    model = slow.make_model("qwen3", seed=1)
    model.generation_config.eos_token_id = [slow.EOS, *range(20, 35)]
    return model


@pytest.fixture(scope="module")
def plain(model: Any) -> VLM:
    return VLM(model, "small")


@pytest.fixture
def captured(model: Any) -> VLM:
    engine = VLM(model, "small")
    engine.steps.captured = True
    return engine


def requests_of(engine: VLM, *numbers: int) -> list[Request]:
    return engine.encode([engine.prompt(slow.make_inputs(LAYOUTS[i], seed=i)) for i in numbers])


def answers(engine: VLM, numbers: tuple[int, ...], kind: str, new: int = 7) -> list[Answer]:
    requests = requests_of(engine, *numbers)
    if kind == "mass":
        return [*engine.answer(engine.begin(requests, new, with_mass=True)).values()]
    if kind == "plain":
        return [*engine.answer(engine.begin(requests, new)).values()]
    rankings = [
        torch.arange(r.prompt.num_visual, dtype=torch.float32, device=engine.model.device)[None] % 5
        for r in requests
    ]
    prunes = {i: Prune(2, ranking, 6) for i, ranking in enumerate(rankings)}
    drafts = {i: [40 + i, 3] for i in prunes} if kind == "draft" else None
    prefix = engine.begin(
        requests, new, prune_layer=2, num_keep=[6] * len(requests), with_draft=kind == "draft"
    )
    return [*engine.answer(prefix, prunes=prunes, drafts=drafts).values()]


SEQUENCE = [
    ((0,), "mass"),
    ((1,), "mass"),
    ((0, 1, 2), "mass"),
    ((2, 0), "plain"),
    ((3,), "pruned"),
    ((4, 0, 1), "pruned"),
    ((1, 3), "draft"),
    ((0,), "mass"),
    ((4, 3, 2, 1, 0), "mass"),
    ((0, 1, 2), "mass"),
]


def test_replayed_steps_answer_the_same(plain: VLM, captured: VLM, device: Device) -> None:
    """Through growing memory, other prune layers, other batches: a graph of old memory would tell."""
    for numbers, kind in SEQUENCE:
        before = len(device.replays)
        for one, other in zip(answers(captured, numbers, kind), answers(plain, numbers, kind), strict=True):
            assert_same_answer(one, other)
            assert one.logprobs == other.logprobs
            assert one.accepted == other.accepted
            assert one.mass is None or torch.equal(one.mass, other.mass)
        assert len(device.replays) > before


def test_capture_is_before_the_run_and_steps_are_replays(
    captured: VLM, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, steps = [], []
    begin, step = DecodeState.begin, captured.steps.step

    def spy_begin(state: DecodeState, *args: Any) -> Any:
        begun.append(len(device.captures))
        return begin(state, *args)

    def spy_step(*args: Any) -> None:
        before = len(device.replays), len(device.captures)
        step(*args)
        steps.append((len(device.replays) - before[0], len(device.captures) - before[1]))

    monkeypatch.setattr(DecodeState, "begin", spy_begin)
    monkeypatch.setattr(captured.steps, "step", spy_step)
    for numbers, kind in SEQUENCE[:7]:
        begun.clear()
        found = answers(captured, numbers, kind)
        assert begun == [len(device.captures)] * len(begun)
        assert len(begun) >= 1
        longest = max(len(answer.token_ids) for answer in found)
        if kind != "draft":
            assert steps == [(1, 0)] * (longest - 1)
        steps.clear()
    count = len(device.captures)
    answers(captured, (1, 3), "draft")
    assert len(device.captures) == count


def test_preparing_replays_nothing(captured: VLM, device: Device) -> None:
    """It may run in a thread beside one that replays a graph of the same pool."""
    captured.reserve(2, 64, 64, None, 7)
    with torch.no_grad():
        captured.steps.prepare(2, False)
    assert keys(captured) == {(2, False, True)}
    assert (len(device.captures), len(device.replays)) == (1, 0)


def test_threads_capture_one_after_the_other(device: Device) -> None:
    inside, never = Event(), Event()

    def slow_step() -> None:
        if device.capturing:
            inside.set()
            never.wait(0.2)

    first, second = StepGraph(slow_step), StepGraph(lambda: None)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(first.capture)
        assert inside.wait(20)
        second.capture()
        done.result()
    assert len(device.captures) == 2


def keys(engine: VLM) -> set[tuple[int, bool, bool]]:
    return {*engine.steps._present_graphs().decode}


def test_graphs_are_known_by_batch_and_mass_and_go_with_the_memory(captured: VLM, device: Device) -> None:
    captured.reserve(4, 130, 130, None, 8)
    for numbers, kind in [((0,), "mass"), ((0, 1), "mass"), ((0, 1, 2), "plain"), ((2,), "plain")]:
        answers(captured, numbers, kind)
    assert keys(captured) == {(1, True, True), (2, True, True), (4, False, True), (1, False, True)}
    step = captured.steps._graph(1, True, True)
    assert captured.steps._graph(1, True, True) is step
    state = captured.memory.state
    captured.reserve(4, 130, 130, None, 9)
    assert captured.memory.state is not state
    assert keys(captured) == set()
    answers(captured, (0,), "mass")
    assert keys(captured) == {(1, True, True)}
    assert captured.steps._graph(1, True, True) is not step


def test_compiled_and_plain_steps_have_graphs_of_their_own(plain: VLM) -> None:
    compiled = plain.with_compiled(True)
    assert compiled.with_compiled(True) is compiled
    assert plain.with_compiled(False) is plain
    assert compiled.steps is not plain.steps
    assert compiled.memory is plain.memory
    assert compiled.steps._graphs is not plain.steps._graphs


def test_prefill_is_replayed_only_where_that_is_faster(captured: VLM, device: Device) -> None:
    captured.reserve(1, 130, 130, None, 7)
    device.replays_are_fast = False
    answers(captured, (0,), "mass")
    prefill = captured.steps._present_graphs().prefill
    assert [*prefill._known.values()] == [None]
    replays = len(device.replays)
    answers(captured, (0,), "mass", new=1)
    assert len(device.replays) == replays
    device.replays_are_fast = True
    answers(captured, (1,), "mass", new=1)
    assert len(device.replays) > replays
    assert [known is not None for known in prefill._known.values()] == [False, True]


def test_prefill_graphs_do_not_pile_up(
    captured: VLM, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sgl_runtime.graphs._MOST_SHAPES", 2)
    captured.reserve(1, 130, 130, None, 7)
    expected = []
    for layout in ("ttIttt", "tIIttt", "tIIIttt", "tIIIIttt", "ttIttt"):
        [request] = captured.encode([captured.prompt(slow.make_inputs(layout))])
        expected.append(captured.generate(request, 2, with_mass=True).token_ids)
    assert expected[0] == expected[-1]
    assert len(captured.steps._present_graphs().prefill._known) == 2


def test_logits_processors_run_between_uncaptured_steps(device: Device) -> None:
    model = slow.make_model("llama", seed=15)
    model.generation_config.update(repetition_penalty=1.7)
    plain, captured = VLM(model, "small"), VLM(model, "small")
    captured.steps.captured = True
    for numbers in ((0,), (1, 2, 0)):
        expected = answers(plain, numbers, "mass")
        for one, other in zip(answers(captured, numbers, "mass"), expected, strict=True):
            assert_same_answer(one, other)


def test_tables_that_graphs_read_stay_when_longer_ones_come(captured: VLM, device: Device) -> None:
    captured.generate(requests_of(captured, 0)[0], 3)
    tables = captured.decoder.cos.data_ptr(), captured.decoder.cos.clone()
    [longer] = captured.encode([captured.prompt(slow.make_inputs("tIIIIIIIIt"))])
    captured.layer_mass(longer)
    assert captured.decoder.cos.data_ptr() != tables[0]
    assert tables[0] in [cos.data_ptr() for cos, _ in captured.decoder._tables]
    torch.testing.assert_close(captured.decoder.cos[: len(tables[1])], tables[1], rtol=0, atol=0)


def test_a_graph_without_capture_calls() -> None:
    calls = []
    graph = StepGraph(lambda: calls.append(1) or len(calls))
    assert [graph(), graph()] == [1, 2]


def test_the_emulated_device_is_like_a_real_one(device: Device) -> None:
    """A capture changes nothing, a replay works on its tensors, and outputs do not outlive the next one."""
    total, more = torch.zeros(3), torch.ones(3)

    def add() -> torch.Tensor:
        total.add_(more)
        return total * 2

    graph = StepGraph(add)
    graph.capture()
    assert total.tolist() == [3.0] * 3  # the three runs before it
    output = graph()
    assert output.tolist() == [8.0] * 3
    more.fill_(10)
    assert graph() is output
    assert output.tolist() == [28.0] * 3
    other = StepGraph(lambda: more + 1)
    other.capture()
    other()
    assert output.isnan().all()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        StepGraph(lambda: total.add_(1) if total.sum().item() > 0 else None).capture()


def test_flag_on_the_cpu_is_read_at_once() -> None:
    flag, finished = FinishedFlag(torch.device("cpu")), torch.tensor([False, False])
    for _ in range(2):
        flag.reset()
        finished[:] = False
        assert not flag.seen(finished)
        flag.record(finished)
        finished[0] = True
        assert not flag.seen(finished)
        finished[1] = True
        assert flag.seen(finished)


class CopyEvent:
    """Notes how many records have followed one that is waited for."""

    records = 0
    waits: ClassVar[list[int]] = []

    def record(self) -> None:
        CopyEvent.records += 1
        self.recorded = CopyEvent.records

    def synchronize(self) -> None:
        self.waits.append(CopyEvent.records - self.recorded)


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> FinishedFlag:
    """The flag as it is on CUDA, in ordinary memory."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **kwargs: empty(*size, **kwargs))
    monkeypatch.setattr(torch.cuda, "Event", CopyEvent)
    CopyEvent.waits.clear()
    return FinishedFlag(torch.device("cuda"))


@pytest.mark.parametrize("last", range(6))
def test_delayed_flag_tells_of_the_record_before_the_last(delayed: FinishedFlag, last: int) -> None:
    """It looks at a step only after the next one has been launched, and waits for no later one."""
    for _ in range(2):
        delayed.reset()
        finished = torch.tensor([True, last == 0])
        told = [delayed.seen(finished)]
        for step in range(1, 7):
            finished[1] = step >= last
            delayed.record(finished)
            told.append(delayed.seen(finished))
        assert told == [last == 0] + [step >= max(2, last + 1) for step in range(1, 7)]
    assert CopyEvent.waits == [1] * 10


def test_a_delayed_flag_changes_no_answer(
    plain: VLM, delayed: FinishedFlag, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps too many that it costs, at most two, add no token and no mass."""
    for numbers, kind in SEQUENCE:
        expected = answers(plain, numbers, kind)
        with monkeypatch.context() as patch:
            patch.setattr(plain, "_flag", delayed)
            found = answers(plain, numbers, kind)
        for one, other in zip(found, expected, strict=True):
            assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)
            assert one.mass is None or torch.equal(one.mass, other.mass)


@pytest.fixture(scope="module")
def on_gpu() -> tuple[VLM, VLM]:
    """Captured and not, of the same weights."""
    model = slow.make_model("qwen3", seed=1)
    model.generation_config.eos_token_id = [slow.EOS, *range(20, 35)]
    engines = VLM(model.to("cuda"), "small"), VLM(model, "small")
    engines[1].steps.captured = False
    return engines


GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


class TestOnGpu:
    pytestmark = GPU

    def test_captured_steps_answer_the_same(self, on_gpu: tuple[VLM, VLM]) -> None:
        for numbers, kind in SEQUENCE * 2:
            found, expected = (answers(engine, numbers, kind) for engine in on_gpu)
            for one, other in zip(found, expected, strict=True):
                assert_same_answer(one, other)
                assert one.accepted == other.accepted

    def test_answers_are_those_of_the_cpu(self, on_gpu: tuple[VLM, VLM], plain: VLM) -> None:
        for numbers, kind in SEQUENCE:
            found, expected = answers(on_gpu[0], numbers, kind), answers(plain, numbers, kind)
            assert [one.token_ids for one in found] == [one.token_ids for one in expected]
            for one, other in zip(found, expected, strict=True):
                if one.mass is not None and other.mass is not None:
                    torch.testing.assert_close(one.mass.cpu(), other.mass, rtol=1e-3, atol=0)

    @pytest.mark.parametrize("captured", [True, False])
    @pytest.mark.parametrize("kind", ["mass", "plain"])
    def test_a_step_never_waits_for_the_device(
        self, on_gpu: tuple[VLM, VLM], captured: bool, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine, numbers = on_gpu[not captured], (0, 1, 2)
        expected = [one.token_ids for one in answers(engine, numbers, kind)]
        step = engine.steps.step

        def watched(*args: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                step(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(engine.steps, "step", watched)
        assert [one.token_ids for one in answers(engine, numbers, kind)] == expected

    @pytest.mark.parametrize("schedule", ["throughput", "latency"])
    def test_golden(self, schedule: str) -> None:
        models = [
            InternVLForConditionalGeneration.from_pretrained(test_golden.COPY / f"{name}-native").to("cuda")
            for name in ("small", "large")
        ]
        inputs = load_file(test_golden.COPY / "inputs.safetensors")
        pipe = SGLPipeline.from_models(*models)
        for case in test_golden.EXPECTED["large"] * 2:
            config = SGLConfig(
                max_new_tokens=8,
                consistency_keep_ratio=test_golden.EXPECTED["consistency_ratio"],
                prune_layer=case["layer"],
                keep_ratio=case["ratio"],
                compile=False,
                schedule=schedule,
            )
            result = pipe.with_config(config).generate(inputs, inputs)
            assert result.small_token_ids == test_golden.EXPECTED["small_ids"]
            assert result.token_ids == case["ids"]
            assert result.consistency == pytest.approx(test_golden.EXPECTED["consistency"], rel=1e-3)
