"""torch.compile as this package uses it: whole functions, a cache that outlives the process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental import _config as shape_config

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
# Every pipeline of the process compiles the same functions, for each VLM, prune layer and batch bucket.
_RECOMPILE_LIMIT = 4096


def whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` compiled without a graph break; only dimensions marked as dynamic may differ.

    Compiled code is kept in ``TORCHINDUCTOR_CACHE_DIR``, by default below ``~/.cache/sgl-vlm``, where the
    next process finds it.
    """
    os.environ.setdefault(CACHE_VARIABLE, str(Path("~/.cache/sgl-vlm/inductor").expanduser()))
    compiled = torch.compile(function, fullgraph=True, dynamic=False)

    def call(*args: Any) -> Any:
        for name in ("recompile_limit", "accumulated_recompile_limit"):  # torch keeps them apart by thread
            if getattr(torch._dynamo.config, name) < _RECOMPILE_LIMIT:
                setattr(torch._dynamo.config, name, _RECOMPILE_LIMIT)
        # Two lengths that happen to be equal in the first call are not the same length.
        with shape_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return compiled(*args)

    return call
