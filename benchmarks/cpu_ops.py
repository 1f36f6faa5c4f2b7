"""Times every op against its baselines, one call of each in turn, and says which targets are met.

    python -m benchmarks.cpu_ops [--op NAME] [--out benchmarks/results]

Turns, not blocks: what else runs on the machine then slows both sides of a comparison alike. Medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import sgl_kernels
from benchmarks.cases import Case, recipes


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", help="only this op, for example decode_attention")
    parser.add_argument("--out", type=Path, help="directory for cpu_ops.json and cpu_ops.md")
    options = parser.parse_args()

    torch.manual_seed(0)
    chosen = [build for op, build in recipes() if options.op in (None, op)]
    if not chosen:
        parser.error(f"no case of op {options.op!r}")
    with torch.inference_mode():
        results = [measure(build()) for build in tqdm(chosen, unit="case", disable=None)]
    table = markdown(results)
    print(table)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        document = {"environment": sgl_kernels.collect_env(), "results": results}
        write_whole(options.out / "cpu_ops.json", json.dumps(document, indent=1) + "\n")
        write_whole(options.out / "cpu_ops.md", table + "\n")
    return 0


def measure(case: Case) -> dict[str, Any]:
    """Median microseconds of each side, and each target with what was reached."""
    times: dict[str, list[float]] = {side: [] for side in case.sides}
    for warm in range(case.rounds + 1):
        for side, call in case.sides.items():
            start = time.perf_counter()
            call()
            if warm:
                times[side].append((time.perf_counter() - start) * 1e6)
    medians = {side: statistics.median(values) for side, values in times.items()}
    ours = medians["ours"]
    targets = [
        {
            "target": str(target),
            "ratio": medians[target.baseline] / ours,
            "met": target.met(ours, medians[target.baseline]),
        }
        for target in case.targets
    ]
    return {"op": case.op, "setting": case.setting, "median_us": medians, "targets": targets}


def markdown(results: list[dict[str, Any]]) -> str:
    env = sgl_kernels.collect_env()
    lines = [
        f"torch {env['torch']}, {env['threads']} threads, vector width {env['isa']}; median microseconds",
        "",
        "| op | setting | ours | baseline | target | baseline / ours | met |",
        "| --- | --- | ---: | ---: | --- | ---: | --- |",
    ]
    for result in results:
        medians = result["median_us"]
        for target in result["targets"]:
            baseline = next(side for side in medians if side != "ours" and f"x {side}" in target["target"])
            lines.append(
                f"| {result['op']} | {result['setting']} | {medians['ours']:.0f} | {medians[baseline]:.0f} | "
                f"{target['target']} | {target['ratio']:.2f} | {'yes' if target['met'] else '**no**'} |"
            )
    others = [
        f"{result['op']} [{result['setting']}] {side}: {value:.0f} us"
        for result in results
        for side, value in result["median_us"].items()
        if side.startswith("ours,")
    ]
    return "\n".join([*lines, "", *(f"* {line}" for line in others)])


def write_whole(path: Path, text: str) -> None:
    """A reader never sees half a file."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


if __name__ == "__main__":
    sys.exit(main())
