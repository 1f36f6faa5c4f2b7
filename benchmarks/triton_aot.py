"""Compiles every Triton kernel for GPUs that are not here, and tells what each takes of a chip.

    python -m benchmarks.triton_aot [--targets sm_90,gfx942] [--table docs/triton_resources.md] [--json FILE]

The ops are called on tensors without memory and each launch is compiled in place of being run, so what is
compiled is what a call would launch: the same arguments, the same configuration, the same specialisation. The
exit status is 1 where a kernel wants more threads or shared memory than its chip has or, on sm_90, spills.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Target: bytes of shared memory that a program can have there.
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
MAX_THREADS = 1024  # of a program
BF16, FP16, FP32, I32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64


@dataclass(frozen=True)
class Usage:
    case: str
    kernel: str
    target: str
    warps: int
    shared: int
    registers: int
    spilled: int  # bytes that are stored, on AMD registers


@dataclass(frozen=True)
class Case:
    """A call of an op; `common` ones stand for their op where all would take too long."""

    name: str
    call: Callable[[], None]
    common: bool = False


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def decode_case(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, mass: bool = True) -> Case:
    from sgl_kernels.triton.decode_attention import decode_attention

    def call(batch: int = 4, slots: int = 8192, visual: int = 1792) -> None:
        q, cache = meta(batch, heads, dim, dtype=dtype), meta(batch, kv_heads, slots, dim, dtype=dtype)
        given = (meta(batch, visual, dtype=I32), meta(batch, visual), meta(batch, heads, visual))
        decode_attention(q, cache, cache, meta(batch, dtype=I32), *(given if mass else [None] * 3), 0.1, q)

    name = f"decode_attention {heads}/{kv_heads} heads, D {dim}, {short(dtype)}{', mass' if mass else ''}"
    return Case(name, call, common=dim == 128 and kv_heads > 1)


def prefill_case(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, lse: bool) -> Case:
    from sgl_kernels.triton.prefill_mass import prefill_mass

    def call(batch: int = 4, length: int = 2048, rows: int = 64, visual: int = 1792) -> None:
        q, k = (meta(batch, n, length, dim, dtype=dtype) for n in (heads, kv_heads))
        index = meta(batch, rows, dtype=I32), meta(batch, visual, dtype=I32)
        mass = meta(batch, visual), meta(batch, heads, visual)
        prefill_mass(q, k, *index, *mass, meta(batch, heads, length) if lse else None, 0.1)

    name = f"prefill_mass {heads}/{kv_heads} heads, D {dim}, {short(dtype)}{', LSE given' if lse else ''}"
    return Case(name, call, common=dim == 128)


def select_case(slots: int) -> Case:
    from sgl_kernels.triton.selection import select_tokens

    def call(batch: int = 4) -> None:
        index = meta(batch, slots, dtype=I32)
        lens = meta(batch, dtype=I32)
        select_tokens(meta(batch, slots), index, lens, 100, lens, index, lens)

    return Case(f"select_tokens N {slots}", call, common=slots == 1792)


def gather_case(width: int, dtype: torch.dtype, *extras: tuple[tuple[int, ...], torch.dtype]) -> Case:
    from sgl_kernels.triton.selection import prune_gather

    def call(batch: int = 4, length: int = 2048, slots: int = 1792, out_len: int = 600) -> None:
        planes = [((width,), dtype), *extras]
        sources, targets = (
            [meta(batch, n, *shape, dtype=kind) for shape, kind in planes] for n in (length, out_len)
        )
        lens = meta(batch, dtype=I32)
        selection = meta(batch, slots), meta(batch, slots, dtype=I32), lens, 100, None
        results = targets[0], meta(batch, out_len, dtype=I32), lens
        prune_gather(sources[0], *selection, sources[1:], *results, targets[1:])

    return Case(f"prune_gather C {width}, {short(dtype)}, {len(extras)} extras", call, common=bool(extras))


def vocabulary_cases(dtype: torch.dtype) -> list[Case]:
    from sgl_kernels.triton.vocabulary import greedy_token, token_logprobs

    def run(op: Callable[..., None], rows: int = 4) -> None:
        op(meta(rows, 151936, dtype=dtype), meta(rows, dtype=I64), meta(rows))

    return [
        Case(f"{op.__name__} V 151936, {short(dtype)}", lambda op=op: run(op), common=True)
        for op in (greedy_token, token_logprobs)
    ]


def cases() -> Iterator[Case]:
    for dim in (64, 80, 96, 128, 256):
        yield decode_case(14, 2, dim, BF16)
        yield prefill_case(14, 2, dim, BF16, lse=True)
        yield prefill_case(14, 2, dim, BF16, lse=False)
    for dim in (64, 128, 256):
        for heads, kv_heads in ((8, 8), (14, 2), (16, 1)):
            yield decode_case(heads, kv_heads, dim, FP32)
        yield decode_case(32, 1, dim, BF16)
        yield prefill_case(14, 2, dim, FP32, lse=True)
        yield prefill_case(14, 2, dim, FP32, lse=False)
    yield decode_case(16, 8, 128, FP16)
    yield decode_case(16, 8, 128, BF16, mass=False)
    yield prefill_case(16, 8, 128, FP16, lse=True)
    yield from map(select_case, (576, 1792, 4096, 16384, 32768))
    yield gather_case(2048, BF16)
    yield gather_case(5120, BF16, ((3,), I64), ((128,), BF16), ((128,), BF16), ((3, 5120), BF16))
    yield gather_case(896, FP32, ((), torch.bool))
    for dtype in (BF16, FP32):
        yield from vocabulary_cases(dtype)


def short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]


class Driver:
    """Stands for a GPU that is not here, as far as compiling asks."""

    def __init__(self, target: Any):
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, _device: str) -> int:
        return 0


def compile_for(name: str, wanted: list[Case]) -> list[Usage]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from sgl_kernels.triton import launching

    is_amd = name.startswith("gfx")
    driver.set_active(Driver(GPUTarget("hip", name, 64) if is_amd else GPUTarget("cuda", int(name[3:]), 32)))
    found: list[Usage] = []
    registers_of: dict[str, tuple[int, int]] = {}

    def launch(kernel: Any, grid: tuple[int, ...], _device: Any, *arguments: Any, **constants: Any) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **constants)
        if compiled.hash not in registers_of:
            count = amd_registers if is_amd else nvidia_registers
            registers_of[compiled.hash] = count(compiled.asm)
        taken = compiled.metadata.num_warps, compiled.metadata.shared, *registers_of[compiled.hash]
        found.append(Usage(case.name, kernel.fn.__name__, name, *taken))

    launching.launch, launching.device_key = launch, lambda _device: name  # type: ignore[assignment]
    for case in wanted:
        case.call()
    return found


def nvidia_registers(asm: Any) -> tuple[int, int]:
    """Registers of a thread and bytes it spills, from the ptxas that Triton brings."""
    import triton

    arch = re.search(r"\.target (sm_(\d+)\w*)", asm["ptx"])
    assert arch is not None
    tool = "ptxas-blackwell" if int(arch[2]) >= 100 else "ptxas"
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(asm["ptx"])
        source.flush()
        command = [str(folder / tool), "-v", f"--gpu-name={arch[1]}", source.name, "-o", os.devnull]
        words = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", words)
    spilled = re.search(r"(\d+) bytes spill stores", words)
    assert registers is not None and spilled is not None, words  # noqa: PT018
    return int(registers[1]), int(spilled[1])


def amd_registers(asm: Any) -> tuple[int, int]:
    """Vector registers of a thread, and how many it spills."""
    found = [re.search(rf"\.{name}:\s+(\d+)", asm["amdgcn"]) for name in ("vgpr_count", "vgpr_spill_count")]
    assert all(found), "the assembly has no register counts"
    return int(found[0][1]), int(found[1][1])  # type: ignore[index]


def table(usage: list[Usage]) -> str:
    """Warps, registers and KiB of shared memory by kernel and target; spills in bold."""
    targets = list(dict.fromkeys(u.target for u in usage))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for u in usage:
        spill = f" **spills {u.spilled}**" if u.spilled else ""
        row = cells.setdefault((u.case, u.kernel), {})
        row[u.target] = f"{u.warps} w, {u.registers} r, {u.shared / 1024:.1f} K{spill}"
    lines = [f"| call | kernel | {' | '.join(targets)} |", "| --- | --- " + "| ---: " * len(targets) + "|"]
    for (case, kernel), row in cells.items():
        lines.append(f"| {case} | `{kernel}` | {' | '.join(row.get(target, '') for target in targets)} |")
    return "\n".join(lines) + "\n"


def document(usage: list[Usage]) -> str:
    import triton

    return f"""# Triton kernels: resources

