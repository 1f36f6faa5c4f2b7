"""LLaVA-1.5 and LLaVA-NeXT against transformers' own processors and forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from sgl_runtime.engine import VLM
from sgl_runtime.errors import CheckpointError, ImageError, PromptError
from sgl_runtime.families.base import Prepared, Preprocessor
from sgl_runtime.families.llava import Llava, LlavaNext, LlavaNextPreprocessor, LlavaPreprocessor
from sgl_runtime.processing import Processor

from . import oracle
from .llava import (
    PROMPT,
    SHAPES,
    area,
    blinker,
    changes,
    clip_settings,
    common,
    overlap,
    picture,
    stub,
    tokenizer,
    with_white,
)
from .models import FAMILIES, IMAGE

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
TINY_PINPOINTS = FAMILIES["llava_next"].config().image_grid_pinpoints
FAMILY_OF = {"llava": Llava, "llava_next": LlavaNext, "llava_next-mistral": LlavaNext}


def next_settings(size: int, patch: int, pinpoints: list[list[int]]) -> dict[str, Any]:
    return clip_settings(
        size,
        patch,
        image_processor_type="LlavaNextImageProcessor",
        do_pad=True,
        image_grid_pinpoints=pinpoints,
    )


SIGLIP_SETTINGS = {
    **common({"height": 28, "width": 28}, [0.5] * 3, [0.5] * 3),
    "image_processor_type": "SiglipImageProcessor",
    "patch_size": 7,
    "vision_feature_select_strategy": "full",
}


def siglip_config() -> Any:
    vision = FAMILIES["llava_onevision"].config().vision_config
    return tf.LlavaConfig(
        vision_config=vision,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_token_index=IMAGE,
    )


def tiny(name: str) -> Any:
    return FAMILIES[name].config()


# name: preprocessor, settings, configuration
PREPROCESSORS: dict[str, tuple[type[Preprocessor], dict[str, Any], Any]] = {
    "1.5": (LlavaPreprocessor, clip_settings(336, 14), tf.LlavaConfig()),
    "1.5 tiny": (LlavaPreprocessor, clip_settings(28, 7), tiny("llava")),
    "1.5 padded": (
        LlavaPreprocessor,
        clip_settings(28, 7, image_processor_type="LlavaImageProcessor", do_pad=True),
        tiny("llava"),
    ),
    "1.5 siglip": (LlavaPreprocessor, SIGLIP_SETTINGS, siglip_config()),
    "next": (
        LlavaNextPreprocessor,
        next_settings(336, 14, PINPOINTS),
        tf.LlavaNextConfig(image_grid_pinpoints=PINPOINTS),
    ),
    "next tiny": (LlavaNextPreprocessor, next_settings(28, 7, TINY_PINPOINTS), tiny("llava_next")),
}


CASES = [  # LLaVA-1.5 refuses the longest
    (name, shape) for name in PREPROCESSORS for shape in SHAPES if "1.5" not in name or max(shape) < 4000
]


def build(name: str) -> Any:
    kind, settings, config = PREPROCESSORS[name]
    return kind(settings, tokenizer(), stub(config))


def theirs(name: str) -> Any:
    """Return transformers' processor for the same settings."""
    _, settings, _ = PREPROCESSORS[name]
    names = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    own = {key: settings[key] for key in names if key in settings}
    inner = getattr(tf, settings["image_processor_type"] + "Pil")
    others = (*names, "image_token", "image_processor_type")
    pixels = {key: value for key, value in settings.items() if key not in others}
    whole = tf.LlavaNextProcessor if name.startswith("next") else tf.LlavaProcessor
    return whole(image_processor=inner(**pixels), tokenizer=tokenizer(), **own)


def request(preprocessor: Any, parts: list[Prepared], prompt: str = PROMPT) -> dict[str, Tensor]:
    pieces = prompt.split("<image>")
    text = pieces[0] + "".join(part.text + piece for part, piece in zip(parts, pieces[1:], strict=True))
    return {"input_ids": torch.tensor([tokenizer()(text)["input_ids"]]), **preprocessor.merge(parts)}


