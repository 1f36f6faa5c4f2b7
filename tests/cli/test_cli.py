"""The command line as a user meets it: its own process, its exit code, its two streams."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from sgl_runtime import cli

Pair = tuple[str, str]


def invoke(
    *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> tuple[int, str, str]:
    """Run `sgl-vlm` in this process (a new one imports torch each time) and return code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["sgl-vlm", *arguments])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def sgl_vlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    return lambda *arguments: invoke(*arguments, monkeypatch=monkeypatch, capsys=capsys)


def run_arguments(pair: Pair, picture: str, **changes: str) -> list[str]:
    options = {"small": pair[0], "large": pair[1], "image": picture, "prompt": "read the red circle"}
    options |= {"max-new-tokens": "4"} | {name.replace("_", "-"): value for name, value in changes.items()}
    return ["run", *(part for name, value in options.items() for part in (f"--{name}", value))]


def test_run_prints_one_json_object(pair: Pair, picture: str) -> None:
    command = [
        sys.executable,
        "-m",
        "sgl_runtime.cli",
        *run_arguments(pair, picture, keep_ratio="0.25"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert len(result["mass"]) == 256
    assert len(result["kept_visual"]) == 64
    order = sorted(range(256), key=lambda i: (-result["mass"][i], i))
    assert result["kept_visual"] == sorted(order[:64])
    assert "large_prefill_full" in result["timings"]
    assert result["timings"]["large_prefill_pruned"] > 0


def test_run_prints_an_answer_and_writes_the_map(sgl_vlm, pair: Pair, picture: str, tmp_path: Path) -> None:
    code, out, _ = sgl_vlm(*run_arguments(pair, picture, save_map=str(tmp_path / "map.png")))
    assert code == 0
    assert "small answer" in out
    assert "51 of 256 visual tokens" in out
    assert Image.open(tmp_path / "map.png").size[0] > 600


def test_run_exits_early_at_threshold_zero(sgl_vlm, pair: Pair, picture: str) -> None:
    code, out, _ = sgl_vlm(*run_arguments(pair, picture, exit_threshold="0"), "--json")
    result = json.loads(out)
    assert code == 0
    assert result["exited"] is True
    assert not any(stage.startswith("large") for stage in result["timings"])


def bad_images(folder: Path) -> dict[str, str]:
    def write(name: str, data: bytes) -> str:
        path = folder / name
        path.write_bytes(data)
        return str(path)

    whole = folder / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    bomb = folder / "bomb.png"
    Image.new("1", (20000, 20000)).save(bomb)
    return {
        "missing": str(folder / "no.png"),
        "truncated": write("truncated.png", whole.read_bytes()[:1500]),
        "text": write("text.jpg", b"this is no picture\n"),
        "empty": write("empty.png", b""),
        "bomb": str(bomb),
        "url": "https://example.com/cat.png",
        "directory": str(folder),
    }


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "no.png"),
        ("truncated", "truncated"),
        ("text", "text.jpg"),
        ("empty", "empty"),
        ("bomb", "pixels"),
        ("url", "ownload"),
        ("directory", "directory"),
    ],
)
def test_bad_images(sgl_vlm, pair: Pair, tmp_path: Path, kind: str, says: str) -> None:
    code, out, err = sgl_vlm(*run_arguments(pair, bad_images(tmp_path)[kind]), "--json")
    assert (code, out) == (2, "")
    assert err.startswith("sgl-vlm: error: ")
    assert says in err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"keep_ratio": "20"}, "0.2"),
        ({"keep_ratio": "0"}, "(0, 1]"),
        ({"keep_ratio": "nan"}, "keep_ratio"),
        ({"prune_layer": "3"}, "0 to 2"),
        ({"prune_layer": "-1"}, "negative"),
        ({"prune_layer": "soon"}, "'soon'"),
        ({"exit_threshold": "70"}, "0.7"),
        ({"max_new_tokens": "0"}, "at least 1"),
        ({"max_new_tokens": "5000"}, "context"),
        ({"prompt": "  "}, "prompt"),
        ({"small": "/nowhere"}, "/nowhere"),
        ({"device": "abacus"}, "abacus"),
        ({"device": "cuda:99"}, "CUDA devices"),
        ({"device": "meta"}, "meta"),
        ({"small": "~no-such-user/x"}, "no-such-user"),
        ({"image": "~no-such-user/x.png"}, "no-such-user"),
        ({"save_map": "/proc/map.png"}, "cannot be written"),
        ({"save_map": "/tmp"}, "is a directory"),
        ({"prompt": "caf\udce9"}, "UTF-8"),
        ({"dtype": "int3"}, "int3"),
    ],
)
def test_bad_settings(sgl_vlm, pair: Pair, picture: str, tmp_path: Path, changes: dict, says: str) -> None:
    target = tmp_path / "map.png"
    code, out, err = sgl_vlm(*run_arguments(pair, picture, **({"save_map": str(target)} | changes)), "--json")
    assert (code, out) == (2, "")
    assert says in err
    assert "Traceback" not in err
    assert not target.exists()


