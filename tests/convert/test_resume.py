"""What goes wrong: damaged sources, occupied places, and runs that are killed and taken up again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgl_runtime.convert import convert
from sgl_runtime.errors import CheckpointError

from .chat_format import HIDDEN, IMAGE, VOCAB, chat_config, chat_tensors, make_native, save_chat

SHARD_BYTES = 70_000
NORM = "language_model.model.norm.weight"
KILLED = """
import os, signal, sys
from pathlib import Path
from sgl_runtime import convert
from sgl_runtime.convert import tensors

source, out, place = sys.argv[1:]
calls = 0

def killing(function):
    def call(*arguments):
        global calls
        calls += 1
        if calls == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call

if place == "shard":
    tensors.Source.read = killing(tensors.Source.read)
else:
    convert.write_json = killing(convert.write_json)
convert.convert(Path(source), Path(out), image_token_id={image}, shard_bytes={shard_bytes})
"""


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    make_native().save_pretrained(tmp_path / "native")
    tensors = chat_tensors(load_file(tmp_path / "native" / "model.safetensors"), "internlm2")
    return save_chat(tmp_path / "chat", tensors, chat_config(), files=2)


def _convert(chat: Path, out: Path) -> Path:
    return convert(chat, out, image_token_id=IMAGE, shard_bytes=SHARD_BYTES)


def _content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def _edit(chat: Path, change: Any, file: int = 1) -> None:
    path = chat / f"model-{file:05}-of-00002.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _holder(chat: Path, name: str) -> int:
    return next(n for n in (1, 2) if name in load_file(chat / f"model-{n:05}-of-00002.safetensors"))


def _refusal(chat: Path, out: Path) -> str:
    with pytest.raises(CheckpointError) as failure:
        _convert(chat, out)
    return str(failure.value)


@pytest.mark.slow  # a new process for each
@pytest.mark.parametrize(("place", "at"), [("shard", 1), ("shard", 30), ("settings", 1)])
def test_killed_and_taken_up(chat: Path, tmp_path: Path, place: str, at: int) -> None:
    out, fresh = tmp_path / "out", _convert(chat, tmp_path / "fresh")
    script = KILLED.format(at=at, image=IMAGE, shard_bytes=SHARD_BYTES)
    command = [sys.executable, "-c", script, str(chat), str(out), place]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (out / "config.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("model-*.safetensors")}
    assert bool(finished) == (at > 1 or place == "settings")
    assert bool(list(out.glob(".*.partial"))) == (place == "shard")
    _convert(chat, out)
    assert _content(out) == _content(fresh)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # kept, not written again


def test_second_run_changes_nothing(chat: Path, tmp_path: Path) -> None:
    out = _convert(chat, tmp_path / "out")
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.glob("model-*")}
    _convert(chat, out)
    assert all(before[p.name][1] == p.read_bytes() for p in out.glob("model-*"))
    shards = list(out.glob("*.safetensors"))
    assert len(shards) > 3
    assert all(before[p.name][0] == p.stat().st_mtime_ns for p in shards)


@pytest.mark.parametrize("damage", ["flipped", "short", "gone"])
def test_damaged_shard_is_written_again(chat: Path, tmp_path: Path, damage: str) -> None:
    out, fresh = _convert(chat, tmp_path / "out"), _convert(chat, tmp_path / "fresh")
    shard = sorted(out.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data if damage == "flipped" else data[:-7])
    if damage == "gone":
        shard.unlink()
    assert _content(out) != _content(fresh)
    _convert(chat, out)
    assert _content(out) == _content(fresh)


def test_other_source(chat: Path, tmp_path: Path) -> None:
    out = _convert(chat, tmp_path / "out")
    _edit(chat, lambda tensors: next(iter(tensors.values())).add_(1))
    assert "has changed since" in _refusal(chat, out)


def test_occupied_place(chat: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "thesis.txt").write_text("mine")
    assert "not begun by sgl-vlm convert" in _refusal(chat, place)
    assert "not begun by sgl-vlm convert" in _refusal(chat, place / "thesis.txt")
    assert [path.name for path in place.iterdir()] == ["thesis.txt"]


def test_full_disk(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = _convert(chat, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    told = _refusal(chat, tmp_path / "more")
    assert "are free" in told
    _convert(chat, out)  # needs no more than it has


def test_native_source(chat: Path, tmp_path: Path) -> None:
    out = _convert(chat, tmp_path / "out")
    assert "transformers' own format already" in _refusal(out, tmp_path / "again")


def test_missing_tensor(chat: Path, tmp_path: Path) -> None:
    _edit(chat, lambda tensors: tensors.pop(NORM), _holder(chat, NORM))
    told = _refusal(chat, tmp_path / "out")
    assert "lacks tensors" in told
    assert "model.language_model.norm.weight" in told
    assert not (tmp_path / "out").exists()


def test_many_missing_tensors(chat: Path, tmp_path: Path) -> None:
    _edit(chat, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1." in name])
    told = _refusal(chat, tmp_path / "out")
    assert told.count("layers.1.") + told.count("layer.1.") == 10
    assert " more." in told


def test_missing_output_layer(chat: Path, tmp_path: Path) -> None:
    name = "language_model.output.weight"
    _edit(chat, lambda tensors: tensors.pop(name), _holder(chat, name))
    assert name in _refusal(chat, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["extra.weight", "language_model.model.layers.7.attention_norm.weight", "mlp1.2.weight"]
)
def test_unused_tensor(chat: Path, tmp_path: Path, name: str) -> None:
    _edit(chat, lambda tensors: tensors.update({name: torch.zeros(HIDDEN)}))
    told = _refusal(chat, tmp_path / "out")
    assert "holds unknown tensors" in told
    assert name in told


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("language_model.model.tok_embeddings.weight", (VOCAB + 1, HIDDEN)),
        ("language_model.model.layers.0.attention.wqkv.weight", (64 - 8, HIDDEN)),
        ("language_model.model.layers.0.attention.wqkv.weight", (61, HIDDEN)),
        ("vision_model.encoder.layers.0.attn.qkv.weight", (24 * 3, 25)),
        ("vision_model.encoder.layers.0.attn.qkv.weight", (2, 24)),
    ],
)
def test_wrong_shape(chat: Path, tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    _edit(chat, lambda tensors: tensors.update({name: torch.zeros(shape)}), _holder(chat, name))
    told = _refusal(chat, tmp_path / "out")
    assert "holds wrongly shaped tensors" in told
    assert f"{name} of shape {shape}" in told


def test_tensor_twice(chat: Path, tmp_path: Path) -> None:
    _edit(chat, lambda tensors: tensors.update({NORM: torch.zeros(HIDDEN)}), 3 - _holder(chat, NORM))
    assert "both hold the tensor" in _refusal(chat, tmp_path / "out")


def test_quantised_tensor(chat: Path, tmp_path: Path) -> None:
    qint = torch.zeros(HIDDEN, dtype=torch.int8)
    _edit(chat, lambda tensors: tensors.update({NORM: qint}), _holder(chat, NORM))
    assert f"holds {NORM} in I8" in _refusal(chat, tmp_path / "out")


def test_cut_source(chat: Path, tmp_path: Path) -> None:
    path = chat / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "could not be read" in _refusal(chat, tmp_path / "out")


def test_pickles(chat: Path, tmp_path: Path) -> None:
    for path in chat.glob("*.safetensors"):
        path.rename(path.with_name(f"pytorch_{path.stem}.bin"))
    assert "pickles" in _refusal(chat, tmp_path / "out")


def test_id_outside_the_vocabulary(chat: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"is {VOCAB}, the model's vocabulary has {VOCAB} entries"):
        convert(chat, tmp_path / "out", image_token_id=VOCAB)


def test_no_tokenizer_and_no_id(chat: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--image-token-id"):
        convert(chat, tmp_path / "out")


def test_says_what_is_lacking(chat: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = _convert(chat, tmp_path / "out")
    assert "lacks one" in caplog.text
    assert not list(out.glob("tokenizer*"))
    assert json.loads((out / "config.json").read_text())["image_token_id"] == IMAGE


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "llama"}', "[]"])
def test_no_chat_format(tmp_path: Path, content: str | None) -> None:
    place = tmp_path / "in"
    place.mkdir()
    if content is not None:
        (place / "config.json").write_text(content)
    assert str(place) in _refusal(place, tmp_path / "out")
