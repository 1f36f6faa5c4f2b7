"""The shipped pair keeps what its card says, measured anew on a few scenes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import InternVLForConditionalGeneration

from sgl_runtime import SGLConfig, SGLPipeline, tiny
from sgl_runtime.tiny import evaluate

SCENES = range(30)


@pytest.fixture(scope="module")
def pipe() -> SGLPipeline:
    return SGLPipeline.from_pretrained(tiny.SMALL, tiny.LARGE, config=SGLConfig(max_new_tokens=8))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return evaluate.collect(tiny.SMALL, tiny.LARGE, "calibration", SCENES, workers=2)


def accuracy(rows: list[dict[str, Any]], name: str) -> float:
    return float(np.mean([row[name] == row["truth"] for row in rows]))


def test_weights_are_small_and_safe() -> None:
    files = [file for folder in (tiny.SMALL, tiny.LARGE) for file in folder.iterdir()]
    assert {file.suffix for file in files} <= {".json", ".jinja", ".safetensors"}
    assert sum(file.stat().st_size for file in files) < 20e6


@pytest.mark.slow
def test_guidance_keeps_the_answer_where_chance_loses_it(rows: list[dict[str, Any]]) -> None:
    large = accuracy(rows, "large")
    assert large > accuracy(rows, "small")
    assert accuracy(rows, "guided 36 %") > large - 0.05
    assert accuracy(rows, "guided 9 %") > accuracy(rows, "random 9 %") + 0.2


@pytest.mark.slow
def test_decision_score_tells_right_from_wrong(rows: list[dict[str, Any]]) -> None:
    """Area under the ROC curve: the chance that a right small answer scores above a wrong one."""
    right = [row["score"] for row in rows if row["small"] == row["truth"]]
    wrong = [row["score"] for row in rows if row["small"] != row["truth"]]
    assert wrong
    assert np.mean([a > b for a in right for b in wrong]) > 0.7


def test_fastv_ranking_is_the_last_rows_attention(pipe: SGLPipeline) -> None:
    assert pipe.large_processor is not None
    inputs = pipe.large_processor(tiny.samples()[0]["image"], "read the red circle")
    [request] = pipe.large.encode([pipe.large.prompt(inputs)])
    model = InternVLForConditionalGeneration.from_pretrained(
        tiny.LARGE, attn_implementation="eager", dtype=torch.float32
    )
    attentions = model(**inputs, output_attentions=True).attentions  # layers x (1, heads, S, S)
    visual = request.prompt.visual_index[0].long()
    for layer in (0, 1, 2):
        expected = attentions[max(layer - 1, 0)][0, :, -1, visual].sum(0)
        got = evaluate.fastv_ranking(pipe.large, request, layer)[0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_exit_curve_routes_by_score() -> None:
    """Ten questions, the five surest of them right: exits cost nothing up to one half."""
    guided = f"guided {evaluate.EXIT_SETTING}"
    rows = [
        {"scene": i, "truth": "a", "small": "a" if i < 5 else "b", guided: "a", "score": 1 - i / 10}
        for i in range(10)
    ]
    points = {point["share"]: point for point in evaluate.exit_curve(rows)}
    assert points[0.5]["early exit"][0] == 1.0
    assert points[0.5]["random routing"][0] == pytest.approx(0.75)
    assert points[0.9]["early exit"][0] == pytest.approx(0.6)
    assert points[0.5]["threshold"] == pytest.approx(0.6)
