"""Finds the block sizes of the Triton kernels on this GPU and writes them into their table.

    python -m benchmarks.tune_triton [--ops decode_attention,vocabulary] [--table FILE]

One field after the other, every choice of it is timed on several shapes of a class, and the fastest is kept
if it is at least 2 % faster over all shapes. The result stands in the table under the name of the device,
such as "sm_90"; other devices keep theirs. Block sizes decide the order of sums: after tuning, results may
differ in the last bits from those before, but not between batch sizes, since classes follow from the shape
of one request. Attention in fp32 is not tuned. Without a GPU the exit status is 2.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if torch.cuda.is_available():
    os.environ["SGL_KERNELS_BACKEND"] = "triton"

import sgl_kernels
from sgl_kernels.bench import timing, workloads

Config = dict[str, int]
Table = dict[str, dict[str, dict[str, Config]]]
TABLE = Path(sgl_kernels.__file__).parent / "triton" / "configs.json"
FASTER_BY = 1.02


@dataclass(frozen=True)
class Task:
    """One class of the table, the calls that stand for it, and what each field may be."""

    entry: str
    shape_class: str
    op: str
    shapes: tuple[str, ...]
    dtype: torch.dtype
    choices: Mapping[str, tuple[int, ...]]


def tasks() -> list[Task]:
    found = []
    warps = (2, 4, 8)
    for dim in (64, 128, 256):
        heads = (f"Hq=14,Hkv=2,D={dim}", f"Hq=16,Hkv=8,D={dim}")
        slots = ("B=1,S=2048,N=1792", "B=1,S=8192,N=7168", "B=16,S=4096,N=3584")
        found += [
            Task(
                "decode_attention",
                f"16 bit, {dim}",
                "decode_attention",
                tuple(f"{h},{s}" for h in heads for s in slots),
                torch.bfloat16,
                {
                    "MIN_SPLIT": (64, 128, 256),
                    "BLOCK_KEYS": (32, 64, 128),
                    "split_warps": warps,
                    "split_stages": (1, 2, 3, 4),
                    "MAX_SPLITS": (32, 64, 128),
                    "BLOCK_SLOTS": (64, 128, 256),
                    "BLOCK_HEADS": (8, 16, 32),
                    "combine_warps": warps,
                },
            ),
            Task(
                "prefill_mass",
                f"16 bit, {dim}",
                "prefill_mass",
                tuple(f"{h},{s},R=64" for h in heads for s in slots),
                torch.bfloat16,
                {
                    "BLOCK_SLOTS": (32, 64, 128),
                    "BLOCK_ROWS": (16, 32, 64),
                    "received_warps": warps,
                    "SPLIT_KEYS": (256, 512, 1024),
                    "denominator_rows": (32, 64, 128),
                    "BLOCK_KEYS": (32, 64, 128),
                    "denominator_warps": warps,
                    "denominator_stages": (2, 3, 4),
                    "fold_slots": (64, 128, 256),
                    "fold_heads": (8, 16, 32),
                    "fold_warps": warps,
                },
            ),
        ]
    for slots, positions in ((1024, 1100), (4096, 4200), (16384, 16500), (32768, 33000)):
        shapes = (f"B=1,N={slots},S={positions}", f"B=16,N={slots * 3 // 4},S={positions}")
        choices = {"warps": (4, 8, 16, 32), "BLOCK": (1024, 2048, 4096)}
        found.append(Task("select_tokens", f"{slots} slots", "select_tokens", shapes, torch.float32, choices))
    gathers = ("B=1,N=1792,S=1900,C=2048", "B=4,N=4096,S=4200,C=5120", "B=1,N=16384,S=16500,C=8192,r=0.5")
    choices = {"ROW_BYTES": (1024, 2048, 4096, 8192), "BLOCK_BYTES": (4096, 8192, 16384), "warps": warps}
    found.append(Task("prune_gather", "gather", "prune_gather", gathers, torch.bfloat16, choices))
    rows = ("B=1,V=151936", "B=16,V=151936", "B=64,V=92553")
    choices = {"BLOCK_TOKENS": (2048, 4096, 8192), "block_warps": warps}
    for dtype in (torch.bfloat16, torch.float32):
        name = f"{dtype.itemsize * 8} bit"
        found.append(Task("vocabulary", name, "greedy_token", rows, dtype, choices))
    return found


def tune(task: Task, device: torch.device) -> Config:
    """The fastest configuration found, as far as it differs from the table's."""
    from sgl_kernels.triton import launching

    untuned, trial = launching.config, dict[str, int]()

    def lookup(entry: str, shape_class: str, where: torch.device) -> Config:
        found = untuned(entry, shape_class, where)
        return found | trial if (entry, shape_class) == (task.entry, task.shape_class) else found

    def side(call: Callable[..., object], config: Config) -> Callable[..., object]:
        def run(*inputs: torch.Tensor) -> object:
            trial.clear()
            trial.update(config)
            return call(*inputs)

        return run

    loads = [
        workloads.build(task.op, workloads.parse_shape(task.op, shape), task.dtype, device)
        for shape in task.shapes
    ]
    launching.config = lookup
    try:
        start = untuned(task.entry, task.shape_class, device)
        return search(start, task.choices, lambda configs: times(loads, side, configs))
    finally:
        launching.config = untuned


