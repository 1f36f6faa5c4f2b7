"""LLaVA-OneVision against transformers' image processor, its processor's arithmetic and its forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor

from sgl_runtime.engine import VLM
from sgl_runtime.errors import CheckpointError, PromptError
from sgl_runtime.families.llava_onevision import LlavaOnevision, LlavaOnevisionPreprocessor
from sgl_runtime.processing import Processor

from . import oracle
from .llava import SHAPES, area, blinker, changes, common, overlap, picture, stub, tokenizer, with_white
from .models import FAMILIES, IMAGE, VIDEO

CASE = FAMILIES["llava_onevision"]
BIG = tf.LlavaOnevisionConfig()


def settings_of(config: Any) -> dict[str, Any]:
    """Settings of llava-hf/llava-onevision-qwen2-0.5b-ov-hf, at the sizes of ``config``."""
    size = config.vision_config.image_size
    return {
        **common({"height": size, "width": size}, [0.5] * 3, [0.5] * 3),
        "do_pad": True,
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_token": "<image>",
        "num_image_tokens": (size // config.vision_config.patch_size) ** 2,
        "processor_class": "LlavaOnevisionProcessor",
        "video_token": "<video>",
        "vision_aspect_ratio": config.vision_aspect_ratio,
        "vision_feature_select_strategy": "full",
    }


def with_strip() -> Any:
    """A tiny configuration whose crops end in pixels that fill no patch, as those of 384 by 14 do."""
    config = CASE.config()
    config.vision_config.image_size = 30
    config.image_grid_pinpoints = [[30, 60], [60, 30], [60, 60]]
    config.vision_aspect_ratio = "anyres_max_9"
    return config


def loose() -> Any:
    """A tiny configuration where 84 x 42 pixels make a few more tokens than four crops, and yet keep them."""
    config = CASE.config()
    config.vision_aspect_ratio = "anyres_max_4"
    return config


CONFIGS = {"tiny": CASE.config(), "strip": with_strip(), "loose": loose(), "real": BIG}


def build(config: Any) -> LlavaOnevisionPreprocessor:
    return LlavaOnevisionPreprocessor(settings_of(config), tokenizer(), stub(config))


def theirs(config: Any) -> Any:
    """Return transformers' processor without its video processor, which needs torchvision."""
    settings = settings_of(config)
    pixels = {
        name: settings[name]
        for name in ("image_mean", "image_std", "size", "image_grid_pinpoints", "resample")
    }
    processor: Any = object.__new__(tf.LlavaOnevisionProcessor)
    processor.image_processor = tf.LlavaOnevisionImageProcessorPil(**pixels)
    for name in ("num_image_tokens", "vision_feature_select_strategy", "vision_aspect_ratio"):
        setattr(processor, name, settings[name])
    processor.image_token, processor.video_token = "<image>", "<video>"
    return processor


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_one_image_is_prepared_as_transformers_does(name: str, shape: tuple[int, int]) -> None:
    config = CONFIGS[name]
    preprocessor, processor = build(config), theirs(config)
    image = picture(*shape)
    wanted = processor.image_processor([[image]], return_tensors="pt")
    [prepared] = preprocessor.images([image])
    merged = preprocessor.merge([prepared])
    assert set(merged) == set(wanted)
    for key, value in merged.items():
        assert torch.equal(value, wanted[key])
    assert prepared.text == processor.replace_image_token(wanted, 0)
    check_cells(prepared.cells, prepared.text.count("<image>"))


