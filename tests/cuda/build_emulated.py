"""Builds the CUDA kernels with the emulator of this folder: a library that registers them for the CPU.

    python tests/cuda/build_emulated.py OUT.so [--sanitize]

csrc/cuda and csrc/bind_cuda.cpp are compiled as they are; only <cuda_runtime.h> is the emulator's.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).resolve().parent / "emulator"
FLAGS = ["-std=c++20", "-O1", "-g0", "-fPIC", "-fno-strict-aliasing", "-w", "-DSGL_EMULATED"]


def build(out: Path, sanitize: bool = False) -> None:
    """Compile and link; raises CalledProcessError with the compiler's words on stderr."""
    import pybind11
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    flags = FLAGS + (["-fsanitize=address,undefined", "-fno-omit-frame-pointer"] if sanitize else [])
    torch_flags = [
        f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"), *include_paths())
    ]
    torch_flags += [
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        '-DSGL_COMPILER="emulated"',
        '-DSGL_CUDA_VERSION="emulated"',
    ]
    torch_flags += ['-DSGL_CUDA_ARCHITECTURES="none"', f'-DSGL_TORCH_VERSION="{torch.__version__}"']
    objects = out.parent / f"{out.stem}.objects"
    objects.mkdir(parents=True, exist_ok=True)
    compiler = shutil.which("c++") or "c++"

    def compile_one(source: Path) -> str:
        extra = [f"-I{EMULATOR}"] if source.suffix == ".cu" else torch_flags
        target = objects / f"{source.stem}.o"
        subprocess.run([compiler, "-x", "c++", *flags, *extra, "-c", source, "-o", target], check=True)
        return str(target)

    sources = [ROOT / "csrc" / "bind_cuda.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(compile_one, sources))
    libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([compiler, "-shared", *flags, *compiled, *libraries, "-o", out], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--sanitize", action="store_true", help="with the address and undefined-behaviour sanitizers"
    )
    options = parser.parse_args()
    build(options.out.resolve(), options.sanitize)
    sys.exit(0)
