"""The exam: the research code's own checkpoints, converted and loaded, are the models of the golden data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import InternVLConfig

from sgl_runtime import SGLConfig, SGLPipeline, hf
from sgl_runtime.convert import convert, load_chat_format, native_tensors

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CPU = torch.device("cpu")
IMAGE = 7  # the golden data has no tokenizer to ask


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("converted")
    return {
        name: convert(GOLDEN / f"{name}-chat", out / name, image_token_id=IMAGE)
        for name in ("small", "large")
    }


@pytest.fixture(scope="module", params=["converted", "loaded directly"])
def pipe(request: pytest.FixtureRequest, converted: dict[str, Path]) -> SGLPipeline:
    if request.param == "converted":
        models = [hf.load_model(path, CPU, torch.float32) for path in converted.values()]
    else:
        models = [
            load_chat_format(GOLDEN / f"{name}-chat", CPU, torch.float32, image_token_id=IMAGE)
            for name in ("small", "large")
        ]
    return SGLPipeline.from_models(*models, SGLConfig(max_new_tokens=8))


@pytest.mark.parametrize("name", ["small", "large"])
def test_weights_and_config(converted: dict[str, Path], name: str) -> None:
    weights = load_file(converted[name] / "model.safetensors")
    native = load_file(GOLDEN / f"{name}-native" / "model.safetensors")
    assert weights.keys() == native.keys()
    assert all(torch.equal(weights[key], native[key]) for key in native)
    configs = [InternVLConfig.from_pretrained(path) for path in (converted[name], GOLDEN / f"{name}-native")]
    assert configs[0].to_dict() == configs[1].to_dict()


@pytest.mark.parametrize("name", ["small", "large"])
def test_native_tensors(name: str) -> None:
    config, tensors = native_tensors(GOLDEN / f"{name}-chat", image_token_id=IMAGE)
    native = load_file(GOLDEN / f"{name}-native" / "model.safetensors")
    assert config.image_token_id == IMAGE
    assert {key: value.tolist() for key, value in tensors} == {k: v.tolist() for k, v in native.items()}


@pytest.mark.parametrize("name", ["small", "large"])
def test_direct_load_is_the_converted_model(converted: dict[str, Path], name: str) -> None:
    direct = load_chat_format(GOLDEN / f"{name}-chat", CPU, torch.float32, image_token_id=IMAGE)
    through = hf.load_model(converted[name], CPU, torch.float32)
    for parts in ("state_dict", "named_buffers"):
        ours, theirs = dict(getattr(direct, parts)()), dict(getattr(through, parts)())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert direct.generation_config.eos_token_id == through.generation_config.eos_token_id == 2
    assert not direct.training


def test_exam(pipe: SGLPipeline, expected: dict[str, Any]) -> None:
    inputs = load_file(GOLDEN / "inputs.safetensors")
    for case in expected["large"]:
        config = SGLConfig(
            max_new_tokens=8,
            consistency_keep_ratio=expected["consistency_ratio"],
            prune_layer=case["layer"],
            keep_ratio=case["ratio"],
        )
        result = pipe.with_config(config).generate(inputs, inputs)
        assert result.token_ids == case["ids"]
    assert result.small_token_ids == expected["small_ids"]
    assert result.confidence == pytest.approx(expected["confidence"], rel=1e-4)
    assert result.consistency == pytest.approx(expected["consistency"], rel=1e-4)
    torch.testing.assert_close(result.mass, torch.tensor(expected["importance"]), rtol=1e-4, atol=0)
