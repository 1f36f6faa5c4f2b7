"""Times every op against its baselines, one call of each in turn, and says which targets are met.

    python -m benchmarks.cpu_ops [--op NAME] [--out benchmarks/results]

Turns, not blocks: what else runs on the machine then slows both sides of a comparison alike. Medians.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.cases import DTYPES, Case, recipes
from benchmarks.provenance import environment
from sgl_kernels.bench.timing import time_sides
from sgl_runtime.files import whole_file

DTYPE_NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]


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
        document = {"environment": environment(), "results": results}
        with whole_file(options.out / "cpu_ops.json") as partial:
            partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        with whole_file(options.out / "cpu_ops.md") as partial:
            partial.write_text(table + "\n", encoding="utf-8")
    return 0


def measure(case: Case) -> dict[str, Any]:
    """Median microseconds of each side, and each target with what was reached."""
    timings = time_sides(case.sides, case.inputs, case.rounds)
    medians = {side: timing.median_us for side, timing in timings.items()}
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
    """One line per shape and target, both dtypes side by side; what misses its target is bold."""
    where = environment()
    lines = [
        f"{where['cpu']}, {where['threads']} threads, vector width {where['isa']}, torch {where['torch']}, "
        f"commit {where['commit']}. Baseline's median over ours (our median, microseconds).",
        "",
        "| op | shape | against | target | float32 | bfloat16 |",
        "| --- | --- | --- | --- | ---: | ---: |",
    ]
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for result in results:
        words = result["setting"].split()
        dtype = next(word for word in words if word in DTYPE_NAMES)
        shape = " ".join(word for word in words if word != dtype)
        for target in result["targets"]:
            cell = f"{target['ratio']:.2f}x ({result['median_us']['ours']:.0f})"
            row = cells.setdefault((result["op"], shape, target["target"]), {})
            row[dtype] = cell if target["met"] else f"**{cell}, missed**"
    for (op, shape, target), row in cells.items():
        bound, baseline = re.fullmatch(r"([<>]= [\d.]+x) (.*)", target).groups()  # type: ignore[union-attr]
        baseline, _, slack = baseline.partition(" + ")
        bound = f"{bound} + {slack}" if slack else bound
        measured = " | ".join(row.get(dtype, "") for dtype in DTYPE_NAMES)
        lines.append(f"| {op} | {shape} | {baseline} | {bound} | {measured} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
