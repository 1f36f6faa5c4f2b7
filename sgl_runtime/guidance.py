"""The small VLM's run: its answer, the mass that ranks visual tokens, the score that decides on an exit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import sgl_kernels
from sgl_runtime.clock import Clock
from sgl_runtime.config import SGLConfig, num_kept
from sgl_runtime.engine import VLM, Answer, Prune, Request
from sgl_runtime.errors import NumericalError


@dataclass(frozen=True, eq=False)
class Guidance:
    """What the small VLM has to say.

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


def guide(small: VLM, request: Request, config: SGLConfig, clock: Clock) -> Guidance:
    """Run the small VLM (arXiv 2412.03324, sections 3.2 and 3.3)."""
    buffer = small.mass_buffer(request)
    answer = small.generate(request, config.max_new_tokens, mass=buffer, clock=clock)
    mass = buffer[0]  # (1, N)
    if config.exit_score == "confidence":
        return Guidance(answer, mass, answer.confidence, None, answer.confidence)
    with clock.stage("consistency"):
        consistency = math.exp(answer_logprob(small, request, answer, mass, config.consistency_keep_ratio))
    return Guidance(answer, mass, answer.confidence, consistency, (answer.confidence + consistency) / 2)


@torch.no_grad()
def answer_logprob(vlm: VLM, request: Request, answer: Answer, ranking: Tensor, keep_ratio: float) -> float:
    """Return the log-probability of an answer given visual tokens pruned before layer 0.

    The answer is teacher-forced in one parallel pass; its tokens' log-probabilities, before logits
    processors, are summed.

    Parameters
    ----------
    ranking : (1, N) fp32
        The visual tokens with the largest values stay.
    keep_ratio
        Share of visual tokens that stay.

    Raises
    ------
    NumericalError
        The pass made NaN.
    """
    ids = answer.token_ids
    prune = Prune(0, ranking, num_kept(request.prompt.num_visual, keep_ratio))
    logits, _ = vlm.prefill(vlm.extended(request, ids[:-1]), prune=prune, num_logits=len(ids))  # (1, T, V)
    targets = torch.tensor(ids, device=logits.device)  # (T,)
    total = float(sgl_kernels.token_logprobs(logits[0], targets).double().sum())
    if math.isnan(total):
        raise NumericalError(
            f"Stage consistency of the {vlm.name} VLM made logits that are NaN (compute dtype "
            f"{vlm.model.dtype}). Check the weights, or load the model in float32 or bfloat16."
        )
    return total
