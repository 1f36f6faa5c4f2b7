"""Compiles csrc/cuda with nvcc: for setup.py, and on its own as a check that needs no GPU.

    python csrc/cuda/nvcc.py [--archs "80;90"] [--table FILE.md]

The check compiles every kernel, links them with the binding against the installed torch, and fails where a
kernel spills registers on sm_90.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
DEFAULT_ARCHS = "80;86;89;90;100;120+PTX"


def path() -> str | None:
    """The CUDA compiler of CUDA_HOME, or else the one on the PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def parse_archs(text: str) -> list[str]:
    """'9.0;100+PTX' or '90 100+PTX' as ['90', '100+PTX']."""
    archs = [arch.replace(".", "") for arch in re.split(r"[;, ]+", text.strip()) if arch]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch):
            raise ValueError(
                f'{text!r} is not a list of CUDA architectures, expected for example "80;90+PTX"'
            )
    return archs


def archs() -> list[str]:
    """What to compile for: SGL_KERNELS_CUDA_ARCHS, TORCH_CUDA_ARCH_LIST or every supported one."""
    named = os.environ.get("SGL_KERNELS_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    return parse_archs(named) if named else supported(parse_archs(DEFAULT_ARCHS))


def supported(wanted: list[str]) -> list[str]:
    """Those of ``wanted`` that this nvcc knows: an older one does not know the newest GPUs."""
    known = subprocess.run([str(path()), "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return [arch for arch in wanted if f"compute_{arch.partition('+')[0]}" in known] or wanted


def gencode(wanted: list[str]) -> list[str]:
    flags = []
    for arch in wanted:
        number, _, ptx = arch.partition("+")
        code = f"sm_{number},compute_{number}" if ptx else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code=[{code}]"]
    return flags


def compile_kernels(
    folder: Path, wanted: list[str], jobs: int, verbose: bool = False
) -> tuple[list[str], str]:
    """Object files in ``folder``, and what the compiler said."""
    compiler = path()
    if compiler is None:
        raise RuntimeError("there is no nvcc in CUDA_HOME or on the PATH; install the CUDA toolkit")
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *gencode(wanted), *(["-Xptxas", "-v"] if verbose else [])]

    def compile_one(source: Path) -> tuple[str, str]:
        target = str(folder / f"{source.stem}.o")
        done = subprocess.run(
            [compiler, *flags, "-c", str(source), "-o", target], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"nvcc failed on {source.name}:\n{done.stdout}{done.stderr}")
        return target, done.stderr

    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(compile_one, sorted(FOLDER.glob("*.cu"))))
    return [target for target, _ in done], "".join(words for _, words in done)


def library_folder() -> str:
    """Where nvcc's static CUDA runtime lies; the nvcc found may be a script that calls the real one."""
    told = subprocess.run(
        [str(path()), "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    ).stderr
    line = re.search(r"^#\$ LIBRARIES=(.*)$", told, re.M)
    folders = re.findall(r'-L([^\s"]+)', line[1]) if line else []
    for folder in [*folders, f"/usr/lib/{platform.machine()}-linux-gnu"]:
        if (Path(folder) / "libcudart_static.a").exists():
            return str(Path(folder).resolve())
    raise RuntimeError(f"no libcudart_static.a where {path()} looks for libraries: {folders}")


def defines(wanted: list[str]) -> dict[str, str | None]:
    """Macros of csrc/bind_cuda.cpp, beside the version of torch."""
    version = subprocess.run([str(path()), "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([0-9.]+)", version)
    return {
        "USE_CUDA": None,
        "SGL_COMPILER": f'"{version.splitlines()[-1]}"',
        "SGL_CUDA_VERSION": f'"{release[1] if release else "unknown"}"',
        "SGL_CUDA_ARCHITECTURES": f'"{" ".join(wanted)}"',
    }


@dataclass(frozen=True)
class Usage:
    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    spilled: int  # bytes stored


def resource_usage(words: str) -> list[Usage]:
    """What ``-Xptxas -v`` tells of each kernel."""
    pattern = re.compile(
        r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores"
        r".*?Used (\d+) registers([^\n]*)",
        re.S,
    )
    found = []
    for name, arch, stack, spilled, registers, rest in pattern.findall(words):
        shared = re.search(r"(\d+) bytes smem", rest)
        found.append(
            Usage(
                demangle(name),
                arch,
                int(registers),
                int(shared[1]) if shared else 0,
                int(stack),
                int(spilled),
            )
        )
    return found


def demangle(name: str) -> str:
    plain = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip() or name
    plain = re.sub(r"sgl::(cuda::)?|^void |\(int\)|\(bool\)", "", plain)
    return re.sub(r"\([A-Za-z]+Args\)$", "", plain)


def table(usage: list[Usage]) -> str:
    """Registers by kernel and architecture; spills in bold."""
    columns = sorted({u.arch for u in usage}, key=lambda arch: int(re.sub(r"\D", "", arch)))
    cells: dict[str, dict[str, str]] = {}
    for u in usage:
        spill = f" **spills {u.spilled} B**" if u.spilled else ""
        cells.setdefault(u.kernel, {})[u.arch] = f"{u.registers}{spill}"
    lines = [f"| kernel | {' | '.join(columns)} |", "| --- " + "| ---: " * len(columns) + "|"]
    for kernel, row in sorted(cells.items()):
        lines.append(f"| `{kernel}` | {' | '.join(row.get(arch, '') for arch in columns)} |")
    return "\n".join(lines) + "\n"


def link(objects: list[str], wanted: list[str], out: Path) -> None:
    """The extension as setup.py links it, against the installed torch."""
    import pybind11
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    macros = defines(wanted) | {
        "TORCH_TARGET_VERSION": "0x020b000000000000",
        "SGL_TORCH_VERSION": f'"{torch.__version__}"',
    }
    compiler = shutil.which(os.environ.get("CXX", "c++")) or "c++"
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
    command += [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in macros.items()]
    # torch carries a pybind11 of its own, which refuses the stable ABI.
    includes = [pybind11.get_include(), sysconfig.get_path("include"), *include_paths()]
    command += [f"-I{path}" for path in includes]
    command += [str(FOLDER.parent / "bind_cuda.cpp"), *objects]
    command += [f"-L{path}" for path in (library_folder(), *library_paths())]
    command += ["-lcudart_static", "-lrt", "-lpthread", "-ldl", "-lc10", "-ltorch", "-ltorch_cpu"]
    command += ["-ltorch_cuda"] if torch.version.cuda else []
    subprocess.run([*command, "-o", str(out)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archs", type=parse_archs, default=parse_archs(DEFAULT_ARCHS))
    parser.add_argument("--table", type=Path, help="write registers and spills of every kernel here")
    options = parser.parse_args()
    if path() is None:
        print("NO NVCC: the CUDA kernels were not compiled (install the CUDA toolkit)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        objects, words = compile_kernels(Path(folder), options.archs, os.cpu_count() or 1, verbose=True)
        link(objects, options.archs, Path(folder) / "_C_cuda.so")
    usage = resource_usage(words)
    text = table(usage)
    if options.table:
        head = "Registers of each CUDA kernel, as `make cuda-check` finds them (nvcc "
        head += f"{defines(options.archs)['SGL_CUDA_VERSION']}). No kernel has static shared memory.\n\n"
        options.table.write_text(
            "# CUDA kernels: resources\n\n" + head.replace('"', "") + text, encoding="utf-8"
        )
    print(text)
    spilling = [u for u in usage if u.spilled and u.arch == "sm_90"]
    for u in spilling:
        print(f"SPILLS: {u.kernel} stores {u.spilled} bytes on {u.arch}", file=sys.stderr)
    return 1 if spilling or not usage else 0


if __name__ == "__main__":
    sys.exit(main())
