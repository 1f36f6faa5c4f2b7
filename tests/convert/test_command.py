"""``sgl-vlm convert`` as a user meets it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from sgl_runtime import cli

from .chat_format import IMAGE, chat_config, chat_tensors, make_native, save_chat


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    make_native().save_pretrained(tmp_path / "native")
    tensors = chat_tensors(load_file(tmp_path / "native" / "model.safetensors"), "internlm2")
    return save_chat(tmp_path / "chat", tensors, chat_config())


def _sgl_vlm(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["sgl-vlm", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0), *capsys.readouterr()


def test_converts(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["convert", str(chat), str(tmp_path / "out"), "--image-token-id", str(IMAGE)]
    code, out, err = _sgl_vlm(arguments, monkeypatch, capsys)
    assert (code, out) == (0, f"Wrote {tmp_path / 'out'}.\n")
    assert "100%" in err  # the progress bar
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("source", ["native", "absent", "tmp"])
def test_refuses_in_one_line(
    chat: Path, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["convert", str(tmp_path / source), str(tmp_path / "out"), "--image-token-id", "5"]
    code, out, err = _sgl_vlm(arguments, monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert err.startswith("sgl-vlm: error: ")
    assert err.count("\n") == 1


def test_help_shows_an_example() -> None:
    done = CliRunner().invoke(cli.app, ["convert", "--help"])
    assert done.exit_code == 0
    assert "Example: sgl-vlm convert" in done.output
