"""Methods side by side answer what each does alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime.checkpoints import picture, save_checkpoint
from runtime.compare import assert_same_answer
from torch import Tensor

from sgl_runtime import SGLConfig, SGLPipeline
from sgl_runtime.config import num_kept
from sgl_runtime.errors import ConfigError, ImageError, MemoryLimitError, NumericalError, SGLError
from sgl_runtime.evaluation.data import Example
from sgl_runtime.evaluation.methods import Answered, Method, answer_batch, make_methods
from sgl_runtime.evaluation.rankings import RANKINGS, Context
from sgl_runtime.requests import Answer, Prune

CONFIG = SGLConfig(max_new_tokens=5, max_batch=4)
SETTINGS = [(0.5, 2), (0.1, 2), (0.25, 0)]
LAYERS = 6


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    return (
        save_checkpoint(root / "small", text="qwen2", seed=1),
        save_checkpoint(root / "large", text="qwen3", seed=2, layers=LAYERS, heads=6),
    )


@pytest.fixture(scope="module")
def pipe(pair: tuple[Path, Path]) -> SGLPipeline:
    return SGLPipeline.from_pretrained(*pair, config=CONFIG, device="cpu")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    root = tmp_path_factory.mktemp("images")
    found = []
    for seed in range(4):
        picture(seed=seed).save(root / f"{seed}.png")
        found.append(Example(str(seed), (str(root / f"{seed}.png"),), f"what is {seed}?", ("x",), {}))
    return found


class Failing:
    """The guided ranking, which fails on example 1."""

    name = "failing"

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.calls = 0

    def rank(self, context: Context) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise self.error
        return RANKINGS["guided"].rank(context)


def answered(
    pipe: SGLPipeline, examples: list[Example], methods: list[Method], **options: str
) -> list[list[Answered]]:
    found = answer_batch(pipe, examples, methods, **options)
    assert not any(isinstance(one, SGLError) for one in found)
    return found  # type: ignore[return-value]


def answers_of(pipe: SGLPipeline, monkeypatch: pytest.MonkeyPatch) -> list[dict[int, Answer]]:
    """What the large VLM answers from now on, with what it kept: texts alone tell less."""
    answers: list[dict[int, Answer]] = []
    real = pipe.large.answer

    def answer(*args: Any, **options: Any) -> dict[int, Answer]:
        answers.append(real(*args, **options))
        return answers[-1]

    monkeypatch.setattr(pipe.large, "answer", answer)
    return answers


def texts(rows: list[Answered]) -> dict[tuple[str, float | None, int | None], str]:
    return {row.method.key: row.prediction for row in rows}


def test_every_method_answers_as_the_engine_does_alone(
    pipe: SGLPipeline, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of three against single runs: tokens, probabilities and what was kept, not the text alone."""
    assert pipe.small_processor is not None
    assert pipe.large_processor is not None
    methods = make_methods(RANKINGS.values(), SETTINGS, LAYERS)
    assert len(methods) == 2 + len(RANKINGS) * len(SETTINGS)
    answers = answers_of(pipe, monkeypatch)
    found = answered(pipe, examples[:3], methods)
    monkeypatch.undo()
    order = [m for layer in (None, 2, 0) for m in methods[1:] if m.prune_layer == layer]
    assert len(answers) == len(order)
    kept = set()
    for i, example in enumerate(examples[:3]):
        assert [row.method for row in found[i]] == methods
        got = {method.key: answer[i] for method, answer in zip(order, answers, strict=True)}
        asked = list(example.images), example.question
        result = pipe(*asked)
        small, *rest = found[i]
        assert small.prediction == result.small_text
        for name in ("confidence", "consistency", "decision_score"):
            assert small.scores[name] == pytest.approx(getattr(result, name), rel=1e-4)
        for row in rest:
            assert row.prediction == pipe.large_processor.decode(got[row.method.key].token_ids)
        [request] = pipe.large.encode([pipe.large.prompt(pipe.large_processor(*asked))])
        whole = pipe.large.generate(request, 5, with_mass=True)
        assert_same_answer(got["large", None, None], whole)
        last = torch.tensor([[request.prompt.length - 1]], dtype=torch.int32)
        for keep_ratio, layer in SETTINGS:
            rankings = {
                "guided": result.mass[None],
                "oracle": whole.mass,
                "fastv": pipe.large.layer_mass(request, last)[max(layer - 1, 0)],
            }
            for name, ranking in rankings.items():
                prune = Prune(layer, ranking, num_kept(request.prompt.num_visual, keep_ratio))
                alone = pipe.large.generate(request, 5, prune=prune)
                assert_same_answer(got[name, keep_ratio, layer], alone)
            config = replace(CONFIG, keep_ratio=keep_ratio, prune_layer=layer)
            assert got["guided", keep_ratio, layer].token_ids == pipe.with_config(config)(*asked).token_ids
            assert got["guided", keep_ratio, layer].kept_index.tolist() == (
                pipe.with_config(config)(*asked).kept_index.tolist()
            )
        kept |= {(i, str(answer.kept_index)) for answer in got.values()}
    assert len(kept) > 40  # or the same would do for all


