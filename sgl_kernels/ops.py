"""The public ops; shapes, dtypes and devices are checked in Python, so that an error can say what to do.

Nothing reads a tensor's values, so every function can be compiled with `fullgraph=True` and captured in a
CUDA graph. Words: batch B, query heads Hq, KV heads Hkv, head dim D, cache slots or positions S, visual slots
N (padded with -1), counted rows R, hidden size C, vocabulary V. "The design" is design.md, "the paper" is
arXiv 2412.03324. No op has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sgl_kernels import registry  # noqa: F401  (defines torch.ops.sgl_vlm)
from sgl_kernels.checks import (
    FLOATS,
    bad_dtype,
    bad_shape,
    check_count,
    check_devices,
    check_heads,
    check_last_stride,
    check_lens,
    check_logits,
    check_mass,
    check_selection,
    check_visual,
    dims,
)

_decode_attention = torch.ops.sgl_vlm.decode_attention.default
_prefill_mass = torch.ops.sgl_vlm.prefill_mass.default
_select_tokens = torch.ops.sgl_vlm.select_tokens.default
_prune_gather = torch.ops.sgl_vlm.prune_gather.default
_greedy_token = torch.ops.sgl_vlm.greedy_token.default
_token_logprobs = torch.ops.sgl_vlm.token_logprobs.default


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
    """Attention of one new row per request over its KV cache, with the mass its visual tokens receive.

    Parameters
    ----------
    q : Tensor
        (B, Hq, D), fp32, bf16 or fp16. Hq is a multiple of Hkv; query head h reads KV head h // (Hq / Hkv).
    k_cache, v_cache : Tensor
        (B, Hkv, S, D), dtype of `q`. Only the last dimension must be contiguous. Slots from `seq_lens` on are
        never read.
    seq_lens : Tensor
        (B,) int32, valid slots of each request, clamped to [0, S]. Length 0 gives an output of zeros.
    visual_index : Tensor, optional
        (B, N) int32, slot of each visual token, in any order. An entry outside [0, seq_len) is padding.
        Needed when `mass` or `head_mass` is given.
    mass : Tensor, optional
        (B, N) fp32. The probabilities of the row, summed over query heads, are ADDED to it. Rows may lie
        apart but share no memory, as those of `.expand()` do.
    head_mass : Tensor, optional
        (B, Hq, N) fp32, laid out likewise. The probabilities of each query head are ADDED to it.
    softmax_scale : float, optional
        Factor of the logits; D ** -0.5 when None.

    Returns
    -------
    Tensor
        (B, Hq, D), dtype of `q`.

    Raises
    ------
    TypeError
        A dtype is not one of those above.
    ValueError
        A shape, stride or device does not fit.

    Notes
    -----
    The design, sections 1 (mass), 2.2 (fp32, fixed order) and 5; the paper's section 3.2. A NaN logit makes
    its head's output and probabilities NaN, as softmax does.
    """
    op = "decode_attention"
    if q.dim() != 3:
        bad_shape(op, "q", q, "(batch, query heads, head dim)")
    batch, heads, dim = q.shape
    if k_cache.dim() != 4 or k_cache.shape[0] != batch or k_cache.shape[3] != dim:
        bad_shape(op, "k_cache", k_cache, f"(batch {batch}, KV heads, cache slots, head dim {dim})")
    if v_cache.shape != k_cache.shape:
        bad_shape(op, "v_cache", v_cache, f"the shape of k_cache, {dims(k_cache)}")
    check_heads(op, heads, k_cache.shape[1], dim)
    check_lens(op, seq_lens, batch)
    if q.dtype not in FLOATS:
        bad_dtype(op, "q", q, "float32, bfloat16 or float16")
    if k_cache.dtype != q.dtype or v_cache.dtype != q.dtype:
        raise TypeError(
            f"{op}: k_cache is {k_cache.dtype} and v_cache is {v_cache.dtype}, expected {q.dtype}, "
            "the dtype of q; cast q or keep the cache in the dtype of q"
        )
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_last_stride(op, name, tensor)
    if mass is not None or head_mass is not None:
        if visual_index is None:
            raise ValueError(
                f"{op}: mass or head_mass came without visual_index, expected (batch, visual slots) int32"
            )
        check_visual(op, visual_index, batch)
        check_mass(op, mass, head_mass, batch, heads, visual_index.shape[1])
    check_devices(op, q, k_cache, v_cache, seq_lens, visual_index, mass, head_mass)
    out = torch.empty((batch, heads, dim), dtype=q.dtype, device=q.device)
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    _decode_attention(q, k_cache, v_cache, seq_lens, visual_index, mass, head_mass, scale, out)
    return out


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
    """Add the attention mass that visual tokens receive from the counted rows of a causal prefill.

    Parameters
    ----------
    q : Tensor
        (B, Hq, S, D), fp32, bf16 or fp16. Only the counted rows are read. Row i sees keys 0..i.
    k : Tensor
        (B, Hkv, S, D), dtype of `q`. Hq is a multiple of Hkv.
    query_index : Tensor
        (B, R) int32, positions of the rows that count: the text rows. An entry outside [0, S) is padding; a
        row named twice counts twice.
    visual_index : Tensor
        (B, N) int32, positions of the visual tokens, in any order. An entry outside [0, S) is padding.
    mass : Tensor
        (B, N) fp32. The probabilities, summed over counted rows and query heads, are ADDED to it. Rows may
        lie apart but share no memory.
    head_mass : Tensor, optional
        (B, Hq, N) fp32, laid out likewise. The probabilities of each query head, summed over counted rows,
        are ADDED to it.
    softmax_lse : Tensor, optional
        (B, Hq, S) fp32, natural logarithm of each row's softmax denominator, of logits that include
        `softmax_scale`. With it only the visual keys are read; without it the op computes it for the counted
        rows.
    softmax_scale : float, optional
        Factor of the logits; D ** -0.5 when None.

    Raises
    ------
    TypeError
        A dtype is not one of those above.
    ValueError
        A shape, stride or device does not fit.

    Notes
    -----
    The design, sections 1 (mass), 2.1 (rows), 2.2 (fp32, fixed order) and 5; the paper's section 3.2. Extra
    memory is O(B Hq (R + N)), and on a GPU without an LSE O(B Hq R S / 256) more: no row of the attention
    matrix is ever stored whole.
    """
    op = "prefill_mass"
    if q.dim() != 4:
        bad_shape(op, "q", q, "(batch, query heads, positions, head dim)")
    batch, heads, length, dim = q.shape
    if k.dim() != 4 or k.shape[0] != batch or k.shape[2] != length or k.shape[3] != dim:
        bad_shape(op, "k", k, f"(batch {batch}, KV heads, positions {length}, head dim {dim})")
    check_heads(op, heads, k.shape[1], dim)
    if query_index.dim() != 2 or query_index.shape[0] != batch:
        bad_shape(op, "query_index", query_index, f"(batch {batch}, counted rows)")
    if query_index.dtype != torch.int32:
        bad_dtype(op, "query_index", query_index, "int32")
    check_visual(op, visual_index, batch)
    check_mass(op, mass, head_mass, batch, heads, visual_index.shape[1])
    if softmax_lse is not None:
        if softmax_lse.shape != (batch, heads, length):
            bad_shape(
                op, "softmax_lse", softmax_lse, f"(batch {batch}, query heads {heads}, positions {length})"
            )
        if softmax_lse.dtype != torch.float32:
            bad_dtype(op, "softmax_lse", softmax_lse, "float32")
    if q.dtype not in FLOATS:
        bad_dtype(op, "q", q, "float32, bfloat16 or float16")
    if k.dtype != q.dtype:
        bad_dtype(op, "k", k, f"{q.dtype}, the dtype of q")
    check_last_stride(op, "q", q)
    check_last_stride(op, "k", k)
    check_devices(op, q, k, query_index, visual_index, mass, head_mass, softmax_lse)
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    _prefill_mass(q, k, query_index, visual_index, mass, head_mass, softmax_lse, scale)


def select_tokens(
    mass: Tensor,
    visual_index: Tensor,
    seq_lens: Tensor,
    num_keep: int | Tensor,
    *,
    out_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Positions that survive pruning: all text tokens and the `num_keep` visual tokens of the largest mass.

    Parameters
    ----------
    mass : Tensor
        (B, N) fp32, the last dimension contiguous. NaN ranks below everything, -0.0 equals 0.0; between
        equals the lower position wins.
    visual_index : Tensor
        (B, N) int32, position of each visual token, in any order. An entry outside [0, seq_len) is padding
        and its mass is not looked at. A position named twice is kept when either of its slots is.
    seq_lens : Tensor
        (B,) int32, prompt length of each request; negative counts as 0.
    num_keep : int or Tensor
        Visual tokens to keep, `max(1, int(N_v * keep_ratio))`; a (B,) int32 tensor gives each request its
        own, as a ragged batch needs. Values are clamped to [0, number of visual tokens].
    out_len : int, optional
        S_out, the width of the result. The shapes of the arguments do not bound the prompt length, so a
        static width must come from the caller under torch.compile and CUDA graphs: any bound of the prompt
        length is safe, and `seq_len - N_v + num_keep` is exact. When None, in eager mode only, the largest of
        `seq_lens` is read on the host. If more tokens survive than `out_len`, those at the highest positions
        are dropped.

    Returns
    -------
    kept_index : Tensor
        (B, S_out) int32, ascending, then -1.
    kept_lens : Tensor
        (B,) int32, valid entries of each row; never more than S_out.

    Raises
    ------
    TypeError
        A dtype is not one of those above, or `num_keep` or `out_len` is no int.
    ValueError
        A shape, stride or device does not fit, `num_keep` or `out_len` is negative, or `out_len` is missing
        where no value can be read.

    Notes
    -----
    The design, sections 2.4 and 2.5; the paper's section 3.2, equation of the pruned token set.
    """
    op = "select_tokens"
    count, each = check_selection(op, mass, visual_index, seq_lens, num_keep)
    batch = mass.shape[0]
    if out_len is not None:
        out_len = check_count(op, "out_len", out_len)
    else:
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{op}: out_len is None under torch.compile, expected an int; "
                "pass a bound of the prompt length, since reading seq_lens would break the graph"
            )
        out_len = max(0, int(seq_lens.max())) if batch else 0
    kept_index = torch.empty((batch, out_len), dtype=torch.int32, device=mass.device)
    kept_lens = torch.empty((batch,), dtype=torch.int32, device=mass.device)
    _select_tokens(mass, visual_index, seq_lens, count, each, kept_index, kept_lens)
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
    """`select_tokens` fused with the gather of the surviving rows.

    Parameters
    ----------
    hidden : Tensor
        (B, S, C), any dtype of 1, 2, 4 or 8 bytes; the last dimension contiguous.
    mass, visual_index, num_keep
        As in `select_tokens`.
    seq_lens : Tensor
        (B,) int32, prompt length of each request, clamped to [0, S].
    extras : sequence of Tensor
        Per-position planes (B, S, ...) that are gathered alike: position ids, cos and sin, deepstack
        features. M-RoPE position ids (3, B, S) come in as `ids.permute(1, 2, 0)`; any strides will do.
    out_len : int, optional
        S_out, the width of the results; S when None, which is always enough. Pass `seq_len - N_v + num_keep`
        to get exactly the kept rows of one request. If more tokens survive than `out_len`, those at the
        highest positions are dropped.

    Returns
    -------
    hidden_out : Tensor
        (B, S_out, C), dtype of `hidden`; zeros from `kept_lens` on.
    kept_index : Tensor
        (B, S_out) int32, ascending, then -1: the original positions, which RoPE keeps using.
    kept_lens : Tensor
        (B,) int32; never more than S_out.
    extras_out : tuple of Tensor
        (B, S_out, ...) for each extra; zeros from `kept_lens` on.

    Raises
    ------
    TypeError
        A dtype is not one of those above.
    ValueError
        A shape, stride or device does not fit, or `num_keep` or `out_len` is negative.

    Notes
    -----
    The design, sections 2.4, 2.5 and 5; the paper's section 3.2.
    """
    op = "prune_gather"
    if hidden.dim() != 3:
        bad_shape(op, "hidden", hidden, "(batch, positions, hidden size)")
    batch, length, width = hidden.shape
    check_last_stride(op, "hidden", hidden)
    count, each = check_selection(op, mass, visual_index, seq_lens, num_keep)
    if mass.shape[0] != batch:
        bad_shape(op, "mass", mass, f"(batch {batch}, visual slots), the batch of hidden {dims(hidden)}")
    for number, extra in enumerate(extras):
        if extra.dim() < 2 or extra.shape[0] != batch or extra.shape[1] != length:
            bad_shape(op, f"extras[{number}]", extra, f"(batch {batch}, positions {length}, ...)")
    check_devices(op, hidden, mass, *extras)
    rows = length if out_len is None else check_count(op, "out_len", out_len)
    device = hidden.device
    hidden_out = torch.empty((batch, rows, width), dtype=hidden.dtype, device=device)
    kept_index = torch.empty((batch, rows), dtype=torch.int32, device=device)
    kept_lens = torch.empty((batch,), dtype=torch.int32, device=device)
    sources = [_contiguous_rows(extra) for extra in extras]
    extras_out = [torch.empty((batch, rows, *x.shape[2:]), dtype=x.dtype, device=device) for x in sources]
    _prune_gather(
        hidden,
        mass,
        visual_index,
        seq_lens,
        count,
        each,
        sources,
        hidden_out,
        kept_index,
        kept_lens,
        extras_out,
    )
    return hidden_out, kept_index, kept_lens, tuple(extras_out)