@pytest.mark.parametrize("second", SHAPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_several_images_are_prepared_as_transformers_does(name: str, second: tuple[int, int]) -> None:
    config = CONFIGS[name]
    preprocessor, processor = build(config), theirs(config)
    images = [picture(60, 100), picture(*second)]
    wanted = processor.image_processor([images], return_tensors="pt")
    prepared = preprocessor.images(images)
    merged = preprocessor.merge(prepared)
    assert set(merged) == set(wanted)
    for key, value in merged.items():
        assert torch.equal(value, wanted[key])
    for number, each in enumerate(prepared):
        assert each.text == processor.replace_image_token(wanted, number)
        check_cells(each.cells, each.text.count("<image>"))


def test_images_prepared_one_by_one_are_samples_of_their_own() -> None:
    """As transformers treats a flat list of images: each is cut into crops."""
    preprocessor, processor = build(CASE.config()), theirs(CASE.config())
    images = [picture(60, 100), picture(28, 40)]
    wanted = processor.image_processor(images, return_tensors="pt")
    parts = [preprocessor.image(image) for image in images]
    merged = preprocessor.merge(parts)
    assert set(merged) == set(wanted)
    for key, value in merged.items():
        assert torch.equal(value, wanted[key])
    assert [part.text for part in parts] == [processor.replace_image_token(wanted, i) for i in (0, 1)]


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_frames_are_resized_and_normalised(name: str, frames: int) -> None:
    """transformers' video processor resizes frames to squares, rescales and normalises them."""
    config = CONFIGS[name]
    preprocessor, processor = build(config), theirs(config)
    size = config.vision_config.image_size
    pictures = [picture(50, 70, seed) for seed in range(frames)]
    prepared = preprocessor.video(pictures, [float(i) for i in range(frames)])
    wanted = [np.asarray(each.resize((size, size), 3), dtype=np.float32) / 255 * 2 - 1 for each in pictures]
    pixels = torch.from_numpy(np.stack(wanted)).permute(0, 3, 1, 2)[None]
    torch.testing.assert_close(prepared.tensors["pixel_values_videos"], pixels, rtol=0, atol=1e-6)
    assert prepared.text == processor.replace_video_token({"pixel_values_videos": pixels}, 0)
    if name == "real":
        assert prepared.text.count("<video>") == 196 * frames + 1
    cells = prepared.cells
    assert cells.shape == (prepared.text.count("<video>"), 3, 2)
    assert (cells[-1] == cells[-2]).all()
    for number, frame in enumerate(cells[:-1].chunk(frames)):
        torch.testing.assert_close(area(frame), torch.tensor(1.0))
        share = torch.tensor([number / frames, (number + 1) / frames])
        torch.testing.assert_close(frame[:, 0], share.expand(len(frame), 2))


def check_cells(cells: Tensor, tokens: int) -> None:
    assert cells.dtype == torch.float32
    assert cells.shape == (tokens, 3, 2)
    assert cells.min() >= 0
    assert cells.max() <= 1
    assert (cells[..., 0] <= cells[..., 1]).all()
    assert (cells[:, 0] == torch.tensor([0, 1])).all()


def mixed_inputs(order: str) -> dict[str, Tensor]:
    """One request of images (i) and videos (v) of three frames, in this order."""
    generator = torch.Generator().manual_seed(5)
    images, videos = order.count("i"), order.count("v")
    tokens = {"i": [IMAGE] * 17, "v": [VIDEO] * (3 * 4 + 1)}
    if images == 1:
        tokens["i"] = [IMAGE] * (16 + 4 * 7)
    ids = [3]
    for kind in order:
        ids += [*tokens[kind], 11]
    crops = 3 if images == 1 else 1
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": torch.randn(images, crops, 3, 28, 28, generator=generator),
        "image_sizes": torch.tensor([[28, 42]] * images),
        "batch_num_images": torch.tensor([images]),
        "pixel_values_videos": torch.randn(videos, 3, 3, 28, 28, generator=generator),
    }


def assert_features(model: Any, inputs: dict[str, Tensor], visuals: int) -> None:
    family = LlavaOnevision(model)
    found = family.visuals(inputs)
    assert len(found) == visuals
    features = [family.encode(visual) for visual in found]
    assert [len(each.tokens) for each in features] == [visual.tokens for visual in found]
    hidden = oracle.embed(CASE, model, inputs).hidden[0]
    is_visual = torch.isin(inputs["input_ids"][0], torch.tensor(family.visual_ids))
    got = torch.cat([each.tokens for each in features])
    torch.testing.assert_close(got, hidden[is_visual], rtol=1e-5, atol=1e-5)


LAYOUTS = [((1, 2), (2, 1)), ((2, 2),), ((1, 2),), ((3, 2),), ((1, 1), (1, 3), (1, 1))]


@pytest.mark.parametrize("images", LAYOUTS, ids=str)
@torch.no_grad()
def test_features_are_what_transformers_embeds(images: Any) -> None:
    inputs = CASE.make_inputs(seed=4, images=images)
    assert_features(CASE.make_model(seed=3), inputs, len(images))


@torch.no_grad()
def test_features_of_crops_of_several_images() -> None:
    """Without batch_num_images every image comes as crops."""
    preprocessor = build(CASE.config())
    parts = [preprocessor.image(picture(*shape)) for shape in [(60, 100), (28, 40), (90, 90)]]
    ids = [10] + [IMAGE] * sum(len(part.cells) for part in parts)
    tensors = preprocessor.merge(parts)
    del tensors["batch_num_images"]
    assert_features(CASE.make_model(seed=3), {"input_ids": torch.tensor([ids]), **tensors}, 3)


