"""`sgl-vlm eval` and `sgl-vlm calibrate` on scenes of the tiny pair, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sgl_runtime import SGLConfig, tiny
from sgl_runtime.cli import app
from sgl_runtime.errors import ConfigError
from sgl_runtime.evaluation import results
from sgl_runtime.evaluation.cli import read_setting
from sgl_runtime.tiny.export import export

SCENES = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("calibration", SCENES, tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    done = evaluate(data, out)
    assert done.exit_code == 0, done.output
    assert "| guided | 0.2 | 2 | 36 % | 12 |" in done.stdout
    return out


def evaluate(data: Path, out: Path, *more: str):
    pair = ("--small", str(tiny.SMALL), "--large", str(tiny.LARGE))
    settings = ("--ranking", "guided", "--ranking", "random", "--setting", "0.2@0.2", "--setting", "0.5@4")
    tail = ("--data", str(data), "--out", str(out), "--max-new-tokens", "8", "--batch", "4", *more)
    return CliRunner().invoke(app, ["eval", *pair, *settings, *tail])


def test_everything_is_written(out: Path) -> None:
    found = results.load(out / "results.jsonl")
    assert len(found.rows) == SCENES * 4 * 6  # small, large, two rankings at two settings
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "small alone" in page
    assert {path.suffix for path in out.iterdir()} >= {".jsonl", ".html", ".md", ".json", ".png"}


def test_a_second_run_adds_nothing(data: Path, out: Path) -> None:
    before = (out / "results.jsonl").read_bytes()
    done = evaluate(data, out, "--json")
    assert done.exit_code == 0, done.output
    assert (out / "results.jsonl").read_bytes() == before
    assert len(json.loads(done.stdout)["table"]) == 6


def test_other_settings_are_not_mixed_in(data: Path, out: Path) -> None:
    done = evaluate(data, out, "--seed", "1")
    assert isinstance(done.exception, ConfigError)
    assert "seed" in str(done.exception)


def test_calibrate(out: Path, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    arguments = ["calibrate", str(out / "results.jsonl"), "--out", str(file), "--setting", "0.2@0.2"]
    done = CliRunner().invoke(app, [*arguments, "--alpha", "0.9", "--delta", "0.5"])
    assert done.exit_code == 0, done.output
    config = SGLConfig.from_file(file)
    assert (config.keep_ratio, config.prune_layer) == (0.2, 2)
    assert config.exit_threshold is not None
    assert f"exit_threshold {config.exit_threshold:g}" in done.stdout
    done = CliRunner().invoke(app, [*arguments, "--alpha", "0.01"])
    assert "few" in str(done.exception or done.stdout)  # three scenes cannot promise that


@pytest.mark.parametrize("text", ["0.2", "0.2@", "a@1", "0.2@x"])
def test_settings_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="KEEP_RATIO@PRUNE_LAYER"):
        read_setting(text)
