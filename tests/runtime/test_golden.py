"""The entry exam: weights, inputs and outputs of the research code (see tests/data/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import InternVLForConditionalGeneration

from sgl_runtime import SGLConfig, SGLPipeline

COPY = Path(__file__).parents[1] / "data" / "golden"
SHARED = Path(__file__).parents[3] / "shared" / "golden" / "official-a"
EXPECTED = json.loads((COPY / "expected.json").read_text())


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return load_file(COPY / "inputs.safetensors")


@pytest.fixture(scope="module")
def pipe() -> SGLPipeline:
    models = [
        InternVLForConditionalGeneration.from_pretrained(COPY / f"{name}-native")
        for name in ("small", "large")
    ]
    return SGLPipeline.from_models(*models, _config())


def _config(**changes: Any) -> SGLConfig:
    return SGLConfig(max_new_tokens=8, consistency_keep_ratio=EXPECTED["consistency_ratio"], **changes)


def test_small(pipe: SGLPipeline, inputs: dict[str, torch.Tensor]) -> None:
    result = pipe.generate(inputs, inputs)
    assert result.small_token_ids == EXPECTED["small_ids"]
    assert result.confidence == pytest.approx(EXPECTED["confidence"], rel=1e-4)
    assert result.consistency == pytest.approx(EXPECTED["consistency"], rel=1e-4)
    torch.testing.assert_close(result.mass, torch.tensor(EXPECTED["importance"]), rtol=1e-4, atol=0)
    assert result.decision_score == pytest.approx((result.confidence + result.consistency) / 2)


@pytest.mark.parametrize("case", EXPECTED["large"], ids=lambda case: f"{case['layer']}-{case['ratio']}")
def test_large_pruned(pipe: SGLPipeline, inputs: dict[str, torch.Tensor], case: dict[str, Any]) -> None:
    config = _config(prune_layer=case["layer"], keep_ratio=case["ratio"])
    result = pipe.with_config(config).generate(inputs, inputs)
    assert result.token_ids == case["ids"]
    assert not result.exited
    best = torch.tensor(EXPECTED["importance"]).topk(max(1, int(80 * case["ratio"]))).indices.sort().values
    assert torch.equal(result.kept_visual, best)
    assert result.kept_index.tolist() == [*range(4), *(best + 4).tolist(), *range(84, 94)]


def test_large_full(pipe: SGLPipeline, inputs: dict[str, torch.Tensor]) -> None:
    result = pipe.with_config(_config(keep_ratio=1.0)).generate(inputs, inputs)
    assert result.token_ids == EXPECTED["large_full"]
    assert torch.equal(result.kept_index, torch.arange(94))


def test_settings_tell_apart() -> None:
    answers = [tuple(case["ids"]) for case in EXPECTED["large"]] + [tuple(EXPECTED["large_full"])]
    assert len(set(answers)) == 6


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")
@pytest.mark.parametrize(
    "path", ["expected.json", "small-native/model.safetensors", "large-native/model.safetensors"]
)
def test_copy_is_the_original(path: str) -> None:
    assert (COPY / path).read_bytes() == (SHARED / path).read_bytes()