@pytest.mark.parametrize(("name", "second"), CASES, ids=str)
def test_images_are_prepared_as_transformers_does(name: str, second: tuple[int, int]) -> None:
    preprocessor = build(name)
    images = [picture(60, 100), picture(*second)]
    ours = request(preprocessor, [preprocessor.image(image) for image in images])
    wanted = theirs(name)(text=PROMPT, images=images, return_tensors="pt")
    assert set(ours) == set(wanted) - {"attention_mask"}
    for key, value in ours.items():
        assert value.dtype == wanted[key].dtype
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_every_token_has_a_cell(name: str, shape: tuple[int, int]) -> None:
    preprocessor = build(name)
    prepared = preprocessor.image(picture(*shape))
    cells = prepared.cells
    assert cells.dtype == torch.float32
    assert cells.shape == (prepared.text.count("<image>"), 3, 2)
    assert prepared.text == "<image>" * len(cells)
    assert cells.min() >= 0
    assert cells.max() <= 1
    assert (cells[..., 0] <= cells[..., 1]).all()
    assert (cells[:, 0] == torch.tensor([0, 1])).all()


def test_the_whole_image_and_its_canvas_each_cover_it_once() -> None:
    preprocessor = build("next")
    for shape in [(90, 40), (35, 120), (64, 64), (480, 640)]:
        cells = preprocessor.image(picture(*shape)).cells
        torch.testing.assert_close(area(cells[:576]), torch.tensor(1.0))
        fine = cells[576:]
        rows = int((fine[1:, 1, 0] > fine[:-1, 1, 0]).sum()) + 1
        seen = fine[:, 1:, 1].amax(0) - fine[:, 1:, 0].amin(0)
        patch = (fine[:, 1:, 1] - fine[:, 1:, 0]).amax(0)
        assert (seen > 1 - patch).all()  # what is cut off as padding may be up to a patch too much
        patches = fine.unflatten(0, (rows, -1))[:, :-1].flatten(0, 1)
        torch.testing.assert_close(area(patches), seen.prod())
        newlines = fine.unflatten(0, (rows, -1))[:, -2:]
        assert (newlines[:, 0] == newlines[:, 1]).all()


def test_an_image_that_would_be_enlarged_without_end_is_refused() -> None:
    with pytest.raises(ImageError, match=r"4000 x 1 pixels.*200 times"):
        build("1.5").image(picture(1, 4000))


@pytest.mark.parametrize("images", [((1, 2), (2, 1)), ((2, 2),), ((1, 1), (1, 3), (1, 1))], ids=str)
@pytest.mark.parametrize("name", FAMILY_OF)
@torch.no_grad()
def test_features_are_what_transformers_embeds(name: str, images: Any) -> None:
    case = FAMILIES[name]
    model = case.make_model(seed=3)
    family = FAMILY_OF[name](model)
    inputs = case.make_inputs(seed=4, images=images)
    wanted = oracle.embed(case, model, inputs)
    visuals = family.visuals(inputs)
    assert len(visuals) == len(images)
    features = [family.encode(visual) for visual in visuals]
    assert [len(each.tokens) for each in features] == [visual.tokens for visual in visuals]
    torch.testing.assert_close(
        torch.cat([each.tokens for each in features]), wanted.hidden[0, wanted.visual], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("strategy", "layer"), [("full", -2), ("default", [-2, -1]), ("default", 1)])
