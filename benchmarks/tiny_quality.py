"""What pruning and early exit cost the tiny pair, with the commands that a user has for other pairs.

    python -m benchmarks.tiny_quality --out benchmarks/results/tiny

`sgl-vlm eval` on calibration scenes and on test scenes, a process each on one thread; `sgl-vlm calibrate` on
the former for several tolerated losses. Then the paper's ablations are added, and each promise is held
against as many scenes again, which neither has seen. A run that was stopped goes on in ``--work``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.provenance import environment
from sgl_runtime.evaluation import calibrating, results
from sgl_runtime.evaluation.calibration import read_calibration
from sgl_runtime.evaluation.data import load
from sgl_runtime.files import whole_file
from sgl_runtime.tiny import LARGE, SMALL
from sgl_runtime.tiny.export import export

# Keep ratio @ prune layer. The paper's f = r = 0.4, 0.2 and 0.05 are token ratios of 64, 36 and 5 % in ten
# layers; its 9 % comes from 48 layers.
SETTINGS = ("0.4@4", "0.2@2", "0.09@0", "0.05@0")
RANKINGS = ("guided", "oracle", "fastv", "random")
ABLATIONS = ("prompt-rows", "generated-rows", "last-prompt-token")
NAMES = {
    "guided": "**the small VLM's mass (ours)**",
    "oracle": "its own mass (oracle)",
    "fastv": "FastV",
    "random": "chance",
    "prompt-rows": "ours, prompt rows only",
    "generated-rows": "ours, generated rows only",
    "last-prompt-token": "ours, last prompt token only",
}
ALPHAS = (0.01, 0.02, 0.03, 0.05)
SHOWN = 0.02  # whose promise the report shows
MAX_NEW_TOKENS = 8
KEPT = ("report.md", "report.json", "accuracy.png", "exits.png", "time.png", "stages.png")


def main(
    test_scenes: Annotated[int, typer.Option(help="Of four questions each.", min=2)] = 300,
    calibration_scenes: Annotated[int, typer.Option(help="Of four questions each.", min=2)] = 600,
    small: Annotated[Path, typer.Option(help="Checkpoint of the small VLM.")] = SMALL,
    large: Annotated[Path, typer.Option(help="Checkpoint of the large VLM.")] = LARGE,
    work: Annotated[Path, typer.Option(help="Scenes, results and the HTML report.")] = Path("runs/quality"),
    out: Annotated[Path | None, typer.Option(help="Where to put what is worth keeping.")] = None,
) -> None:
    """Evaluate, calibrate, check, and print how long it took."""
    scenes = {"calibration": calibration_scenes, "test": test_scenes}
    data = {split: export(split, count, work / split) for split, count in scenes.items()}
    data["held-out"] = export("test", calibration_scenes, work / "held-out", first=test_scenes)
    pair = ["--small", str(small), "--large", str(large)]

    def evaluate(split: str, rankings: tuple[str, ...], *more: str) -> subprocess.Popen[bytes]:
        chosen = [f"--ranking={name}" for name in rankings] + [f"--setting={at}" for at in SETTINGS]
        sizes = ["--max-new-tokens", str(MAX_NEW_TOKENS), "--batch", "8"]
        where = ["--data", str(data[split]), "--out", str(work / f"{split}-run")]
        return _start("eval", *pair, *where, *chosen, *sizes, *more)

    timing = work / "seconds.json"
    resumed = (work / "test-run").exists() or (work / "calibration-run").exists()
    began = time.perf_counter()
    _wait(evaluate("calibration", ("guided",), "--pictures", "0"), evaluate("test", RANKINGS))
    files = {}
    for alpha in ALPHAS:
        files[alpha] = work / f"calibration-{alpha:g}.json"
        rows = str(work / "calibration-run" / "results.jsonl")
        _wait(_start("calibrate", rows, "--alpha", str(alpha), "--out", str(files[alpha])))
    if not resumed:
        timing.write_text(json.dumps(time.perf_counter() - began))
    took = json.loads(timing.read_text()) if timing.exists() else None
    shown = ("--calibration", str(files[SHOWN]))
    _wait(
        evaluate("test", (*RANKINGS, *ABLATIONS), *shown),
        evaluate("held-out", ("guided",), "--pictures", "0", *shown),
    )
    text = promises(results.load(work / "held-out-run" / "results.jsonl"), files, took)
    typer.echo(text)
    if out is not None:
        found = results.load(work / "test-run" / "results.jsonl")
        _keep(out, work, text, found, data["test"], files[SHOWN], took)


def quality(methods: list[dict[str, Any]]) -> str:
    """Return the README's table of scores, from the rows of report.json."""

    def cells(name: str, ratio: str, row: dict[str, Any]) -> str:
        mean, low, high = (f"{100 * row[key]:.1f}" for key in ("mean", "low", "high"))
        lost = row["difference"]
        difference = (
            ""
            if lost is None
            else f"{100 * lost['mean']:+.1f} [{100 * lost['low']:+.1f}, {100 * lost['high']:+.1f}]"
        )
        return f"| {name} | {ratio} | {mean} [{low}, {high}] | {difference} |"

    lines = ["| answered by | token ratio | accuracy | minus large, unpruned |", "| --- | --- | --- | --- |"]
    alone = {row["method"]: row for row in methods if row["token_ratio"] is None}
    lines += [cells("small alone", "", alone["small"]), cells("large, unpruned", "", alone["large"])]
    pruned = [row for row in methods if row["token_ratio"] is not None]
    for row in sorted(pruned, key=lambda row: -row["token_ratio"]):
        name = NAMES.get(row["method"], row["method"])
        lines.append(cells(f"large, ranked by {name}", f"{100 * row['token_ratio']:.0f} %", row))
    return "\n".join(lines) + "\n"


