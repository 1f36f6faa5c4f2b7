"""Rankings against attention matrices of transformers, the pipeline's own pruning, and a user's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runtime import slow
from torch import Tensor

from sgl_runtime import SGLConfig, SGLPipeline, mapping, tiny
from sgl_runtime.config import num_kept
from sgl_runtime.errors import ConfigError, NumericalError
from sgl_runtime.evaluation.rankings import RANKINGS, Batch, Context, code_of, find_ranking, rank
from sgl_runtime.requests import Prune

LAYOUT = "ttItttItt"  # a text row between two images
CONFIG = SGLConfig(max_new_tokens=6)


@pytest.fixture(scope="module")
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    return slow.make_model("qwen2", seed=1), slow.make_model("qwen3", seed=2, layers=6, heads=6)


@pytest.fixture(scope="module")
def bare(models: tuple[torch.nn.Module, torch.nn.Module]) -> SGLPipeline:
    return SGLPipeline.from_models(*models, CONFIG)


def batch_of(pipe: SGLPipeline, *seeds: int) -> Batch:
    inputs = [slow.make_inputs(LAYOUT, seed=seed) for seed in seeds]
    ids = [f"example {seed}" for seed in seeds]
    return Batch(
        pipe, [(pipe.small.prompt(each), pipe.large.prompt(each)) for each in inputs], list(seeds), ids
    )


def true_masses(model: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    """Mass (layers, N) by which rows count, from eager attention over the model's own answer."""
    inputs = slow.make_inputs(LAYOUT, seed=seed)
    answer = slow.greedy(model, inputs, CONFIG.max_new_tokens)
    assert len(answer) > 2
    attention = slow.attention_matrices(model, inputs, answer)
    ids = inputs["input_ids"][0]
    visual, text = (ids == slow.IMAGE_ID).nonzero()[:, 0], (ids != slow.IMAGE_ID).nonzero()[:, 0]
    generated = torch.arange(len(ids), attention.shape[-1])
    rows = {
        "all": torch.cat((text, generated)),
        "prompt": text,
        "generated": generated,
        "last": text[-1:],
    }
    return {name: slow.masses(attention, visual, some) for name, some in rows.items()}


