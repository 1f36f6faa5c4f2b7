"""Idefics3 and SmolVLM against transformers' own processors and forward passes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from sgl_runtime.errors import CheckpointError, PromptError
from sgl_runtime.families import base, idefics3
from sgl_runtime.families.idefics3 import Idefics3, Idefics3Preprocessor, SmolVLM, SmolVLMPreprocessor
from sgl_runtime.processing import Processor
from sgl_runtime.videos import Video

from . import oracle
from .models import FAMILIES, IMAGE, Inputs

TILE, PER_TILE = 56, 16
SETTINGS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_seq_len": PER_TILE,
    "max_image_size": {"longest_edge": TILE},
    "resample": 1,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 4 * TILE},
    "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 5 * TILE}},
}
KINDS = {"idefics3": (Idefics3, Idefics3Preprocessor), "smolvlm": (SmolVLM, SmolVLMPreprocessor)}
SHAPES = [(100, 60), (60, 100), (56, 56), (57, 57), (30, 20), (400, 9), (3, 300), (1, 1), (224, 112)]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    special = ["<|endoftext|>", "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    special += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", additional_special_tokens=special[1:]
    )


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str) -> Any:
    return FAMILIES[kind].make_model(seed=3)


@pytest.fixture
def family(kind: str, model: Any) -> Idefics3:
    return KINDS[kind][0](model)


def prepare(kind: str, family: Idefics3, tokenizer: Any, **changes: Any) -> Idefics3Preprocessor:
    return KINDS[kind][1]({**SETTINGS, **changes}, tokenizer, family)


def smol_processor(tokenizer: Any) -> Any:
    """A SmolVLMProcessor for its text alone: a whole one needs torchvision and num2words."""
    from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

    processor = object.__new__(SmolVLMProcessor)
    processor.image_seq_len = PER_TILE
    processor.image_token, processor.fake_image_token = "<image>", "<fake_token_around_image>"
    processor.global_image_token = "<global-img>"
    return processor


def theirs(kind: str, tokenizer: Any, images: list[Image.Image], text: str, **changes: Any) -> Inputs:
    """What transformers' own processor makes of one request."""
    settings = {**SETTINGS, **changes}
    del settings["video_sampling"], settings["image_seq_len"]
    if kind == "idefics3":
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

        processor = tf.Idefics3Processor(Idefics3ImageProcessorPil(**settings), tokenizer, PER_TILE)
        found = processor(text=text, images=images, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "pixel_values", "pixel_attention_mask")}
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    found = SmolVLMImageProcessorPil(**settings)([images], return_tensors="pt", return_row_col_info=True)
    processor = smol_processor(tokenizer)
    first, *rest = text.split("<image>")
    spans = [processor.replace_image_token(found, image_idx=i) for i in range(len(images))]
    text = first + "".join(span + piece for span, piece in zip(spans, rest, strict=True))
    return {"input_ids": tokenizer(text, return_tensors="pt")["input_ids"], **found}


def ours(preprocessor: Idefics3Preprocessor, tokenizer: Any, images: list[Image.Image], text: str) -> Inputs:
    parts = [preprocessor.image(image) for image in images]
    first, *rest = text.split(preprocessor.image_mark)
    text = first + "".join(part.text + piece for part, piece in zip(parts, rest, strict=True))
    return {"input_ids": tokenizer(text, return_tensors="pt")["input_ids"], **preprocessor.merge(parts)}


def assert_same(mine: Inputs, wanted: Inputs) -> None:
    for name in ("input_ids", "pixel_values", "pixel_attention_mask"):
        assert mine[name].dtype == wanted[name].dtype
        assert torch.equal(mine[name], wanted[name]), name


def white_without_attention(model: Any) -> None:
    """Make the vision tower local: what a patch shows changes its own token only."""
    for layer in model.model.vision_model.encoder.layers:
        torch.nn.init.zeros_(layer.self_attn.out_proj.weight)


def changed(family: Idefics3, before: Tensor, after: Tensor) -> Tensor:
    """Which visual tokens differ, and by how much: (tokens,)."""
    found = []
    for tiles in (before, after):
        visuals = family.visuals({"pixel_values": tiles})
        with torch.no_grad():
            found.append(torch.cat([each.tokens for each in family.features(visuals, lambda: None)]))
    return (found[1] - found[0]).abs().amax(1)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_image_is_prepared_as_in_transformers(
    kind: str, family: Idefics3, tokenizer: Any, shape: tuple[int, int], split: bool
) -> None:
    preprocessor = prepare(kind, family, tokenizer, do_image_splitting=split)
    images, text = [picture(*shape)], "User:<image>what?"
    assert_same(
        ours(preprocessor, tokenizer, images, text),
        theirs(kind, tokenizer, images, text, do_image_splitting=split),
    )


