from __future__ import annotations

import pytest
import torch

from .slow import make_model


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def small_model() -> torch.nn.Module:
    return make_model("qwen2", seed=1)


@pytest.fixture(scope="session")
def large_model() -> torch.nn.Module:
    return make_model("qwen3", seed=2, layers=6, heads=6)