def times(
    loads: list[workloads.Workload],
    side: Callable[[Callable[..., object], Config], Callable[..., object]],
    configs: list[Config],
) -> list[float]:
    """Geometric mean of the medians over all shapes; infinite where the device refuses a configuration."""
    logs = [0.0] * len(configs)
    for load in loads:
        sides = {i: side(load.sides(sgl_kernels)[""], config) for i, config in enumerate(configs)}
        runs, _ = timing.runnable(sides, load.inputs)
        measured = timing.time_sides(runs, load.inputs, rounds=10)
        for i in range(len(configs)):
            logs[i] += math.log(measured[i].median_us) if i in measured else math.inf
    return [math.exp(total / len(loads)) for total in logs]


def search(
    start: Config, choices: Mapping[str, tuple[int, ...]], measure: Callable[[list[Config]], list[float]]
) -> Config:
    """Field after field the best choice; what differs from `start`."""
    best = dict(start)
    for name, values in choices.items():
        configs = [best, *(best | {name: value} for value in values if value != best[name])]
        found = measure(configs)
        fastest = min(range(len(configs)), key=found.__getitem__)
        if found[0] > FASTER_BY * found[fastest]:
            best = configs[fastest]
    return {name: value for name, value in best.items() if start[name] != value}


def text(table: Table) -> str:
    """The table as it is committed: one line for each class."""
    blocks = []
    for entry, devices in table.items():
        sections = []
        for device, classes in devices.items():
            lines = [f"      {json.dumps(name)}: {json.dumps(config)}" for name, config in classes.items()]
            sections.append(f"    {json.dumps(device)}: {{\n" + ",\n".join(lines) + "\n    }")
        blocks.append(f"  {json.dumps(entry)}: {{\n" + ",\n".join(sections) + "\n  }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", type=lambda words: words.split(","), help="entries of the table to tune")
    parser.add_argument("--table", type=Path, default=TABLE, help="table to read and write")
    options = parser.parse_args(arguments)
    entries = list(dict.fromkeys(task.entry for task in tasks()))
    if unknown := set(options.ops or ()) - set(entries):
        parser.error(f"unknown ops {sorted(unknown)}, expected some of {', '.join(entries)}")
    if not torch.cuda.is_available():
        print(
            f"tune_triton: torch {torch.__version__} sees no GPU, so there is nothing to measure; "
            f"{options.table} stays as it is",
            file=sys.stderr,
        )
        return 2
    from sgl_kernels.triton import launching

    device = torch.device("cuda", torch.cuda.current_device())
    key = launching.device_key(device)
    table: Any = json.loads(options.table.read_text())
    for task in tasks():
        if task.entry in (options.ops or entries):
            tuned = tune(task, device)
            section = table[task.entry].setdefault(key, {})
            section[task.shape_class] = section.get(task.shape_class, {}) | tuned
            options.table.write_text(text(table), encoding="utf-8")
            print(f"{key} {task.entry} {task.shape_class}: {tuned or 'as it was'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
