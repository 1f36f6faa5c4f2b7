"""Every family from a checkpoint on disk to an answer: what `SGLPipeline.from_pretrained` says is what
transformers' generate says to the same tensors.

The tests' parameters are families' names in `models.FAMILIES`; the README's table cites them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sgl_runtime import SGLConfig, SGLPipeline, hf
from sgl_runtime.errors import PromptError
from sgl_runtime.processing import Processor
from sgl_runtime.requests import make_prompt
from sgl_runtime.videos import Video

from . import oracle
from .checkpoints import WORDS, film, for_transformers, picture, save_family
from .models import FAMILIES, IMAGE, VIDEO

NEW, BOS = 6, 1
CPU = torch.device("cpu")
TAKES_VIDEOS = {name for name in FAMILIES if name.startswith(("internvl", "qwen", "llava_one", "smolvlm"))}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<image>What is it?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "And its tail?"},
]
IMAGES: dict[str, tuple[Any, Any]] = {
    "one image": (picture(120, 70), "What is it?"),
    "two images": ([picture(120, 70), picture(50, 90, seed=1)], "Is <image> in <image>?"),
    "conversation": (picture(90, 90, seed=2), CONVERSATION),
}
VIDEOS: dict[str, tuple[Any, Any]] = {
    "a video": (Video(film(4, 80, 50)), "What happens?"),
    "three frames": (Video(film(3, 50, 80, seed=1), fps=2.0), "<video>What happens?"),
    # Qwen2.5-VL counts seconds: the last step stands further back than the text behind it.
    "a slow video": (Video(film(8, 80, 50), fps=0.5), "What happens?"),
    "a video between images": (
        [picture(60, 60), Video(film(2, 80, 50, seed=2)), picture(40, 90, seed=3)],
        "<image>, <video>, <image>?",
    ),
}


@dataclass(frozen=True, eq=False)
class Pair:
    """Two checkpoints of one family with different weights, and a pipeline of them that prunes nothing."""

    name: str
    directories: tuple[Path, Path]

    @cached_property
    def models(self) -> tuple[Any, Any]:
        """The models for transformers."""
        case = FAMILIES[self.name]
        return case.make_model(seed=1), case.make_model(seed=2)

    @cached_property
    def pipe(self) -> SGLPipeline:
        config = SGLConfig(keep_ratio=1.0, draft=False, max_new_tokens=NEW)
        return SGLPipeline.from_pretrained(*self.directories, config=config, device="cpu")

    @property
    def processor(self) -> Processor:
        assert self.pipe.large_processor is not None
        return self.pipe.large_processor

    def check_answers(self, visuals: Any, prompt: Any) -> None:
        result = self.pipe(visuals, prompt)
        inputs = self.processor(visuals, prompt)
        answers = [oracle.greedy(m, for_transformers(m, inputs), NEW) for m in self.models]
        assert [result.small_token_ids, result.token_ids] == answers
        assert answers[0] != answers[1]
        assert result.text == self.processor.decode(answers[1])


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp(request.param)
    small, large = (save_family(request.param, root / str(seed), seed) for seed in (1, 2))
    return Pair(request.param, (small, large))


def test_loads_every_tensor(pair: Pair) -> None:
    loaded = hf.load_model(pair.directories[0], CPU, torch.float32)
    ours, theirs = dict(loaded.named_parameters()), dict(pair.models[0].named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    held = load_file(pair.directories[0] / "model.safetensors")
    assert sum(tensor.numel() for tensor in held.values()) == sum(w.numel() for w in theirs.values())


@pytest.mark.parametrize("request_name", IMAGES)
def test_answers_are_those_of_transformers(pair: Pair, request_name: str) -> None:
    pair.check_answers(*IMAGES[request_name])


@pytest.mark.parametrize("request_name", IMAGES)
def test_every_visual_token_has_a_place(pair: Pair, request_name: str) -> None:
    visuals, prompt = IMAGES[request_name]
    inputs = pair.processor(visuals, prompt)
    images = visuals if isinstance(visuals, list) else [visuals]
    boxes = checked_cells(inputs, len(images))
    for image, own in zip(images, boxes, strict=True):
        assert torch.equal(own[:, 0], torch.tensor([0.0, 1.0]).expand(len(own), 2))
        # LLaVA-1.5 cuts the middle out.
        seen = min(image.size) / max(image.size) if pair.name == "llava" else 1.0
        assert covered(own) == pytest.approx(seen, abs=0.02 if seen < 1 else 0)
        if pair.name == "llava_onevision" and len(images) > 1:
            assert len(own) == 16 + 1  # several images are not cut into crops
    spans = make_prompt(pair.pipe.large.model, "large", inputs).spans
    assert sum(spans) == len(inputs["visual_cells"])


def test_one_bos(pair: Pair) -> None:
    """Whether the template writes it, as Idefics3's, the tokenizer adds it, as LLaVA's, or there is none."""
    for visuals, prompt in IMAGES.values():
        ids = pair.processor(visuals, prompt)["input_ids"][0]
        wanted = [0] if WORDS[FAMILIES[pair.name].model_type].bos else []
        assert (ids == BOS).nonzero()[:, 0].tolist() == wanted


@pytest.mark.parametrize("request_name", VIDEOS)
def test_videos(pair: Pair, request_name: str) -> None:
    visuals, prompt = VIDEOS[request_name]
    if pair.name not in TAKES_VIDEOS:
        with pytest.raises(PromptError, match="takes no videos; give single frames as images"):
            pair.pipe(visuals, prompt)
        return
    pair.check_answers(visuals, prompt)
    inputs = pair.processor(visuals, prompt)
    sources = visuals if isinstance(visuals, list) else [visuals]
    for source, own in zip(sources, checked_cells(inputs, len(sources)), strict=True):
        if isinstance(source, Video):
            frames = len(source.source)
            steps = -(-frames // 2) if pair.name.startswith("qwen") else frames
            times = own[:, 0].unique(dim=0)
            wanted = torch.linspace(0, 1, steps + 1).unfold(0, 2, 1)
            torch.testing.assert_close(times, wanted)
            for time in times:  # each step shows the whole picture
                assert covered(own[(own[:, 0] == time).all(1)]) == 1


def test_no_family_takes_videos_in_secret(pair: Pair) -> None:
    assert pair.pipe.large.model.family.video == (pair.name in TAKES_VIDEOS)


def test_batches(pair: Pair) -> None:
    """Pruned and drafted, of requests unlike each other."""
    config = SGLConfig(keep_ratio=0.3, prune_layer=1, max_new_tokens=NEW)
    pipe = pair.pipe.with_config(config)
    requests = [*IMAGES.values(), (picture(30, 30, seed=4), "?")]
    if pair.name in TAKES_VIDEOS:
        requests += [VIDEOS["a video"]]
    for got, request in zip(pipe.batch(requests), requests, strict=True):
        alone = pipe(*request)
        assert got.small_token_ids == alone.small_token_ids
        assert got.token_ids == alone.token_ids
        assert got.accepted_draft == alone.accepted_draft
        assert torch.equal(got.kept_index, alone.kept_index)
        torch.testing.assert_close(got.mass, alone.mass, rtol=1e-5, atol=0)


def checked_cells(inputs: dict[str, Tensor], visuals: int) -> list[Tensor]:
    """The cells of each image or video: one for each visual token, in order, inside the whole."""
    image, cells = inputs["visual_image"], inputs["visual_cells"]
    tokens = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    assert cells.shape == (int(tokens.sum()), 3, 2)
    assert image.shape == cells.shape[:1]
    assert bool((image.diff() >= 0).all())
    assert image.unique().tolist() == list(range(visuals))
    assert bool(((cells >= 0) & (cells <= 1)).all())
    assert bool((cells[..., 0] <= cells[..., 1]).all())
    return [cells[image == number] for number in range(visuals)]


def covered(cells: Tensor) -> float:
    """The share of a picture's points that some cell (N, 3, 2) looks at."""
    points = (np.arange(199) + 0.5) / 199
    seen = np.zeros((199, 199), dtype=bool)
    for (top, bottom), (left, right) in cells[:, 1:].numpy():
        seen |= ((points >= top) & (points <= bottom))[:, None] & ((points >= left) & (points <= right))
    return float(seen.mean())
