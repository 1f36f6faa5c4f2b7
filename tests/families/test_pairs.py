"""A small VLM of one family guides a large one of another: which tokens it keeps, and what that says.

Kept tokens are held to a computation of `mapping.rank` in fp64 that shares no code with it, answers to
transformers alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sgl_runtime import SGLConfig, SGLPipeline, SGLResult
from sgl_runtime.errors import PromptError
from sgl_runtime.videos import Video

from . import oracle
from .checkpoints import CHARACTERS, FIRST, film, for_transformers, picture, save_family, shuffled
from .models import EOS, FAMILIES

NEW = 6
LAYER = 1
CLEAR = 1e-4  # of the ranking at the cut: far beyond rounding
CONFIG = SGLConfig(keep_ratio=0.25, prune_layer=LAYER, max_new_tokens=NEW)
REQUESTS = ("one image", "three images")
VIDEO = Video(film(5, 80, 50, seed=1)), "What happens?"


@dataclass(frozen=True, eq=False)
class Guided:
    """Two families.

    Attributes
    ----------
    small_settings, large_settings : image settings that differ from those of `checkpoints`
    shuffled : the large one's tokenizer has the characters in another order
    seed : of the pictures, so that no two tokens tie at the cut
    """

    small: str
    large: str
    shuffled: bool = False
    small_settings: dict[str, Any] = field(default_factory=dict)
    large_settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def save(self, root: Path) -> Saved:
        letters = shuffled(seed=7) if self.shuffled else CHARACTERS
        small = save_family(self.small, root / "small", 1, settings=self.small_settings)
        large = save_family(self.large, root / "large", 2, settings=self.large_settings, characters=letters)
        return Saved(self, SGLPipeline.from_pretrained(small, large, config=CONFIG, device="cpu"))


@dataclass(frozen=True, eq=False)
class Saved:
    """Two families' checkpoints, loaded."""

    families: Guided
    pipe: SGLPipeline

    def request(self, name: str) -> tuple[Any, Any]:
        sizes = [(130, 70)] if name == "one image" else [(120, 70), (50, 90), (64, 70)]
        images = [picture(*size, seed=3 * self.families.seed + i) for i, size in enumerate(sizes)]
        return images, "What is it?"

    @cached_property
    def model(self) -> Any:
        """The large one for transformers."""
        return FAMILIES[self.families.large].make_model(seed=2)

    def inputs(self, visuals: Any, prompt: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        processors = self.pipe.small_processor, self.pipe.large_processor
        small, large = (processor(visuals, prompt) for processor in processors if processor is not None)
        return small, large

    def reference(self, result: SGLResult, inputs: dict[str, Tensor]) -> list[int]:
        """The large one's answer with the tokens that ``result`` kept, from transformers alone."""
        case, kept = FAMILIES[self.families.large], result.kept_index
        assert kept is not None
        prompt = oracle.embed(case, self.model, for_transformers(self.model, inputs))
        visual = prompt.visual.tolist()
        assert [visual[i] for i in result.kept_visual] == [at for at in kept.tolist() if at in set(visual)]
        assert len(kept) == prompt.length - len(visual) + len(result.kept_visual)
        return oracle.pruned_greedy(case, self.model, prompt, LAYER, kept.tolist(), NEW)[0]


GUIDED = {
    "llava_onevision-qwen2_5_vl": Guided("llava_onevision", "qwen2_5_vl", seed=1),
    "internvl_qwen2-qwen3_vl": Guided("internvl-qwen2", "qwen3_vl", shuffled=True),
    "smolvlm-internvl_llama": Guided("smolvlm", "internvl-llama"),
    "qwen2_vl-llava_next": Guided("qwen2_vl", "llava_next", shuffled=True, seed=2),
    "llava-qwen2_vl": Guided("llava", "qwen2_vl"),  # of which LLaVA-1.5 sees the middle
    # as many tokens of an image in either, but not of the same parts
    "internvl_llama-llava": Guided("internvl-llama", "llava", small_settings={"max_patches": 1}),
    "qwen3_vl-idefics3": Guided("qwen3_vl", "idefics3", shuffled=True, seed=9),
    "qwen2_5_vl-llava_onevision": Guided("qwen2_5_vl", "llava_onevision"),
    "qwen2_vl-qwen3_vl_moe": Guided("qwen2_vl", "qwen3_vl_moe"),  # one tokenizer and one grid
    "internvl_qwen3-internvl_qwen2": Guided(
        "internvl-qwen3", "internvl-qwen2", small_settings={"max_patches": 1}, seed=2
    ),
}
FILMED = {
    "qwen2_5_vl-internvl_qwen2": Guided("qwen2_5_vl", "internvl-qwen2"),
    "smolvlm-qwen3_vl": Guided("smolvlm", "qwen3_vl", shuffled=True),
    "qwen2_vl-llava_onevision": Guided("qwen2_vl", "llava_onevision"),
}


@pytest.fixture(scope="module", params=GUIDED)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return GUIDED[request.param].save(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("name", REQUESTS)
def test_the_best_are_kept(pair: Saved, name: str) -> None:
    request = pair.request(name)
    result, (small, large) = pair.pipe(*request), pair.inputs(*request)
    ranking = fp64_ranking(result.mass, small, large)
    assert result.kept_visual.tolist() == best(ranking, max(1, int(len(ranking) * CONFIG.keep_ratio)))
    assert result.token_ids == pair.reference(result, large)


@pytest.mark.parametrize("name", REQUESTS)
def test_each_image_keeps_its_share(pair: Saved, name: str) -> None:
    request = pair.request(name)
    pipe = pair.pipe.with_config(replace(CONFIG, keep_scope="image"))
    result, (small, large) = pipe(*request), pair.inputs(*request)
    ranking, image = fp64_ranking(result.mass, small, large), large["visual_image"].numpy()
    wanted: list[int] = []
    for number in range(image.max() + 1):
        own = np.flatnonzero(image == number)
        wanted += own[best(ranking[own], max(1, int(len(own) * CONFIG.keep_ratio)))].tolist()
    assert result.kept_visual.tolist() == wanted
    assert result.token_ids == pair.reference(result, large)


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize(
    "changes", [{"draft": False}, {"schedule": "latency"}, {"schedule": "latency", "draft": False}], ids=str
)
def test_schedules_and_drafts_change_nothing(pair: Saved, name: str, changes: dict[str, Any]) -> None:
    plain = pair.pipe(*pair.request(name))
    other = pair.pipe.with_config(replace(CONFIG, **changes))(*pair.request(name))
    assert other.token_ids == plain.token_ids
    assert other.small_token_ids == plain.small_token_ids
    assert torch.equal(other.kept_index, plain.kept_index)
    assert torch.equal(other.mass, plain.mass)


@pytest.mark.parametrize("schedule", ["throughput", "latency"])
def test_exits(pair: Saved, schedule: str) -> None:
    """Of the two, the one whose score reaches the threshold leaves with the small one's answer."""
    plain = pair.pipe.batch([pair.request(name) for name in REQUESTS])
    scores = [result.decision_score for result in plain]
    changes = {"exit_threshold": max(scores), "schedule": schedule}
    pipe = pair.pipe.with_config(replace(CONFIG, **changes))
    found = pipe.batch([pair.request(name) for name in REQUESTS])
    assert [result.exited for result in found] == [score == max(scores) for score in scores]
    for got, was in zip(found, plain, strict=True):
        assert got.token_ids == (was.small_token_ids if got.exited else was.token_ids)
        assert got.text == (was.small_text if got.exited else was.text)
        assert (got.kept_visual is None) == got.exited


@pytest.mark.parametrize("name", FILMED)
def test_videos(name: str, tmp_path: Path) -> None:
    pair = FILMED[name].save(tmp_path)
    result, (small, large) = pair.pipe(*VIDEO), pair.inputs(*VIDEO)
    assert not torch.equal(small["visual_cells"][:, 0].unique(), large["visual_cells"][:, 0].unique())
    ranking = fp64_ranking(result.mass, small, large)
    assert result.kept_visual.tolist() == best(ranking, int(len(ranking) * CONFIG.keep_ratio))
    assert result.token_ids == pair.reference(result, large)


@pytest.mark.parametrize("name", FAMILIES)
def test_drafts_of_another_tokenizer(name: str, tmp_path: Path) -> None:
    """Two models that say the same in different ids: the large one takes over all of a text."""
    letters = shuffled(seed=3)
    small = save_family(name, tmp_path / "small", 1)
    large = save_family(name, tmp_path / "large", 1, characters=letters, same_text=True)
    config = SGLConfig(keep_ratio=1.0, max_new_tokens=NEW)
    pipe = SGLPipeline.from_pretrained(small, large, config=config, device="cpu")
    undrafted = pipe.with_config(replace(config, draft=False))
    for seed in range(8):
        request = picture(100, 60, seed), "What is it?"
        result = pipe(*request)
        said = [
            i if i < FIRST else FIRST + letters.index(CHARACTERS[i - FIRST]) for i in result.small_token_ids
        ]
        assert result.token_ids == undrafted(*request).token_ids == said != result.small_token_ids
        if all(i >= FIRST or i == EOS for i in said):  # other special tokens have no text
            assert result.accepted_draft == len(said)
            return
    pytest.fail("no answer was text alone; choose other seeds")


def test_images_that_one_of_them_does_not_see(pair: Saved) -> None:
    one, _ = pair.inputs(*pair.request("one image"))
    _, three = pair.inputs(*pair.request("three images"))
    with pytest.raises(PromptError, match=r"images \[1, 2\] are seen by one of them only") as caught:
        pair.pipe.generate(one, three)
    counts = torch.bincount(three["visual_image"]).tolist()
    small, large = str(caught.value).split("; the large VLM sees ")
    assert f"image 0 as {len(one['visual_image'])} tokens of" in small
    assert all(f"image {i} as {count} tokens of" in large for i, count in enumerate(counts))


def test_inputs_without_cells(pair: Saved) -> None:
    """Tokens stand for each other then, so there must be as many in each image."""
    small, large = (
        {name: tensor for name, tensor in inputs.items() if not name.startswith("visual_")}
        for inputs in pair.inputs(*pair.request("one image"))
    )
    counts = [len(inputs["visual_image"]) for inputs in pair.inputs(*pair.request("one image"))]
    if counts[0] == counts[1]:
        assert torch.equal(pair.pipe.generate(small, large).mass, pair.pipe(*pair.request("one image")).mass)
        return
    told = f"The small VLM has {counts[0]} visual tokens and the large VLM {counts[1]} .*visual_cells"
    with pytest.raises(PromptError, match=told):
        pair.pipe.generate(small, large)


def fp64_ranking(mass: Tensor, small: dict[str, Tensor], large: dict[str, Tensor]) -> np.ndarray:
    """For each large token (N_l,) the mean mass of what the small tokens give it, by shares of volume."""
    masses, given, worth = mass.double().numpy(), *np.zeros((2, len(large["visual_image"])))
    boxes = [inputs["visual_cells"].double().numpy() for inputs in (small, large)]
    for i, (image, box) in enumerate(zip(small["visual_image"].tolist(), boxes[0], strict=True)):
        takers = (large["visual_image"] == image).numpy()
        begin = np.maximum(box[:, 0], boxes[1][:, :, 0])
        end = np.minimum(box[:, 1], boxes[1][:, :, 1])
        volume = np.clip(end - begin, 0, None).prod(1) * takers
        if not volume.any():
            away = np.square(box.sum(1) - boxes[1].sum(2)).sum(1)
            volume[np.where(takers, away, np.inf).argmin()] = 1
        given += masses[i] * volume / volume.sum()
        worth += volume / volume.sum()
    return np.divide(given, worth, out=np.zeros_like(given), where=worth > 0)


def best(ranking: np.ndarray, count: int) -> list[int]:
    """The ``count`` largest, ascending; the cut must be clear of rounding."""
    order = sorted(range(len(ranking)), key=lambda i: (-ranking[i], i))
    last, next_best = ranking[order[count - 1]], ranking[order[count]]
    assert last - next_best > CLEAR * last, (count, ranking[order])
    return sorted(order[:count])
