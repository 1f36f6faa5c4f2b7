"""Build of the compiled kernels. Everything else about the package is in pyproject.toml.

SGL_KERNELS_SKIP_BUILD=1   install without compiled kernels; the ops then run as plain PyTorch
SGL_KERNELS_NATIVE=1       optimise the widest kernels for this machine only (-march=native)
SGL_KERNELS_SKIP_CUDA=1    never build _C_cuda
SGL_KERNELS_FORCE_CUDA=1   build _C_cuda even when the installed torch is a CPU build; a failure is an error
SGL_KERNELS_CUDA_ARCHS     what _C_cuda is compiled for, such as "90" or "80;90+PTX"; by default
                           TORCH_CUDA_ARCH_LIST, or every architecture of csrc/cuda/nvcc.py
MAX_JOBS                   compiler processes at a time; by default from cores and free memory
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import nvcc  # noqa: E402

X86 = platform.machine().lower() in ("x86_64", "amd64")
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11: a newer call fails to compile
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
KERNELS = [
    "decode_attention.cpp",
    "gather.cpp",
    "prefill_mass.cpp",
    "vocabulary.cpp",
]  # compiled once per vector width
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no")


def announce(reason: str) -> None:
    line = f"sgl-vlm: INSTALLING WITHOUT COMPILED KERNELS, ops will be slow (plain PyTorch): {reason}"
    print(f"\n{'!' * 20} {line}\n", file=sys.stderr, flush=True)


def wants_cuda() -> bool:
    """Whether to build _C_cuda: nvcc and a CUDA build of torch, never whether this machine has a GPU."""
    import torch

    if flag("SGL_KERNELS_SKIP_CUDA"):
        return False
    if flag("SGL_KERNELS_FORCE_CUDA"):
        return True
    return nvcc.path() is not None and torch.version.cuda is not None


def isa_flags() -> dict[str, list[str]]:
    isas: dict[str, list[str]] = {"baseline": []}
    if X86:
        isas |= {"avx2": AVX2, "avx512": AVX512}
    if flag("SGL_KERNELS_NATIVE"):
        widest = (
            "baseline" if not X86 else "avx512" if "avx512f" in Path("/proc/cpuinfo").read_text() else "avx2"
        )
        isas[widest] = [*isas[widest], "-march=native"]
    return isas


def default_jobs() -> int:
    """One compiler takes up to 1.5 GB here."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4 << 30
    return max(1, min(os.cpu_count() or 1, free // (3 << 29)))


def cpu_extension():  # type: ignore[no-untyped-def]
    import pybind11
    import torch
    from torch.utils.cpp_extension import CppExtension

    compiler = shutil.which(os.environ.get("CXX", "c++")) or "c++"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    native = " -march=native" if flag("SGL_KERNELS_NATIVE") else ""
    defines = {
        "TORCH_TARGET_VERSION": TORCH_TARGET_VERSION,
        "SGL_COMPILER": f'"{version.splitlines()[0]}"',
        "SGL_FLAGS": f'"{" ".join(CXX_FLAGS)}{native}"',
        "SGL_TORCH_VERSION": f'"{torch.__version__}"',
    } | ({"SGL_X86": "1"} if X86 else {})
    return CppExtension(
        "sgl_kernels._C",
        ["csrc/bind_cpu.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/selection.cpp"],
        depends=[
            str(p.relative_to(ROOT))
            for p in sorted((ROOT / "csrc").glob("cpu/*")) + sorted((ROOT / "csrc").glob("*.h"))
        ],
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc")],
        define_macros=list(defines.items()),
        extra_compile_args={"cxx": [*CXX_FLAGS, "-fvisibility=hidden"]},
        optional=True,
    )


def cuda_extension():  # type: ignore[no-untyped-def]
    """The second extension. nvcc compiles kernels that know no torch; the C++ compiler the binding."""
    import pybind11
    import torch
    from torch.utils.cpp_extension import CppExtension

    if not wants_cuda():
        return None
    if nvcc.path() is None:
        raise RuntimeError("SGL_KERNELS_FORCE_CUDA is set, but there is no nvcc in CUDA_HOME or on the PATH")
    defines = nvcc.defines(nvcc.archs()) | {
        "TORCH_TARGET_VERSION": TORCH_TARGET_VERSION,
        "SGL_TORCH_VERSION": f'"{torch.__version__}"',
    }
    return CppExtension(
        "sgl_kernels._C_cuda",
        ["csrc/bind_cuda.cpp"],
        depends=[str(p.relative_to(ROOT)) for p in [*ROOT.glob("csrc/cuda/*"), *ROOT.glob("csrc/*.h")]],
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc")],
        define_macros=list(defines.items()),
        library_dirs=[nvcc.library_folder()],
        # Named: a linker that drops unused libraries would drop the one through which it would be found.
        libraries=["cudart_static", "rt", "pthread", "dl", *(["torch_cuda"] if torch.version.cuda else [])],
        extra_compile_args={"cxx": [*CXX_FLAGS, "-fvisibility=hidden"]},
        optional=not flag("SGL_KERNELS_FORCE_CUDA"),
    )


def build_command():  # type: ignore[no-untyped-def]
    from torch.utils.cpp_extension import BuildExtension

    class BuildKernels(BuildExtension):  # type: ignore[misc]
        """Compiles the CPU kernels once per vector width; a failed build leaves the reference."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # torch checks the compiler before it builds anything
                self.report("the extensions", error)

        def build_extension(self, ext) -> None:  # type: ignore[no-untyped-def]
            try:
                if ext.name == "sgl_kernels._C":
                    ext.extra_objects = [o for i in isa_flags().items() for o in self.compile_isa(*i)]
                if ext.name == "sgl_kernels._C_cuda":
                    ext.extra_objects = self.compile_cuda()
                super().build_extension(ext)
            except Exception as error:
                self.report(ext.name, error)

        def report(self, what: str, error: Exception) -> None:
            if flag("SGL_KERNELS_FORCE_CUDA"):
                raise error
            announce(f"the build of {what} failed: {type(error).__name__}: {error}")

        def compile_isa(self, isa: str, flags: list[str]) -> list[str]:
            objects: list[str] = self.compiler.compile(
                [f"csrc/cpu/{name}" for name in KERNELS],
                output_dir=str(Path(self.build_temp) / isa),
                macros=[("SGL_ISA", isa)],
                depends=["csrc/types.h", "csrc/cpu/kernels.h", "csrc/cpu/simd.h"],
                extra_postargs={"cxx": [*CXX_FLAGS, "-fvisibility=hidden", *flags]},
            )
            return objects

        def compile_cuda(self) -> list[str]:
            archs = nvcc.archs()
            print(f"compiling csrc/cuda for {' '.join(archs)}", flush=True)
            folder = Path(self.build_temp) / "cuda"
            objects, words = nvcc.compile_kernels(folder, archs, int(os.environ["MAX_JOBS"]))
            print(words, end="", file=sys.stderr, flush=True)
            return list(objects)

    return BuildKernels


def extensions():  # type: ignore[no-untyped-def]
    """Extension modules and build command, or none of either when there is nothing to build with."""
    if flag("SGL_KERNELS_SKIP_BUILD"):
        announce("SGL_KERNELS_SKIP_BUILD is set")
        return [], {}
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        announce("no C++ compiler was found (set CXX or install one, such as g++)")
        return [], {}
    try:
        import torch  # noqa: F401
    except ImportError as error:
        announce(f"torch is not importable where the package is built: {error}")
        return [], {}
    os.environ.setdefault("MAX_JOBS", str(default_jobs()))
    modules = [cpu_extension()]
    try:
        modules += [module for module in [cuda_extension()] if module is not None]
    except Exception as error:
        if flag("SGL_KERNELS_FORCE_CUDA"):
            raise
        announce(f"the CUDA kernels cannot be built: {type(error).__name__}: {error}")
    return modules, {"build_ext": build_command()}


modules, commands = extensions()
setup(ext_modules=modules, cmdclass=commands)
