"""Every family against transformers: masses, answers, pruned answers, drafts, batches, compiled or not.

The tests' parameters are families' names in `models.FAMILIES`; the README's table cites them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pytest
import torch

from sgl_runtime.engine import VLM
from sgl_runtime.requests import Answer, Prune, Request

from . import oracle
from .models import FAMILIES, VOCAB, Case, Inputs, Size

NEW = 6
LAYOUTS: list[tuple[Size, ...]] = [((1, 2), (2, 1)), ((2, 2),), ((1, 1), (1, 3), (1, 1))]
IMAGES = pytest.mark.parametrize("images", LAYOUTS, ids=["two images", "one image", "three images"])
RATIOS = (0.2, 0.5)
# What is traced is the text model alone: one of each that runtime/test_compiled.py has not, with fused
# projections, with M-RoPE, with that and DeepStack and a mixture of experts, with another name inside.
COMPILED = ("internvl-phi3", "qwen2_5_vl", "qwen3_vl_moe", "smolvlm")


@dataclass(frozen=True, eq=False)
class Pair:
    """One model for transformers, and the same for the runtime."""

    case: Case

    @cached_property
    def model(self) -> Any:
        return self.case.make_model(seed=1)

    @cached_property
    def exact(self) -> Any:
        """The model in fp64, as far as transformers lets it be."""
        model = self.case.make_model(seed=1).double()
        model.set_experts_implementation("eager")  # the default knows no fp64
        return model

    @cached_property
    def engine(self) -> VLM:
        return VLM(self.case.make_model(seed=1), "large")

    def request(self, inputs: Inputs, engine: VLM | None = None) -> Request:
        engine = self.engine if engine is None else engine
        [request] = engine.encode([engine.prompt(inputs)])
        return request

    def embed(self, inputs: Inputs) -> oracle.Embedded:
        return oracle.embed(self.case, self.model, inputs)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(FAMILIES[request.param])


def some_prune(layer: int, num_visual: int, ratio: float, seed: int = 0) -> Prune:
    """A ranking with ties."""
    generator = torch.Generator().manual_seed(seed)
    ranking = torch.randint(0, num_visual, (1, num_visual), generator=generator).float()
    return Prune(layer, ranking, max(1, int(num_visual * ratio)))


def assert_same(one: Answer, other: Answer) -> None:
    """The same answer, but for rounding where rows are padded or computed together."""
    assert one.error is None
    assert one.token_ids == other.token_ids
    assert one.logprobs == pytest.approx(other.logprobs, rel=1e-4, abs=1e-5)
    assert (one.kept_index is None) == (other.kept_index is None)
    assert one.kept_index is None or torch.equal(one.kept_index, other.kept_index)
    assert (one.mass is None) == (other.mass is None)
    if one.mass is not None:
        torch.testing.assert_close(one.mass, other.mass, rtol=1e-5, atol=0)


@IMAGES
def test_masses(pair: Pair, images: Any) -> None:
    inputs = pair.case.make_inputs(seed=2, images=images)
    request = pair.request(inputs)
    answer = pair.engine.generate(request, NEW, with_mass=True)
    prompt = pair.embed(inputs)
    attention = oracle.attention_matrices(pair.case, pair.exact, prompt, answer.token_ids)
    rows = oracle.text_rows(prompt, attention.shape[-1])
    expected = oracle.masses(attention, prompt.visual, rows)
    torch.testing.assert_close(answer.mass[0].double(), expected.sum(0), rtol=1e-5, atol=0)
    in_prompt = oracle.masses(attention, prompt.visual, rows[rows < prompt.length])
    torch.testing.assert_close(pair.engine.layer_mass(request)[:, 0].double(), in_prompt, rtol=1e-5, atol=0)
    for wrong in (prompt.visual[-1:], rows[rows > prompt.visual[0]][:1], rows[-1:]):  # each row shows
        assert (oracle.masses(attention, prompt.visual, wrong).sum(0) > 1e-3 * expected.sum(0)).any()


@IMAGES
def test_answers(pair: Pair, images: Any) -> None:
    for seed in range(3):
        inputs = pair.case.make_inputs(seed=seed, images=images)
        answer = pair.engine.generate(pair.request(inputs), 2 * NEW)
        assert answer.token_ids == oracle.greedy(pair.model, inputs, 2 * NEW)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_pruned_answers(pair: Pair, layer: int, ratio: float) -> None:
    for seed, images in enumerate(LAYOUTS):
        inputs = pair.case.make_inputs(seed=seed, images=images)
        request, prompt = pair.request(inputs), pair.embed(inputs)
        prune = some_prune(layer, len(prompt.visual), ratio, seed)
        answer = pair.engine.generate(request, NEW, prune=prune)
        kept = oracle.kept_positions(prompt, prune.ranking[0].tolist(), prune.num_keep)
        assert answer.kept_index.tolist() == kept
        ids, logprobs = oracle.pruned_greedy(pair.case, pair.model, prompt, layer, kept, NEW)
        assert answer.token_ids == ids
        assert answer.logprobs == pytest.approx(logprobs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("layer", [None, 0, 2])
def test_drafts(pair: Pair, layer: int | None) -> None:
    inputs = pair.case.make_inputs(seed=4)
    request = pair.request(inputs)
    prune = None if layer is None else some_prune(layer, request.prompt.num_visual, 0.3)
    free = pair.engine.generate(request, NEW, prune=prune)
    right = free.token_ids
    for agree in (len(right), len(right) // 2, 0):
        draft = [*right[:agree], *((token + 1) % VOCAB for token in right[agree:])]
        drafted = pair.engine.generate(request, NEW, prune=prune, draft=draft)
        assert_same(drafted, free)
        assert drafted.accepted == agree


@pytest.mark.parametrize("layer", [None, 0, 2])
def test_batches(pair: Pair, layer: int | None) -> None:
    """Of prompts, images, budgets and drafts unlike each other, in groups of several and of one."""
    engine = pair.engine
    wanted = [*LAYOUTS, ((1, 1),), ((1, 2), (2, 1))]
    texts = [None, None, None, (1, 40), (2, 9, 3)]
    inputs = [
        pair.case.make_inputs(seed=seed, images=images, text=text)
        for seed, (images, text) in enumerate(zip(wanted, texts, strict=True))
    ]
    requests = engine.encode([engine.prompt(one) for one in inputs])
    if layer is None:
        answers = engine.answer(engine.begin(requests, NEW, with_mass=True))
        for number, one in enumerate(inputs):
            assert_same(answers[number], engine.generate(pair.request(one), NEW, with_mass=True))
        return
    prunes = {
        i: some_prune(layer, request.prompt.num_visual, 0.1 + 0.15 * i, seed=i)
        for i, request in enumerate(requests)
    }
    alone = [engine.generate(pair.request(one), NEW, prune=prunes[i]) for i, one in enumerate(inputs)]
    drafts = {i: [*answer.token_ids[: i + 1], 11] for i, answer in enumerate(alone)}
    num_keep = [prunes[i].num_keep for i in range(len(inputs))]
    for given in (None, drafts):
        prefix = engine.begin(
            requests, NEW, prune_layer=layer, num_keep=num_keep, with_draft=given is not None
        )
        answers = engine.answer(prefix, prunes=prunes, drafts=given)
        for i, answer in enumerate(alone):
            assert_same(answers[i], answer)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is one graph, serves all sizes and says the same; runtime/test_compiled.py runs inductor."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    case = FAMILIES[name]
    pair = Pair(case)
    compiled = pair.engine.with_compiled(True)
    requests = [case.make_inputs(seed=seed, images=images) for seed, images in enumerate(LAYOUTS)]
    requests.sort(key=lambda inputs: -inputs["input_ids"].shape[1])  # the longest sets memory aside for all

    def check(inputs: Inputs, **options: Any) -> None:
        request = pair.request(inputs)
        if "prune" in options:
            options["prune"] = some_prune(options["prune"], request.prompt.num_visual, 0.3)
            free = pair.engine.generate(request, NEW, prune=options["prune"])
            options["draft"] = [*free.token_ids[:3], 11]
        plain = pair.engine.generate(request, NEW, **options)
        again = compiled.generate(pair.request(inputs, compiled), NEW, **options)
        assert_same(again, plain)
        assert again.accepted == plain.accepted

    runs: list[dict[str, Any]] = [{"prune": 1}, {"with_mass": True}]
    for run in (*runs, runs[0]):  # a run of the other kind lays memory out anew
        check(requests[0], **run)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for inputs in requests[1:]:
            for run in runs:
                check(inputs, **run)
