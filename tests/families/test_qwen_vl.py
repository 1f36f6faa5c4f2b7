"""Qwen-VL's images, videos and prompts against transformers' own processors, and against plain arithmetic."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sgl_runtime import hf
from sgl_runtime.engine import VLM
from sgl_runtime.errors import CheckpointError, ImageError, PromptError
from sgl_runtime.families.base import Family
from sgl_runtime.processing import Processor
from sgl_runtime.videos import Video

from .models import FAMILIES

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
THEIRS: dict[str, Any] = {
    "qwen2_vl": Qwen2VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
}
SETTINGS: dict[str, Any] = {
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 4 * 64, "longest_edge": 40 * 64},
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}
SIZES = [(90, 40), (35, 120), (64, 64), (9, 9), (8, 100)]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'text' %}"
    "{{ c['text'] }}{% else %}<|vision_start|><|{{ c['type'] }}_pad|><|vision_end|>{% endif %}{% endfor %} . "
    "{% endfor %}"
)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = ["<unk>", "<s>", "</s>", "user:", "is", *special, "what", *"<>.", "seconds", *"0123456789"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", additional_special_tokens=special
    )
    found.chat_template = TEMPLATE
    return found


def family(name: str) -> Family:
    return hf.view(FAMILIES[name].make_model()).family


def processor(name: str, **changes: Any) -> Processor:
    own, tokens = family(name), tokenizer()
    return Processor(tokens, own.preprocessor({**SETTINGS, **changes}, tokens, own))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [[SIZES[0]], SIZES[1:3], SIZES], ids=["one", "two", "five"])
def test_images(name: str, sizes: list[tuple[int, int]]) -> None:
    class WithoutVideo(THEIRS[name]):  # type: ignore[misc]
        """Theirs insists on a video processor, which needs torchvision."""

        def check_argument_for_proper_class(self, *_: Any, **__: Any) -> None: ...

    images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": " what is"}]
    theirs = WithoutVideo(Qwen2VLImageProcessorPil(**SETTINGS), tokenizer(), SimpleNamespace(merge_size=2))
    text = tokenizer().apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    expected = theirs(images=images, text=[text], return_tensors="pt")
    found = processor(name)(images, " what is")
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["pixel_values"], expected["pixel_values"].float())
    assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_where_the_patches_come_from(name: str) -> None:
    """Of a picture that is white in one cell only, that token's patches alone are bright."""
    own = processor(name)
    blank = Image.new("RGB", (72, 48))
    cells = own(blank, "what")["visual_cells"]
    for token in (0, 5, len(cells) - 1):
        _, (top, bottom), (left, right) = cells[token].tolist()
        white = blank.copy()
        white.paste((255, 255, 255), tuple(round(x) for x in (left * 72, top * 48, right * 72, bottom * 48)))
        inputs = own(white, "what")
        assert torch.equal(inputs["visual_cells"], cells)
        bright = inputs["pixel_values"].unflatten(0, (-1, 4)).mean((1, 2))
        assert int(bright.argmax()) == token
        assert bright.sort().values[-2] < 0  # no other token sees more than a seam of it


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_videos(name: str, count: int) -> None:
    """Two frames a step, an odd last one twice; patches are laid out as for the steps' stills."""
    frames = [picture(24, 16, seed=seed) for seed in range(count)]
    inputs = processor(name, video_processor={"size": {"shortest_edge": 64, "longest_edge": 8 * 16 * 24}})(
        Video(frames, num_frames=count, fps=2.0), " what is"
    )
    steps = -(-count // 2)
    assert inputs["video_grid_thw"].tolist() == [[steps, 4, 6]]
    mean, std = (np.array(SETTINGS[f"image_{what}"], dtype=np.float32) for what in ("mean", "std"))
    film = np.stack([(np.asarray(frame, dtype=np.float32) / 255 - mean) / std for frame in frames])
    film = np.concatenate([film, film[-1:]])[: 2 * steps]
    patches = inputs["pixel_values_videos"].numpy().reshape(steps, 2, 3, 2, 2, 3, 2, 4, 4)
    for step, row, column, y, x, frame in np.ndindex(steps, 2, 3, 2, 2, 2):
        top, left = 8 * row + 4 * y, 8 * column + 4 * x
        seen = film[2 * step + frame, top : top + 4, left : left + 4].transpose(2, 0, 1)
        np.testing.assert_allclose(patches[step, row, column, y, x, :, frame], seen, rtol=1e-5, atol=1e-5)
    cells = inputs["visual_cells"].unflatten(0, (steps, 6))
    times = torch.arange(steps + 1)[..., None] / steps
    torch.testing.assert_close(cells[:, 0, 0], torch.cat((times[:-1], times[1:]), 1))
    ids = inputs["input_ids"][0]
    assert int((ids == 8).sum()) == 6 * steps == len(inputs["visual_image"])
    seconds = [i / 2 for i in range(count)] + [(count - 1) / 2]
    text = tokenizer().decode(ids).replace(" ", "")
    if name == "qwen3_vl":
        middles = [(seconds[2 * i] + seconds[2 * i + 1]) / 2 for i in range(steps)]
        step_text = "<|vision_start|>" + "<|video_pad|>" * 6 + "<|vision_end|>"
        told = own_text(name, frames, count)
        assert told == "".join(f"<{middle:.1f} seconds>{step_text}" for middle in middles)
    else:
        assert "<|vision_start|>" + "<|video_pad|>" * (6 * steps) + "<|vision_end|>" in text
        assert inputs["second_per_grid_ts"].tolist() == [1.0 if count > 1 else 2.0]


def own_text(name: str, frames: list[Image.Image], count: int) -> str:
    own = processor(name, video_processor={"size": {"shortest_edge": 64, "longest_edge": 8 * 16 * 24}})
    return own.preprocessor.video(frames, [i / 2 for i in range(count)]).text


def test_a_long_video_of_qwen3_is_made_smaller() -> None:
    """Its limits hold for all frames together; for the others, for each."""
    frames = [picture(64, 48, seed=seed) for seed in range(8)]
    limits = {"video_processor": {"size": {"shortest_edge": 64, "longest_edge": 4 * 64 * 48}}}
    grids = {
        name: processor(name, **limits)(Video(frames, 8), "what")["video_grid_thw"][0].tolist()
        for name in NAMES
    }
    assert grids["qwen2_vl"] == grids["qwen2_5_vl"] == [4, 12, 16]
    steps, height, width = grids["qwen3_vl"]
    assert steps == 4
    assert 8 * height * width * 16 <= 4 * 64 * 48


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": None, "image_grid_thw": None}, "at least one image or video"),
        ({"image_grid_thw": None}, "image_grid_thw must be a tensor of 2"),
        ({"image_grid_thw": torch.tensor([[1, 6, 7]])}, "multiples of 2"),
        ({"image_grid_thw": torch.tensor([[1, 6]])}, "time, height, width"),
        ({"image_grid_thw": torch.tensor([[1, 60, 8]])}, "needs 480 patches, got"),
        ({"image_grid_thw": torch.tensor([[1.0, 6.0, 16.0]])}, "must hold integers"),
        ({"pixel_values": torch.zeros(96, 95)}, "96 numbers a patch"),
        ({"second_per_grid_ts": torch.ones(2)}, "one number for each of 0 videos"),
        ({"input_ids": torch.tensor([[3, *[7] * 20, *[8] * 4, 3]])}, "20 visual tokens of images.*need 24"),
    ],
)
def test_bad_inputs(name: str, changes: dict[str, Any], message: str) -> None:
    inputs = FAMILIES[name].make_inputs(images=((1, 2),))
    with pytest.raises(PromptError, match=message):
        family(name).visuals({**inputs, **changes})


