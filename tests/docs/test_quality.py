"""The numbers of the tiny pair in the README are those that `benchmarks.tiny_quality` wrote, and agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.tiny_quality import ALPHAS, NAMES, SETTINGS, quality
from sgl_runtime import tiny
from sgl_runtime.evaluation.calibration import read_calibration
from sgl_runtime.fingerprint import checkpoint_fingerprint
from sgl_runtime.tiny.scenes import make_scene

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results" / "tiny"


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (KEPT / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads((KEPT / "report.json").read_text(encoding="utf-8"))


def right(answers: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name].lower() == row["answer"].lower() for row in answers], float)


@pytest.mark.parametrize("name", ["quality.md", "promises.md"])
def test_the_readme_has_the_tables_as_they_were_written(name: str) -> None:
    table = [line for line in (KEPT / name).read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    assert "\n".join(table) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_scores_are_those_of_the_answers(answers: list[dict[str, Any]], report: dict[str, Any]) -> None:
    assert quality(report["methods"]) == (KEPT / "quality.md").read_text(encoding="utf-8")
    assert len(answers) == report["header"]["data set"]["count"] == 1200
    assert len(report["methods"]) == 2 + len(NAMES) * len(SETTINGS)
    for row in report["methods"]:
        setting = "" if row["keep_ratio"] is None else f" {row['keep_ratio']:g}@{row['prune_layer']}"
        assert row["mean"] == pytest.approx(right(answers, row["method"] + setting).mean())


def test_the_answers_are_of_the_test_scenes(answers: list[dict[str, Any]]) -> None:
    for row in answers[::97]:
        scene, number = map(int, row["id"].split("-"))
        question = make_scene("test", scene, 4).questions[number]
        assert (row["question"], row["answer"]) == (question.text, question.answer)


def test_the_promise_is_of_this_pair_and_kept(answers: list[dict[str, Any]], report: dict[str, Any]) -> None:
    """Counted anew from the answers, on scenes that calibration has not seen."""
    calibration = read_calibration(KEPT / "calibration.json")
    assert calibration.pair == {
        "small": checkpoint_fingerprint(tiny.SMALL),
        "large": checkpoint_fingerprint(tiny.LARGE),
    }
    assert calibration.alpha in ALPHAS
    assert calibration.exit_threshold is not None
    assert calibration.data_sha256 != report["header"]["data set"]["sha256"]
    decision = np.array([row["decision_score"] for row in answers])
    pruned = f"guided {calibration.keep_ratio:g}@{calibration.prune_layer}"
    large = right(answers, "large" if calibration.keep_ratio == 1 else pruned)
    answered = np.where(decision >= calibration.exit_threshold, right(answers, "small"), large)
    loss = (right(answers, "large") - answered).mean()  # each scene has four questions
    assert report["promise"]["mean"] == pytest.approx(loss)
    assert loss <= calibration.alpha
    assert report["promise"]["kept"]
    five = np.where(decision >= 0.655, right(answers, "small"), right(answers, "guided 0.05@0"))
    assert f"{100 * (right(answers, 'large') - five).mean():.1f}" == "6.9"  # as the README says