def test_several_images_are_prepared_as_in_transformers(kind: str, family: Idefics3, tokenizer: Any) -> None:
    images = [picture(*shape, seed=i) for i, shape in enumerate([(100, 60), (20, 20), (10, 300)])]
    text = "User:<image>and\n\n<image><image> differ how?"
    mine = ours(prepare(kind, family, tokenizer), tokenizer, images, text)
    assert_same(mine, theirs(kind, tokenizer, images, text))
    visual = int((mine["input_ids"] == tokenizer.convert_tokens_to_ids("<image>")).sum())
    assert visual == sum(each.tokens for each in family.visuals(mine))


def test_one_tile_when_that_is_enough(kind: str, family: Idefics3, tokenizer: Any) -> None:
    """The image is first scaled to size, so one tile needs a size of one."""
    small = {"longest_edge": TILE}
    images, text = [picture(90, 90)], "<image>?"
    mine = ours(prepare(kind, family, tokenizer, size=small), tokenizer, images, text)
    assert_same(mine, theirs(kind, tokenizer, images, text, size=small))
    assert mine["pixel_values"].shape == (1, 1, 3, TILE, TILE)


def test_a_prompt_is_rendered_as_in_transformers(kind: str, family: Idefics3, tokenizer: Any) -> None:
    """SmolVLM's template, which puts no blank between "User:" and an image that comes first."""
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    processor = Processor(tokenizer, prepare(kind, family, tokenizer), DEFAULT_CHAT_TEMPLATE)
    images = [picture(100, 60), picture(20, 20)]
    found = processor(images, "<image>and <image>?")
    text = "<|im_start|>User:<image>and <image>?<end_of_utterance>\nAssistant:"
    assert_same(found, theirs(kind, tokenizer, images, text))
    assert len(found["visual_cells"]) == sum(each.tokens for each in family.visuals(found))


def test_a_mask_only_where_the_settings_pad(kind: str, family: Idefics3, tokenizer: Any) -> None:
    found = prepare(kind, family, tokenizer, do_pad=False).image(picture(100, 60)).tensors
    padded = prepare(kind, family, tokenizer).image(picture(100, 60)).tensors
    assert list(found) == ["pixel_values"]
    assert torch.equal(found["pixel_values"], padded["pixel_values"])