@torch.no_grad()
def test_layers_and_class_token_are_those_of_the_configuration(strategy: str, layer: Any) -> None:
    config = tiny("llava")
    config.vision_feature_select_strategy, config.vision_feature_layer = strategy, layer
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(config).eval()
    Llava.check_config(config)
    family = Llava(model)
    inputs = {
        "input_ids": torch.tensor([[3, *[IMAGE] * (17 if strategy == "full" else 16), 4]]),
        "pixel_values": torch.randn(1, 3, 28, 28),
    }
    wanted = oracle.embed(FAMILIES["llava"], model, inputs)
    (visual,) = family.visuals(inputs)
    torch.testing.assert_close(
        family.encode(visual).tokens, wanted.hidden[0, wanted.visual], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_the_processor_and_the_engine_take_them(name: str) -> None:
    model = FAMILIES[name].make_model()
    _, settings, _ = PREPROCESSORS[{"llava": "1.5 tiny", "llava_next": "next tiny"}[name]]
    processor = Processor.of(
        Path("here"), tokenizer(), settings, template=None, family=FAMILY_OF[name](model)
    )
    inputs = processor([picture(60, 100), picture(28, 40)], "what is this")
    prompt = VLM(model, "small").prompt(inputs)
    assert sum(visual.tokens for visual in prompt.visuals) == len(inputs["visual_cells"])


@pytest.mark.parametrize("name", FAMILY_OF)
@torch.no_grad()
def test_the_example_is_one_image(name: str) -> None:
    family = FAMILY_OF[name](FAMILIES[name].make_model())
    example = family.example()
    (visual,) = family.visuals(example)
    assert len(family.encode(visual).tokens) == visual.tokens == (example["input_ids"] == IMAGE).sum()
    family.model(**example)


@pytest.mark.parametrize("shape", [(28, 56), (70, 28), (28, 28)], ids=str)
def test_a_patch_of_1_5_looks_where_its_cell_says(shape: tuple[int, int]) -> None:
    """The image's shorter side is a crop's: nothing is resampled."""
    model = blinker(FAMILIES["llava"].make_model())
    family = Llava(model)
    preprocessor = LlavaPreprocessor(clip_settings(28, 7), tokenizer(), family)
    black = preprocessor.image(picture(*shape).point(lambda _: 0))
    ids = torch.full((1, 16), IMAGE)
    for token, cell in enumerate(black.cells):
        white = preprocessor.image(with_white(*shape, cell))
        changed = changes(family, black.tensors, white.tensors, ids).nonzero()[:, 0]
        assert changed.tolist() == [token]


@pytest.mark.parametrize("shape", [(12, 28), (28, 20)], ids=str)
def test_padding_of_1_5_has_no_cell(shape: tuple[int, int]) -> None:
    model = blinker(FAMILIES["llava"].make_model())
    family = Llava(model)
    settings = clip_settings(28, 7, image_processor_type="LlavaImageProcessor", do_pad=True)
    preprocessor = LlavaPreprocessor(settings, tokenizer(), family)
    black = preprocessor.image(picture(*shape).point(lambda _: 0))
    torch.testing.assert_close(area(black.cells), torch.tensor(1.0))
    ids = torch.full((1, 16), IMAGE)
    seen = black.cells[:, 1:, 1] > black.cells[:, 1:, 0] + 1e-6
    for token, cell in enumerate(black.cells):
        if seen[token].all():
            white = preprocessor.image(with_white(*shape, cell))
            assert changes(family, black.tensors, white.tensors, ids).nonzero()[:, 0].tolist() == [token]
    white = preprocessor.image(picture(*shape).point(lambda _: 255))
    changed = changes(family, black.tensors, white.tensors, ids) > 0
    assert changed.tolist() == seen.all(1).tolist()


@pytest.mark.parametrize("shape", [(56, 42), (28, 84), (70, 56), (84, 28)], ids=str)
def test_a_patch_of_next_looks_where_its_cell_says(shape: tuple[int, int]) -> None:
    """The image fits into its canvas as it is, so a patch of a crop sees its cell and no more."""
    model = blinker(FAMILIES["llava_next"].make_model())
    family = LlavaNext(model)
    settings = next_settings(28, 7, TINY_PINPOINTS)
    preprocessor = LlavaNextPreprocessor(settings, tokenizer(), family)
    black = preprocessor.image(picture(*shape).point(lambda _: 0))
    ids = torch.full((1, len(black.cells)), IMAGE)
    columns = shape[1] // 7
    reach = 3 * max(shape) / 28 / min(shape)  # of the bicubic filter, in the whole image
    for token in range(16, len(black.cells)):
        if (token - 16) % (columns + 1) == columns:  # a newline sees nothing
            assert (black.cells[token] == black.cells[token - 1]).all()
            continue
        white = preprocessor.image(with_white(*shape, black.cells[token]))
        changed = changes(family, black.tensors, white.tensors, ids) > 0
        assert changed[16:].nonzero()[:, 0].tolist() == [token - 16]
        whole = black.cells[:16]
        assert changed[:16][overlap(whole, black.cells[token])].all()
        assert not changed[:16][~overlap(whole, black.cells[token], reach)].any()


def good(name: str) -> dict[str, Tensor]:
    return FAMILIES[name].make_inputs()


@pytest.mark.parametrize("name", ["llava", "llava_next"])
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"pixel_values": None}, "NoneType"),
        ({"pixel_values": [1, 2]}, "list"),
        ({"pixel_values": torch.zeros(2, 28, 28)}, r"\(2, 28, 28\)"),
        ({"pixel_values": "small"}, r"\(3, 28, 28\).*14"),
        ({"pixel_values": "integers"}, "uint8"),
    ],
    ids=str,
)
def test_wrong_pixels_are_named(name: str, changed: dict[str, Any], told: str) -> None:
    family = FAMILY_OF[name](FAMILIES[name].make_model())
    inputs: dict[str, Any] = good(name)
    pixels = inputs["pixel_values"]
    special = {"small": pixels[..., :14], "integers": pixels.byte()}
    inputs.update({key: special[v] if isinstance(v, str) else v for key, v in changed.items()})
    with pytest.raises(PromptError, match=told):
        family.visuals(inputs)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        (None, "NoneType"),
        (torch.tensor([[28, 42]]), r"\(2, 2\).*\(1, 2\)"),
        (torch.tensor([[28.0, 42.0], [28.0, 42.0]]), "float32"),
        (torch.tensor([[28, 42], [0, 42]]), r"positive.*\[28, 42, 0, 42\]"),
        (torch.tensor([[28, 42], [84, 84]]), "84 x 84 pixels takes 10 crops.*holds 3"),
    ],
    ids=str,
)
def test_wrong_sizes_are_named(sizes: Any, told: str) -> None:
    family = LlavaNext(FAMILIES["llava_next"].make_model())
    with pytest.raises(PromptError, match=told):
        family.visuals({**good("llava_next"), "image_sizes": sizes})


