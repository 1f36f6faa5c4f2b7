"""Where a number was measured: machine, versions, commit, and on a GPU its driver and clocks as found."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import sgl_kernels

NVIDIA_SMI = (
    "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,"
    "power.draw,power.limit,memory.total"
)


def environment(device: str = "cpu") -> dict[str, Any]:
    """`collect_env` with what places a number. SGL_COMMIT names the commit of a copy without a repository."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    found = {
        "cpu": models[0] if models else platform.processor(),
        "commit": os.environ.get("SGL_COMMIT") or _git_describe() or "unknown",
        "date": datetime.date.today().isoformat(),
        **sgl_kernels.collect_env(),
    }
    if device == "cuda":
        found["gpu"] = gpu()
    return found


def gpu() -> dict[str, Any]:
    """The first GPU, as found: nothing is set."""
    properties = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
    }
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader", "--id=0"]
        line = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        found["nvidia_smi"] = dict(zip(NVIDIA_SMI.split(","), map(str.strip, line.split(",")), strict=False))
    return found


def _git_describe() -> str:
    if shutil.which("git") is None:
        return ""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
