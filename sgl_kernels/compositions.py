"""The same results from stock torch calls, in the dtype of the inputs: what one writes without this package.

Tests take their tolerance from these (our error against fp64 is at most twice theirs) and benchmarks their
baselines. They know no lengths and no padding: every request is full and every index valid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def eager_decode(q: Tensor, k: Tensor, v: Tensor, visual_index: Tensor, mass: Tensor) -> Tensor:
    """repeat_kv, matmul, softmax, matmul, sum: transformers' eager attention of one row."""
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)  # (B, Hq, S, D)
    logits = q[:, :, None] @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, Hq, 1, S)
    probs = logits.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    mass += probs[:, :, 0].sum(1).gather(1, visual_index.long())
    return (probs.to(q.dtype) @ values)[:, :, 0]


def grouped_decode(q: Tensor, k: Tensor, v: Tensor, visual_index: Tensor, mass: Tensor) -> Tensor:
    """The best composition: query heads of one KV head are the rows of one matmul, nothing is repeated."""
    batch, heads, dim = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, dim)  # (B, Hkv, Hq/Hkv, D)
    logits = grouped @ k.transpose(-1, -2) * dim**-0.5
    probs = logits.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    mass += probs.sum((1, 2)).gather(1, visual_index.long())
    return (probs.to(q.dtype) @ v).reshape(batch, heads, dim)


def eager_prefill(
    q: Tensor, k: Tensor, v: Tensor, query_index: Tensor, visual_index: Tensor, mass: Tensor
) -> Tensor:
    """Full causal attention with its matrix kept, then the sum of the counted rows."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    logits = (q @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)
    probs = logits.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))  # (B, Hq, S, S)
    rows = query_index.long()[:, None, :, None].expand(-1, q.shape[1], -1, length)
    mass += probs.gather(2, rows).sum((1, 2)).gather(1, visual_index.long())
    return probs.to(q.dtype) @ values


def topk_select(mass: Tensor, visual_index: Tensor, text_index: Tensor, num_keep: int) -> Tensor:
    """topk, cat, sort: the kept positions (B, kept). Which of equal masses survives is not defined."""
    best = mass.topk(num_keep, dim=1).indices
    return torch.cat([visual_index.gather(1, best), text_index], 1).sort(1).values


def topk_prune(
    hidden: Tensor, mass: Tensor, visual_index: Tensor, text_index: Tensor, num_keep: int
) -> Tensor:
    """topk, sort, cat, index_select."""
    kept = topk_select(mass, visual_index, text_index, num_keep).long()
    first_row = torch.arange(hidden.shape[0], device=hidden.device)[:, None] * hidden.shape[1]
    rows = hidden.flatten(0, 1).index_select(0, (kept + first_row).flatten())
    return rows.reshape(*kept.shape, hidden.shape[2])


def log_softmax_greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log_softmax, max."""
    logprob, token = log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32)).max(-1)
    return token, logprob


def log_softmax_gather(logits: Tensor, targets: Tensor) -> Tensor:
    """log_softmax, gather."""
    logprobs = log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return logprobs.gather(-1, targets[..., None])[..., 0]
