"""What the page shows is what the pipeline says; what cannot be answered is told in words."""

from __future__ import annotations

import io
import re
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from sgl_runtime import SGLConfig, SGLPipeline, tiny
from sgl_runtime.errors import SGLError
from sgl_runtime.images import open_image
from sgl_runtime.pictures import guidance_panels
from sgl_runtime.web import Answering, server

SAMPLE = tiny.samples()[0]
DATA = Path(SAMPLE["image"]).read_bytes()
FIELDS = {"prompt": SAMPLE["prompt"], "keep_ratio": "0.05", "prune_layer": "0", "exit_threshold": "0.9"}
START = SGLConfig(keep_ratio=0.5, prune_layer=3, max_new_tokens=16, max_batch=1, compile=False)


@pytest.fixture(scope="module")
def pipe() -> SGLPipeline:
    return SGLPipeline.from_pretrained(tiny.SMALL, tiny.LARGE, config=START)


@pytest.mark.parametrize("sample", tiny.samples(), ids=lambda sample: sample["prompt"])
@pytest.mark.parametrize("threshold", ["0.9", "0", None])
def test_the_answer_is_the_pipelines(pipe: SGLPipeline, sample: tiny.Sample, threshold: str | None) -> None:
    fields = {**FIELDS, "prompt": sample["prompt"]}
    if threshold is None:
        del fields["exit_threshold"]
    else:
        fields["exit_threshold"] = threshold
    reply = Answering(pipe)(Path(sample["image"]).read_bytes(), fields)
    exits = None if threshold is None else float(threshold)
    config = SGLConfig(
        keep_ratio=0.05, prune_layer=0, exit_threshold=exits, max_new_tokens=16, max_batch=1, compile=False
    )
    expected = SGLPipeline.from_pretrained(tiny.SMALL, tiny.LARGE, config=config)(
        sample["image"], sample["prompt"]
    )
    assert reply.result.text == expected.text
    assert reply.result.exited == expected.exited
    assert reply.result.decision_score == expected.decision_score
    assert torch.equal(reply.result.mass, expected.mass)
    assert reply.runs["this answer"] == reply.result.timings
    assert reply.runs["this answer"].keys() == expected.timings.keys()
    if not expected.exited:
        assert torch.equal(reply.result.kept_visual, expected.kept_visual)


def test_the_pictures_are_those_of_the_command_line(pipe: SGLPipeline) -> None:
    reply = Answering(pipe)(DATA, FIELDS)
    image = open_image(SAMPLE["image"])
    drawn = guidance_panels(
        pipe.with_config(reply.config),
        image,
        SAMPLE["prompt"],
        pipe.with_config(reply.config)(image, SAMPLE["prompt"]),
    )
    assert [panel.caption for panel in reply.panels] == [
        "attention received in the small VLM",
        "large VLM sees 12 of 256 tokens",
    ]
    for panel, expected in zip(reply.panels, drawn[1:], strict=True):
        assert panel.image.tobytes() == expected.image.tobytes()


def test_the_token_ratio_is_that_of_the_sliders(pipe: SGLPipeline) -> None:
    reply = Answering(pipe)(DATA, {**FIELDS, "keep_ratio": "0.25", "prune_layer": "4"})
    layers = pipe.large.num_layers
    assert reply.token_ratio == pytest.approx((4 + (layers - 4) * 0.25) / layers)
    assert len(reply.result.kept_visual) == 64


def test_a_moved_slider_prepares_nothing_anew(pipe: SGLPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabularies of real pairs take a quarter of a second to compare, and memory more to be set aside."""
    answer = Answering(pipe)
    answer(DATA, {**FIELDS, "unpruned": "on"})
    before = pipe.large.memory.allocated
    monkeypatch.setattr(
        type(pipe.small_processor.tokenizer), "get_vocab", lambda self: pytest.fail("vocabularies compared")
    )
    for changes in ({"keep_ratio": "0.7"}, {"prune_layer": "0"}, {"exit_threshold": "0.1"}):
        answer(DATA, {**FIELDS, **changes})
    assert pipe.large.memory.allocated == before


def test_the_unpruned_large_vlm_is_timed_alone(pipe: SGLPipeline) -> None:
    reply = Answering(pipe)(DATA, {**FIELDS, "unpruned": "on"})
    config = SGLConfig(keep_ratio=1.0, max_new_tokens=16, max_batch=1, compile=False, draft=False)
    assert reply.unpruned == pipe.with_config(config)(SAMPLE["image"], SAMPLE["prompt"]).text
    stages = reply.runs["unpruned large VLM alone"]
    assert list(stages) == ["preprocess", "large_vision", "large_prefill_full", "large_decode"]
    assert all(seconds > 0 for seconds in stages.values())
    assert reply.result.text == Answering(pipe)(DATA, FIELDS).result.text


def test_what_models_say_is_shown_as_text(pipe: SGLPipeline) -> None:
    reply = Answering(pipe)(DATA, {**FIELDS, "unpruned": "on"})
    said = replace(reply.result, text="<b>a</b>", small_text="<i>b</i>")
    page = server._shown(server._templates(), replace(reply, result=said, unpruned="<u>c</u>"))
    for shown in ("&lt;b&gt;a&lt;/b&gt;", "&lt;i&gt;b&lt;/i&gt;", "&lt;u&gt;c&lt;/u&gt;"):
        assert page.count(shown) == 1
    assert "<b>" not in page


def _png(width: int, height: int) -> bytes:
    """A PNG's header, which says a size without having as many pixels."""
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        for chunk in (head, b"IDAT")
    )


def _eps() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, format="EPS")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "changes", "words"),
    [
        (b"no picture", {}, r"The image of 10 bytes is not an image in PNG, JPEG, WEBP, GIF, BMP, TIFF\."),
        (b"", {}, "There is no picture: choose one"),
        (b"http://127.0.0.1/a.png", {}, "is not an image in PNG"),
        (_eps(), {}, "is not an image in PNG"),
        (_png(60_000, 60_000), {}, "60000 x 60000 = 3,600,000,000 pixels; the limit is"),
        (DATA[:2000], {}, "is damaged or cut short"),
        (DATA, {"prompt": " \n"}, "There is no question: write one"),
        (DATA, {"prompt": "<image> or <image>"}, "The prompt marks places for <image> <image>"),
        (DATA, {"prompt": "why " * 2000}, "prompt has .* tokens"),
        (DATA, {"keep_ratio": "0"}, r"keep_ratio must be in \(0, 1\], got 0.0"),
        (DATA, {"keep_ratio": "nan"}, "keep_ratio must be a number"),
        (DATA, {"keep_ratio": "all"}, "keep_ratio must be a number, got 'all'"),
        (DATA, {"prune_layer": "99"}, "prune_layer=99 is outside the large model"),
        (DATA, {"prune_layer": "0.5"}, "prune_layer must be a whole number, got '0.5'"),
        (DATA, {"prune_layer": "9" * 5000}, "prune_layer must be a whole number"),
        (DATA, {"exit_threshold": "2"}, r"exit_threshold must be None or in \[0, 1\], got 2.0"),
    ],
)
def test_what_cannot_be_answered_is_told_in_words(
    pipe: SGLPipeline, data: bytes, changes: dict[str, str], words: str
) -> None:
    with pytest.raises(SGLError, match=words) as told:
        Answering(pipe)(data, {**FIELDS, **changes})
    assert not re.search(r"Traceback|0x[0-9a-f]{6}", str(told.value))
    assert Answering(pipe)(DATA, FIELDS).result.text == SAMPLE["answer"]  # and it goes on
