"""Every op in plain PyTorch: the specification, the test oracle, the benchmark baseline and the fallback.

Read this file to know what an op computes. Words and rules are those of design.md, sections 1 and 2:
batch B, query heads Hq, KV heads Hkv, head dim D, cache slots or positions S, visual slots N, vocabulary V.

Rules that hold for every op:

* arithmetic is fp32, or fp64 when the inputs are fp64;
* `seq_lens` is clamped to [0, S];
* an index outside its range is padding, as -1 is: it reads nothing and changes nothing;
* a visual slot is a unit of its own: two slots at one position each receive that position's mass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    *,
    visual_index: Tensor | None = None,
    mass: Tensor | None = None,
    head_mass: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention of one new row per request; a request of length 0 gets zeros."""
    batch, heads, dim = q.shape
    kv_heads, slots = k_cache.shape[1:3]
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    compute = _compute_dtype(q)

    valid = torch.arange(slots, device=q.device) < seq_lens[:, None]  # (B, S)
    # What lies past the valid length is uninitialised memory: NaN * 0 is NaN, so the values are masked too.
    values = v_cache.to(compute).masked_fill(~valid[:, None, :, None], 0.0)  # (B, Hkv, S, D)
    grouped = q.to(compute).reshape(batch, kv_heads, heads // kv_heads, dim)
    logits = grouped @ k_cache.to(compute).transpose(-1, -2) * scale  # (B, Hkv, Hq/Hkv, S)
    hidden_key = ~valid[:, None, None, :]
    probs = logits.masked_fill(hidden_key, -torch.inf).softmax(-1).masked_fill(hidden_key, 0.0)
    if mass is not None or head_mass is not None:
        assert visual_index is not None
        _add_mass(probs.reshape(batch, heads, slots), valid, visual_index, mass, head_mass)
    return (probs @ values).reshape(batch, heads, dim).to(q.dtype)


def prefill_mass(
    q: Tensor,
    k: Tensor,
    query_index: Tensor,
    visual_index: Tensor,
    mass: Tensor,
    *,
    head_mass: Tensor | None = None,
    softmax_lse: Tensor | None = None,
    softmax_scale: float | None = None,
) -> None:
    """Attention mass of the counted rows; the row at position i sees the keys at positions 0..i."""
    batch, heads, length, dim = q.shape
    kv_heads = k.shape[1]
    if length == 0:
        return
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    compute = _compute_dtype(q)

    counted = (query_index >= 0) & (query_index < length)  # (B, R)
    row = query_index.long().where(counted, 0)
    take = row[:, None, :, None].expand(-1, heads, -1, dim)
    rows = q.gather(2, take).to(compute)  # (B, Hq, R, D)
    rows = rows.reshape(batch, kv_heads, heads // kv_heads * row.shape[1], dim)
    logits = rows @ k.to(compute).transpose(-1, -2) * scale
    logits = logits.reshape(batch, heads, row.shape[1], length)
    sees = torch.arange(length, device=q.device) <= row[:, :, None]  # (B, R, S)
    logits = logits.masked_fill(~sees[:, None], -torch.inf)  # (B, Hq, R, S)
    if softmax_lse is None:
        probs = logits.softmax(-1)
    else:
        lse = softmax_lse.gather(2, row[:, None, :].expand(-1, heads, -1))
        probs = (logits - lse.to(compute)[..., None]).exp()
    probs = probs.masked_fill(~(sees & counted[:, :, None])[:, None], 0.0)
    everywhere = torch.ones((batch, length), dtype=torch.bool, device=q.device)
    _add_mass(probs.sum(2), everywhere, visual_index, mass, head_mass)


def select_tokens(
    mass: Tensor,
    visual_index: Tensor,
    seq_lens: Tensor,
    num_keep: int | Tensor,
    *,
    out_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Ascending positions of all text tokens and of the `num_keep` visual tokens with the largest mass."""
    slots = mass.shape[1]
    if out_len is None:
        out_len = max(0, int(seq_lens.max())) if seq_lens.numel() else 0
    keep = num_keep[:, None] if isinstance(num_keep, Tensor) else num_keep

    valid = (visual_index >= 0) & (visual_index < seq_lens[:, None])  # (B, N)
    chosen = (_rank(mass, visual_index, valid) < keep) & valid

    # At most `slots` positions are dropped, so nothing past out_len + slots can reach the output.
    bound = out_len + slots
    position = torch.arange(bound, device=mass.device)
    column = visual_index.long().where(valid & (visual_index < bound), bound)  # `bound` is a bin for the rest
    bins = torch.zeros((mass.shape[0], bound + 1), dtype=torch.int32, device=mass.device)
    is_visual = bins.scatter(1, column, 1)[:, :bound] > 0
    is_chosen = bins.scatter_add(1, column, chosen.int())[:, :bound] > 0
    present = (position < seq_lens[:, None]) & (~is_visual | is_chosen)  # (B, bound)

    kept_lens = present.sum(1).clamp(max=out_len).int()
    order = (~present).int().argsort(dim=1, stable=True)[:, :out_len].int()
    kept_index = order.where(position[:out_len] < kept_lens[:, None], -1)
    return kept_index, kept_lens


def prune_gather(
    hidden: Tensor,
    mass: Tensor,
    visual_index: Tensor,
    seq_lens: Tensor,
    num_keep: int | Tensor,
    *,
    extras: Sequence[Tensor] = (),
    out_len: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """`select_tokens`, then the kept rows of `hidden` (B, S, C) and every extra (B, S, ...); zeros after."""
    length = hidden.shape[1]
    kept_index, kept_lens = select_tokens(
        mass,
        visual_index,
        seq_lens.clamp(0, length),
        num_keep,
        out_len=length if out_len is None else out_len,
    )
    hidden_out, *extras_out = (_gather_rows(source, kept_index) for source in (hidden, *extras))
    return hidden_out, kept_index, kept_lens, tuple(extras_out)


def greedy_token(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit (the lowest id among equals, NaN below everything) and its log-probability."""
    ranked = logits.masked_fill(logits.isnan(), -torch.inf)
    best = ranked.max(-1, keepdim=True).values
    # -inf is a legal best value; a NaN that was lowered to -inf must still lose against a true one.
    is_best = (ranked == best) & ~logits.isnan()
    token = is_best.int().argmax(-1)
    compute = logits.to(_compute_dtype(logits))
    return token, _logprob(compute, compute.gather(-1, token[..., None]).squeeze(-1))


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target id; 0 for the padding id -1, NaN for any other id outside [0, V)."""
    compute = logits.to(_compute_dtype(logits))
    inside = (targets >= 0) & (targets < logits.shape[-1])
    picked = compute.gather(-1, targets.long().where(inside, 0)[..., None]).squeeze(-1)
    logprob = _logprob(compute, picked)
    return logprob.where(inside, torch.nan).masked_fill(targets == -1, 0.0)


def _logprob(logits: Tensor, picked: Tensor) -> Tensor:
    """Log of the softmax at `picked`; subtracting the log-sum-exp in one piece would lose a small result."""
    largest = logits.max(-1).values
    return picked - largest - (logits - largest[..., None]).exp().sum(-1).log()


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _add_mass(
    probs: Tensor, valid: Tensor, visual_index: Tensor, mass: Tensor | None, head_mass: Tensor | None
) -> None:
    """Add probs (B, Hq, S) at the visual slots to mass (B, N) and head_mass (B, Hq, N)."""
    slots = probs.shape[-1]
    if slots == 0:
        return
    inside = (visual_index >= 0) & (visual_index < slots)
    index = visual_index.long().where(inside, 0)
    inside &= valid.gather(1, index)
    received = probs.gather(2, index[:, None, :].expand(-1, probs.shape[1], -1))  # (B, Hq, N)
    received = received.masked_fill(~inside[:, None], 0.0)
    if head_mass is not None:
        head_mass += received.to(head_mass.dtype)
    if mass is not None:
        mass += received.sum(1).to(mass.dtype)


def _rank(mass: Tensor, visual_index: Tensor, valid: Tensor) -> Tensor:
    """Rank of each slot (B, N): mass falling, then position rising, NaN after all numbers, padding last."""
    number = mass.masked_fill(mass.isnan(), -torch.inf)
    worst_last = torch.where(valid, mass.isnan().int(), 2)
    order = visual_index.argsort(dim=1, stable=True)
    for key, descending in ((number, True), (worst_last, False)):  # stable: the later key decides first
        order = order.gather(1, key.gather(1, order).argsort(dim=1, descending=descending, stable=True))
    return order.argsort(dim=1)


def _gather_rows(source: Tensor, kept_index: Tensor) -> Tensor:
    rows = source.new_zeros((*kept_index.shape, *source.shape[2:]))
    if source.shape[1] > 0:
        index = kept_index.long().clamp(min=0)
        batch = torch.arange(source.shape[0], device=source.device)[:, None]
        kept = (kept_index >= 0).reshape(*kept_index.shape, *(1,) * (source.dim() - 2))
        rows = torch.where(kept, source[batch, index], rows)
    return rows
