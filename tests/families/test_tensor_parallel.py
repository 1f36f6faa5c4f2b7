"""Families shared by two processes: masses, answers and pruned answers are those of one; or a refusal.

This file is also the program that torchrun starts. The tests' parameters are families' names in
`models.FAMILIES`; the README's table cites them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sgl_runtime import hf, parallel
from sgl_runtime.engine import VLM
from sgl_runtime.errors import ConfigError
from sgl_runtime.requests import Prune

from .checkpoints import save_family
from .models import FAMILIES

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PROCESSES, NEW, LAYER = 2, 6, 1
REFUSED = {"internvl-phi3": "q, k and v are one matrix", "qwen3_vl_moe": "holds its experts transposed"}
SHARED = [name for name in FAMILIES if name not in REFUSED]


def answers(directory: Path, name: str, device: torch.device, **options: Any) -> dict[str, Any]:
    """What one family says to one request, unpruned and pruned."""
    model: Any = hf.load_model(directory / name, device, torch.float32, **options)
    engine = VLM(model, "large")
    [request] = engine.encode([engine.prompt(FAMILIES[name].make_inputs(seed=1))])
    count = request.prompt.num_visual
    ranking = torch.rand(1, count, generator=torch.Generator().manual_seed(0))
    prune = Prune(LAYER, ranking, count // 3)
    return {
        "whole": engine.generate(request, NEW, with_mass=True),
        "pruned": engine.generate(request, NEW, prune=prune),
        "heads": engine.model.num_heads,
        "bytes": layer_bytes(model, engine),
    }


def layer_bytes(model: Any, engine: VLM) -> int:
    """Bytes of the decoder layers' weights in this process, without norms, biases and routers."""
    layers = getattr(model.model, engine.model.family.decoder).layers
    weights = {name: weight for name, weight in layers.named_parameters() if weight.dim() > 1}
    return sum(
        getattr(weight, "_local_tensor", weight).nbytes
        for name, weight in weights.items()
        if "mlp.gate.weight" not in name
    )


def work(directory: Path) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    processes, device = parallel.join(CPU)
    found = {name: answers(directory, name, device, processes=processes) for name in SHARED}
    torch.save(found, directory / f"rank{torch.distributed.get_rank()}.pt")
    parallel.leave()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parallel")
    for name in FAMILIES:
        save_family(name, root / name, seed=3)
    return root


@pytest.fixture(scope="module")
def ranks(saved: Path) -> list[dict[str, Any]]:
    pytest.importorskip("accelerate", reason="transformers shards a model only with accelerate")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(PROCESSES), "-m", "tests.families.test_tensor_parallel", str(saved)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(saved / f"rank{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_two_processes_answer_as_one(name: str, saved: Path, ranks: list[dict[str, Any]]) -> None:
    alone = answers(saved, name, CPU)
    for rank in ranks:
        shared = rank[name]
        for what in ("heads", "bytes"):
            assert shared[what] == alone[what] // PROCESSES
        for kind in ("whole", "pruned"):
            assert shared[kind].token_ids == alone[kind].token_ids
            assert shared[kind].logprobs == pytest.approx(alone[kind].logprobs, rel=1e-4, abs=1e-5)
        assert torch.equal(shared["pruned"].kept_index, alone["pruned"].kept_index)
    mass = sum(rank[name]["whole"].mass for rank in ranks)  # each process has that of its own heads
    torch.testing.assert_close(mass, alone["whole"].mass, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, saved: Path) -> None:
    with pytest.raises(ConfigError, match=f"which transformers cannot share out: .*{REFUSED[name]}"):
        hf.load_model(saved / name, CPU, torch.float32, processes=PROCESSES)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
