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


def test_a_promise_is_checked_on_other_scenes(data: Path, out: Path, tmp_path: Path) -> None:
    """Without being asked for: the guided answers at its setting, and its settings."""
    file = tmp_path / "calibration.json"
    results_file = str(out / "results.jsonl")
    arguments = ["--out", str(file), "--setting", "0.5@4", "--alpha", "0.9", "--delta", "0.5"]
    assert CliRunner().invoke(app, ["calibrate", results_file, *arguments]).exit_code == 0
    others = export("test", 2, tmp_path / "others")
    pair = ("--small", str(tiny.SMALL), "--large", str(tiny.LARGE), "--data", str(others))
    more = ("--ranking", "random", "--setting", "0.2@2", "--calibration", str(file), "--pictures", "0")
    done = CliRunner().invoke(app, ["eval", *pair, "--out", str(tmp_path / "run"), *more])
    assert done.exit_code == 0, done.output
    promise = json.loads((tmp_path / "run" / "report.json").read_text())["promise"]
    assert promise["routed_to"] == ["guided", 0.5, 4]
    assert promise["differences"] == []  # 8 new tokens, as it was calibrated
    assert not promise["same_data"]
    done = CliRunner().invoke(
        app, ["eval", *pair, "--out", str(tmp_path / "judged"), *more, "--metric", "judge"]
    )
    assert "it needs a judge" in str(done.exception)
    assert not (tmp_path / "judged").exists()


def test_places_that_cannot_be_written_are_told_first(data: Path, out: Path, tmp_path: Path) -> None:
    found = out / "results.jsonl"
    before = found.read_bytes()
    for target in (found, tmp_path):
        done = CliRunner().invoke(app, ["calibrate", str(found), "--out", str(target)])
        assert "must be the file of the calibration to write" in str(done.exception)
    assert found.read_bytes() == before
    done = evaluate(data, found)
    assert "--out must be a directory" in str(done.exception)


def test_an_interrupt_says_how_to_go_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "run", interrupt)
    done = evaluate(data, tmp_path / "new")
    assert done.exit_code == 130
    assert "the same command goes on from there" in done.output


@pytest.mark.parametrize("text", ["0.2", "0.2@", "a@1", "0.2@x"])
def test_settings_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="KEEP_RATIO@PRUNE_LAYER"):
        read_setting(text)
