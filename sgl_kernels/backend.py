"""Which implementation serves each op, and why.

The extensions load apart, so one can fail alone; the first error of each is kept for `collect_env`.
`SGL_KERNELS_BACKEND` states what must be active: `reference` loads nothing, `cpu`, `cuda` and `triton` fail
at import when theirs is missing. Unset, whatever loads is used and a missing CPU extension is announced.
`SGL_KERNELS_ISA` states the CPU extension's vector width; one that is not to be had is announced, and the
widest runs.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
from types import ModuleType
from typing import Any

import torch

from sgl_kernels import registry

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
    if wanted == "triton":
        raise ImportError(
            f"{ENVIRONMENT_VARIABLE}=triton: this version has no Triton kernels; unset the variable"
        )
    if wanted == "reference":
        _announce(f"{ENVIRONMENT_VARIABLE}=reference")
        return
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
    if "_C" in _load_errors:
        _announce(f"sgl_kernels._C did not load: {_load_errors['_C']}")


def extension(name: str) -> ModuleType | None:
    """The loaded extension module `_C` or `_C_cuda`, or None."""
    return _modules.get(name)


def active_backend(op: str) -> str:
    """Backends that serve `op`, such as "cpu" or "cpu, cuda"; "reference" where none is compiled."""
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    compiled = [name for name, key in keys.items() if registry.has_kernel(op, key)]
    return ", ".join(compiled) or "reference"


def collect_env() -> dict[str, Any]:
    """Versions, the active backend of every op, CPU features and the first load errors.

    Returns
    -------
    dict
        `python`, `platform`, `torch`, `torch_cuda`, `threads`, `backend_override`, `backends` (op to
        backend), `extensions` (module to its `build_info()`, whose `isa_refused` is the SGL_KERNELS_ISA that
        could not be had, or None), `cpu_features`, `isa` (vector width in use, None without the CPU
        extension), `load_errors` (module to its first error).
    """
    info = {name: module.build_info() for name, module in _modules.items()}
    cpu = info.get("_C", {})
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "backend_override": os.environ.get(ENVIRONMENT_VARIABLE),
        "backends": {op: active_backend(op) for op in registry.SCHEMAS},
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


def _announce(reason: str) -> None:
    print(
        f"sgl_kernels: SLOW PATH, ops run as plain PyTorch (reference): {reason}", file=sys.stderr, flush=True
    )
