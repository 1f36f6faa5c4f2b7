"""Measures the whole pipeline against the research code's way, pair by pair, and says which targets are met.

    python -m benchmarks.pipeline --compile auto --compile on --out benchmarks/results
    python -m benchmarks.pipeline --pair internvl3-1b-14b --batch 1 --batch 16 --ratio 0.4 --ratio 0.2

Each pair, ratio and way of compiling has a process of its own, so that one that fails does not take the
others with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGKILL
from typing import Any

from benchmarks.provenance import environment
from sgl_runtime import bench_pairs, bench_pipeline, checkpoints
from sgl_runtime.bench_report import TITLES, table
from sgl_runtime.files import whole_file

COMPILE = {"auto": "auto", "on": True}


def main() -> int:
    options = parse()
    if options.task:
        for measured in bench_pipeline.run_by_batch(bench_pipeline.Task(**json.loads(options.task))):
            print(json.dumps(measured, default=str), flush=True)
        return 0
    tasks, end = make_tasks(options), time.monotonic() + options.limit
    document: dict[str, Any] = {"environment": environment(tasks[0].device), "pairs": [], "failed": []}
    for task in tasks:
        found, failure = measure(task, end - time.monotonic())
        if failure:
            document["failed"].append(failure)
            print(failure, file=sys.stderr)
        if found:
            document["pairs"].append(found)
            print(table(found), end="\n\n", flush=True)
        if options.out:
            write(options.out, f"pipeline_{task.device}", document)
    return 1 if document["failed"] or disagreements(document) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--pair", action="append", choices=bench_pairs.NAMES, help="default: tiny and mid")
    add("--batch", action="append", type=int, help="default: 1; for tiny 1 and 4; on CUDA 1, 4 and 16")
    add("--ratio", action="append", type=float, help="keep ratio, and share of the depth; default: 0.2")
    add("--compile", action="append", choices=COMPILE, help="default: auto, which is on for CUDA")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--turns", type=int, help="default: what fits into 20 s, at least 5, on CUDA 3")
    add("--limit", type=float, default=math.inf, help="seconds in all; what is cut short shows what it has")
    add("--out", type=Path, help="directory for pipeline_cpu or pipeline_cuda, .json and .md")
    add("--task", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_tasks(options: argparse.Namespace) -> list[bench_pipeline.Task]:
    return [
        bench_pipeline.make_task(
            pair,
            options.device,
            "auto",
            batches=options.batch or batches(pair, options.device),
            keep_ratio=ratio,
            compile=COMPILE[word],
            turns=options.turns,
        )
        for pair in options.pair or ["tiny", "mid"]
        for ratio in options.ratio or [0.2]
        for word in options.compile or ["auto"]
    ]


def batches(pair: str, device: str) -> list[int]:
    """The batch sizes of a pair that are worth their time."""
    if checkpoints.resolve_device(device).type == "cuda":
        return [1, 4, 16]
    return [1, 4] if pair == "tiny" else [1]


def measure(task: bench_pipeline.Task, seconds: float) -> tuple[dict[str, Any] | None, str]:
    """The document of `bench_pipeline.run`, as far as it came, and what went wrong."""
    command = [sys.executable, "-m", "benchmarks.pipeline", "--task", json.dumps(dataclasses.asdict(task))]
    name = f"{task.pair} at ratio {task.keep_ratio}, compile={task.compile}"
    limit = None if math.isinf(seconds) else max(seconds, 0.0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    lines = [line for line in output.splitlines() if line.endswith("}")]
    found = json.loads(lines[-1]) if lines else None
    if process.returncode == 0:
        return found, ""
    return found, f"{name}: {'out of time' if process.returncode == -SIGKILL else 'failed, see above'}"


def disagreements(document: dict[str, Any]) -> list[str]:
    """Differences between sides where rounding does not excuse them: in float32."""
    return [
        words
        for pair in document["pairs"]
        if pair["task"]["dtype"] == "float32"
        for words in pair["differences"]
    ]


def write(directory: Path, name: str, document: dict[str, Any]) -> None:
    for suffix, text in ((".json", json.dumps(document, indent=1, default=str)), (".md", markdown(document))):
        with whole_file(directory / f"{name}{suffix}") as partial:
            partial.write_text(text + "\n", encoding="utf-8")


def markdown(document: dict[str, Any]) -> str:
    """Where it was measured, what to make of the words, and each pair's table as printed."""
    where = document["environment"]
    device = where.get("gpu", {}).get("name", where["cpu"])
    lines = [
        f"{device}, torch {where['torch']}, commit {where['commit']}, {where['date']}. Medians, in "
        "milliseconds; what targets compare is the median of the ratios within a turn. `decode GB/s` is that "
        "of the small VLM, of the large one in side 6, and its share of a copy's; `peak MB` is what a side "
        "needs beyond the weights; `accepted` are draft tokens taken over, of those answered.",
        "",
        f"Sides: {'; '.join(TITLES.values())}.",
    ]
    for pair in document["pairs"]:
        lines += ["", "```", table(pair), "```"]
    lines += [f"\nFailed: {words}." for words in document["failed"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