@pytest.mark.parametrize("order", ["vi", "iv", "viv", "ivvi", "iivi"])
@torch.no_grad()
def test_images_and_videos_stand_where_the_prompt_says(order: str) -> None:
    assert_features(CASE.make_model(seed=3), mixed_inputs(order), len(order))


@torch.no_grad()
def test_features_of_a_video_alone() -> None:
    inputs = mixed_inputs("v")
    for name in ("pixel_values", "image_sizes", "batch_num_images"):
        del inputs[name]
    assert_features(CASE.make_model(seed=3), inputs, 1)


@pytest.mark.parametrize("shapes", [[(60, 100)], [(60, 100), (28, 40)]], ids=str)
def test_the_processor_and_the_engine_take_them(shapes: list[tuple[int, int]]) -> None:
    model = CASE.make_model()
    engine = VLM(model, "small")
    words, settings = tokenizer(), settings_of(model.config)
    processor = Processor.of(Path("here"), words, settings, template=None, family=LlavaOnevision(model))
    inputs = processor([picture(*shape) for shape in shapes], "what is this")
    prompt = engine.prompt(inputs)
    assert sum(visual.tokens for visual in prompt.visuals) == len(inputs["visual_cells"])
    assert inputs["batch_num_images"].tolist() == [len(shapes)]
    assert inputs["pixel_values"].shape[1] == (1 if len(shapes) > 1 else 1 + 2 * 3)


@torch.no_grad()
def test_the_example_is_one_image() -> None:
    family = LlavaOnevision(CASE.make_model())
    example = family.example()
    (visual,) = family.visuals(example)
    assert len(family.encode(visual).tokens) == visual.tokens == (example["input_ids"] == IMAGE).sum()
    family.model(**example)


def seen_by(model: Any, shape: tuple[int, int], cell: Tensor) -> Tensor:
    """How much each token of an image changes when the image turns white in ``cell``."""
    preprocessor, family = build(model.config), LlavaOnevision(model)
    black, white = (
        preprocessor.image(image) for image in (picture(*shape).point(lambda _: 0), with_white(*shape, cell))
    )
    ids = torch.full((1, len(black.cells)), IMAGE)
    return changes(family, black.tensors, white.tensors, ids)


@pytest.mark.parametrize(
    ("name", "shape"), [("strip", (60, 45)), ("strip", (30, 60)), ("tiny", (28, 42))], ids=str
)
def test_a_patch_looks_where_its_cell_says(name: str, shape: tuple[int, int]) -> None:
    """The image fits into its canvas as it is, so a patch of a crop sees its cell and no more."""
    config = CONFIGS[name]
    model = blinker(tf.LlavaOnevisionForConditionalGeneration(config).eval())
    cells = build(config).image(picture(*shape)).cells
    newlines = (cells[17:] == cells[16:-1]).flatten(1).all(1)  # a newline has the cell of its predecessor
    patches = [16 + i for i in range(len(cells) - 16) if i == 0 or not newlines[i - 1]]
    assert len(patches) + int(newlines.sum()) == len(cells) - 16
    reach = 3 * max(shape) / config.vision_config.image_size / min(shape)  # of the bicubic filter
    for token in patches:
        changed = seen_by(model, shape, cells[token]) > 0
        assert changed[16:].nonzero()[:, 0].tolist() == [token - 16]
        assert changed[:16][overlap(cells[:16], cells[token], -2 / min(shape))].all()
        assert not changed[:16][~overlap(cells[:16], cells[token], reach)].any()


@pytest.mark.parametrize("shape", [(84, 84), (84, 70)], ids=str)
def test_a_shrunk_grid_looks_where_its_cells_say(shape: tuple[int, int]) -> None:
    """A token sees the patch in the middle of its cell; that patch is seen by no token far from it."""
    model = blinker(CASE.make_model())
    cells = build(model.config).image(picture(*shape)).cells
    fine = cells[16:]
    assert len(fine) < shape[0] * shape[1] // 49
    size = torch.tensor(shape)
    newlines = (fine == cells[15:-1]).flatten(1).all(1)
    for token in (~newlines).nonzero()[:, 0].tolist():
        patch = (fine[token, 1:].mean(1) * size / 7).floor()
        box = torch.stack([patch, patch + 1], dim=1) * 7 / size[:, None]
        change = seen_by(model, shape, torch.cat([fine[token, :1], box]))[16:] > 0
        assert change[token]
        assert not change[~overlap(fine, torch.cat([fine[token, :1], box]), 7 / min(shape))].any()


