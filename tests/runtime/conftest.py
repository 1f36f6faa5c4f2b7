from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sgl_runtime import SGLConfig, SGLPipeline

from .checkpoints import save_checkpoint
from .slow import make_model


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package", autouse=True)
def _interrupts() -> Iterator[None]:
    """A shell that puts the tests into the background has them ignore SIGINT, which some of them raise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def small_model() -> torch.nn.Module:
    return make_model("qwen2", seed=1)


@pytest.fixture(scope="session")
def large_model() -> torch.nn.Module:
    return make_model("qwen3", seed=2, layers=6, heads=6)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    return (
        save_checkpoint(root / "small", text="qwen2", seed=1),
        save_checkpoint(root / "large", text="qwen3", seed=2, layers=6, heads=6),
    )


@pytest.fixture(scope="session")
def pipe(pair: tuple[Path, Path]) -> SGLPipeline:
    return SGLPipeline.from_pretrained(*pair, config=SGLConfig(max_new_tokens=5), device="cpu")