Warps (w), registers of a thread (r) and KiB of shared memory of a program (K) for what each call launches,
compiled ahead of time by Triton {triton.__version__} with the configurations of
`sgl_kernels/triton/configs.json`. On NVIDIA spills are bytes stored, on AMD registers. Written by
`python -m benchmarks.triton_aot --table docs/triton_resources.md`, which needs no GPU.

{table(usage)}"""


def complaints(usage: list[Usage]) -> list[str]:
    found = []
    for u in usage:
        threads = u.warps * (64 if u.target.startswith("gfx") else 32)
        if threads > MAX_THREADS:
            found.append(f"{threads} threads, {u.target} has at most {MAX_THREADS}: {u}")
        if u.shared > SHARED_LIMITS[u.target]:
            found.append(f"{u.shared} bytes of shared memory, {u.target} has {SHARED_LIMITS[u.target]}: {u}")
        if u.target == "sm_90" and u.spilled:
            found.append(f"spills {u.spilled} bytes on sm_90: {u}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", type=lambda text: text.split(","), default=list(SHARED_LIMITS))
    parser.add_argument("--common", action="store_true", help="only the commonest call of each op")
    parser.add_argument("--table", type=Path, help="write the table of resources here")
    parser.add_argument("--json", type=Path, help="write what was found here")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(SHARED_LIMITS):
        parser.error(f"unknown targets {sorted(unknown)}, expected some of {', '.join(SHARED_LIMITS)}")
    if importlib.util.find_spec("triton") is None:
        print("NO TRITON: its kernels were not compiled (pip install -e '.[dev]')", file=sys.stderr)
        return 2
    wanted = [case for case in cases() if case.common or not options.common]
    usage = [u for target in options.targets for u in compile_for(target, wanted)]
    if options.table:
        options.table.write_text(document(usage), encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps([asdict(u) for u in usage], indent=1) + "\n", encoding="utf-8")
    found = complaints(usage)
    print(*found, f"{len(usage)} kernels for {', '.join(options.targets)}", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
