"""Prompts and tiles against transformers' InternVLProcessor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor

from sgl_runtime import SGLPipeline, hf
from sgl_runtime.errors import CheckpointError, PromptError
from sgl_runtime.processing import Processor
from sgl_runtime.videos import Video

from .checkpoints import (
    IMAGE_SETTINGS,
    SPECIAL,
    STRING_TEMPLATE,
    TEMPLATE,
    make_tokenizer,
    picture,
    save_checkpoint,
)
from .slow import make_model

PIXELS = {name: value for name, value in IMAGE_SETTINGS.items() if name != "image_processor_type"}


class _WithoutVideo(InternVLProcessor):
    """InternVLProcessor insists on a video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, *_: Any, **__: Any) -> None: ...


def _theirs(
    content: list[dict[str, Any]], template: str = TEMPLATE, **tokens: bool
) -> dict[str, torch.Tensor]:
    processor = _WithoutVideo(
        image_processor=GotOcr2ImageProcessorPil(**PIXELS),
        tokenizer=make_tokenizer(template, **tokens),
        video_processor=None,
        image_seq_length=16,
        chat_template=template,
    )
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def _ours(template: str | None = TEMPLATE, **settings: Any) -> Processor:
    tokenizer, family = make_tokenizer(template), hf.view(make_model()).family
    pixels = {**PIXELS, "crop_to_patches": True, **settings}
    return Processor(tokenizer, family.preprocessor(pixels, tokenizer, family))


def _image(**size: int) -> dict[str, Any]:
    return {"type": "image", "image": picture(**size)}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


WIDE, TALL, TINY = {"width": 130, "height": 60}, {"width": 50, "height": 200}, {"width": 20, "height": 20}


@pytest.mark.parametrize(
    ("sizes", "prompt", "content"),
    [
        ([WIDE], "What is it?", [_image(**WIDE), _text("What is it?")]),
        ([TINY], " padded\n", [_image(**TINY), _text(" padded\n")]),
        ([WIDE, TALL, TINY], "Compare.", [_image(**WIDE), _image(**TALL), _image(**TINY), _text("Compare.")]),
        (
            [WIDE, TINY],
            "Is <image> in <image>?",
            [_text("Is "), _image(**WIDE), _text(" in "), _image(**TINY), _text("?")],
        ),
        ([TALL], "<image>Why </img> and ünïcode", [_image(**TALL), _text("Why </img> and ünïcode")]),
    ],
)
def test_tokens_and_tiles_are_those_of_internvl(
    sizes: list[dict[str, int]], prompt: str, content: list[dict[str, Any]]
) -> None:
    ours, theirs = _ours()([picture(**size) for size in sizes], prompt), _theirs(content)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"].float())
    assert ours["pixel_values"].dtype == torch.float32


@pytest.mark.parametrize("template", [TEMPLATE, SPECIAL[0] + TEMPLATE])
def test_exactly_one_bos(template: str) -> None:
    ours = _ours(template)
    ours.tokenizer = make_tokenizer(template, adds_bos=True)
    ids = ours(picture(**TINY), "x")["input_ids"]
    theirs = _theirs([_image(**TINY), _text("x")], template, adds_bos=True)
    assert torch.equal(ids, theirs["input_ids"])
    assert (ids == 0).sum() == 1


