"""Measures the GPU targets of the ops with the kernels that SGL_KERNELS_BACKEND names, and reports them.

    SGL_KERNELS_BACKEND=cuda python -m benchmarks.gpu_ops measure --out runs/gpu_ops.cuda.json
    python -m benchmarks.gpu_ops report runs/gpu_ops.cuda.json runs/gpu_ops.triton.json --out runs/gpu_ops.md

`measure --tiny` goes through every case on the CPU at a size of nothing: a check that each can be built.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import sgl_kernels
from benchmarks.gpu_cases import DTYPE, GpuCase, build, cases, shrunk
from benchmarks.provenance import environment, gpu
from sgl_kernels import registry
from sgl_kernels.bench.timing import Ceilings, ceilings, runnable, time_sides
from sgl_kernels.bench.workloads import describe
from sgl_runtime.files import whole_file


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--out", type=Path, required=True, help="JSON file")
    measuring.add_argument("--op", help="only this op")
    measuring.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU")
    reporting = commands.add_parser("report")
    reporting.add_argument("documents", type=Path, nargs="+", help="JSON files of `measure`")
    reporting.add_argument("--out", type=Path, help="Markdown file with every row")
    options = parser.parse_args()

    if options.command == "report":
        documents = [json.loads(path.read_text(encoding="utf-8")) for path in options.documents]
        if options.out:
            write(options.out, full_table(documents))
        print(short_table(documents))
        return 0
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --tiny goes through the cases on the CPU")
    document = measure(options.out, options.op, options.tiny)
    failed = [row for row in document["results"] if row.get("error")]
    print(short_table([document]))
    return 1 if failed else 0


def measure(out: Path, only: str | None, tiny: bool) -> dict[str, Any]:
    """Every case; `out` is written anew after each, so that a run cut short leaves what it had."""
    device = torch.device("cpu" if tiny else "cuda")
    limit = ceilings(device, DTYPE, copied=1 << 20, size=64) if tiny else ceilings(device, DTYPE)
    document: dict[str, Any] = {
        "backend": registry.serving_backend("decode_attention", device.type.upper()),
        "environment": environment(device.type),
        "ceilings": dataclasses.asdict(limit),
        "results": [],
    }
    started = time.perf_counter()
    for case in cases():
        if only in (None, case.op):
            document["results"].append(measure_case(shrunk(case) if tiny else case, limit, tiny))
        if not tiny:
            torch.cuda.empty_cache()  # what graphs of one case held is of no use to the next
            document["gpu_after"] = gpu()
        document["seconds"] = time.perf_counter() - started
        write(out, json.dumps(document, indent=1, default=str))
    return document


def measure_case(case: GpuCase, limit: Ceilings, tiny: bool = False) -> dict[str, Any]:
    """Times and targets of one case. One that fails is reported and does not take the others with it."""
    result: dict[str, Any] = {"op": case.op, "shape": case.shape, "sides": {}, "targets": []}
    try:
        torch.manual_seed(0)
        with torch.inference_mode():
            workload = build(case, torch.device("cpu" if tiny else "cuda"))
            stock, result["cannot_run"] = runnable(workload.stock, workload.inputs)
            sides = {**workload.sides(sgl_kernels), **stock}
            touched = workload.cost("").bytes
            timings = time_sides(sides, workload.inputs, 2 if tiny else None, touched)
    except Exception as error:
        return {**result, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    for name, timing in timings.items():
        cost = workload.cost(name)
        result["sides"][name or "ours"] = {
            **dataclasses.asdict(timing),
            **dataclasses.asdict(cost),
            "gb_per_s": cost.bytes / timing.median_us / 1e3,
            "share_of_copy": cost.bytes / timing.median_us * 1e6 / limit.copy_bytes_per_s,
        }
    medians = {name: timing.median_us for name, timing in timings.items()}
    for target in case.targets:
        outcome: dict[str, Any] = {
            "target": target.words,
            "us": medians[target.side],
            "limit_us": None,
            "met": None,
        }
        try:
            allowed = target.limit(medians, workload.cost(target.side), limit)
            outcome |= {"limit_us": allowed, "met": medians[target.side] <= allowed}
        except (KeyError, ValueError):  # the side it compares with could not be run
            pass
        result["targets"].append(outcome)
    return result


def short_table(documents: list[dict[str, Any]]) -> str:
    """For each backend, op and target: how many shapes met it, and the one furthest from it."""
    lines = [provenance_line(document) for document in documents]
    lines.append(f"{'backend':<8} {'op':<17} {'target':<62} {'met':>7}  worst: us against allowed, shape")
    for document in documents:
        grouped: dict[tuple[str, str], list[tuple[float, dict[str, Any], dict[str, Any]]]] = {}
        for result in document["results"]:
            for target in result["targets"]:
                over = target["us"] / target["limit_us"] if target["limit_us"] else -1.0
                grouped.setdefault((result["op"], target["target"]), []).append((over, target, result))
        for (op, words), rows in grouped.items():
            measured = [row for row in rows if row[1]["met"] is not None]
            line = f"{document['backend']:<8} {op:<17} {words:<62} "
            if not measured:
                lines.append(f"{line}{'-':>7}  what it compares with did not run")
                continue
            _, worst, where = max(measured, key=lambda row: row[0])
            met = f"{sum(target['met'] for _, target, _ in measured)}/{len(measured)}"
            numbers = f"{worst['us']:.1f} against {worst['limit_us']:.1f}"
            lines.append(f"{line}{met:>7}  {numbers}, {describe(where['shape'])}")
        for result in document["results"]:
            if result.get("error"):
                shape = describe(result["shape"])
                lines.append(f"{document['backend']:<8} {result['op']:<17} FAILED {shape}: {result['error']}")
    return "\n".join(lines)


def full_table(documents: list[dict[str, Any]]) -> str:
    """Markdown: every shape and target."""
    lines = [f"* {provenance_line(document)}" for document in documents]
    lines += [
        "",
        "| backend | op | shape | target | us | allowed | |",
        "| --- | --- | --- | --- | ---: | ---: | --- |",
    ]
    verdicts = {True: "met", False: "**missed**", None: "not measured"}
    for document in documents:
        for result in document["results"]:
            head = f"| {document['backend']} | {result['op']} | {describe(result['shape'])} |"
            if result.get("error"):
                lines.append(f"{head} | | | **failed**: {result['error']} |")
            for target in result["targets"]:
                allowed = "" if target["limit_us"] is None else f"{target['limit_us']:.2f}"
                verdict = verdicts[target["met"]]
                lines.append(f"{head} {target['target']} | {target['us']:.2f} | {allowed} | {verdict} |")
    return "\n".join(lines)


def provenance_line(document: dict[str, Any]) -> str:
    where, limit = document["environment"], document["ceilings"]
    device = where.get("gpu", {}).get("name", where["cpu"])
    driver = where.get("gpu", {}).get("nvidia_smi", {}).get("driver_version", "none")
    return (
        f"{document['backend']}: {device}, driver {driver}, torch {where['torch']}, CUDA "
        f"{where['torch_cuda']}, commit {where['commit']}, {where['date']}; a copy moves "
        f"{limit['copy_bytes_per_s'] / 1e12:.2f} TB/s, a bf16 product does "
        f"{limit['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s"
    )


def write(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
