"""A results file goes on after any end, and takes nothing that does not belong to it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sgl_runtime import SGLPipeline, tiny
from sgl_runtime.errors import CheckpointError, ConfigError, ImageError, SGLError
from sgl_runtime.evaluation import results as results_module
from sgl_runtime.evaluation.data import BadRow, DataSet, Example, load
from sgl_runtime.evaluation.intervals import bootstrap
from sgl_runtime.evaluation.methods import Answered, Method, make_methods
from sgl_runtime.evaluation.metrics import METRICS
from sgl_runtime.evaluation.rankings import RANKINGS
from sgl_runtime.evaluation.results import Results, run
from sgl_runtime.evaluation.table import markdown, table
from sgl_runtime.fingerprint import checkpoint_fingerprint
from sgl_runtime.tiny.scenes import make_scene

from . import interrupted

SETTINGS = [(0.2, 2), (0.1, 0)]
LAYERS = 10
STAGES = {"prefill": 0.1875, "decode": 0.0625}


@pytest.fixture(scope="module")
def pipe() -> SGLPipeline:
    return interrupted.load_pair()


@pytest.fixture
def dataset() -> DataSet:
    """Seven questions, two of them about one image."""
    images = ("a", "a", "b", "c", "d", "e", "f")
    examples = [
        Example(str(i), (f"/images/{image}.png",), f"question {i}", (f"answer {i}",), {})
        for i, image in enumerate(images)
    ]
    return DataSet("seven", "exact", tuple(examples), ())


class Answers:
    """In place of `answer_batch`: right or wrong by example and method, and what was asked."""

    def __init__(self, *, errors: dict[str, SGLError] | None = None, fail_at: int | None = None) -> None:
        self.errors = errors or {}
        self.fail_at = fail_at
        self.asked: list[tuple[str, str]] = []
        self.batches = 0

    def __call__(
        self, pipe: SGLPipeline, examples: Sequence[Example], methods: Sequence[Method], **options: Any
    ) -> list[list[Answered] | SGLError]:
        if self.batches == self.fail_at:
            raise KeyboardInterrupt
        self.batches += 1
        return [self.errors.get(example.id) or self._answer(example, methods) for example in examples]

    def _answer(self, example: Example, methods: Sequence[Method]) -> list[Answered]:
        self.asked += [(example.id, str(method.key)) for method in methods]
        right = [len(f"{example.id}{method.key}") % 2 or int(example.id) % 3 for method in methods]
        scores: dict[str, float | None] = {"confidence": 0.5, "consistency": None, "decision_score": 0.5}
        return [
            Answered(m, example.answers[0] if ok else "no", STAGES, scores if m.name == "small" else {})
            for m, ok in zip(methods, right, strict=True)
        ]


def go(
    pipe: SGLPipeline,
    dataset: DataSet,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    answers: Answers | None = None,
    names: Sequence[str] = ("guided", "random"),
    **options: Any,
) -> Results:
    monkeypatch.setattr(results_module, "answer_batch", answers or Answers())
    methods = make_methods([RANKINGS[name] for name in names], SETTINGS, LAYERS)
    return run(pipe, dataset, methods, out, **{"checkpoints": interrupted.CHECKPOINTS, "batch": 2, **options})


def test_rows_as_they_are_documented(
    pipe: SGLPipeline, dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "results.jsonl"
    found = go(pipe, dataset, out, monkeypatch)
    first, run, *lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert found == Results(first["header"], lines, runs=[run["run"]])
    assert datetime.fromisoformat(run["run"]["started"]).utcoffset() == timedelta(0)
    assert "threads" in run["run"]["machine"]
    assert len(lines) == 7 * (2 + 2 * 2)
    about = {
        "id": "1",
        "group": "/images/a.png",
        "prediction": "answer 1",
        "score": 1.0,
        "seconds": 0.25,
        "stages": STAGES,
    }
    setting = {"keep_ratio": None, "prune_layer": None}
    scores = {"confidence": 0.5, "consistency": None, "decision_score": 0.5}
    assert lines[6:8] == [
        {**about, "method": "small", **setting, **scores},
        {**about, "method": "large", **setting},
    ]
    assert lines[9] == {**about, "method": "guided", "keep_ratio": 0.1, "prune_layer": 0}
    assert {row["score"] for row in lines} == {0.0, 1.0}


def test_two_processes_do_not_write_one_file(
    pipe: SGLPipeline, dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results.jsonl"

    class Intruder(Answers):
        def __call__(self, *positional: Any, **options: Any) -> list[list[Answered] | SGLError]:
            with pytest.raises(ConfigError, match="Another process is writing"):
                run(pipe, dataset, [], out, checkpoints=interrupted.CHECKPOINTS)
            return super().__call__(*positional, **options)

    intruder = Intruder()
    found = go(pipe, dataset, out, monkeypatch, intruder)
    assert intruder.batches == 4
    assert len(found.rows) == 7 * (2 + 2 * 2)
    go(pipe, dataset, out, monkeypatch)  # and leave it to others afterwards


def test_what_is_there_is_not_done_again(
    pipe: SGLPipeline, dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results.jsonl"
    go(pipe, dataset, out, monkeypatch, names=("guided",))
    before = out.read_bytes()
    again, more = Answers(), Answers()
    go(pipe, dataset, out, monkeypatch, again, names=("guided",))
    assert (again.asked, out.read_bytes()) == ([], before)
    extended = go(pipe, dataset, out, monkeypatch, more)
    assert out.read_bytes().startswith(before)
    assert len(more.asked) == 7 * 2
    assert all("random" in key for _, key in more.asked)
    whole = go(pipe, dataset, tmp_path / "whole.jsonl", monkeypatch)
    assert table(extended) == table(whole)


def test_an_interrupt_loses_no_more_than_a_batch(
    pipe: SGLPipeline, dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rest = tmp_path / "results.jsonl", Answers()
    with pytest.raises(KeyboardInterrupt):
        go(pipe, dataset, out, monkeypatch, Answers(fail_at=2))
    assert len(results_module.load(out).rows) == 4 * 6
    found = go(pipe, dataset, out, monkeypatch, rest)
    assert {example for example, _ in rest.asked} == {"4", "5", "6"}
    assert table(found) == table(go(pipe, dataset, tmp_path / "whole.jsonl", monkeypatch))


def test_a_file_cut_anywhere_goes_on(
    pipe: SGLPipeline, dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every place around the lines' ends and at many inside of lines, garbage of a crash included."""
    whole = tmp_path / "whole.jsonl"
    expected = table(go(pipe, dataset, whole, monkeypatch))
    data = whole.read_bytes()
    begin = data.index(b"\n") + 1
    answers = [line for line in data.splitlines() if not line.startswith(b'{"run"')]
    ends = [i for i, byte in enumerate(data) if byte == 10 and i >= begin][::5]
    cuts = {begin, begin + 1, *(end + extra for end in ends for extra in (-1, 0, 1, 2, 17))}
    for number, cut in enumerate(sorted(cut for cut in cuts if cut <= len(data))):
        for tail in (b"", b"\0" * 40):
            out = tmp_path / f"{number}-{len(tail)}.jsonl"
            out.write_bytes(data[:cut] + tail)
            assert table(go(pipe, dataset, out, monkeypatch)) == expected
            assert b"\0" not in out.read_bytes()
            written = [line for line in out.read_bytes().splitlines() if not line.startswith(b'{"run"')]
            assert sorted(written) == sorted(answers)