@pytest.mark.parametrize("shape", [(12, 28), (28, 20)], ids=str)
def test_several_images_are_padded_to_squares(shape: tuple[int, int]) -> None:
    """28 pixels on the longer side: nothing is resampled; the padding has no cell."""
    model = blinker(CASE.make_model())
    family, preprocessor = LlavaOnevision(model), build(model.config)
    other = picture(28, 28)
    black = preprocessor.images([picture(*shape).point(lambda _: 0), other])
    cells = black[0].cells
    torch.testing.assert_close(area(cells[:-1]), torch.tensor(1.0))
    assert (cells[-1] == cells[-2]).all()
    ids = torch.full((1, 34), IMAGE)
    for token, cell in enumerate(cells[:16]):
        if (cell[1:, 1] - cell[1:, 0] > 1e-6).all():
            white = preprocessor.images([with_white(*shape, cell), other])
            changed = changes(family, preprocessor.merge(black), preprocessor.merge(white), ids)
            assert changed.nonzero()[:, 0].tolist() == [token]


def test_a_frame_looks_where_its_cells_say() -> None:
    model = blinker(CASE.make_model())
    family, preprocessor = LlavaOnevision(model), build(model.config)
    blank = picture(28, 28).point(lambda _: 0)
    black = preprocessor.video([blank] * 3, [0.0, 1.0, 2.0])
    ids = torch.full((1, len(black.cells)), VIDEO)
    for token, cell in enumerate(black.cells[:-1]):
        frames = [blank] * 3
        frames[token // 4] = with_white(28, 28, cell)
        changed = changes(family, black.tensors, preprocessor.video(frames, [0.0, 1.0, 2.0]).tensors, ids)
        assert changed.nonzero()[:, 0].tolist() == [token]


def test_videos_of_unequal_length_are_refused() -> None:
    preprocessor = build(CASE.config())
    videos = [preprocessor.video([picture(20, 20)] * n, [0.0] * n) for n in (2, 3)]
    with pytest.raises(PromptError, match="equally many frames, got 2, 3"):
        preprocessor.merge(videos)
    with pytest.raises(PromptError, match="no frames"):
        preprocessor.video([], [])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"pixel_values": None}, r"images of \[\] and videos"),
        ({"pixel_values": None, "pixel_values_videos": None}, "neither"),
        ({"pixel_values": torch.zeros(2, 3, 28, 28)}, r"5 dimensions, got torch.float32 \(2, 3, 28, 28\)"),
        ({"pixel_values_videos": torch.zeros(1, 3, 3, 28, 14)}, r"\(3, 28, 28\), got .*14"),
        ({"image_sizes": None}, "image_sizes.*NoneType"),
        ({"image_sizes": torch.tensor([[28, 42]])}, r"\(2, 2\).*\(1, 2\)"),
        ({"batch_num_images": torch.tensor([3])}, r"sum to 2, got torch.int64 \(1,\): \[3\]"),
        ({"batch_num_images": 2}, "got int"),
        ({"batch_num_images": None}, "takes 3 crops.*holds 1"),
        (
            {"input_ids": torch.tensor([[3] + [IMAGE] * 13 + [VIDEO] * 34])},
            "image tokens .13.*video tokens .34",
        ),
        ({"input_ids": torch.tensor([[3] + [IMAGE] * 34])}, "video tokens .0"),
        ({"input_ids": torch.tensor([[3] + [IMAGE] * 34 + [VIDEO] * 14])}, "video tokens .14"),
    ],
    ids=str,
)
def test_wrong_inputs_are_named(changed: dict[str, Any], told: str) -> None:
    family = LlavaOnevision(CASE.make_model())
    with pytest.raises(PromptError, match=told):
        family.visuals({**mixed_inputs("iiv"), **changed})


@pytest.mark.parametrize("ratio", ["anyres", "anyres_max_", "anyres_max_0", "pad", None])
def test_other_aspect_ratios_are_refused(ratio: Any) -> None:
    config = CASE.config()
    LlavaOnevision.check_config(config)
    object.__setattr__(config, "vision_aspect_ratio", ratio)
    with pytest.raises(CheckpointError, match=f"anyres_max_N.*{ratio}"):
        LlavaOnevision.check_config(config)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"image_grid_pinpoints": None}, "lacks image_grid_pinpoints"),
        ({"num_image_tokens": 729}, "num_image_tokens = 729.*16"),
        ({"vision_aspect_ratio": "anyres_max_9"}, "anyres_max_9.*anyres_max_2"),
        ({"size": {"height": 30, "width": 30}}, "30 x 30.*28 x 28"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_model_are_refused(changed: dict[str, Any], told: str) -> None:
    config = CASE.config()
    with pytest.raises(CheckpointError, match=told):
        LlavaOnevisionPreprocessor({**settings_of(config), **changed}, tokenizer(), stub(config))
