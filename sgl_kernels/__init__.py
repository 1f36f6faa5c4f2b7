"""Fused ops of SGL: attention mass without an attention matrix, exact token selection, one-pass token scores.

>>> import torch
>>> from sgl_kernels import select_tokens
>>> mass = torch.tensor([[0.1, 0.9, 0.4]])
>>> visual_index = torch.tensor([[1, 2, 3]], dtype=torch.int32)
>>> select_tokens(mass, visual_index, torch.tensor([5], dtype=torch.int32), 1)
(tensor([[ 0,  2,  4, -1, -1]], dtype=torch.int32), tensor([3], dtype=torch.int32))
"""

from importlib.metadata import PackageNotFoundError, version

from sgl_kernels import backend, reference
from sgl_kernels.backend import collect_env
from sgl_kernels.ops import (
    decode_attention,
    greedy_token,
    prefill_mass,
    prune_gather,
    select_tokens,
    token_logprobs,
)

try:
    __version__ = version("sgl-vlm")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

backend.load()

__all__ = [
    "__version__",
    "collect_env",
    "decode_attention",
    "greedy_token",
    "prefill_mass",
    "prune_gather",
    "reference",
    "select_tokens",
    "token_logprobs",
]