def test_a_full_disk_leaves_a_file_that_resumes(
    pipe: SGLPipeline, dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, room = tmp_path / "results.jsonl", os.write, [3000]

    def write(file: int, data: bytes) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(file, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space left"):
        go(pipe, dataset, out, monkeypatch)
    monkeypatch.setattr(os, "write", real)
    assert not out.read_bytes().endswith(b"\n")
    found = go(pipe, dataset, out, monkeypatch)
    assert table(found) == table(go(pipe, dataset, tmp_path / "whole.jsonl", monkeypatch))


def test_each_batch_is_on_the_disk_before_the_next(
    pipe: SGLPipeline, dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, synced = tmp_path / "results.jsonl", os.fsync, list[int]()
    monkeypatch.setattr(
        os, "fsync", lambda file: (real(file), synced.append(out.exists() and len(out.read_bytes())))[0]
    )
    go(pipe, dataset, out, monkeypatch)
    assert len(synced) == 1 + 4  # the header, then batches of two of seven examples
    assert synced[-1] == len(out.read_bytes())
    assert sorted(set(synced[1:])) == synced[1:]


def test_errors_are_counted_and_tried_again(
    pipe: SGLPipeline, dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, broken = tmp_path / "results.jsonl", {"2": ImageError("it is torn"), "5": ImageError("it is gone")}
    for _ in range(2):
        found = go(pipe, dataset, out, monkeypatch, Answers(errors=broken))
        assert found.errors == {"2": "ImageError: it is torn", "5": "ImageError: it is gone"}
        assert {row["count"] for row in table(found)} == {5}
    assert out.read_text().count('"error"') == 2
    mended = Answers(errors={"5": ImageError("it is gone")})
    found = go(pipe, dataset, out, monkeypatch, mended)
    assert {example for example, _ in mended.asked} == {"2"}
    assert set(found.errors) == {"5"}
    assert {row["count"] for row in table(found)} == {6}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"checkpoints": (tiny.LARGE, tiny.LARGE)}, "pair.small.fingerprint was "),
        ({"config": {"max_new_tokens": 9}}, "settings.max_new_tokens was 8 and is 9"),
        ({"config": {"consistency_keep_ratio": 0.1}}, "settings.consistency_keep_ratio was 0.05 and is 0.1"),
        ({"config": {"keep_scope": "image"}}, "settings.keep_scope was 'request' and is 'image'"),
        ({"data": {"name": "other"}}, "data set.name was 'seven' and is 'other'"),
        ({"data": {"metric": "anls"}}, "data set.metric was 'exact' and is 'anls'"),
        ({"data": {"bad": (BadRow(3, "no image"),)}}, "data set.bad was 0 and is 1"),
        ({"question": "another"}, "data set.sha256 was "),
        ({"version": "9.9"}, "versions.torch was .* and is '9.9'"),
    ],
)
def test_results_of_another_run_are_refused(
    pipe: SGLPipeline,
    dataset: DataSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    told: str,
) -> None:
    out = tmp_path / "results.jsonl"
    go(pipe, dataset, out, monkeypatch)
    before = out.read_bytes()
    other = pipe.with_config(replace(pipe.config, **change.pop("config", {})))
    changed = replace(dataset, **change.pop("data", {}))
    if question := change.pop("question", None):
        changed = replace(
            dataset, examples=(*dataset.examples[:6], replace(dataset.examples[6], question=question))
        )
    if newer := change.pop("version", None):
        monkeypatch.setattr(results_module, "version", lambda name: newer)
    with pytest.raises(ConfigError, match=told):
        go(other, changed, out, monkeypatch, **change)
    assert out.read_bytes() == before


