"""The shipped pair keeps what its card says, measured anew on a few scenes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import InternVLForConditionalGeneration

from sgl_runtime import SGLConfig, SGLPipeline, tiny
from sgl_runtime.evaluation.data import load
from sgl_runtime.evaluation.methods import Key, make_methods
from sgl_runtime.evaluation.rankings import RANKINGS, fastv_ranking
from sgl_runtime.evaluation.results import load as load_results
from sgl_runtime.evaluation.results import run
from sgl_runtime.tiny.export import export

SCENES = 30


@pytest.fixture(scope="module")
def pipe() -> SGLPipeline:
    return SGLPipeline.from_pretrained(tiny.SMALL, tiny.LARGE, config=SGLConfig(max_new_tokens=8))


@pytest.fixture(scope="module")
def rows(pipe: SGLPipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[Key, list[dict[str, Any]]]:
    """Answers by method, of questions in one order."""
    folder = tmp_path_factory.mktemp("scenes")
    dataset = load(export("calibration", SCENES, folder))
    methods = make_methods([RANKINGS["guided"], RANKINGS["random"]], [(0.2, 2), (0.09, 0)], 10)
    run(pipe, dataset, methods, folder / "results.jsonl", checkpoints=(tiny.SMALL, tiny.LARGE), batch=8)
    found: dict[Key, list[dict[str, Any]]] = {}
    for row in load_results(folder / "results.jsonl").rows:
        found.setdefault((row["method"], row["keep_ratio"], row["prune_layer"]), []).append(row)
    return found


def accuracy(rows: list[dict[str, Any]]) -> float:
    assert len(rows) == 4 * SCENES
    return float(np.mean([row["score"] for row in rows]))


def test_weights_are_small_and_safe() -> None:
    files = [file for folder in (tiny.SMALL, tiny.LARGE) for file in folder.iterdir()]
    assert {file.suffix for file in files} <= {".json", ".jinja", ".safetensors"}
    assert sum(file.stat().st_size for file in files) < 20e6


@pytest.mark.slow
def test_guidance_keeps_the_answer_where_chance_loses_it(rows: dict[Key, list[dict[str, Any]]]) -> None:
    large = accuracy(rows["large", None, None])
    assert large > accuracy(rows["small", None, None])
    assert accuracy(rows["guided", 0.2, 2]) > large - 0.05
    assert accuracy(rows["guided", 0.09, 0]) > accuracy(rows["random", 0.09, 0]) + 0.2


@pytest.mark.slow
def test_decision_score_tells_right_from_wrong(rows: dict[Key, list[dict[str, Any]]]) -> None:
    """Area under the ROC curve: the chance that a right small answer scores above a wrong one."""
    small = rows["small", None, None]
    right, wrong = (
        [row["decision_score"] for row in small if row["score"] == is_right] for is_right in (1, 0)
    )
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
        got = fastv_ranking(pipe.large, request, layer)[0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
