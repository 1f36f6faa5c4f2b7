"""What the plugins share: parts to requests, questions that fail alone, settings, the tally."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sgl_runtime import Video, tiny
from sgl_runtime.errors import ConfigError, ImageError, PromptError
from sgl_runtime.fingerprint import checkpoint_fingerprint
from sgl_runtime.plugins.guided import Guided, Part, Tally, to_request
from tests.evaluation.made_results import CALIBRATION

from .conftest import SETTINGS


def parts(image, question):
    return [Part("user", "image", image), Part("user", "text", question)]


@pytest.fixture(scope="module")
def guided():
    return Guided(str(tiny.SMALL), str(tiny.LARGE), **SETTINGS)


def test_a_question_that_fails_fails_alone(guided, scenes, expected):
    guided.tally = Tally()
    questions = [parts(scenes.image(i), scenes.rows[i]["question"]) for i in range(6)]
    questions[1] = [Part("user", "audio", "a.wav")]
    questions[4] = parts("missing.png", "read the red circle")
    answers = guided(questions, num_frames=8)
    assert isinstance(answers[1], PromptError)
    assert isinstance(answers[4], ImageError)
    for i in (0, 2, 3, 5):
        assert answers[i].token_ids == expected[i].token_ids
        assert answers[i].exited == expected[i].exited
    tally, found = guided.tally, [expected[i] for i in (0, 2, 3, 5)]
    assert (tally.requests, tally.failed) == (6, 2)
    assert tally.exited == sum(result.exited for result in found)
    assert tally.tokens == sum(len(result.token_ids) for result in found)
    assert tally.stages == answers[0].timings
    assert tally.seconds >= sum(tally.stages.values()) > 0
    guided(questions[:1], num_frames=8)
    assert (tally.requests, tally.failed) == (7, 2)
    assert tally.stages["small_prefill"] > answers[0].timings["small_prefill"]


@pytest.mark.parametrize("limit", [1, 2, 12, 500])
def test_the_longest_answer_is_bounded_by_the_configuration(guided, scenes, pipe, limit):
    question = scenes.rows[0]["question"]
    (answer,) = guided([parts(scenes.image(0), question)], num_frames=8, max_new_tokens=limit)
    whole = pipe(scenes.image(0), question)
    assert 2 < len(whole.token_ids) <= 12
    assert answer.token_ids == whole.token_ids[: min(limit, 12)]


def test_order_roles_and_marks():
    conversation = [
        Part("system", "text", "Be brief."),
        Part("user", "text", "What differs between "),
        Part("user", "image", "a.png"),
        Part("user", "video", "b.mp4"),
        Part("user", "text", "? Write <image>, <video> or <b>."),
        Part("assistant", "text", "Nothing."),
        Part("user", "text", "Sure?"),
    ]
    visuals, messages = to_request(conversation, num_frames=3)
    assert visuals[0] == "a.png"
    assert isinstance(visuals[1], Video)
    assert (visuals[1].source, visuals[1].num_frames) == ("b.mp4", 3)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[1]["content"] == [
        {"type": "text", "text": "What differs between "},
        {"type": "image"},
        {"type": "video"},
        {"type": "text", "text": "? Write < image>, < video> or <b>."},
    ]


def test_a_literal_mark_is_no_place_for_an_image(guided, scenes, pipe):
    (answer,) = guided([parts(scenes.image(0), "read the <image> red circle")], num_frames=8)
    assert answer.token_ids == pipe(scenes.image(0), "read the < image> red circle").token_ids


def test_unknown_settings_are_named():
    with pytest.raises(ConfigError, match=r"keep_rate: there is no such setting\. .*keep_ratio"):
        Guided(str(tiny.SMALL), str(tiny.LARGE), keep_rate=0.2)


def test_a_calibration_fixes_its_settings(tmp_path: Path):
    pair = {"small": checkpoint_fingerprint(tiny.SMALL), "large": checkpoint_fingerprint(tiny.LARGE)}
    file = tmp_path / "calibration.json"
    replace(
        CALIBRATION, exit_threshold=0.75, keep_ratio=0.5, prune_layer=3, max_new_tokens=5, pair=pair
    ).write(file)
    given = {"calibration": str(file), "device": "cpu", "compile": False}
    config = Guided(str(tiny.SMALL), str(tiny.LARGE), **given).pipe.config
    assert (config.exit_threshold, config.keep_ratio, config.prune_layer) == (0.75, 0.5, 3)
    assert config.max_new_tokens == 5
    assert config.calibration is not None
    with pytest.raises(ConfigError, match="fixes keep_ratio"):
        Guided(str(tiny.SMALL), str(tiny.LARGE), keep_ratio=0.1, **given)
