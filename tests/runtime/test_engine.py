"""The engine against transformers: masses, unpruned and pruned answers, on every text model it supports."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sgl_runtime.engine import VLM
from sgl_runtime.errors import NumericalError, PromptError
from sgl_runtime.requests import Prune, Request

from . import slow

LAYOUTS = ["tttIttttt", "tItttItIIt", "IttItt"]
NEW = 6


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def vlm(request: pytest.FixtureRequest) -> tuple[Any, VLM]:
    model = slow.make_model(request.param, seed=3)
    return model, VLM(model, "small")


def _request(engine: VLM, inputs: slow.Inputs) -> Request:
    [request] = engine.encode([engine.prompt(inputs)])
    return request


def _rows(inputs: slow.Inputs, fed: int) -> tuple[torch.Tensor, torch.Tensor]:
    visual = inputs["input_ids"][0] == slow.IMAGE_ID
    is_text = torch.cat((~visual, torch.ones(fed, dtype=torch.bool)))
    return visual.nonzero()[:, 0], is_text.nonzero()[:, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answer_is_transformers(vlm: tuple[Any, VLM], layout: str) -> None:
    model, engine = vlm
    for seed in range(3):
        inputs = slow.make_inputs(layout, seed=seed)
        assert engine.generate(_request(engine, inputs), 12).token_ids == slow.greedy(model, inputs, 12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mass_is_that_of_full_attention(vlm: tuple[Any, VLM], layout: str) -> None:
    model, engine = vlm
    inputs = slow.make_inputs(layout, seed=4)
    request = _request(engine, inputs)
    answer = engine.generate(request, NEW, with_mass=True)
    visual, text = _rows(inputs, len(answer.token_ids) - 1)
    attention = slow.attention_matrices(model, inputs, answer.token_ids)
    expected = slow.masses(attention, visual, text)
    torch.testing.assert_close(answer.mass[0], expected.sum(0), rtol=1e-4, atol=0)
    in_prompt = slow.masses(attention, visual, text[text < request.prompt.length])
    torch.testing.assert_close(engine.layer_mass(request)[:, 0], in_prompt, rtol=1e-4, atol=0)
    last_visual_row = slow.masses(attention, visual, visual[-1:]).sum(0)
    assert (last_visual_row > 1e-3 * expected.sum(0)).any()  # or a wrong row could hide


def test_text_between_spans_counts_for_the_spans_before_it(vlm: tuple[Any, VLM]) -> None:
    model, engine = vlm
    inputs = slow.make_inputs("tItttttIt", seed=5)
    request = _request(engine, inputs)
    answer = engine.generate(request, 1, with_mass=True)
    mass = answer.mass[0]
    visual, _ = _rows(inputs, 0)
    attention = slow.attention_matrices(model, inputs, answer.token_ids)
    last = torch.tensor([inputs["input_ids"].shape[1] - 1])
    only_last = slow.masses(attention, visual, last).sum(0)
    torch.testing.assert_close(mass[slow.PER_TILE :], only_last[slow.PER_TILE :], rtol=1e-4, atol=0)
    assert mass[: slow.PER_TILE].sum() > 1.5 * only_last[: slow.PER_TILE].sum()


def test_mass_is_conserved(vlm: tuple[Any, VLM]) -> None:
    _, engine = vlm
    inputs = slow.make_inputs("Itt", seed=6)
    request = _request(engine, inputs)
    length = request.prompt.length
    everything = replace(request.prompt, visual_index=torch.arange(length, dtype=torch.int32)[None])
    every_key = replace(request, prompt=everything)
    rows = request.prompt.text_rows.shape[1]
    per_layer = engine.layer_mass(every_key).sum((1, 2)).tolist()
    assert per_layer == pytest.approx([engine.model.num_heads * rows] * engine.num_layers, rel=1e-5)


def test_chosen_rows_and_layers(vlm: tuple[Any, VLM]) -> None:
    model, engine = vlm
    inputs = slow.make_inputs("ttItttt", seed=7)
    request = _request(engine, inputs)
    visual, _ = _rows(inputs, 0)
    last = inputs["input_ids"].shape[1] - 1
    mass = engine.layer_mass(request, torch.tensor([[last]], dtype=torch.int32))
    attention = slow.attention_matrices(model, inputs, [0])
    torch.testing.assert_close(
        mass[:, 0], slow.masses(attention, visual, torch.tensor([last])), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("layer", "num_keep"), [(0, 1), (0, 5), (1, 3), (2, 10), (3, 1)])
def test_pruned_answer_is_that_of_the_slow_loop(
    vlm: tuple[Any, VLM], layout: str, layer: int, num_keep: int
) -> None:
    model, engine = vlm
    inputs = slow.make_inputs(layout, seed=8)
    request = _request(engine, inputs)
    num_visual = request.prompt.num_visual
    ranking = torch.randint(0, 6, (1, num_visual), generator=torch.Generator().manual_seed(layer)).float()
    answer = engine.generate(request, NEW, prune=Prune(layer, ranking, num_keep))
    visual, _ = _rows(inputs, 0)
    kept = slow.kept_positions(visual.tolist(), request.prompt.length, ranking[0].tolist(), num_keep)
    assert answer.kept_index.tolist() == kept
    ids, logprobs = slow.pruned_greedy(model, inputs, layer, kept, NEW)
    assert answer.token_ids == ids
    assert answer.logprobs == pytest.approx(logprobs, rel=1e-4, abs=1e-5)


@torch.no_grad()
def test_pruned_logits_of_prompt_and_draft(vlm: tuple[Any, VLM]) -> None:
    model, engine = vlm
    inputs = slow.make_inputs("ttItIttt", seed=9)
    request = _request(engine, inputs)
    ranking = torch.rand(1, request.prompt.num_visual, generator=torch.Generator().manual_seed(0))
    prefix = engine.begin([request], NEW, prune_layer=2, num_keep=[7], with_draft=True)
    [group] = prefix.groups
    draft = group.padded_draft({0: [11, 12, 13]})
    logits, kept, kept_lens = engine._run_upper(
        group, group.begun, engine.memory.cache, 2, {0: Prune(2, ranking, 7)}, draft
    )
    expected = slow.pruned_logits(model, inputs, [11, 12], 2, kept[0, : kept_lens[0]].tolist())[-3:]
    torch.testing.assert_close(logits[0, :3], expected, rtol=1e-4, atol=1e-4)


def test_keeping_all_is_not_pruning(vlm: tuple[Any, VLM]) -> None:
    _, engine = vlm
    request = _request(engine, slow.make_inputs(seed=10))
    ranking = torch.zeros(1, slow.PER_TILE)
    pruned = engine.generate(request, NEW, prune=Prune(1, ranking, slow.PER_TILE))
    plain = engine.generate(request, NEW)
    assert pruned.token_ids == plain.token_ids
    assert pruned.logprobs == plain.logprobs


def test_generated_image_token_is_text() -> None:
    model = slow.make_model("qwen2", seed=11)
    with torch.no_grad():
        model.lm_head.weight[slow.IMAGE_ID] = (
            3
            * model.lm_head.weight.norm(dim=1).max()
            * torch.nn.functional.normalize(
                torch.randn(model.lm_head.weight.shape[1], generator=torch.Generator().manual_seed(0)), dim=0
            )
        )
    engine = VLM(model, "small")
    for seed in range(20):
        inputs = slow.make_inputs(seed=seed)
        request = _request(engine, inputs)
        answer = engine.generate(request, NEW, with_mass=True)
        if slow.IMAGE_ID in answer.token_ids[:-1]:
            break
    assert slow.IMAGE_ID in answer.token_ids[:-1]
    visual, text = _rows(inputs, len(answer.token_ids) - 1)
    expected = slow.masses(slow.attention_matrices(model, inputs, answer.token_ids), visual, text).sum(0)
    torch.testing.assert_close(answer.mass[0], expected, rtol=1e-4, atol=0)
    assert answer.token_ids == slow.pruned_greedy(model, inputs, 99, [], NEW)[0]


def test_runs_repeat_bit_for_bit(vlm: tuple[Any, VLM]) -> None:
    _, engine = vlm
    first, second = (slow.make_inputs(layout, seed=12) for layout in ("ttIttt", "tIIIttttttt"))
    outcomes = []
    for inputs in (first, second, first):  # the memory that `second` leaves behind must not show
        request = _request(engine, inputs)
        answer = engine.generate(request, NEW, with_mass=True)
        outcomes.append((answer.token_ids, answer.logprobs, answer.mass))
    assert outcomes[0][:2] == outcomes[2][:2]
    assert torch.equal(outcomes[0][2], outcomes[2][2])


def test_stale_memory_is_never_read(vlm: tuple[Any, VLM]) -> None:
    _, engine = vlm
    request = _request(engine, slow.make_inputs(seed=13))
    prune = Prune(2, torch.rand(1, slow.PER_TILE, generator=torch.Generator().manual_seed(0)), 4)
    before = engine.generate(request, NEW, prune=prune)
    engine.memory._storage.fill_(torch.nan)
    after = engine.generate(request, NEW, prune=prune)
    assert before.logprobs == after.logprobs


@pytest.mark.parametrize("stops", [(), (2,), (4, 2)])
def test_end_of_sequence(stops: tuple[int, ...]) -> None:
    model = slow.make_model("qwen2", seed=14)
    inputs = slow.make_inputs(seed=14)
    model.generation_config.eos_token_id = unused = 149
    free = slow.greedy(model, inputs, 8)
    assert unused not in free
    assert free.index(free[2]) == 2
    ids = [free[i] for i in stops] or [unused]
    model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]
    engine = VLM(model, "small")
    assert engine.generate(_request(engine, inputs), 8).token_ids == (free[:3] if stops else free)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(0, 150, 2))},
        {"begin_suppress_tokens": list(range(100)), "repetition_penalty": 1.3},
        {"bad_words_ids": [[t] for t in range(3, 100)]},
        {"min_new_tokens": 5},
    ],
    ids=lambda s: next(iter(s)),
)
def test_logits_processors(settings: dict[str, Any]) -> None:
    model = slow.make_model("llama", seed=15)
    inputs = slow.make_inputs(seed=15)
    if "min_new_tokens" in settings:
        model.generation_config.eos_token_id = slow.greedy(model, inputs, 1)[0]
    plain = slow.greedy(model, inputs, 8)
    model.generation_config.update(**settings)
    out = model.generate(**inputs, max_new_tokens=8, output_scores=True, return_dict_in_generate=True)
    expected = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert expected != plain  # or the setting would test nothing
    engine = VLM(model, "small")
    answer = engine.generate(_request(engine, inputs), 8)
    assert answer.token_ids == expected
    scores = [float(s[0].log_softmax(-1)[t]) for s, t in zip(out.scores, expected, strict=True)]
    assert answer.logprobs == pytest.approx(scores, rel=1e-4, abs=1e-5)


def test_bfloat16_stays_near_float32() -> None:
    model = slow.make_model("qwen3", seed=16)
    inputs = slow.make_inputs(seed=16)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        engine = VLM(model.to(dtype), "small")
        results.append(engine.layer_mass(_request(engine, inputs)).sum(0)[0])
    assert results[1].dtype == torch.float32
    assert torch.corrcoef(torch.stack(results))[0, 1] > 0.99


@pytest.mark.parametrize(("part", "stage"), [("lm_head", "prefill"), ("vision", "vision")])
def test_nan_is_named_with_its_stage(part: str, stage: str) -> None:
    model = slow.make_model("qwen2", seed=17)
    weight = model.lm_head.weight if part == "lm_head" else model.model.multi_modal_projector.linear_2.weight
    with torch.no_grad():
        weight[5] = torch.nan
    engine = VLM(model, "large")
    with pytest.raises(NumericalError, match=f"large_{stage}"):
        engine.generate(_request(engine, slow.make_inputs()), 3)


def test_nan_in_decode_is_named() -> None:
    model = slow.make_model("qwen2", seed=18)
    inputs = slow.make_inputs(seed=18)
    first = slow.greedy(model, inputs, 1)[0]
    with torch.no_grad():
        model.get_input_embeddings().weight[first] = torch.inf
    assert first not in inputs["input_ids"]
    engine = VLM(model, "small")
    with pytest.raises(NumericalError, match="small_decode"):
        engine.generate(_request(engine, inputs), 3)


def test_mass_is_that_of_a_plain_run(vlm: tuple[Any, VLM]) -> None:
    _, engine = vlm
    request = _request(engine, slow.make_inputs())
    prune = Prune(1, torch.zeros(1, slow.PER_TILE), 2)
    with pytest.raises(ValueError, match="without pruning"):
        engine.generate(request, 2, with_mass=True, prune=prune)
    with pytest.raises(ValueError, match="without drafts"):
        engine.generate(request, 2, with_mass=True, draft=[3])


def _changed(**changes: Any) -> slow.Inputs:
    return {**slow.make_inputs(), **changes}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input_ids must be"),
        (_changed(input_ids=torch.ones(2, 5, dtype=torch.long)), "input_ids must be"),
        (_changed(input_ids=torch.ones(1, 5)), "input_ids must be"),
        (_changed(pixel_values=None), "pixel_values must be a tensor of 4"),
        (_changed(pixel_values=torch.zeros(0, 3, 56, 56)), "pixel_values must be a tensor of 4"),
        (_changed(pixel_values=torch.zeros(1, 3, 56, 48)), "Tiles must be"),
        (_changed(pixel_values=torch.zeros(2, 3, 56, 56)), r"its images need 32: 16 \+ 16"),
        (_changed(input_ids=torch.full((1, 5), 150)), "in 0 to 149"),
        (_changed(input_ids=torch.tensor([[3, *[7] * 16]])), "end in text"),
        (_changed(attention_mask=torch.tensor([[0] + [1] * 23])), "all ones"),
    ],
)
def test_bad_inputs(vlm: tuple[Any, VLM], inputs: slow.Inputs, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        vlm[1].prompt(inputs)


def test_no_room(vlm: tuple[Any, VLM]) -> None:
    _, engine = vlm
    request = _request(engine, slow.make_inputs("tIt"))
    assert engine.generate(request, 256 - 18).token_ids
    with pytest.raises(PromptError, match="context holds 256"):
        engine.generate(request, 256 - 17)


@pytest.mark.parametrize("text", ["llama", "qwen2", "qwen3"])
def test_steps_are_one_graph(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in a step reads a value back or branches on one, so it can be compiled and captured whole."""
    engine = VLM(slow.make_model(text, seed=19, layers=2), "small")
    request = _request(engine, slow.make_inputs(seed=20))
    prune = Prune(1, torch.rand(1, slow.PER_TILE, generator=torch.Generator().manual_seed(0)), 4)
    plain = engine.generate(request, 6, with_mass=True)
    pruned = engine.generate(request, 6, prune=prune, draft=[11, 12])
    torch.compiler.reset()
    for name in ("_lower", "_draft_rows", "_upper", "_decode", "_step"):
        whole = torch.compile(getattr(engine.steps, name), fullgraph=True, dynamic=False, backend="eager")
        monkeypatch.setattr(engine.steps, name, whole)
    again = engine.generate(request, 6, with_mass=True)
    assert (again.token_ids, again.logprobs) == (plain.token_ids, plain.logprobs)
    assert torch.equal(again.mass, plain.mass)
    again = engine.generate(request, 6, prune=prune, draft=[11, 12])
    assert (again.token_ids, again.logprobs) == (pruned.token_ids, pruned.logprobs)
