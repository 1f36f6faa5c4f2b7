"""Confidence, consistency and the decision, against transformers."""

from __future__ import annotations

import math

import pytest
import torch

from sgl_runtime.clock import Clock
from sgl_runtime.config import SGLConfig
from sgl_runtime.engine import VLM
from sgl_runtime.errors import NumericalError
from sgl_runtime.guidance import Guidance, answer_logprobs, guide
from sgl_runtime.requests import Answer, Request

from . import slow


def _request(engine: VLM, inputs: slow.Inputs) -> Request:
    [request] = engine.encode([engine.prompt(inputs)])
    return request


def _guide(engine: VLM, request: Request, config: SGLConfig, clock: Clock | None = None) -> Guidance:
    [guidance] = guide(engine, [request], config, clock or Clock(engine.model.device))
    assert isinstance(guidance, Guidance)
    return guidance


def _logprob(engine: VLM, request: Request, token_ids: list[int], mass: torch.Tensor, ratio: float) -> float:
    """`answer_logprobs` of one request with any answer and any ranking."""
    prefix = engine.begin([request], len(token_ids), with_mass=True)
    answer = Answer(token_ids, [0.0] * len(token_ids), mass=mass)
    return answer_logprobs(engine, prefix, {0: answer}, ratio)[0]


@pytest.mark.parametrize("layout", ["tttIttttt", "tItttItIIt"])
@pytest.mark.parametrize("keep_ratio", [0.01, 0.3, 1.0])
def test_guidance(small_model: torch.nn.Module, layout: str, keep_ratio: float) -> None:
    engine = VLM(small_model, "small")
    inputs = slow.make_inputs(layout, seed=1)
    request = _request(engine, inputs)
    config = SGLConfig(max_new_tokens=7, consistency_keep_ratio=keep_ratio)
    guidance = _guide(engine, request, config)

    ids, logprobs = slow.pruned_greedy(small_model, inputs, 99, [], 7)
    assert guidance.answer.token_ids == ids
    assert guidance.confidence == pytest.approx(math.exp(sum(logprobs) / len(ids)), rel=1e-4)

    num_keep = max(1, int(request.prompt.num_visual * keep_ratio))
    visual = request.prompt.visual_index[0].tolist()
    kept = slow.kept_positions(visual, request.prompt.length, guidance.mass[0].tolist(), num_keep)
    rows = slow.pruned_logits(small_model, inputs, ids[:-1], 0, kept)[-len(ids) :].log_softmax(-1)
    consistency = math.exp(float(rows[range(len(ids)), ids].double().sum()))
    assert guidance.consistency == pytest.approx(consistency, rel=1e-3)
    assert guidance.decision_score == pytest.approx((guidance.confidence + consistency) / 2, rel=1e-3)


def test_keeping_all_makes_consistency_the_product_of_probabilities(small_model: torch.nn.Module) -> None:
    engine = VLM(small_model, "small")
    request = _request(engine, slow.make_inputs(seed=2))
    answer = engine.generate(request, 5)
    total = _logprob(engine, request, answer.token_ids, torch.zeros(1, slow.PER_TILE), 1.0)
    assert total == pytest.approx(sum(answer.logprobs), rel=1e-4)


def test_long_answers_do_not_underflow_in_log_space(small_model: torch.nn.Module) -> None:
    engine = VLM(small_model, "small")
    request = _request(engine, slow.make_inputs(seed=2))
    total = _logprob(engine, request, [3] * 200, torch.zeros(1, slow.PER_TILE), 1.0)
    assert -math.inf < total < -200


def test_confidence_alone(small_model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VLM(small_model, "small")
    request = _request(engine, slow.make_inputs(seed=3))
    monkeypatch.setattr(
        "sgl_runtime.guidance.answer_logprobs", lambda *_: pytest.fail("consistency pass ran")
    )
    clock = Clock(engine.model.device)
    guidance = _guide(engine, request, SGLConfig(max_new_tokens=3, exit_score="confidence"), clock)
    assert guidance.consistency is None
    assert guidance.decision_score == guidance.confidence == guidance.answer.confidence
    assert "consistency" not in clock.seconds


def test_nan_in_the_consistency_pass_is_named(
    small_model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = VLM(small_model, "small")
    requests = [_request(engine, slow.make_inputs(seed=seed)) for seed in (4, 5)]
    config = SGLConfig(max_new_tokens=3)
    alone = _guide(engine, requests[1], config)
    real = engine.steps.upper

    def spoil(rows: object, seq_lens: object, next_angle: object, cache: object, *rest: object) -> object:
        logits, *others = real(rows, seq_lens, next_angle, cache, *rest)
        if cache is None:  # only the consistency pass has none
            logits[0] = torch.nan
        return logits, *others

    monkeypatch.setattr(engine.steps, "upper", spoil)
    error, guidance = guide(engine, requests, config, Clock(engine.model.device))
    assert isinstance(error, NumericalError)
    assert "Stage consistency of the small VLM" in str(error)
    assert isinstance(guidance, Guidance)
    assert guidance.decision_score == pytest.approx(alone.decision_score, rel=1e-4)
