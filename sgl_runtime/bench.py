"""`sgl-vlm bench`: times the ops on the user's own shapes, a table or one JSON object.

Which kernels serve an op is decided when sgl_kernels is imported. What this process already has is measured
here, as are the reference and stock torch; every other backend gets a process of its own, started with
SGL_KERNELS_BACKEND, which reads its task from stdin and writes the results to stdout.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import torch

import sgl_kernels
from sgl_kernels import registry
from sgl_kernels.bench import workloads
from sgl_kernels.bench.timing import Call, Ceilings, ceilings, runnable, time_sides
from sgl_runtime.errors import ConfigError

COMPILED = ("cpu", "cuda", "triton")
BACKENDS = (*COMPILED, "reference", "torch")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """What to time: every shape of one op, for each backend. `rounds` None is the timer's own number."""

    op: str
    shapes: list[workloads.Shape]
    backends: list[str]
    dtype: str
    device: str
    rounds: int | None = None


def make_task(op: str, shapes: list[str], backends: str | None, dtype: str, device: str) -> Task:
    """Check the words of the command line.

    Raises
    ------
    ConfigError
        A word is unknown, a shape does not fit the op, or there is no such device.
    """
    try:
        parsed = [workloads.parse_shape(op, text) for text in shapes or [""]]
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    wanted = list(dict.fromkeys(filter(None, (backends or "").replace(",", " ").split())))
    for name in wanted:
        if name not in BACKENDS:
            raise ConfigError(f"--backend must name some of {', '.join(BACKENDS)}, got {name!r}.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and "cpu" not in wanted else "cpu"
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be auto, cpu or cuda, got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but torch sees no CUDA device.")
    return Task(op, parsed, wanted or [_serving(op, device), "torch"], dtype, device)


def run(task: Task) -> dict[str, Any]:
    """Measure, and return the environment, the ceilings and one row per shape and side, as JSON holds them.

    Raises
    ------
    ConfigError
        A backend cannot serve the op here.
    """
    here = [name for name in task.backends if name not in COMPILED or name == _serving(task.op, task.device)]
    measured = {
        name: _in_a_process_of_its_own(dataclasses.replace(task, backends=[name]))
        for name in task.backends
        if name not in here
    }
    rows = _measure(dataclasses.replace(task, backends=here))
    for others in measured.values():
        rows += others
    limit = ceilings(torch.device(task.device), DTYPES[task.dtype])
    order = {name: i for i, name in enumerate(task.backends)}
    shape_order = [workloads.describe(shape) for shape in task.shapes]
    rows.sort(key=lambda row: (shape_order.index(workloads.describe(row["shape"])), order[row["backend"]]))
    return {
        "environment": {**sgl_kernels.collect_env(), "device": _device_name(task.device)},
        "ceilings": dataclasses.asdict(limit),
        "results": [with_roofline(row, limit) for row in rows],
    }


def with_roofline(row: Row, limit: Ceilings) -> Row:
    """Add what the time means: GB/s of the counted bytes, share of copy bandwidth, and the nearer ceiling."""
    if "cannot_run" in row:
        return row
    seconds = row["median_us"] / 1e6
    floors = {
        "memory": row["bytes"] / limit.copy_bytes_per_s,
        "compute": row["flops"] / limit.matmul_flops_per_s,
    }
    bound = max(floors, key=lambda name: floors[name])
    return {
        **row,
        "gb_per_s": row["bytes"] / seconds / 1e9,
        "share_of_copy": floors["memory"] / seconds,
        "bound": bound,
        "share_of_bound": floors[bound] / seconds,
    }


def table(document: dict[str, Any]) -> str:
    """What `run` returned, for people."""
    lines, last = [], ""
    for row in document["results"]:
        title = f"{row['op']} {workloads.describe(row['shape'])} {row['dtype']}"
        if title != last:
            heading = f"{'backend':<10} {'what':<30} {'median us':>10} {'p10':>9} {'p90':>9} {'GB/s':>8}"
            lines += ["", title, f"{heading}  share of roofline"]
            last = title
        if "cannot_run" in row:
            lines.append(f"{row['backend']:<10} {row['side'] or row['op']:<30} {row['cannot_run']}")
            continue
        numbers = f"{row['median_us']:>10.1f} {row['p10_us']:>9.1f} {row['p90_us']:>9.1f}"
        share = f"{row['share_of_bound']:.0%} {row['bound']}"
        lines.append(
            f"{row['backend']:<10} {row['side'] or row['op']:<30} {numbers} {row['gb_per_s']:>8.1f}  {share}"
        )
    limit = document["ceilings"]
    lines.append(
        f"\n{document['environment']['device']}: a copy moves {limit['copy_bytes_per_s'] / 1e9:.1f} GB/s, a "
        f"matrix product does {limit['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s in this run. GB/s and shares "
        "are of the bytes and operations an op cannot do without; what fits in a CPU's cache can beat a copy."
    )
    return "\n".join(lines).lstrip()


def _measure(task: Task) -> list[Row]:
    """Rows of the backends that this process has; sides of one shape take turns."""
    rows = []
    for shape in task.shapes:
        torch.manual_seed(0)
        workload = _build(task, shape)
        sides: dict[tuple[str, str], Call] = {}
        for backend in task.backends:
            if backend == "torch":
                calls = workload.stock
            else:
                calls = workload.sides(sgl_kernels.reference if backend == "reference" else sgl_kernels)
            sides |= {(backend, name): call for name, call in calls.items()}
        order = list(sides)
        with torch.inference_mode():
            sides, refused = runnable(sides, workload.inputs)
            timings = time_sides(sides, workload.inputs, task.rounds, workload.cost("").bytes)
        results = {key: dataclasses.asdict(timing) for key, timing in timings.items()}
        results |= {key: {"cannot_run": reason} for key, reason in refused.items()}
        rows += [
            {
                "op": task.op,
                "shape": shape,
                "dtype": str(workload.dtype).removeprefix("torch."),
                "backend": backend,
                "side": side,
                **results[backend, side],
                **dataclasses.asdict(workload.cost(side)),
            }
            for backend, side in order
        ]
    return rows


def _build(task: Task, shape: workloads.Shape) -> workloads.Workload:
    try:
        return workloads.build(task.op, shape, DTYPES[task.dtype], torch.device(task.device))
    except (MemoryError, RuntimeError) as error:  # allocators of torch raise RuntimeError
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{task.op} {workloads.describe(shape)} cannot be set up: {reason}") from error


def _in_a_process_of_its_own(task: Task) -> list[Row]:
    (backend,) = task.backends
    done = subprocess.run(
        [sys.executable, "-m", "sgl_runtime.bench"],
        input=json.dumps(dataclasses.asdict(task)),
        capture_output=True,
        text=True,
        env={**os.environ, "SGL_KERNELS_BACKEND": backend},
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ConfigError(f"--backend {backend} cannot run {task.op} on {task.device}: {reason}")
    rows: list[Row] = json.loads(done.stdout)
    return rows


def _serving(op: str, device: str) -> str:
    return registry.serving_backend(op, device.upper())


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def _main() -> None:
    task = Task(**json.load(sys.stdin))
    serving = _serving(task.op, task.device)
    if serving != task.backends[0]:
        sys.exit(f"{serving} serves the op there")
    json.dump(_measure(task), sys.stdout)


if __name__ == "__main__":
    _main()
