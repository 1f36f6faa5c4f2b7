"""Tensor parallelism. This file is also the program that torchrun starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sgl_runtime import SGLConfig, SGLPipeline, SGLResult, hf, parallel, tiny
from sgl_runtime.errors import ConfigError

from .checkpoints import save_checkpoint

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PROCESSES = 2
IDS = torch.arange(8, 50)[None]
# The head of a vocabulary of 271 cannot be halved; biases behind a sum must be added once.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {"text": "llama", "heads": 8, "attention_bias": True, "mlp_bias": True},
    "qwen2": {"text": "qwen2", "heads": 4, "vocab": 271},
    "qwen3": {"text": "qwen3", "heads": 8},
    "tied": {"text": "qwen3", "heads": 4},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "draft": {},
    "no draft": {"draft": False},
    "latency": {"schedule": "latency"},
    "exits": {"exit_threshold": 0.9},
    "unpruned": {"keep_ratio": 1.0},
}


@torch.no_grad()
def run_layers(view: hf.ModelView, ids: Tensor) -> dict[str, Tensor]:
    """Embeddings, the last layer's output and logits of ids (1, S): a plain loop over the view's modules."""
    embedded = hidden = view.embed(ids)
    cos, sin = (table[None] for table in view.rope(torch.arange(ids.shape[1])))
    for layer in view.layers:
        q, k, v = (
            project(layer.input_norm(hidden)).unflatten(-1, (-1, view.head_dim)).transpose(1, 2)
            for project in layer.qkv
        )
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = layer.q_norm(q), layer.k_norm(k)
        q, k = (
            x * cos[:, None] + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * sin[:, None]
            for x in (q, k)
        )
        assert (q.shape[1], k.shape[1]) == (view.num_heads, view.num_kv_heads)
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        hidden = hidden + layer.o_proj(attended.transpose(1, 2).flatten(2))
        normed = layer.post_norm(hidden)
        gate, up = (project(normed) for project in layer.gate_up)
        hidden = hidden + layer.down_proj(layer.activation(gate) * up)
    return {"embedded": embedded, "hidden": hidden, "logits": view.lm_head(view.norm(hidden))}


def layer_bytes(model: Any) -> int:
    """Bytes of the weight matrices of the decoder layers in this process."""
    return sum(w.nbytes for w in model.model.language_model.layers.parameters() if w.dim() == 2)


def run_pipelines(**options: Any) -> dict[str, list[SGLResult]]:
    """The tiny pair's answers to one batch, per configuration."""
    pipe = SGLPipeline.from_pretrained(tiny.SMALL, tiny.LARGE, device="cpu", **options)
    requests = [(sample["image"], sample["prompt"]) for sample in tiny.samples()]
    configs = {name: SGLConfig(max_new_tokens=8, **changes) for name, changes in CONFIGS.items()}
    return {name: pipe.with_config(config).batch(requests) for name, config in configs.items()}


def work(directory: Path) -> None:
    """What each process does: run every checkpoint, agree on something, write down what it got."""
    torch.set_num_threads(1)
    processes, device = parallel.join(CPU)
    found: dict[str, Any] = {}
    for name in CHECKPOINTS:
        model = hf.load_model(directory / name, device, torch.float32, processes=processes)
        found[name] = {**run_layers(hf.view(model), IDS), "bytes": layer_bytes(model)}
    rank = torch.distributed.get_rank()
    found["agreed"] = parallel.agree((torch.full((3,), rank + 0.5), [1] * (rank + 1), -rank / 3), device)
    found["first"] = parallel.is_first()
    found["pipelines"] = run_pipelines(tensor_parallel=True)
    found["quantised"] = run_pipelines(tensor_parallel=True, quantize="int8")
    torch.save(found, directory / f"rank{rank}.pt")
    parallel.leave()