class Own:
    name = "own"
    rank = RANKINGS["random"].rank


def test_a_users_ranking_that_changed_is_refused(
    pipe: SGLPipeline, dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results.jsonl"
    monkeypatch.setattr(results_module, "answer_batch", Answers())
    methods = make_methods([Own()], SETTINGS, LAYERS)
    found = run(pipe, dataset, methods, out, checkpoints=interrupted.CHECKPOINTS)
    assert {"code" in row for row in found.rows if row["method"] == "own"} == {True}
    assert {"code" in row for row in found.rows if row["method"] != "own"} == {False}
    run(pipe, dataset, methods, out, checkpoints=interrupted.CHECKPOINTS)
    monkeypatch.setattr(results_module, "code_of", lambda ranking: "another")
    with pytest.raises(ConfigError, match="'own' whose file has changed"):
        run(pipe, dataset, methods, out, checkpoints=interrupted.CHECKPOINTS)


@pytest.mark.parametrize(
    "content", [b"", b"notes", b"notes\n", b"[1]\n", b'{"a": 1}\n', b'{"header": {"format": 0}}\n']
)
def test_other_files_are_left_alone(
    pipe: SGLPipeline, dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    out = tmp_path / "results.jsonl"
    out.write_bytes(content)
    with pytest.raises(ConfigError, match=r"results file|is empty"):
        go(pipe, dataset, out, monkeypatch)
    assert out.read_bytes() == content
    with pytest.raises(ConfigError, match="There is no results file"):
        results_module.load(tmp_path / "missing.jsonl")


def test_damage_in_the_middle_is_no_crash(
    pipe: SGLPipeline, dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results.jsonl"
    go(pipe, dataset, out, monkeypatch)
    lines = out.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3][:20] + b"\n"
    out.write_bytes(b"".join(lines))
    with pytest.raises(ConfigError, match="line 4 is damaged"):
        go(pipe, dataset, out, monkeypatch)
    assert out.read_bytes() == b"".join(lines)


def test_table_and_its_markdown(
    pipe: SGLPipeline, dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = tuple(
        replace(e, extra={"category": "odd" if i % 2 else "even"}) for i, e in enumerate(dataset.examples)
    )
    dataset = replace(dataset, examples=examples)
    found = go(pipe, dataset, tmp_path / "results.jsonl", monkeypatch)
    rows = table(found, dataset)
    keys = [(row["method"], row["keep_ratio"], row["prune_layer"]) for row in rows]
    assert keys == [
        method.key for method in make_methods([RANKINGS["guided"], RANKINGS["random"]], SETTINGS, LAYERS)
    ]
    for row, key in zip(rows, keys, strict=True):
        mine = [r for r in found.rows if (r["method"], r["keep_ratio"], r["prune_layer"]) == key]
        scores = [r["score"] for r in mine]
        assert (row["mean"], row["low"], row["high"]) == bootstrap(scores, [r["group"] for r in mine])
        assert row["mean"] == sum(scores) / 7
        assert row["summary"]["odd"] == pytest.approx(sum(scores[1::2]) / 3)
        assert (row["seconds"], row["stages"]) == (0.25, STAGES)
    assert [row["token_ratio"] for row in rows] == pytest.approx([None, None, 0.36, 0.1, 0.36, 0.1])
    lines = markdown(rows, "exact").splitlines()
    assert len(lines) == 2 + len(rows)
    assert lines[0].startswith(
        "| method | keep ratio | prune layer | token ratio | examples | score | seconds |"
    )
    assert lines[4].startswith("| guided | 0.2 | 2 | 36 % | 7 | ")
    assert f"{100 * rows[2]['mean']:.1f} [" in lines[4]
    odd, even = (100 * rows[2]["summary"][name] for name in ("odd", "even"))
    assert f"| {even:.1f} | {odd:.1f} |" in lines[4]
    assert f"| {even / 100:.1f} | {odd / 100:.1f} |" in markdown(rows, "mme").splitlines()[4]


def test_answers_that_need_a_judge_are_stored(
    pipe: SGLPipeline, dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = go(pipe, replace(dataset, metric="judge"), tmp_path / "results.jsonl", monkeypatch)
    assert {row["score"] for row in found.rows} == {None}
    assert {row["mean"] for row in table(found)} == {None}
    assert "| small |  |  |  | 7 |  | 0.250 |" in markdown(table(found), "judge")


def test_a_killed_run_gives_the_same_table(pipe: SGLPipeline, tmp_path: Path) -> None:
    """kill -9 in the middle of a real run in another process, then on from what it left."""
    rows = []
    for index in range(4):
        scene = make_scene("calibration", index, 4)
        scene.image.save(tmp_path / f"{index}.png")
        rows += [
            {"id": f"{index}-{i}", "image": f"{index}.png", "question": q.text, "answer": q.answer}
            for i, q in enumerate(scene.questions)
        ]
    rows.append({"id": "torn", "image": "torn.png", "question": "read it", "answer": "x"})
    (tmp_path / "torn.png").write_bytes((tmp_path / "0.png").read_bytes()[:500])
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "evaluation.interrupted", str(data), str(out)]
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[1],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 1 + 3 * 4):
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        _, told = process.communicate()
    assert process.returncode == -signal.SIGKILL, told.decode()[-2000:]
    done = len(results_module.load(out).rows)
    assert 3 * 4 <= done < 16 * 4
    out.write_bytes(out.read_bytes() + b'{"id": "3-3", "gro')  # what a kill inside of a write would leave

    found = interrupted.evaluate(pipe, str(data), str(out))
    whole = interrupted.evaluate(pipe, str(data), str(tmp_path / "whole.jsonl"))
    assert [list(one.errors) for one in (found, whole)] == [["torn"], ["torn"]]
    assert len(found.rows) == 16 * 4

    def timeless(results: Results) -> list[dict[str, Any]]:
        return [{**row, "seconds": None, "stages": None} for row in table(results, load(data))]

    assert timeless(found) == timeless(whole)
    assert [r["prediction"] for r in found.rows] == [r["prediction"] for r in whole.rows]


def test_fingerprints_tell_weights_and_settings_apart(tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in tiny.SMALL.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    expected = checkpoint_fingerprint(tiny.SMALL)
    assert checkpoint_fingerprint(copy("same")) == expected
    assert checkpoint_fingerprint(tiny.LARGE) != expected
    trained = copy("trained") / "model.safetensors"
    weights = load_file(trained)
    for weight in weights.values():
        weight += 0.001
    save_file(weights, trained, metadata={"format": "pt"})
    settings = copy("settings") / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("}", " }"))
    short = copy("short") / "model.safetensors"
    short.write_bytes(short.read_bytes()[:-10000])
    others = {checkpoint_fingerprint(tmp_path / name) for name in ("trained", "settings")}
    assert len(others | {expected}) == 3
    with pytest.raises(CheckpointError, match="could not be read as safetensors"):
        checkpoint_fingerprint(tmp_path / "short")


@pytest.mark.parametrize(
    "change",
    [
        {"method": None},
        {"score": "abc"},
        {"score": 1.5},
        {"seconds": -100},
        {"stages": None},
        {"group": 3},
        {"id": ["a"]},
        {"decision_score": None},
        {"prediction": None},
        {"keep_ratio": "0.2"},
    ],
)
def test_lines_edited_by_hand_are_told(
    pipe: SGLPipeline,
    dataset: DataSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
) -> None:
    out = tmp_path / "results.jsonl"
    go(pipe, dataset, out, monkeypatch)
    lines = out.read_text().splitlines()
    assert json.loads(lines[2])["method"] == "small"
    edited = {**json.loads(lines[2]), **change}
    out.write_text("\n".join([*lines[:2], json.dumps(edited), *lines[3:]]) + "\n")
    with pytest.raises(ConfigError, match="line 3 is damaged"):
        results_module.load(out)
    header = json.loads(lines[0])["header"]
    del header["pair"]
    out.write_text("\n".join([json.dumps({"header": header}), *lines[1:]]) + "\n")
    with pytest.raises(ConfigError, match="not a results file of this version"):
        results_module.load(out)


def test_images_are_known_by_what_they_hold(tmp_path: Path) -> None:
    """Copies are one group, moved files the same data, changed ones other data."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(b"one")

    def dataset_in(folder: Path, **extra: Any) -> DataSet:
        examples = [
            Example(name, (str(folder / f"{name}.png"),), "question", ("answer",), extra) for name in "ab"
        ]
        return DataSet("two", "exact", tuple(examples), ())

    def groups(dataset: DataSet) -> set[str]:
        answered = [Answered(make_methods([], [], LAYERS)[0], "answer", STAGES)]
        lines = [
            next(results_module._lines(METRICS["exact"], example, answered, {}, {}))
            for example in dataset.examples
        ]
        return {line["group"] for line in lines}

    here = dataset_in(tmp_path)
    assert len(groups(here)) == 1
    assert groups(dataset_in(tmp_path, group=7)) == {"7"}
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("a", "b"):
        (moved / f"{name}.png").write_bytes(b"one")
    before = results_module.describe(here)
    assert results_module.describe(dataset_in(moved)) == before
    (tmp_path / "b.png").write_bytes(b"two other pixels")
    assert len(groups(here)) == 2
    assert results_module.describe(here)["sha256"] != before["sha256"]
