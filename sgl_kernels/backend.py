"""Which implementation serves each op, and why.

The extensions load apart, so one can fail alone; the first error of each is kept for `collect_env`.
`SGL_KERNELS_BACKEND` states what must be active: `reference` loads nothing, `cpu`, `cuda` and `triton` fail
at import when theirs is missing. Unset, whatever loads is used: on a GPU the CUDA extension, else the Triton
kernels; where tensors of a device are left to the reference, that is announced. Triton itself is imported by
the first call that needs it. Under TRITON_INTERPRET=1 `triton` interprets its kernels, on CPU tensors too.
`SGL_KERNELS_ISA` states the CPU extension's vector width; one that is not to be had is announced, and the
widest runs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from types import ModuleType
from typing import Any

import torch

from sgl_kernels import registry, triton

BACKENDS = ("reference", "cpu", "cuda", "triton")
ENVIRONMENT_VARIABLE = "SGL_KERNELS_BACKEND"

_modules: dict[str, ModuleType] = {}
_load_errors: dict[str, str] = {}


def load() -> None:
    """Load the extensions that the environment asks for, and say so when the fallback will be used."""
    wanted = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if wanted and wanted not in BACKENDS:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE} is {wanted!r}, expected one of {', '.join(BACKENDS)}, or unset"
        )
    if wanted == "reference":
        _announce("ops", f"{ENVIRONMENT_VARIABLE}=reference")
        return
    if wanted == "triton":
        _require_triton()
    interpreted = wanted == "triton" and triton.interpreting()
    if not interpreted:
        _load_extension("_C")
    if wanted == "cuda" or (wanted == "" and torch.version.cuda is not None):
        _load_extension("_C_cuda")
    _check_isa()
    required = {"cpu": "_C", "cuda": "_C_cuda"}.get(wanted)
    if required in _load_errors:
        raise ImportError(
            f"{ENVIRONMENT_VARIABLE}={wanted}, but sgl_kernels.{required} did not load: "
            f"{_load_errors[required]}"
        )
    if wanted == "triton" or (wanted == "" and _torch_has_gpu() and _triton_is_installed()):
        _register_triton(["CPU", "CUDA"] if interpreted else ["CUDA"])
    if "_C" in _load_errors:
        _announce("ops on CPU tensors", f"sgl_kernels._C did not load: {_load_errors['_C']}")
    if wanted == "" and _torch_has_gpu() and "reference" in devices()["cuda"].values():
        reason = _load_errors.get("_C_cuda", "sgl_kernels._C_cuda is not for ROCm")
        _announce("ops on GPU tensors", f"{reason}, and triton is not installed (pip install triton)")


def extension(name: str) -> ModuleType | None:
    """The loaded extension module `_C` or `_C_cuda`, or None."""
    return _modules.get(name)


def active_backend(op: str) -> str:
    """Backends that serve `op`, such as "cpu" or "cpu, triton"; "reference" where no kernel does."""
    serving = dict.fromkeys(registry.serving_backend(op, key) for key in ("CPU", "CUDA"))
    return ", ".join(name for name in serving if name != "reference") or "reference"


def devices() -> dict[str, dict[str, str]]:
    """Device type to op to the backend that would serve it; "cuda" only where torch is built for a GPU."""
    types = ["cpu", "cuda"] if _torch_has_gpu() else ["cpu"]
    return {t: {op: registry.serving_backend(op, t.upper()) for op in registry.SCHEMAS} for t in types}


def collect_env() -> dict[str, Any]:
    """Versions, the active backend of every op, CPU features and the first load errors.

    Returns
    -------
    dict
        `python`, `platform`, `torch`, `torch_cuda`, `triton` (its version, None where it is not installed),
        `threads`, `backend_override`, `backends` (op to the backends in use, such as "cpu, triton"),
        `devices` (device type to op to backend), `extensions` (module to its `build_info()`, whose
        `isa_refused` is the SGL_KERNELS_ISA that could not be had, or None), `cpu_features`, `isa` (vector
        width in use, None without the CPU extension), `load_errors` (module to its first error).
    """
    info = {name: module.build_info() for name, module in _modules.items()}
    cpu = info.get("_C", {})
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _triton_version(),
        "threads": torch.get_num_threads(),
        "backend_override": os.environ.get(ENVIRONMENT_VARIABLE),
        "backends": {op: active_backend(op) for op in registry.SCHEMAS},
        "devices": devices(),
        "extensions": info,
        "cpu_features": cpu.get("cpu_features", []),
        "isa": cpu.get("isa"),
        "load_errors": dict(_load_errors),
    }


def _load_extension(name: str) -> None:
    try:
        _modules[name] = importlib.import_module(f"sgl_kernels.{name}")
    except Exception as error:  # a broken extension must not take the package with it
        _load_errors.setdefault(name, f"{type(error).__name__}: {error}")


def _check_isa() -> None:
    info = _modules["_C"].build_info() if "_C" in _modules else {}
    refused = info.get("isa_refused")
    if refused is not None:
        print(
            f"sgl_kernels: SGL_KERNELS_ISA is {refused!r}, expected one of {', '.join(info['isas'])}; "
            f"running {info['isa']}",
            file=sys.stderr,
            flush=True,
        )


def _torch_has_gpu() -> bool:
    """Whether this build of torch knows "cuda" tensors, of NVIDIA or AMD; not whether a GPU is there."""
    return torch.version.cuda is not None or torch.version.hip is not None


def _triton_is_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:
        return False


def _triton_version() -> str | None:
    if not _triton_is_installed():
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # builds for ROCm and nightlies go by other names
        return "unknown"


def _require_triton() -> None:
    if not _triton_is_installed():
        raise ImportError(
            f"{ENVIRONMENT_VARIABLE}=triton, but triton is not installed: pip install triton, or unset the "
            "variable"
        )
    if not _torch_has_gpu() and not triton.interpreting():
        raise ImportError(
            f"{ENVIRONMENT_VARIABLE}=triton, but torch {torch.__version__} is built for CPUs only: install a "
            "CUDA or ROCm build of torch, or set TRITON_INTERPRET=1 to interpret the kernels on the CPU"
        )


def _register_triton(dispatch_keys: list[str]) -> None:
    for op in registry.SCHEMAS:
        for key in dispatch_keys:
            if not registry.has_kernel(op, key):
                registry.implement(op, key, "triton", triton.implementation(op))


def _announce(what: str, reason: str) -> None:
    print(
        f"sgl_kernels: SLOW PATH, {what} run as plain PyTorch (reference): {reason}",
        file=sys.stderr,
        flush=True,
    )