@pytest.mark.parametrize(
    ("settings", "limits"),
    [
        ({}, (256, 2560)),
        ({"size": None, "min_pixels": 640, "max_pixels": 1280}, (640, 1280)),
        ({"video_processor": {"min_pixels": 64, "max_pixels": 128}}, (64, 128)),
        ({"video_processor": {"size": {"shortest_edge": 64, "longest_edge": 192}}}, (64, 192)),
        ({"video_processor": {"fps": 2}}, (128 * 64, 768 * 64)),
    ],
)
def test_limits_of_frames(settings: dict[str, Any], limits: tuple[int, int]) -> None:
    """As transformers' video processor finds them: its own settings, or those of images where it has none."""
    found = processor("qwen2_5_vl", **settings).preprocessor.video_limits
    assert (found["min_pixels"], found["max_pixels"]) == limits


def test_a_wrong_setting_of_videos_is_a_bad_checkpoint() -> None:
    own, tokens = family("qwen3_vl"), tokenizer()
    with pytest.raises(CheckpointError, match="do not work"):
        Processor.of(Path("x"), tokens, {**SETTINGS, "video_processor": {"size": 5}}, None, own)


def test_a_tower_of_another_dtype() -> None:
    """The text model's dtype is that of all rows, DeepStack planes among them."""
    model = FAMILIES["qwen3_vl"].make_model()
    model.model.language_model.to(torch.bfloat16)
    model.lm_head.to(torch.bfloat16)
    engine = VLM(model, "large")
    inputs = FAMILIES["qwen3_vl"].make_inputs()
    [request] = engine.encode([engine.prompt(inputs)])
    assert {rows.dtype for rows in (request.rows.hidden, *request.rows.planes)} == {torch.bfloat16}
    assert len(engine.generate(request, 3).token_ids) == 3


def test_an_image_too_long_is_refused() -> None:
    with pytest.raises(ImageError, match="2000 x 8 pixels"):
        processor("qwen2_vl")(picture(2000, 8), "what")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 8}, "patch_size of 8, the model has 4"),
        ({"merge_size": None}, "lacks merge_size"),
        ({"image_mean": [0.5]}, "image settings do not work"),
    ],
)
def test_settings_of_another_model(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        processor("qwen3_vl", **changes)