def test_system_prompt_and_video(sgl_vlm, pair: Pair, picture: str, tmp_path: Path) -> None:
    """A video of one frame and a system prompt reach the models: both change the answer's score."""
    (tmp_path / "film").mkdir()
    (tmp_path / "film" / "0.png").write_bytes(Path(picture).read_bytes())
    small, large = pair
    asked = ("run", "--small", small, "--large", large, "--prompt", "read the red circle", "--json")
    scores = set()
    for more in (
        ("--image", picture),
        ("--image", picture, "--system", "be brief"),
        ("--image", picture, "--image", picture, "--keep-scope", "image"),
    ):
        code, out, err = sgl_vlm(*asked, *more)
        assert code == 0, err
        scores.add(json.loads(out)["confidence"])
    assert len(scores) == 3
    code, _, err = sgl_vlm(*asked)
    assert (code, "at least one image" in err) == (2, True)
    code, _, err = sgl_vlm(*asked, "--video", str(tmp_path / "no.mp4"))
    assert (code, "There is no video file" in err) == (2, True)
    code, _, err = sgl_vlm(*asked, "--image", picture, "--keep-scope", "all")
    assert (code, "'request', 'image'" in err) == (2, True)


def test_pickled_weights_are_refused(sgl_vlm, pair: Pair, picture: str, tmp_path: Path) -> None:
    for file in Path(pair[0]).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    code, _, err = sgl_vlm(*run_arguments((str(tmp_path), pair[1]), picture))
    assert code == 2
    assert "safetensors" in err


def test_map_of_two_images_is_refused_before_anything_loads(sgl_vlm, picture: str, tmp_path: Path) -> None:
    arguments = run_arguments(("/nowhere", "/nowhere"), picture, save_map=str(tmp_path / "m.png"))
    code, _, err = sgl_vlm(*arguments, "--image", picture)
    assert code == 2
    assert "--save-map draws one image" in err


def test_a_wrong_backend_is_bad_input() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sgl_runtime.cli", "env"],
        capture_output=True,
        text=True,
        env={**os.environ, "SGL_KERNELS_BACKEND": "abacus"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("sgl-vlm: error: SGL_KERNELS_BACKEND is 'abacus'")


def test_env_is_readable_and_json(sgl_vlm) -> None:
    code, out, _ = sgl_vlm("env", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["packages"]["transformers"]
    code, out, _ = sgl_vlm("env")
    assert code == 0
    assert "transformers: " in out


@pytest.mark.parametrize("command", ["demo", "run", "bench", "env"])
def test_help_shows_an_example(command: str) -> None:
    done = CliRunner().invoke(cli.app, [command, "--help"])
    assert done.exit_code == 0
    assert re.search("Examples?: sgl-vlm", done.output)