def test_configurations_that_cannot_run_are_refused() -> None:
    pixtral = tf.LlavaConfig(vision_config=tf.PixtralVisionConfig())
    with pytest.raises(CheckpointError, match="pixtral"):
        Llava.check_config(pixtral)
    config = siglip_config()
    config.vision_feature_select_strategy = "default"
    with pytest.raises(CheckpointError, match="first patch"):
        Llava.check_config(config)
    config = tiny("llava_next")
    config.vision_feature_select_strategy = "full"
    with pytest.raises(CheckpointError, match="class token"):
        LlavaNext.check_config(config)
    config = tiny("llava_next")
    config.image_grid_pinpoints = [[28, 50]]
    with pytest.raises(CheckpointError, match=r"28 pixels, got \[\[28, 50\]\]"):
        LlavaNext.check_config(config)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"image_mean": None}, "lacks image_mean"),
        ({"image_processor_type": "GotOcr2ImageProcessor"}, "GotOcr2ImageProcessor"),
        ({"patch_size": 14}, "patch_size = 14.*7"),
        ({"vision_feature_select_strategy": "full"}, "full.*default"),
        ({"size": {"shortest_edge": 30}, "crop_size": {"height": 30, "width": 30}}, "30 x 30.*28 x 28"),
        ({"do_center_crop": False}, "28 x 56.*28 x 28"),
        ({"size": {"depth": 3}}, "do not work"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_model_are_refused(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        LlavaPreprocessor({**clip_settings(28, 7), **changed}, tokenizer(), stub(tiny("llava")))


def test_pinpoints_must_be_the_models() -> None:
    settings = next_settings(28, 7, [[28, 56]])
    with pytest.raises(CheckpointError, match="image_grid_pinpoints"):
        LlavaNextPreprocessor(settings, tokenizer(), stub(tiny("llava_next")))
    del settings["image_grid_pinpoints"]
    with pytest.raises(CheckpointError, match="lacks image_grid_pinpoints"):
        LlavaNextPreprocessor(settings, tokenizer(), stub(tiny("llava_next")))


def test_settings_of_the_fast_processor_are_read_too() -> None:
    settings = clip_settings(28, 7, image_processor_type="CLIPImageProcessorFast")
    fast = LlavaPreprocessor(settings, tokenizer(), stub(tiny("llava"))).image(picture(40, 50))
    plain = build("1.5 tiny").image(picture(40, 50))
    assert torch.equal(fast.tensors["pixel_values"], plain.tensors["pixel_values"])
