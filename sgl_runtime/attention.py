"""Attention of the prefill and of draft rows, behind one function each.

The prefill's backend depends on device, dtype and head dim; `attention_backend` says which it is:

* ``flash-attn-4``, ``flash-attn-3``, ``flash-attn-2``: the packages, on the GPUs that each is made for;
* ``torch-flash``: the flash attention inside torch, which hands out its LSE;
* ``torch-sdpa``: whatever ``scaled_dot_product_attention`` picks, without an LSE.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

HALVES = (torch.float16, torch.bfloat16)
CPU_DTYPES = (torch.float32, *HALVES)
MAX_HEAD_DIM = 256
FLASH_4_HEAD_DIMS = (64, 96, 128)
# By major compute capability, best first. Version 2 on newer GPUs than Hopper would be what torch has inside.
PACKAGES = {8: ("flash-attn-2",), 9: ("flash-attn-3", "flash-attn-4", "flash-attn-2"), 10: ("flash-attn-4",)}
DISTRIBUTIONS = {"flash-attn-2": "flash-attn", "flash-attn-3": "flash-attn-3", "flash-attn-4": "flash-attn-4"}
MODULES = {
    "flash-attn-2": "flash_attn",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-4": "flash_attn.cute",
}

Flash = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_cuda = torch.ops.aten._scaled_dot_product_flash_attention.default

# An op of our own, so that torch.compile need not look into the packages.
_library = torch.library.Library("sgl_runtime", "DEF")
_library.define("flash_attention(Tensor q, Tensor k, Tensor v, float softmax_scale) -> (Tensor, Tensor)")


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, *, need_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of a prompt: row i sees keys 0 to i. Later keys and values must be finite, no more.

    Parameters
    ----------
    q : (B, Hq, S, D)
        Last dimension contiguous, as in ``k`` and ``v``; transposed views of (B, S, heads, D) need no copy.
    k, v : (B, Hkv, S, D), dtype of `q`
        Hq is a multiple of Hkv.
    softmax_scale
        Factor of the logits.
    need_lse
        Whether the caller has a use for the LSE.

    Returns
    -------
    out : (B, Hq, S, D), dtype of `q`
        A transposed view of (B, S, Hq, D) in every backend but ``torch-sdpa``, which may choose.
    softmax_lse : (B, Hq, S) fp32 or None
        Natural logarithm of each row's softmax denominator, of logits that include ``softmax_scale``: what
        `sgl_kernels.prefill_mass` takes, with any strides. None without ``need_lse`` or where the backend
        gives none.
    """
    backend = _backend(q.device, q.dtype, _newest_version(q.shape[-1]))
    if backend.startswith("flash-attn"):
        out, lse = torch.ops.sgl_runtime.flash_attention(q, k, v, softmax_scale)
        return out, lse if need_lse else None
    if need_lse and backend == "torch-flash":
        flash = _flash_cpu if q.device.type == "cpu" else _flash_cuda
        out, lse = flash(q, k, v, 0.0, True, scale=softmax_scale)[:2]
        return out, lse
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=softmax_scale), None