@pytest.mark.parametrize("prune_layer", [0, 1, 4])
@pytest.mark.parametrize("seeds", [(4,), (3, 4, 5)])
def test_rankings_are_sums_of_attention(
    bare: SGLPipeline,
    models: tuple[torch.nn.Module, torch.nn.Module],
    prune_layer: int,
    seeds: tuple[int, ...],
) -> None:
    small, large = (true_masses(model, 4) for model in models)
    expected = {
        "guided": small["all"].sum(0),
        "oracle": large["all"].sum(0),
        "fastv": large["last"][max(prune_layer - 1, 0)],
        "last-prompt-token": small["last"].sum(0),
        "prompt-rows": small["prompt"].sum(0),
        "generated-rows": small["generated"].sum(0),
    }
    assert set(expected) | {"random"} == set(RANKINGS)
    batch = batch_of(bare, *seeds)
    for name, mass in expected.items():
        got = rank(RANKINGS[name], Context(batch, seeds.index(4), prune_layer))
        torch.testing.assert_close(got, mass[None], rtol=2e-5, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_generated_rows_are_not_a_difference_of_rounded_sums(bare: SGLPipeline) -> None:
    """They agree with total minus prompt to the rounding of the total, and are none where nothing is fed."""
    context = Context(batch_of(bare, 4), 0, 1)
    total = context.guidance.mass
    rest = total - bare.small.layer_mass(context.small_request).sum(0)
    torch.testing.assert_close(context.generated_mass, rest, rtol=0, atol=1e-6 * float(total.max()))
    short = bare.with_config(SGLConfig(max_new_tokens=1))
    assert not Context(batch_of(short, 4), 0, 1).generated_mass.any()


def test_random_depends_on_its_seed_only(bare: SGLPipeline) -> None:
    alone, first, second = batch_of(bare, 4), batch_of(bare, 3, 4), batch_of(bare, 5)
    noise = rank(RANKINGS["random"], Context(alone, 0, 1))
    assert torch.equal(noise, rank(RANKINGS["random"], Context(alone, 0, 4)))
    assert torch.equal(noise, rank(RANKINGS["random"], Context(first, 1, 1)))
    assert not torch.equal(noise, rank(RANKINGS["random"], Context(second, 0, 1)))
    assert noise.shape == (1, 2 * slow.PER_TILE)


@pytest.mark.parametrize(("keep_ratio", "prune_layer"), [(0.4, 4), (0.09, 0)])
def test_guided_keeps_what_the_pipeline_keeps(keep_ratio: float, prune_layer: int) -> None:
    config = SGLConfig(max_new_tokens=8, keep_ratio=keep_ratio, prune_layer=prune_layer)
    pipe = SGLPipeline.from_pretrained(tiny.SMALL, tiny.LARGE, config=config)
    assert pipe.small_processor is not None
    assert pipe.large_processor is not None
    for sample in tiny.samples()[:3]:
        asked = sample["image"], sample["prompt"]
        prompts = (
            pipe.small.prompt(pipe.small_processor(*asked)),
            pipe.large.prompt(pipe.large_processor(*asked)),
        )
        context = Context(Batch(pipe, [prompts], [0], ["0"]), 0, prune_layer)
        prune = Prune(
            prune_layer, rank(RANKINGS["guided"], context), num_kept(prompts[1].num_visual, keep_ratio)
        )
        kept = pipe.large.generate(context.large_request, 8, prune=prune).kept_index
        assert kept is not None
        assert kept.tolist() == pipe(*asked).kept_index.tolist()


def test_other_grids_are_mapped(bare: SGLPipeline) -> None:
    """The large VLM sees the left and the right half of what the small one sees whole."""
    small, large = slow.make_inputs("tIttt", seed=1), slow.make_inputs("tIttItt", seed=1)

    def grid(first: float, last: float) -> Tensor:
        y, x = torch.meshgrid(
            torch.arange(4) / 4, first + torch.arange(4) / 4 * (last - first), indexing="ij"
        )
        begin = torch.stack((torch.zeros(16), y.flatten(), x.flatten()), 1)
        return torch.stack((begin, begin + torch.tensor([1.0, 0.25, (last - first) / 4])), 2)

    for inputs, boxes in ((small, grid(0, 1)), (large, torch.cat((grid(0, 0.5), grid(0.5, 1))))):
        inputs |= {"visual_cells": boxes, "visual_image": torch.zeros(len(boxes), dtype=torch.int64)}
    prompts = bare.small.prompt(small), bare.large.prompt(large)
    context = Context(Batch(bare, [prompts], [0], ["0"]), 0, 1)
    assert prompts[0].cells is not None
    assert prompts[1].cells is not None
    expected = mapping.rank(context.guidance.mass, prompts[0].cells, prompts[1].cells)
    assert torch.equal(rank(RANKINGS["guided"], context), expected)
    for name in RANKINGS:
        assert rank(RANKINGS[name], context).shape == (1, 32)


OWN = """
import torch

class CentreFirst:
    name = "centre-first"

    def rank(self, context):
        count = context.large_request.prompt.num_visual
        return -(torch.arange(count) - count / 2).abs()[None]
"""


def test_a_users_ranking_in_ten_lines(
    bare: SGLPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(OWN.strip().splitlines()) <= 10
    (tmp_path / "own_ranking.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    ranking = find_ranking("own_ranking:CentreFirst")
    assert ranking.name == "centre-first"
    got = rank(ranking, Context(batch_of(bare, 4), 0, 1))
    assert got.dtype == torch.float32
    assert got.argmax() == 16
    assert code_of(RANKINGS["guided"]) is None
    before = code_of(ranking)
    (tmp_path / "own_ranking.py").write_text(OWN.replace("/ 2", "/ 3"))
    assert before is not None
    assert code_of(ranking) != before


def test_the_example_keeps_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    pipe = SGLPipeline.from_pretrained(tiny.SMALL, tiny.LARGE, config=SGLConfig(max_new_tokens=8))
    assert pipe.small_processor is not None
    assert pipe.large_processor is not None
    inputs = [
        processor(tiny.samples()[0]["image"], "read the red circle")
        for processor in (pipe.small_processor, pipe.large_processor)
    ]
    prompts = [(pipe.small.prompt(inputs[0]), pipe.large.prompt(inputs[1]))]
    context = Context(Batch(pipe, prompts, [0], ["0"]), 0, 2)
    got = rank(find_ranking("examples.centre_ranking:Centre"), context)
    side = torch.arange(16) + 0.5 - 8
    expected = -(side[:, None] ** 2 + side**2).sqrt().flatten()[None] / 16
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("guidance", "There is no ranking 'guidance'. Choose from guided, oracle, fastv"),
        ("no_such_module:Mine", "No module named 'no_such_module'"),
        ("json:Mine", "has no attribute 'Mine'"),
        (":Mine", "could not be loaded"),
        ("json:dumps", "is no ranking"),
        ("collections:OrderedDict", "is no ranking"),
    ],
)
def test_what_is_no_ranking(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_ranking(name)


class Own:
    """A user's ranking, which returns or raises what it was made with."""

    name = "own"

    def __init__(self, made_with: object) -> None:
        self.made_with = made_with

    def rank(self, context: Context) -> Tensor:
        if isinstance(self.made_with, BaseException):
            raise self.made_with
        return self.made_with  # type: ignore[return-value]


@pytest.mark.parametrize("returned", [torch.zeros(32), torch.zeros(1, 16), [0.0] * 32, None])
def test_a_ranking_of_another_shape(bare: SGLPipeline, returned: object) -> None:
    with pytest.raises(ConfigError, match=r"'own' must return a tensor \(1, 32\)"):
        rank(Own(returned), Context(batch_of(bare, 4), 0, 1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_a_ranking_of_no_real_numbers(bare: SGLPipeline, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=f"'own' must return real numbers, got {dtype}"):
        rank(Own(torch.ones(1, 32, dtype=dtype)), Context(batch_of(bare, 4), 0, 1))


def test_a_ranking_of_nan(bare: SGLPipeline) -> None:
    """One NaN ranks below everything; nothing but NaN ranks nothing."""
    context = Context(batch_of(bare, 3, 4), 1, 1)
    ranking = torch.full((1, 32), torch.nan)
    with pytest.raises(ConfigError, match="'own' is NaN for all 32 visual tokens of example example 4"):
        rank(Own(ranking), context)
    ranking[0, 7] = 1
    assert rank(Own(ranking), context)[0, 7] == 1
    assert rank(Own(torch.arange(32)[None]), context).dtype == torch.float32


def test_a_ranking_that_fails(bare: SGLPipeline) -> None:
    context = Context(batch_of(bare, 3, 4), 1, 1)
    for error, told in (
        (ValueError("no heads"), "ValueError: no heads"),
        (KeyError("x"), "KeyError: 'x'"),
        (AssertionError(), "AssertionError"),
    ):
        with pytest.raises(ConfigError) as raised:
            rank(Own(error), context)
        assert str(raised.value) == f"The ranking 'own' failed on example example 4: {told}. Mend its `rank`."
        assert raised.value.__cause__ is error
    for error in (NumericalError("NaN"), MemoryError(), torch.OutOfMemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(error)) as passed:
            rank(Own(error), context)
        assert passed.value is error