def test_one_tile_without_cropping() -> None:
    inputs = _ours(crop_to_patches=False)(picture(**WIDE), "x")
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)
    mean, std = (torch.tensor(IMAGE_SETTINGS[name])[:, None, None] for name in ("image_mean", "image_std"))
    back = inputs["pixel_values"][0] * std + mean
    resized = picture(**WIDE).resize((56, 56), resample=3)
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    torch.testing.assert_close(back, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("template", [None, STRING_TEMPLATE])
def test_templates_of_other_kinds(template: str | None) -> None:
    processor = _ours(template)
    ids = processor([picture(**TINY), picture(**TINY)], "a<image>b<image>c")["input_ids"][0]
    span = "<img>" + "<IMG_CONTEXT>" * 16 + "</img>\n"
    inner = f"a{span}b{span}c"
    expected = inner if template is None else f"Q: {inner} A:"
    assert processor.tokenizer.decode(ids) == expected


@pytest.mark.parametrize(
    ("size", "columns", "rows"),
    [(WIDE, 2, 1), (TALL, 1, 4), (TINY, 1, 1), ({"width": 112, "height": 112}, 2, 2)],
)
def test_cells_are_where_the_tiles_come_from(size: dict[str, int], columns: int, rows: int) -> None:
    """Of a picture that is white in one cell only, only the tokens of that cell and thumbnail see white."""
    processor, image = _ours(), picture(**size)
    inputs = processor(image, "x")
    tiles, cells = inputs["pixel_values"], inputs["visual_cells"].unflatten(0, (-1, 4, 4))
    assert tiles.shape[0] == cells.shape[0] == columns * rows + (columns * rows > 1)
    assert inputs["visual_image"].tolist() == [0] * (16 * len(tiles))
    canvas = Image.new("RGB", (columns * 56, rows * 56))
    for tile, patch in ((0, (0, 0)), (columns * rows - 1, (3, 1)), (columns * rows // 2, (1, 2))):
        (top, bottom), (left, right) = (
            cells[tile][patch][1:] * torch.tensor([[rows * 56], [columns * 56]])
        ).tolist()
        white = canvas.copy()
        white.paste((255, 255, 255), tuple(map(round, (left, top, right, bottom))))
        seen = (
            processor(white, "x")["pixel_values"].mean(1).unfold(1, 14, 14).unfold(2, 14, 14).mean((-1, -2))
        )
        assert seen[: columns * rows].flatten().argmax() == tile * 16 + patch[0] * 4 + patch[1]
    only = _ours(crop_to_patches=False)(image, "x")
    assert torch.equal(only["visual_cells"], cells[-1].flatten(0, 1))


def test_a_video_is_a_tile_a_frame() -> None:
    """As InternVLProcessor writes it, which cannot be built here."""
    frames = [picture(**WIDE, seed=seed) for seed in range(3)]
    inputs = _ours()(Video(frames), "What happens?")
    span = "<img>" + "<IMG_CONTEXT>" * 16 + "</img>"
    text = _ours().tokenizer.decode(inputs["input_ids"][0])
    assert f"Frame1: {span}\nFrame2: {span}\nFrame3: {span}\n" in text
    alone = [_ours(crop_to_patches=False)(frame, "x") for frame in frames]
    assert torch.equal(inputs["pixel_values"], torch.cat([each["pixel_values"] for each in alone]))
    cells = inputs["visual_cells"].unflatten(0, (3, 16))
    times = torch.tensor([[0, 1], [1, 2], [2, 3]]) / 3
    torch.testing.assert_close(cells[:, :, 0], times[:, None].expand(3, 16, 2))
    assert torch.equal(cells[0, :, 1:], alone[0]["visual_cells"][:, 1:])
    assert inputs["visual_image"].unique().tolist() == [0]


def test_a_conversation() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "text", "text": "And <image>?"}]},
    ]
    processor = _ours()
    tile = "<img>" + "<IMG_CONTEXT>" * 16 + "</img>\n"
    small = picture(width=8, height=8)
    one = _ours(max_patches=1)
    text = one.tokenizer.decode(one([small], messages)["input_ids"][0])
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n"
        f"<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nAnd {tile}?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    messages[3]["content"] = "And its tail?"  # without any mark the image is in the user's first message
    text = one.tokenizer.decode(one([small], messages)["input_ids"][0])
    assert f"<|im_start|>user\n{tile}What is it?<|im_end|>" in text
    theirs = _theirs([_image(width=8, height=8), _text("What is it?")])
    ours = processor([small], [{"role": "user", "content": [{"type": "image"}, _text("What is it?")]}])
    assert torch.equal(ours["input_ids"], theirs["input_ids"])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "list of messages"),
        ([{"role": "robot", "content": "x"}], "role .system, user, assistant."),
        ([{"role": "user"}], "role .system, user, assistant."),
        ([{"role": "user", "content": 3}], "text or a list of parts"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "type.*audio"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "role is assistant"),
        ([{"role": "system", "content": "x"}], "role is system"),
        ([{"role": "user", "content": "<video> x"}], "<video>, but there came <image>"),
    ],
)
def test_bad_conversations(prompt: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        _ours()(picture(), prompt)


@pytest.mark.parametrize(
    ("images", "prompt", "message"),
    [
        ([], "What?", "at least one image"),
        ([picture()], "", "asks something"),
        ([picture()], " \n", "asks something"),
        ([picture()], "<image>", "asks something"),
        ([picture()], None, "asks something"),
        ([picture()], "a <image> b <image>", "<image> <image>.*came <image>"),
        ([picture()], "a <IMG_CONTEXT>", "reserved"),
    ],
)
def test_bad_prompts(images: list[Any], prompt: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        _ours()(images, prompt)


@pytest.mark.parametrize("template", ["no content at all", "{{ raise_exception('never') }}"])
def test_a_template_without_images_is_refused(template: str) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        _ours(template)(picture(), "x")


def test_the_checkpoints_template_goes_before_the_tokenizers(tmp_path: Path) -> None:
    """As transformers' InternVLProcessor does, which reads chat_template.json."""
    directory = save_checkpoint(tmp_path / "one", template="tokenizer's <IMG_CONTEXT>")
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = "tokenizer's <IMG_CONTEXT>"
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "checkpoint's <IMG_CONTEXT>"}))
    processor = SGLPipeline.from_pretrained(directory, directory).large_processor
    assert processor is not None
    ids = processor(picture(), "x")["input_ids"][0]
    assert processor.tokenizer.decode(ids).startswith("checkpoint's")


