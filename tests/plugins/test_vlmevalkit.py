"""The plugin for VLMEvalKit: beside the real package where there is one, else a stand-in of conftest.py."""

from __future__ import annotations

import csv
import json
import logging
import os
import subprocess
import sys

import pytest

from sgl_runtime import Video, tiny
from sgl_runtime.errors import SGLError

from .conftest import HAS_VLMEVALKIT, SETTINGS

PAIR = {"small": str(tiny.SMALL), "large": str(tiny.LARGE)}


@pytest.fixture(scope="module")
def model(vlmevalkit_plugin):
    return vlmevalkit_plugin.SGLVLM(**PAIR, nframe=2, **SETTINGS)


def image(path):
    return {"type": "image", "value": path}


def text(words, **more):
    return {"type": "text", "value": words, **more}


def test_answers_are_the_pipelines(model, scenes, expected):
    for i, row in enumerate(scenes.rows):
        assert model.generate([image(scenes.image(i)), text(row["question"])], "scenes") == expected[i].text


def test_parts_in_their_order(model, scenes, pipe):
    first, second = scenes.image(0), scenes.image(4)
    asked = [
        text("Be brief.", role="system"),
        text("read the <image> in "),
        image(first),
        text(" or "),
        image(second),
    ]
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "read the < image> in <image> or <image>"},
    ]
    assert model.generate(asked) == pipe([first, second], conversation).text


def test_videos(model, scenes, pipe, monkeypatch):
    """A data set's ``nframe`` takes the place of the model's, as VLMEvalKit does it."""
    assert model.VIDEO_LLM
    frames = [scenes.image(0), scenes.image(4), scenes.image(8)]
    asked = [{"type": "video", "value": frames}, text("how many red shapes")]
    assert model.generate_inner(asked) == pipe(Video(frames, num_frames=2), "how many red shapes").text
    monkeypatch.setattr(model, "nframe", 3)
    shown = []

    def answer(questions, num_frames):
        shown.append(num_frames)
        return [SGLError("not asked")]

    monkeypatch.setattr(model, "_guided", answer)
    model.generate_inner(asked)
    assert shown == [3]


def test_a_question_that_fails_is_told_and_marked(model, vlmevalkit_plugin, caplog):
    with caplog.at_level(logging.WARNING):
        answer = model.generate_inner([image("missing.png"), text("read the red circle")], "scenes")
    assert answer == vlmevalkit_plugin.FAILED
    assert "A question of scenes failed: There is no image file missing.png." in caplog.text


@pytest.mark.skipif(not HAS_VLMEVALKIT, reason="needs VLMEvalKit: `make test-plugins`")
def test_failed_answers_are_known_to_it(vlmevalkit_plugin):
    from vlmeval.inference import FAIL_MSG

    assert vlmevalkit_plugin.FAILED == FAIL_MSG


def test_its_run_file_finds_the_class(vlmevalkit_plugin, tmp_path, monkeypatch, capsys):
    file = tmp_path / "run.py"
    file.write_text("import sys, vlmeval.vlm\nprint(__name__, vlmeval.vlm.SGLVLM.__name__, sys.argv[1:])\n")
    monkeypatch.setattr(sys, "argv", ["vlmevalkit", str(file), "--config", "c.json"])
    vlmevalkit_plugin.main()
    assert capsys.readouterr().out == "__main__ SGLVLM ['--config', 'c.json']\n"


@pytest.mark.skipif(not HAS_VLMEVALKIT, reason="needs VLMEvalKit: `make test-plugins`")
def test_its_own_command(scenes, pipe, tmp_path):
    """Its run.py on a data set of its own kind, offline: the answers, the score, the counts."""
    import pandas

    letters, exits, right = "ABCD", 0, 0
    answers = []
    with (tmp_path / "Scenes.tsv").open("w", newline="") as stream:
        table = csv.writer(stream, delimiter="\t")
        table.writerow(["index", "image_path", "question", *letters, "answer"])
        for i, row in enumerate(scenes.rows):
            choices = ["Z9", "5", "red circle", "K1"]
            choices[i % 4] = row["answer"]
            table.writerow([i, scenes.image(i), row["question"], *choices, letters[i % 4]])
            listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, choices, strict=True))
            prompt = f"Question: {row['question']}\nOptions:\n{listed}"
            result = pipe(
                scenes.image(i), f"{prompt}Please select the correct answer from the options above. \n"
            )
            answers.append(result.text)
            exits += result.exited
            named = [choice for choice in choices if choice.lower() in result.text.lower()]
            right += named == [row["answer"]]
    config = {
        "model": {"sgl_vlm": {"class": "SGLVLM", **PAIR, **SETTINGS}},
        "data": {"Scenes": {"class": "CustomMCQDataset", "dataset": "Scenes"}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "sgl_runtime.plugins.vlmevalkit", "--config", "config.json"]
    done = subprocess.run(
        [*command, "--work-dir", "out", "--judge", "exact_matching"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"LMUData": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    sheet = pandas.read_excel(tmp_path / "out" / "sgl_vlm" / "sgl_vlm_Scenes.xlsx", dtype=str).fillna("")
    assert list(sheet["prediction"]) == answers
    with (tmp_path / "out" / "sgl_vlm" / "sgl_vlm_Scenes_acc.csv").open() as stream:
        (accuracy,) = csv.DictReader(stream)
    assert float(accuracy["Overall"]) == pytest.approx(right / 12)
    assert f"requests 12, exited with the small answer {exits}, failed 0" in done.stderr
