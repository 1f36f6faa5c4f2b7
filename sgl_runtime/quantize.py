"""Weight-only quantisation by torchao: weights in 8 bits with one scale per output, arithmetic in the compute
dtype. A linear then holds a half of its bfloat16 bytes, a quarter of its float32 bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sgl_runtime.errors import ConfigError

SCHEMES = ("int8", "fp8")


def check_scheme(scheme: str, device: torch.device, dtype: torch.dtype) -> None:
    """Find out before a model is loaded whether ``scheme`` can run.

    Raises
    ------
    ConfigError
        No such scheme, torchao is missing, or device or compute dtype do not go with it.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"quantize={scheme!r} is not a scheme; write one of {', '.join(SCHEMES)}.")
    if dtype == torch.float16:
        raise ConfigError(
            f"quantize={scheme!r} does not go with float16: torchao's int8 products overflow there and its "
            "fp8 scales underflow. Use dtype='bfloat16'."
        )
    if scheme == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        raise ConfigError(
            f"quantize='fp8' needs a GPU of compute capability 8.9 or newer, {device} has {major}.{minor}. "
            "Use quantize='int8'."
        )
    _torchao(scheme)


def quantize_linears(module: nn.Module, scheme: str, device: torch.device) -> None:
    """Quantise the weight of every ``nn.Linear`` inside ``module``, in place; biases stay as they are.

    Each in turn moves to ``device`` for it and stays there: never do all lie there unquantised.

    Parameters
    ----------
    module
        What to quantise: the decoder layers, not the vision tower, the embedding or the head.
    scheme
        "int8" (symmetric) or "fp8" (e4m3), one scale per row of a weight.

    Raises
    ------
    ConfigError
        See `check_scheme`.
    """
    linears = [linear for linear in module.modules() if isinstance(linear, nn.Linear)]
    check_scheme(scheme, device, linears[0].weight.dtype)
    quantize, config = _torchao(scheme)
    quantize(module, config, device=device)
    if scheme == "fp8":
        for linear in linears:
            _mend_zero_rows(linear.weight)


def _mend_zero_rows(weight: Any) -> None:
    """Make rows of zeros be zeros again: torchao 0.18 gives them a scale of 0 and divides by it."""
    zero = weight.scale == 0  # (outputs, 1)
    weight.scale.masked_fill_(zero, 1)
    weight.qdata.view(torch.uint8).masked_fill_(zero, 0)


def _torchao(scheme: str) -> tuple[Any, Any]:
    """Return torchao's ``quantize_`` and its settings of a scheme."""
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ConfigError(
            f'quantize={scheme!r} needs torchao ({error}): pip install "sgl-vlm[quant]".'
        ) from error
    kind = Int8WeightOnlyConfig if scheme == "int8" else Float8WeightOnlyConfig
    return quantize_, kind(set_inductor_config=False)  # that would change inductor for the whole process