def torchrun(*program: str) -> str:
    """Run a module and its arguments in two processes; return what they print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(PROCESSES), "-m", *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Loading weights" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parallel")
    for seed, (name, changes) in enumerate(CHECKPOINTS.items()):
        save_checkpoint(root / name, seed=seed, layers=3, **changes)
    _tie(root / "tied")
    return root


def _tie(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def ranks(saved: Path) -> list[dict[str, Any]]:
    pytest.importorskip("accelerate", reason="transformers shards a model only with accelerate")
    pytest.importorskip("torchao", reason="a part of the run is quantised")
    torchrun("tests.runtime.test_parallel", str(saved))
    return [torch.load(saved / f"rank{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def alone() -> dict[str, list[SGLResult]]:
    return run_pipelines()


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_two_processes_compute_what_one_does(name: str, saved: Path, ranks: list[dict[str, Any]]) -> None:
    model = hf.load_model(saved / name, CPU, torch.float32)
    alone = run_layers(hf.view(model), IDS)
    truth = run_layers(hf.view(model.double()), IDS)
    for key, exact in truth.items():
        assert all(torch.equal(rank[name][key], ranks[0][name][key]) for rank in ranks), key
        assert ranks[0][name][key].shape == exact.shape
        error, plain = (float((got - exact).norm()) for got in (ranks[0][name][key], alone[key]))
        assert error <= 2 * plain, (key, error, plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_each_process_holds_its_share_of_the_layers(
    name: str, saved: Path, ranks: list[dict[str, Any]]
) -> None:
    whole = layer_bytes(hf.load_model(saved / name, CPU, torch.float32))
    assert [rank[name]["bytes"] for rank in ranks] == [whole // PROCESSES] * PROCESSES


@pytest.mark.slow
def test_processes_agree_with_the_first(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        mass, ids, score = rank["agreed"]
        assert mass.tolist() == [0.5, 0.5, 0.5]
        assert (ids, score) == ([1], 0.0)
    assert [rank["first"] for rank in ranks] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_pipelines_answer_as_in_one_process(
    name: str, alone: dict[str, list[SGLResult]], ranks: list[dict[str, Any]]
) -> None:
    for rank in ranks:
        for want, got in zip(alone[name], rank["pipelines"][name], strict=True):
            plain, expected = got.to_dict(), want.to_dict()
            assert set(plain.pop("timings")) <= set(expected.pop("timings"))
            assert plain == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_quantised_shards_answer_alike(
    name: str, alone: dict[str, list[SGLResult]], ranks: list[dict[str, Any]]
) -> None:
    """The shards of a row have scales of their own, so these are not the weights of one process."""
    for rank in ranks:
        for want, got in zip(alone[name], rank["quantised"][name], strict=True):
            assert got.token_ids == want.token_ids
            assert torch.equal(got.mass, want.mass)


@pytest.mark.slow
def test_command_line_prints_one_answer(tmp_path: Path, alone: dict[str, list[SGLResult]]) -> None:
    pytest.importorskip("accelerate", reason="transformers shards a model only with accelerate")
    sample, picture = tiny.samples()[0], tmp_path / "map.png"
    options = {"--small": tiny.SMALL, "--large": tiny.LARGE, "--image": sample["image"]}
    options |= {"--prompt": sample["prompt"], "--save-map": picture, "--max-new-tokens": 8}
    arguments = [str(word) for option in options.items() for word in option]
    printed = torchrun("sgl_runtime.cli", "run", *arguments, "--tensor-parallel", "--json")
    answer = json.loads(printed)
    assert answer["token_ids"] == alone["draft"][0].token_ids
    assert answer["kept_index"] == alone["draft"][0].kept_index.tolist()
    assert picture.exists()


@pytest.mark.slow
def test_the_requests_are_not_all_alike(alone: dict[str, list[SGLResult]]) -> None:
    """Or the comparison above would be of little worth."""
    assert {result.exited for result in alone["exits"]} == {False, True}
    assert len({tuple(result.kept_index.tolist()) for result in alone["draft"]}) == 4
    assert len({tuple(result.token_ids) for result in alone["draft"]}) > 1
    assert any(result.accepted_draft for result in alone["draft"])


def test_heads_that_cannot_be_shared(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"8 attention heads and 4 KV heads, which 3 processes.*at most 4"):
        hf.load_model(saved / "llama", CPU, torch.float32, processes=3)
    with pytest.raises(ConfigError, match=r"4 attention heads and 2 KV heads, which 4 processes.*at most 2"):
        hf.load_model(saved / "qwen2", CPU, torch.float32, processes=4)


def test_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node"):
        parallel.join(CPU)


def test_one_process_is_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert parallel.join(CPU) == (1, CPU)


def test_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'accelerate: pip install "sgl-vlm\[parallel\]"'):
        parallel.join(CPU)


class TestDevices:
    """A machine of two GPUs, as far as `join` looks."""

    @pytest.fixture(autouse=True)
    def _machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current: list[int] = []
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", self.current.append)

    def test_each_process_takes_its_own_gpu(self) -> None:
        assert parallel.join(torch.device("cuda")) == (2, torch.device("cuda", 1))
        assert parallel.join(torch.device("cuda", 1)) == (2, torch.device("cuda", 1))
        assert self.current == [1, 1]

    def test_not_another_ones(self) -> None:
        with pytest.raises(ConfigError, match=r"device='cuda:0'.*process 1 runs on cuda:1"):
            parallel.join(torch.device("cuda", 0))

    def test_more_processes_than_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(ConfigError, match="Process 2 of this machine has no GPU: there are 2"):
            parallel.join(torch.device("cuda"))

    def test_not_the_cpu_of_such_a_machine(self) -> None:
        with pytest.raises(ConfigError, match=r"device='cpu'.*CUDA_VISIBLE_DEVICES=''"):
            parallel.join(CPU)


def test_loaded_alone_nothing_is_sharded(saved: Path) -> None:
    model = hf.load_model(saved / "llama", CPU, torch.float32)
    view = hf.view(model)
    assert (view.num_heads, view.num_kv_heads) == (8, 4)
    assert all(type(weight) is nn.Parameter for weight in model.parameters())


if __name__ == "__main__":
    work(Path(sys.argv[1]))