def greedy_token(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely token of each row and its log-probability, in one pass over the vocabulary.

    Parameters
    ----------
    logits : Tensor
        (..., V), fp32, bf16 or fp16, after logits processors; the last dimension contiguous, V at least 1.

    Returns
    -------
    token : Tensor
        (...) int64. The lowest id among equal logits; NaN ranks below everything (id 0 if all are NaN).
    logprob : Tensor
        (...) fp32, natural logarithm. NaN when a logit of the row is NaN or +inf, or all are -inf.

    Raises
    ------
    TypeError
        `logits` is not fp32, bf16 or fp16.
    ValueError
        `logits` has no vocabulary dimension, an empty one, or one that is not contiguous.

    Notes
    -----
    The design, sections 1 (confidence) and 2.6.
    """
    check_logits("greedy_token", logits)
    leading = logits.shape[:-1]
    token = torch.empty(leading, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(leading, dtype=torch.float32, device=logits.device)
    _greedy_token(_rows(logits), token.view(-1), logprob.view(-1))
    return token, logprob


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target token; no softmax is materialised.

    Parameters
    ----------
    logits : Tensor
        (..., V), fp32, bf16 or fp16; the last dimension contiguous, V at least 1.
    targets : Tensor
        (...) int64 or int32. -1 is padding.

    Returns
    -------
    Tensor
        (...) fp32, natural logarithm; 0 for padding, so that a sum leaves it out; NaN for any other id
        outside [0, V), so that a mismatch of vocabularies cannot pass for a probability.

    Raises
    ------
    TypeError
        A dtype is not one of those above.
    ValueError
        A shape, stride or device does not fit.

    Notes
    -----
    The design, section 1 (consistency).
    """
    op = "token_logprobs"
    check_logits(op, logits)
    leading = logits.shape[:-1]
    if targets.shape != leading:
        bad_shape(op, "targets", targets, f"{tuple(leading)}, the leading dimensions of logits")
    if targets.dtype not in (torch.int64, torch.int32):
        bad_dtype(op, "targets", targets, "int64 or int32")
    check_devices(op, logits, targets)
    logprob = torch.empty(leading, dtype=torch.float32, device=logits.device)
    _token_logprobs(_rows(logits), targets.reshape(-1), logprob.view(-1))
    return logprob


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])


def _contiguous_rows(extra: Tensor) -> Tensor:
    """What one position holds must lie together; batch and position may have any stride."""
    expected = 1
    for size, stride in zip(reversed(extra.shape[2:]), reversed(extra.stride()[2:]), strict=True):
        if size != 1 and stride != expected:
            return extra.contiguous()
        expected *= size
    return extra
