"""The small VLM's run: its answers, the mass that ranks visual tokens, the score that decides on an exit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sgl_runtime import parallel
from sgl_runtime.clock import Clock
from sgl_runtime.config import SGLConfig, num_kept
from sgl_runtime.engine import VLM
from sgl_runtime.errors import NumericalError, SGLError
from sgl_runtime.requests import Answer, Prefix, Prune, Request


@dataclass(frozen=True, eq=False)
class Guidance:
    """What the small VLM has to say about one request.

    Attributes
    ----------
    answer : its greedy answer
    mass : (1, N) fp32, attention received by each visual token, over all layers, heads and text rows
    confidence : geometric mean of the answer's token probabilities
    consistency : probability of the answer given pruned visual tokens, or None when not asked for
    decision_score : mean of the two, or the confidence alone
    """

    answer: Answer
    mass: Tensor
    confidence: float
    consistency: float | None
    decision_score: float


def guide(
    small: VLM, requests: Sequence[Request], config: SGLConfig, clock: Clock
) -> list[Guidance | SGLError]:
    """Run the small VLM on a batch (arXiv 2412.03324, sections 3.2 and 3.3); a request can fail alone."""
    prefix = small.begin(requests, config.max_new_tokens, with_mass=True, clock=clock)
    answers = small.answer(prefix, clock=clock)
    logprobs: dict[int, float] = {}
    if config.exit_score == "both":
        with clock.stage("consistency"):
            logprobs = answer_logprobs(small, prefix, answers, config.consistency_keep_ratio)
    return [_guidance(small, answers[i], logprobs.get(i)) for i in range(len(requests))]


def answer_logprobs(
    vlm: VLM, prefix: Prefix, answers: dict[int, Answer], keep_ratio: float
) -> dict[int, float]:
    """Return the log-probability of each answer given visual tokens pruned before layer 0.

    Parameters
    ----------
    prefix
        From the run that gave the answers; its image features are used again.
    answers
        With their mass, by which visual tokens are ranked. Those that failed are left out.
    keep_ratio
        Share of visual tokens that stay.
    """
    prunes, token_ids = {}, {}
    for number, answer in answers.items():
        if answer.error is None and answer.mass is not None:
            prunes[number] = Prune(0, answer.mass, num_kept(answer.mass.shape[1], keep_ratio))
            token_ids[number] = answer.token_ids
    return vlm.score(prefix, prunes, token_ids)


def agree_on(guidance: list[Guidance | SGLError], device: torch.device) -> list[Guidance | SGLError]:
    """Return rank 0's ``guidance`` in every process that shares the large VLM, the masses on the CPU."""
    plain = [
        g if isinstance(g, SGLError) else replace(g, answer=replace(g.answer, mass=None), mass=g.mass.cpu())
        for g in guidance
    ]
    return parallel.agree(plain, device)


def _guidance(small: VLM, answer: Answer, logprob: float | None) -> Guidance | SGLError:
    if answer.error is not None:
        return answer.error
    assert answer.mass is not None
    if logprob is None:
        return Guidance(answer, answer.mass, answer.confidence, None, answer.confidence)
    if math.isnan(logprob):
        return NumericalError(
            f"Stage consistency of the {small.name} VLM made logits that are NaN (compute dtype "
            f"{small.model.dtype}). Check the weights, or load the model in float32 or bfloat16."
        )
    consistency = math.exp(logprob)
    score = (answer.confidence + consistency) / 2
    return Guidance(answer, answer.mass, answer.confidence, consistency, score)