def promises(found: results.Results, files: dict[float, Path], took: float | None) -> str:
    """Return what calibration promised beside what came of it on examples it has not seen, in Markdown."""
    lines = [
        "| tolerated loss | chosen by calibrate | exits | loss on held-out scenes | kept | time, large = 1 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for alpha, file in files.items():
        calibration = read_calibration(file)
        checked = calibrating.check(found, calibration)
        mean, low, high = (f"{100 * checked[name]:+.1f}" for name in ("mean", "low", "high"))
        threshold = calibration.exit_threshold
        chosen = (
            f"keep_ratio {calibration.keep_ratio:g}, prune_layer {calibration.prune_layer}, exit_threshold "
        )
        chosen += "none" if threshold is None else f"{threshold:g}"
        share, measured = f"{100 * checked['exit_share']:.0f} %", calibration.measured
        time_of = f"{measured['seconds'] / measured['seconds_large_unpruned']:.2f}"
        kept = "yes" if checked["kept"] else "no"
        lines.append(
            f"| {100 * alpha:g} points | {chosen} | {share} | {mean} [{low}, {high}] | {kept} | {time_of} |"
        )
    machine = found.runs[0]["machine"]
    minutes = "resumed, not timed" if took is None else f"{took / 60:.1f} minutes"
    lines.append(f"\neval on both splits and calibrate: {minutes}, two processes ({machine}).")
    return "\n".join(lines) + "\n"


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "sgl_runtime.cli", *arguments]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def _wait(*running: subprocess.Popen[bytes]) -> None:
    for process in running:
        if process.wait() != 0:
            raise typer.Exit(process.returncode)


def _keep(
    out: Path,
    work: Path,
    text: str,
    found: results.Results,
    data: Path,
    calibration: Path,
    took: float | None,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copy(work / "test-run" / name, out / name)
    shutil.copy(calibration, out / "calibration.json")
    where = {"environment": environment(), "minutes": took and round(took / 60, 2)}
    for name, content in (
        ("quality.md", quality(json.loads((out / "report.json").read_text())["methods"])),
        ("promises.md", text),
        ("environment.json", json.dumps(where, indent=1, default=str) + "\n"),
        ("answers.jsonl", "".join(json.dumps(row) + "\n" for row in _answers(found, data))),
    ):
        with whole_file(out / name) as partial:
            partial.write_text(content, encoding="utf-8")


def _answers(found: results.Results, data: Path) -> list[dict[str, Any]]:
    """Return a row per question with the answer of every method, named as "guided 0.2@2"."""
    rows = {
        example.id: {"id": example.id, "question": example.question, "answer": example.answers[0]}
        for example in load(data).examples
    }
    for row in found.rows:
        asked: dict[str, Any] = rows[row["id"]]
        if row["method"] == "small":
            asked |= {name: row[name] for name in ("confidence", "consistency", "decision_score")}
        setting = "" if row["keep_ratio"] is None else f" {row['keep_ratio']:g}@{row['prune_layer']}"
        asked[row["method"] + setting] = row["prediction"]
    return list(rows.values())


if __name__ == "__main__":
    typer.run(main)