@pytest.mark.parametrize("together", [1, 3, 16])
def test_features_are_those_of_the_forward(
    kind: str, model: Any, family: Idefics3, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    case = FAMILIES[kind]
    inputs = case.make_inputs(seed=1, images=((2, 2), (1, 1), (1, 3)))
    monkeypatch.setitem(base._TILES_TOGETHER, "cpu", together)
    calls: list[None] = []
    visuals = family.visuals(inputs)
    with torch.no_grad():
        found = family.features(visuals, lambda: calls.append(None))
    assert len(calls) == -(-10 // together)
    assert [each.tokens.shape for each in found] == [(PER_TILE, 64)] * 10
    assert [visual.tokens for visual in visuals] == [PER_TILE] * 10
    prompt = oracle.embed(case, model, inputs)
    torch.testing.assert_close(
        torch.cat([each.tokens for each in found]), prompt.hidden[0, prompt.visual], rtol=1e-5, atol=1e-5
    )


def test_a_tile_is_encoded_bit_for_bit(kind: str, model: Any, family: Idefics3) -> None:
    inputs = FAMILIES[kind].make_inputs(images=((1, 2),))
    for i, visual in enumerate(family.visuals(inputs)):
        with torch.no_grad():
            wanted = model.get_image_features(
                inputs["pixel_values"][:, i : i + 1], inputs["pixel_attention_mask"][:, i : i + 1]
            ).pooler_output[0]
            assert torch.equal(family.encode(visual).tokens, wanted)


def test_batched_or_not_is_the_same(kind: str, family: Idefics3) -> None:
    inputs = FAMILIES[kind].make_inputs(images=((1, 2),))
    flat = {name: inputs[name][0] for name in ("pixel_values", "pixel_attention_mask")}
    for a, b in zip(family.visuals(inputs), family.visuals(flat), strict=True):
        assert torch.equal(a.tensors["pixel_values"], b.tensors["pixel_values"])


def test_a_black_image(kind: str, model: Any, family: Idefics3, tokenizer: Any) -> None:
    part = prepare(kind, family, tokenizer).image(Image.new("RGB", (80, 70)))
    tiles = part.tensors["pixel_values"]
    assert (tiles == -1).all()
    with torch.no_grad():
        found = family.features(family.visuals(part.tensors), lambda: None)
        wanted = model.get_image_features(tiles[None]).pooler_output
    torch.testing.assert_close(torch.cat([each.tokens for each in found]), torch.cat(list(wanted)))


def test_a_grey_tile_is_no_padding(kind: str, model: Any, family: Idefics3) -> None:
    """transformers takes a tile whose values are all 0 for padding, and then lacks its features."""
    tiles = torch.randn(3, 3, TILE, TILE, generator=torch.Generator().manual_seed(0))
    tiles[1] = 0
    with torch.no_grad():
        kept = list(model.get_image_features(tiles[None]).pooler_output)
        assert len(torch.cat(kept)) == 2 * PER_TILE
        found = family.features(family.visuals({"pixel_values": tiles[None]}), lambda: None)
        vision, connector = model.model.vision_model, model.model.connector
        wanted = connector(vision(pixel_values=tiles).last_hidden_state)
    torch.testing.assert_close(torch.stack([each.tokens for each in found]), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [56, 60])
def test_cells_are_where_tokens_look(kind: str, tokenizer: Any, tile: int) -> None:
    """Of a tile of 60 pixels, 8 patches of 7 see 56."""
    config = FAMILIES[kind].config()
    config.vision_config.image_size = tile
    torch.manual_seed(0)
    model = tf.AutoModelForImageTextToText.from_config(config).eval()
    white_without_attention(model)
    family = KINDS[kind][0](model)
    preprocessor = prepare(
        kind, family, tokenizer, max_image_size={"longest_edge": tile}, size={"longest_edge": 3 * tile}
    )
    pixels = np.zeros((2 * tile, 3 * tile, 3), dtype=np.uint8)  # as large as it is scaled to: nothing blurs
    black = preprocessor.image(Image.fromarray(pixels))
    assert black.cells.shape == (7 * PER_TILE, 3, 2)
    assert (black.cells[:, 0] == torch.tensor([0.0, 1.0])).all()
    edges = black.cells[:, 1:] * torch.tensor([2.0 * tile, 3.0 * tile])[:, None]
    torch.testing.assert_close(edges[: 6 * PER_TILE], edges[: 6 * PER_TILE].round(), rtol=0, atol=1e-4)
    for token in (0, 6, 21, 40, 63, 95):
        (top, bottom), (left, right) = edges[token].round().int().tolist()
        assert (bottom - top, right - left) == (14, 14)
        painted = pixels.copy()
        painted[top:bottom, left:right] = 255
        part = preprocessor.image(Image.fromarray(painted))
        moved = changed(family, black.tensors["pixel_values"], part.tensors["pixel_values"])
        assert moved[: 6 * PER_TILE].nonzero()[:, 0].tolist() == [token]
        most = 6 * PER_TILE + int(moved[6 * PER_TILE :].argmax())
        overlap = torch.minimum(edges[:, :, 1], edges[token, :, 1]) - torch.maximum(
            edges[:, :, 0], edges[token, :, 0]
        )
        areas = overlap.clamp_min(0).prod(1)[6 * PER_TILE :]
        assert areas[most - 6 * PER_TILE] == areas.max() > 0
    painted = pixels.copy()
    painted[56:tile] = 255  # below the patches of the upper tiles
    unseen = preprocessor.image(Image.fromarray(painted)).tensors["pixel_values"]
    assert not changed(family, black.tensors["pixel_values"], unseen)[: 6 * PER_TILE].any()


def test_the_example_runs(kind: str, model: Any, family: Idefics3) -> None:
    inputs = family.example()
    (visual,) = family.visuals(inputs)
    assert (inputs["input_ids"] == IMAGE).sum() == visual.tokens
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def _pixels(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


BAD: list[tuple[Any, str]] = [
    ({}, "pixel_values must be a tensor of 4 dimensions, got NoneType"),
    ({"pixel_values": [1.0]}, "got list"),
    ({"pixel_values": _pixels(3, TILE, TILE)}, "got torch.float32 \\(3, 56, 56\\)"),
    ({"pixel_values": _pixels(0, 3, TILE, TILE)}, "must be a tensor of 4 dimensions"),
    ({"pixel_values": _pixels(2, 1, 3, TILE, TILE)}, "of one request"),
    ({"pixel_values": _pixels(1, 1, 3, 28, TILE)}, "\\(tiles, 3, 56, 56\\) of floats"),
    ({"pixel_values": _pixels(1, 3, TILE, TILE, dtype=torch.uint8)}, "of floats, got torch.uint8"),
    (
        {"pixel_values": _pixels(1, 2, 3, TILE, TILE), "pixel_attention_mask": _pixels(2, TILE, TILE)},
        "pixel_attention_mask must be \\(1, 2, 56, 56\\)",
    ),
    ({"pixel_values": _pixels(2, 3, TILE, TILE), "pixel_attention_mask": "all"}, "got str"),
    (
        {
            "pixel_values": _pixels(2, 3, TILE, TILE),
            "pixel_attention_mask": torch.stack([_pixels(TILE, TILE), torch.zeros(TILE, TILE)]),
        },
        "tile 1 is padded",
    ),
]


@pytest.mark.parametrize(("inputs", "message"), BAD, ids=[message[:24] for _, message in BAD])
def test_wrong_inputs(family: Idefics3, inputs: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        family.visuals(inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": None}, "lacks size"),
        ({"image_mean": None}, "lacks image_mean"),
        ({"size": {"height": 56, "width": 56}}, "size must be"),
        ({"max_image_size": {"longest_edge": 48}}, "tiles of 48 pixels"),
        ({"image_seq_len": 81}, "image_seq_len is 81, the model makes 16"),
        ({"image_std": [0.5]}, "image settings do not work"),
    ],
)
def test_wrong_settings(
    kind: str, family: Idefics3, tokenizer: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        prepare(kind, family, tokenizer, **changes)


def test_patches_that_do_not_fill_tokens(kind: str) -> None:
    config = FAMILIES[kind].config()
    KINDS[kind][0].check_config(config)
    config.scale_factor = 3
    with pytest.raises(CheckpointError, match="8 patches of 7 pixels a side, which scale_factor 3"):
        KINDS[kind][0].check_config(config)


@pytest.fixture
def smolvlm(tokenizer: Any) -> tuple[SmolVLM, SmolVLMPreprocessor]:
    family = SmolVLM(FAMILIES["smolvlm"].make_model())
    return family, SmolVLMPreprocessor(SETTINGS, tokenizer, family)


def test_idefics3_takes_no_video(tokenizer: Any) -> None:
    family = Idefics3(FAMILIES["idefics3"].make_model())
    assert not Idefics3.video
    assert Idefics3Preprocessor.video_mark is None
    with pytest.raises(PromptError, match="images only"):
        prepare("idefics3", family, tokenizer).video([picture(9, 9)], [0.0])


@pytest.mark.parametrize(("count", "fps"), [(1, 1.0), (3, 0.04), (5, 2.0)])
def test_the_text_of_a_video_is_that_of_transformers(
    smolvlm: tuple[SmolVLM, SmolVLMPreprocessor],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    fps: float,
) -> None:
    from transformers.models.smolvlm import processing_smolvlm
    from transformers.video_utils import VideoMetadata

    words = {1: "one", 3: "three", 5: "five"}
    monkeypatch.setattr(processing_smolvlm, "num2words", words.__getitem__)
    metadata = VideoMetadata(total_num_frames=count, fps=fps, frames_indices=list(range(count)))
    found = {"pixel_values": torch.zeros(1, count, 3, TILE, TILE), "video_metadata": [metadata]}
    wanted = smol_processor(tokenizer).replace_video_token(found, video_idx=0)
    part = smolvlm[1].video([picture(90, 50, seed=i) for i in range(count)], metadata.timestamps)
    assert part.text == wanted


def test_numbers_in_words() -> None:
    found = [idefics3._in_words(number) for number in (8, 15, 20, 64, 99, 100, 112, 700, 999)]
    assert found == [
        "eight",
        "fifteen",
        "twenty",
        "sixty-four",
        "ninety-nine",
        "one hundred",
        "one hundred and twelve",
        "seven hundred",
        "nine hundred and ninety-nine",
    ]
    with pytest.raises(PromptError, match="at most 999 frames, got 1000"):
        idefics3._in_words(1000)


@pytest.mark.parametrize(
    ("shape", "settings", "scaled"),
    [
        ((90, 50), {}, (224, 124)),
        ((50, 91), {}, (124, 224)),
        ((300, 300), {}, (224, 224)),
        ((90, 50), {"video_processor": {"size": {"longest_edge": 168}}}, (168, 94)),
    ],
)
def test_frames_are_scaled_twice(
    tokenizer: Any, shape: tuple[int, int], settings: dict[str, Any], scaled: tuple[int, int]
) -> None:
    """First to the size, the shorter edge even, then to the tile: as SmolVLMVideoProcessor does."""
    frames = [picture(*shape, seed=i) for i in range(3)]
    family = SmolVLM(FAMILIES["smolvlm"].make_model())
    part = prepare("smolvlm", family, tokenizer, **settings).video(frames, [0.0, 1.0, 2.0])
    lanczos = Image.Resampling.LANCZOS
    squares = [frame.resize(scaled, lanczos).resize((TILE, TILE), lanczos) for frame in frames]
    wanted = torch.stack([torch.from_numpy(np.array(square)) for square in squares]).permute(0, 3, 1, 2)
    torch.testing.assert_close(part.tensors["pixel_values"], wanted / 127.5 - 1, rtol=0, atol=1e-6)
    assert part.tensors["pixel_attention_mask"].shape == (3, TILE, TILE)
    assert part.tensors["pixel_attention_mask"].all()


def test_frames_are_those_of_the_video_processor(smolvlm: tuple[SmolVLM, SmolVLMPreprocessor]) -> None:
    pytest.importorskip("torchvision", reason="transformers' video processors need torchvision")
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    frames = [picture(90, 50, seed=i) for i in range(3)]
    settings = copy.deepcopy(SETTINGS)  # which the processor writes into
    del settings["image_seq_len"]
    processor = SmolVLMVideoProcessor(**settings)
    found = processor([frames], return_tensors="pt")
    part = smolvlm[1].video(frames, [0.0, 1.0, 2.0])
    # Each of the two scalings may round a value of 0 ... 255 the other way.
    torch.testing.assert_close(
        part.tensors["pixel_values"], found["pixel_values"][0], rtol=0, atol=2.5 / 127.5
    )
    assert torch.equal(part.tensors["pixel_attention_mask"], found["pixel_attention_mask"][0])


def test_cells_of_a_video_tell_the_time(smolvlm: tuple[SmolVLM, SmolVLMPreprocessor]) -> None:
    family, preprocessor = smolvlm
    part = preprocessor.video([picture(90, 50)] * 4, [0.5, 1.5, 2.5, 3.5])
    assert len(part.cells) == sum(each.tokens for each in family.visuals(part.tensors)) == 4 * PER_TILE
    times = part.cells.view(4, PER_TILE, 3, 2)[:, :, 0]
    begin = torch.arange(4) / 4
    assert torch.equal(times, torch.stack((begin, begin + 0.25), 1)[:, None].expand(4, PER_TILE, 2))
    single = preprocessor.image(picture(9, 9)).cells[-PER_TILE:]
    assert torch.equal(part.cells.view(4, PER_TILE, 3, 2)[2, :, 1:], single[:, 1:])


def test_a_video_beside_an_image(smolvlm: tuple[SmolVLM, SmolVLMPreprocessor]) -> None:
    family, preprocessor = smolvlm
    parts = [preprocessor.video([picture(90, 50)] * 2, [0.5, 1.5]), preprocessor.image(picture(100, 60))]
    visuals = family.visuals(preprocessor.merge(parts))
    assert len(visuals) * PER_TILE == sum(len(part.cells) for part in parts)
    assert torch.equal(visuals[1].tensors["pixel_values"][0], parts[0].tensors["pixel_values"][1])
    assert torch.equal(visuals[2].tensors["pixel_values"][0], parts[1].tensors["pixel_values"][0])


def test_a_video_in_a_prompt(smolvlm: tuple[SmolVLM, SmolVLMPreprocessor], tokenizer: Any) -> None:
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    preprocessor = smolvlm[1]
    processor = Processor(tokenizer, preprocessor, DEFAULT_CHAT_TEMPLATE)
    frames = [picture(90, 50, seed=i) for i in range(3)]
    found = processor([picture(60, 100), Video(frames, fps=0.5)], "Is <image> in <video>?")
    image, video = preprocessor.image(picture(60, 100)), preprocessor.video(frames, [0.0, 2.0, 4.0])
    text = f"<|im_start|>User: Is {image.text} in {video.text}?<end_of_utterance>\nAssistant:"
    assert found["input_ids"][0].tolist() == tokenizer(text)["input_ids"]
    assert torch.equal(found["pixel_values"], preprocessor.merge([image, video])["pixel_values"])
    assert torch.equal(found["visual_cells"], torch.cat((image.cells, video.cells)))


@pytest.mark.parametrize(("count", "seconds"), [(0, []), (2, [0.0])])
def test_wrong_videos(smolvlm: tuple[SmolVLM, SmolVLMPreprocessor], count: int, seconds: list[float]) -> None:
    with pytest.raises(PromptError, match=f"got {count} frames, {len(seconds)} times"):
        smolvlm[1].video([picture(9, 9)] * count, seconds)
