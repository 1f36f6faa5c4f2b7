"""The baseline must be what it stands for: the research code's numbers, and ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import InternVLForConditionalGeneration

from sgl_runtime import SGLConfig, SGLPipeline, tiny
from sgl_runtime.research import ResearchPipeline

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture(scope="module")
def golden() -> tuple[list[Any], dict[str, torch.Tensor]]:
    load = InternVLForConditionalGeneration.from_pretrained
    return [load(GOLDEN / f"{name}-native") for name in ("small", "large")], load_file(
        GOLDEN / "inputs.safetensors"
    )


def settings(**changes: Any) -> SGLConfig:
    return SGLConfig(max_new_tokens=8, consistency_keep_ratio=EXPECTED["consistency_ratio"], **changes)


@pytest.mark.parametrize("case", EXPECTED["large"], ids=lambda case: f"{case['layer']}-{case['ratio']}")
def test_golden(golden: Any, case: dict[str, Any]) -> None:
    models, inputs = golden
    research = ResearchPipeline(*models, settings(prune_layer=case["layer"], keep_ratio=case["ratio"]))
    result = research.generate(inputs, inputs)
    assert result.small_token_ids == EXPECTED["small_ids"]
    assert result.token_ids == case["ids"]
    assert result.confidence == pytest.approx(EXPECTED["confidence"], rel=1e-4)
    assert result.consistency == pytest.approx(EXPECTED["consistency"], rel=1e-4)
    torch.testing.assert_close(result.mass, torch.tensor(EXPECTED["importance"]), rtol=1e-4, atol=0)
    assert list(result.timings) == [
        "small_vision",
        "small_prefill",
        "small_decode",
        "consistency",
        "large_vision",
        "large_prefill_full",
        "large_prefill_pruned",
        "large_decode",
    ]


def test_the_same_as_ours_on_the_tiny_pair() -> None:
    config = SGLConfig(keep_ratio=0.1, prune_layer=0.2, max_new_tokens=8)
    pipe = SGLPipeline.from_pretrained(tiny.SMALL, tiny.LARGE, config=config, device="cpu")
    load = InternVLForConditionalGeneration.from_pretrained
    research = ResearchPipeline(
        *(load(path, dtype=torch.float32) for path in (tiny.SMALL, tiny.LARGE)), config
    )
    for sample in tiny.samples():
        ours = pipe(sample["image"], sample["prompt"])
        inputs = [p(sample["image"], sample["prompt"]) for p in (pipe.small_processor, pipe.large_processor)]
        theirs = research.generate(*inputs)
        assert theirs.token_ids == ours.token_ids
        assert theirs.small_token_ids == ours.small_token_ids
        assert torch.equal(theirs.kept_visual, ours.kept_visual)
        torch.testing.assert_close(theirs.mass, ours.mass, rtol=1e-4, atol=1e-6)
        assert theirs.confidence == pytest.approx(ours.confidence, rel=1e-4)
        assert theirs.consistency == pytest.approx(ours.consistency, rel=1e-4)
