"""The one place that declares the ops of namespace `sgl_vlm`: schema, fake, fallback.

Every op writes into destinations that its caller allocates and returns nothing, so a fake has nothing to do,
no shape can depend on data, and a captured graph owns all its memory. Compiled extensions register kernels
for their own dispatch key (CPU, CUDA), and `implement` registers Python functions that launch kernels; the
PyTorch reference serves every key that has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sgl_kernels import reference

NAMESPACE = "sgl_vlm"

# `num_keep_each`, when given, holds one count per request and `num_keep` is not looked at.
SCHEMAS = {
    "decode_attention": (
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens, Tensor? visual_index, "
        "Tensor(a!)? mass, Tensor(b!)? head_mass, float softmax_scale, Tensor(c!) out) -> ()"
    ),
    "prefill_mass": (
        "(Tensor q, Tensor k, Tensor query_index, Tensor visual_index, Tensor(a!) mass, "
        "Tensor(b!)? head_mass, Tensor? softmax_lse, float softmax_scale) -> ()"
    ),
    "select_tokens": (
        "(Tensor mass, Tensor visual_index, Tensor seq_lens, SymInt num_keep, Tensor? num_keep_each, "
        "Tensor(a!) kept_index, Tensor(b!) kept_lens) -> ()"
    ),
    "prune_gather": (
        "(Tensor hidden, Tensor mass, Tensor visual_index, Tensor seq_lens, SymInt num_keep, "
        "Tensor? num_keep_each, Tensor[] extras, Tensor(a!) hidden_out, Tensor(b!) kept_index, "
        "Tensor(c!) kept_lens, Tensor(d!)[] extras_out) -> ()"
    ),
    "greedy_token": "(Tensor logits, Tensor(a!) token, Tensor(b!) logprob) -> ()",
    "token_logprobs": "(Tensor logits, Tensor targets, Tensor(a!) logprob) -> ()",
}


def _decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    visual_index: Tensor | None,
    mass: Tensor | None,
    head_mass: Tensor | None,
    softmax_scale: float,
    out: Tensor,
) -> None:
    result = reference.decode_attention(
        q,
        k_cache,
        v_cache,
        seq_lens,
        visual_index=visual_index,
        mass=mass,
        head_mass=head_mass,
        softmax_scale=softmax_scale,
    )
    out.copy_(result)


def _prefill_mass(
    q: Tensor,
    k: Tensor,
    query_index: Tensor,
    visual_index: Tensor,
    mass: Tensor,
    head_mass: Tensor | None,
    softmax_lse: Tensor | None,
    softmax_scale: float,
) -> None:
    reference.prefill_mass(
        q,
        k,
        query_index,
        visual_index,
        mass,
        head_mass=head_mass,
        softmax_lse=softmax_lse,
        softmax_scale=softmax_scale,
    )


def _select_tokens(
    mass: Tensor,
    visual_index: Tensor,
    seq_lens: Tensor,
    num_keep: int,
    num_keep_each: Tensor | None,
    kept_index: Tensor,
    kept_lens: Tensor,
) -> None:
    keep = num_keep if num_keep_each is None else num_keep_each
    index, lens = reference.select_tokens(mass, visual_index, seq_lens, keep, out_len=kept_index.shape[1])
    kept_index.copy_(index)
    kept_lens.copy_(lens)


def _prune_gather(
    hidden: Tensor,
    mass: Tensor,
    visual_index: Tensor,
    seq_lens: Tensor,
    num_keep: int,
    num_keep_each: Tensor | None,
    extras: Sequence[Tensor],
    hidden_out: Tensor,
    kept_index: Tensor,
    kept_lens: Tensor,
    extras_out: Sequence[Tensor],
) -> None:
    keep = num_keep if num_keep_each is None else num_keep_each
    rows, index, lens, extra_rows = reference.prune_gather(
        hidden, mass, visual_index, seq_lens, keep, extras=extras, out_len=kept_index.shape[1]
    )
    hidden_out.copy_(rows)
    kept_index.copy_(index)
    kept_lens.copy_(lens)
    for destination, source in zip(extras_out, extra_rows, strict=True):
        destination.copy_(source)


def _greedy_token(logits: Tensor, token: Tensor, logprob: Tensor) -> None:
    best, best_logprob = reference.greedy_token(logits)
    token.copy_(best)
    logprob.copy_(best_logprob)


def _token_logprobs(logits: Tensor, targets: Tensor, logprob: Tensor) -> None:
    logprob.copy_(reference.token_logprobs(logits, targets))


_FALLBACKS = {
    "decode_attention": _decode_attention,
    "prefill_mass": _prefill_mass,
    "select_tokens": _select_tokens,
    "prune_gather": _prune_gather,
    "greedy_token": _greedy_token,
    "token_logprobs": _token_logprobs,
}


def _fake(*_args: object) -> None:
    """Everything is written into destinations: there is no output to describe."""


# Module level because the registrations live as long as this object.
_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _FALLBACKS[_name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)


# Which backend the functions registered by `implement` belong to.
_implemented: dict[tuple[str, str], str] = {}


def implement(op: str, dispatch_key: str, backend: str, function: Callable[..., None]) -> None:
    """Let `function`, which takes the arguments of the schema, serve `op` on `dispatch_key`."""
    _library.impl(op, function, dispatch_key)
    _implemented[op, dispatch_key] = backend


def has_kernel(op: str, dispatch_key: str) -> bool:
    """Whether a kernel, compiled or launched from Python, serves `op` on `dispatch_key` ("CPU" or "CUDA")."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", dispatch_key))


def serving_backend(op: str, dispatch_key: str) -> str:
    """Backend of the kernel that serves `op` on `dispatch_key`; "reference" where none does."""
    compiled = dispatch_key.lower() if has_kernel(op, dispatch_key) else "reference"
    return _implemented.get((op, dispatch_key), compiled)
