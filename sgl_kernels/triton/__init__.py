"""The six ops as Triton kernels: the path for GPUs where no CUDA code was built, AMD among them.

Importing this package imports no Triton; the first call of an op does. Under TRITON_INTERPRET=1 the kernels
run on the CPU, one program after the other, which is how they are tested without a GPU.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable

MODULES = {
    "decode_attention": "decode_attention",
    "prefill_mass": "prefill_mass",
    "select_tokens": "selection",
    "prune_gather": "selection",
    "greedy_token": "vocabulary",
    "token_logprobs": "vocabulary",
}


def interpreting() -> bool:
    """Whether Triton interprets its kernels on the CPU; it reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")


def implementation(op: str) -> Callable[..., None]:
    """The function that serves `op`, with the arguments of its schema; its first call imports Triton."""

    def call(*arguments: object) -> None:
        module = importlib.import_module(f"sgl_kernels.triton.{MODULES[op]}")
        getattr(module, op)(*arguments)

    return call