@pytest.mark.parametrize("settings", [{"size": "x"}, {"image_mean": [0.5]}, {"resample": 77}])
def test_image_settings_that_do_not_work_are_a_bad_checkpoint(tmp_path: Path, settings: dict) -> None:
    directory = save_checkpoint(tmp_path / "one", settings=settings)
    with pytest.raises(CheckpointError, match="image settings"):
        SGLPipeline.from_pretrained(directory, directory)


def test_a_prompt_that_is_not_text_is_refused() -> None:
    with pytest.raises(PromptError, match="not UTF-8"):
        _ours()(picture(), "caf\udce9")


def test_decode() -> None:
    processor = _ours()
    ids = processor.tokenizer(" red<|im_end|>")["input_ids"]
    assert processor.decode(ids) == "red"


def _load(directory: Path) -> Processor:
    return Processor.from_directory(directory, hf.view(make_model(vocab=270, image_id=5)).family)


@pytest.mark.parametrize(
    ("settings", "files", "crops"),
    [
        ({}, {}, False),
        ({"crop_to_patches": True}, {}, True),
        ({"processor_class": "InternVLProcessor"}, {}, True),
        (
            {},
            {"processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": 16}},
            True,
        ),
    ],
)
def test_who_decides_on_tiles(
    tmp_path: Path, settings: dict[str, Any], files: dict[str, Any], crops: bool
) -> None:
    directory = save_checkpoint(tmp_path / "m", settings=settings)
    for name, value in files.items():
        (directory / name).write_text(json.dumps(value))
    assert _load(directory).preprocessor.processor.crop_to_patches is crops


def test_settings_inside_processor_config(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path / "m")
    (directory / "preprocessor_config.json").unlink()
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": IMAGE_SETTINGS}))
    assert _load(directory).preprocessor.processor.max_patches == 4


def test_template_of_older_checkpoints(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path / "m", template=None)
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": STRING_TEMPLATE}))
    processor = _load(directory)
    assert processor.tokenizer.decode(processor(picture(), "x")["input_ids"][0]).endswith("</img>\nx A:")


def test_damaged_directories(tmp_path: Path) -> None:
    for name, damage, message in (
        ("none", lambda d: (d / "preprocessor_config.json").unlink(), "no preprocessor_config"),
        ("json", lambda d: (d / "preprocessor_config.json").write_text("{"), "read as JSON"),
        (
            "mean",
            lambda d: (d / "preprocessor_config.json").write_text('{"size": 3}'),
            "image_mean, image_std",
        ),
        ("size", lambda d: _resize(d), "28 x 28.*56 x 56"),
        ("tokens", lambda d: [f.unlink() for f in d.glob("tokenizer*")], "no tokenizer"),
    ):
        directory = save_checkpoint(tmp_path / name)
        damage(directory)
        with pytest.raises(CheckpointError, match=message):
            _load(directory)


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"the id 5, the model expects 8"):
        Processor.from_directory(directory, hf.view(make_model(vocab=270, image_id=8)).family)


def _resize(directory: Path) -> None:
    settings = {**IMAGE_SETTINGS, "size": {"height": 28, "width": 28}}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