def test_a_batch_changes_nothing(pipe: SGLPipeline, examples: list[Example]) -> None:
    methods = make_methods(RANKINGS.values(), SETTINGS, LAYERS)
    together = answered(pipe, examples, methods)
    for example, rows in zip(examples, together, strict=True):
        [alone] = answered(pipe, [example], methods)
        assert texts(rows) == texts(alone)
        assert all(row.seconds > 0 for row in rows)


def test_each_thing_is_computed_once(
    pipe: SGLPipeline, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def spy(name: str) -> None:
        for vlm in (pipe.small, pipe.large):
            real = getattr(vlm, name)

            def called(*args, real=real, of=vlm.name, **options):  # type: ignore[no-untyped-def]
                calls.append(f"{of} {name}")
                return real(*args, **options)

            monkeypatch.setattr(vlm, name, called)

    for name in ("encode", "begin", "answer"):
        spy(name)
    rankings = [RANKINGS[name] for name in ("guided", "oracle", "random")]
    answered(pipe, examples[:2], make_methods(rankings, SETTINGS, LAYERS))
    counts = {name: calls.count(name) for name in set(calls)}
    assert counts == {
        "small encode": 1,
        "small begin": 1,
        "small answer": 1,
        "large encode": 1,
        "large begin": 3,  # unpruned, and before each of two prune layers
        "large answer": 10,
    }
    calls.clear()
    answered(pipe, examples[:2], make_methods([], [], LAYERS, large=False))
    assert not any("large" in call for call in calls)
    calls.clear()
    answered(pipe, examples[:2], make_methods([RANKINGS["fastv"]], SETTINGS, LAYERS, small=False))
    assert not any("small" in call for call in calls)


@pytest.mark.parametrize("keep_scope", ["request", "image"])
def test_prompts_of_other_lengths_keep_their_own_share(
    pipe: SGLPipeline,
    pair: tuple[Path, Path],
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
    keep_scope: str,
) -> None:
    """One, two and six images in a batch, over all of a request or of each image, as the pipeline keeps."""
    several = [
        replace(examples[0], id=str(count), images=sum((e.images for e in examples * 2), ())[:count])
        for count in (1, 2, 6)
    ]
    settings = [(0.07, 1), (0.3, 1), (0.9, 1)]
    # A pipeline of its own: memory must be made for the setting that keeps most, which does not come first.
    config = replace(CONFIG, keep_scope=keep_scope)
    other = SGLPipeline.from_pretrained(*pair, config=config, device="cpu")
    answers = answers_of(other, monkeypatch)
    methods = make_methods([RANKINGS["guided"]], settings, LAYERS, small=False, large=False)
    found = answered(other, several, methods)
    monkeypatch.undo()
    for (keep_ratio, layer), answer, place in zip(settings, answers, range(3), strict=True):
        alone = pipe.with_config(replace(config, keep_ratio=keep_ratio, prune_layer=layer))
        for i, example in enumerate(several):
            result = alone(list(example.images), example.question)
            assert answer[i].kept_index.tolist() == result.kept_index.tolist()
            assert answer[i].token_ids == result.token_ids
            assert found[i][place].prediction == result.text


def test_the_suffix_is_asked(pipe: SGLPipeline, examples: list[Example]) -> None:
    [rows] = answered(pipe, examples[:1], make_methods([], [], LAYERS), suffix="\nIn a word.")
    asked = pipe(list(examples[0].images), examples[0].question + "\nIn a word.")
    assert rows[0].prediction == asked.small_text
    assert rows[0].prediction != pipe(list(examples[0].images), examples[0].question).small_text


def test_who_fails_is_answered_by_none(pipe: SGLPipeline, examples: list[Example]) -> None:
    missing = replace(examples[1], images=("/nowhere/missing.png",))
    long = replace(examples[2], question="why? " * 200)
    methods = make_methods([RANKINGS["guided"]], SETTINGS, LAYERS)
    found = answer_batch(pipe, [examples[0], missing, long, examples[3]], methods)
    assert isinstance(found[1], ImageError)
    assert "context" in str(found[2])
    expected = answered(pipe, [examples[0], examples[3]], methods)
    assert [texts(found[0]), texts(found[3])] == [texts(rows) for rows in expected]  # type: ignore[arg-type]
    assert isinstance(answer_batch(pipe, [missing], methods)[0], ImageError)

    failing = Failing(NumericalError("NaN"))
    found = answer_batch(pipe, examples[:3], make_methods([failing], [(0.5, 2)], LAYERS))
    assert isinstance(found[1], NumericalError)
    assert [row.method.name for row in found[2]] == ["small", "large", "failing"]  # type: ignore[union-attr]
    for fatal in (MemoryLimitError("full"), ConfigError("wrong")):
        with pytest.raises(type(fatal)):
            answer_batch(pipe, examples[:3], make_methods([Failing(fatal)], [(0.5, 2)], LAYERS))


def test_a_users_ranking_that_fails_is_named_with_its_example(
    pipe: SGLPipeline, examples: list[Example]
) -> None:
    methods = make_methods([Failing(IndexError("out of range"))], [(0.5, 2)], LAYERS)
    named = [replace(example, id=f"q{example.id}") for example in examples]
    missing = replace(named[0], images=("/nowhere/missing.png",))
    with pytest.raises(ConfigError, match="'failing' failed on example q2: IndexError: out of range"):
        answer_batch(pipe, [named[0], missing, *named[2:]], methods)


def test_an_example_that_makes_nan(pipe: SGLPipeline, examples: list[Example]) -> None:
    """Weights that give NaN are the example's error, with its stage, not a score."""
    weight = pipe.large.model.norm.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    try:
        methods = make_methods([RANKINGS["guided"]], [(0.5, 2)], LAYERS, large=False)
        [found] = answer_batch(pipe, examples[:1], methods)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert isinstance(found, NumericalError)
    assert "large" in str(found)


def test_settings_become_layers(pipe: SGLPipeline) -> None:
    methods = make_methods([RANKINGS["guided"]], [(0.2, 0.5), (0.2, 3), (0.1, 0.5)], LAYERS, large=False)
    assert [method.key for method in methods] == [
        ("small", None, None),
        ("guided", 0.2, 3),
        ("guided", 0.1, 3),
    ]


class Guided:
    name = "guided"

    def rank(self, context: Context) -> Tensor:
        raise AssertionError


class Small(Guided):
    name = "small"


@pytest.mark.parametrize(
    ("rankings", "settings", "message"),
    [
        ([RANKINGS["guided"]], [(0.2, 6)], "outside the large model"),
        ([RANKINGS["guided"]], [(20, 2)], "looks like a percentage"),
        ([RANKINGS["guided"], RANKINGS["guided"]], [(0.2, 2)], "Two methods are called 'guided'"),
        ([Guided()], [(0.2, 2)], "Two methods are called 'guided'"),
        ([Small()], [(0.2, 2)], "Two methods are called 'small'"),
        ([RANKINGS["guided"]], [], "nothing to compare"),
    ],
)
def test_settings_that_cannot_be(rankings: list, settings: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_methods(rankings, settings, LAYERS, small=False, large=False)


def test_a_pipeline_without_tokenizers(pipe: SGLPipeline, examples: list[Example]) -> None:
    bare = SGLPipeline(pipe.small, pipe.large, CONFIG)
    with pytest.raises(ConfigError, match="from_pretrained"):
        answer_batch(bare, examples[:1], make_methods([], [], LAYERS))