def cached_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, softmax_scale: float
) -> Tensor:
    """Attention of T new rows per request over its KV cache, which already holds their keys and values.

    Row t of request b sees the slots 0 to ``seq_lens[b] + t``. What lies in later slots never matters, NaN
    included.

    Parameters
    ----------
    q : (B, Hq, T, D)
    k_cache, v_cache : (B, Hkv, S, D), dtype of `q`
        Hq is a multiple of Hkv.
    seq_lens : (B,) int32
        Length BEFORE the new rows; ``seq_lens + T <= S``.
    softmax_scale
        Factor of the logits.

    Returns
    -------
    Tensor
        (B, Hq, T, D), dtype of `q`.
    """
    rows, heads = q.shape[2], k_cache.shape[1]
    slots = torch.arange(k_cache.shape[2], device=q.device)  # (S,)
    last = seq_lens[:, None] + torch.arange(rows, device=q.device)  # (B, T)
    # A mask alone adds -inf to the logits and multiplies values by 0, and both leave NaN where there was NaN.
    written = (slots <= last[:, -1:])[:, None, :, None]  # (B, 1, S, 1)
    k, v = torch.where(written, k_cache, 0), torch.where(written, v_cache, 0)
    # The query heads of a KV head become rows: masked kernels have no grouped heads, and keys are read once.
    batch, _, _, dim = q.shape
    # Not unflatten: torch.compile cannot look into it while a default device is set.
    grouped = q.reshape(batch, heads, -1, rows, dim)  # (B, Hkv, G, T, D)
    mask = (slots <= last[..., None])[:, None].repeat(1, 1, grouped.shape[2], 1)  # (B, 1, G T, S)
    out = scaled_dot_product_attention(grouped.flatten(2, 3), k, v, attn_mask=mask, scale=softmax_scale)
    return out.reshape(batch, -1, rows, dim)


def attention_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return the backend that serves a prefill there, one of those that the module names."""
    return _decided(device, dtype, _newest_version(head_dim))


@torch.compiler.assume_constant_result
def _backend(device: torch.device, dtype: torch.dtype, newest: int) -> str:
    """What `attention_backend` decided; under torch.compile a constant of the graph."""
    return _decided(device, dtype, newest)


@cache
def _decided(device: torch.device, dtype: torch.dtype, newest: int) -> str:
    if device.type == "cpu":
        return "torch-flash" if dtype in CPU_DTYPES else "torch-sdpa"
    if device.type != "cuda" or torch.version.hip is not None:
        return "torch-sdpa"
    major, _ = torch.cuda.get_device_capability(device)
    if major < 8 or dtype not in HALVES or not newest:
        return "torch-sdpa"
    for name in PACKAGES.get(major, ()):
        if int(name[-1]) <= newest and _package(name) is not None:
            return name
    return "torch-flash" if torch.backends.cuda.is_flash_attention_available() else "torch-sdpa"


def _newest_version(head_dim: int) -> int:
    """The newest flash attention on CUDA that takes the head dim; 0 if none does."""
    if head_dim in FLASH_4_HEAD_DIMS:
        return 4
    return 0 if head_dim % 8 or head_dim > MAX_HEAD_DIM else 3


@cache
def _package(name: str) -> Flash | None:
    """The package's function from (B, S, heads, D) to out and LSE; None, with a warning if it is broken."""
    try:
        importlib.metadata.version(DISTRIBUTIONS[name])  # version 2 ships the folder of version 4, in pieces
    except importlib.metadata.PackageNotFoundError:
        return None
    try:
        function = importlib.import_module(MODULES[name]).flash_attn_func
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        warnings.warn(
            f"{DISTRIBUTIONS[name]} is installed but cannot be used, so the next best attention serves the "
            f"prefill: {error}",
            stacklevel=2,
        )
        return None
    known = inspect.signature(function).parameters  # old versions 3 and 4 always return the LSE
    wish = {word: True for word in ("return_attn_probs", "return_lse") if word in known}

    def attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        out, lse = function(q, k, v, softmax_scale=softmax_scale, causal=True, **wish)[:2]
        return out, lse[..., : q.shape[1]]

    return attend


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    attend = _package(_backend(q.device, q.dtype, _newest_version(q.shape[-1])))
    assert attend is not None
    out, lse = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale)
    return out.transpose(1, 2), lse.contiguous()


def _flash_attention_fake(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, length, dim = q.shape
    out = q.new_empty((batch, length, heads, dim)).transpose(1, 2)
    return out, q.new_empty((batch, heads, length), dtype=torch.float32)


_library.impl("flash_attention", _flash_attention, "CUDA")
torch.library.register_fake("sgl_runtime::flash_attention", _flash_attention_fake, lib=_library)
