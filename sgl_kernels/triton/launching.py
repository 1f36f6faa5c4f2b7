"""What the host side of every Triton op shares: the table of configurations, the launch, the checks.

Nothing here looks at the values of a tensor, so an op can be captured in a CUDA graph.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_kernels.triton import interpreting

if interpreting():
    from sgl_kernels.triton import interpreter

    interpreter.repair()

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
# Arguments whose size and alignment Triton must not compile into a kernel. They differ between a request
# alone and in a batch, alignment decides how a tile lies in registers, and so in which order it is summed.
ANY_ALIGNMENT = [
    *("seq_lens", "query_index", "visual_index", "mass", "head_mass", "lse", "num_keep_each"),
    *("lens_stride", "query_batch", "index_batch", "mass_batch", "head_mass_batch", "head_mass_head"),
    *("lse_batch", "lse_head", "lse_position", "each_stride", "target_stride"),
    *("kv_heads", "heads", "slots", "splits", "visual_slots", "length", "rows", "blocks", "vocabulary"),
    *("max_len", "num_keep", "out_len", "unknown"),
]
TABLE = Path(__file__).with_name("configs.json")


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any
) -> None:
    """Run `kernel` on the current stream of `device`."""
    # NumPy, which stands in for the GPU there, would warn of every 0 / 0 in a masked lane.
    quiet = interpreter.silence() if interpreting() else nullcontext()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), quiet:
        kernel[grid](*arguments, **constants)


def config(op: str, shape_class: str, device: torch.device) -> dict[str, int]:
    """Block sizes, num_warps and num_stages of `op` on `device`.

    Looked up, never searched for: `benchmarks/tune_triton.py` writes the table. `shape_class` must follow
    from the shape of one request alone, since block sizes decide the order of sums.
    """
    return _config(op, shape_class, device_key(device))


@lru_cache
def device_key(device: torch.device) -> str:
    """The table's name of a device: "sm_90", "gfx942", "interpreter"."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@lru_cache
def _config(op: str, shape_class: str, key: str) -> dict[str, int]:
    """Later entries of the table win: of all devices, of AMD's, of this one; "any" before the class."""
    table = json.loads(TABLE.read_text())[op]
    chosen: dict[str, int] = {}
    for name in ("default", "amd" if key.startswith("gfx") else key, key):
        section = table.get(name, {})
        chosen |= section.get("any", {}) | section.get(shape_class, {})
    return chosen


def attention_class(dtype: torch.dtype, dim: int) -> str:
    """Shape class of an attention op: "16 bit, 128" for bf16 or fp16 with head dims 65 to 128."""
    return f"{dtype.itemsize * 8} bit, {next(width for width in (64, 128, 256) if dim <= width)}"


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def require(condition: bool, op: str, expected: str) -> None:
    """Keeps a direct call of torch.ops.sgl_vlm inside its tensors; the public functions explain errors."""
    if not condition:
        raise RuntimeError(f"{op}: arguments do not fit: expected {expected}")


def require_head_dim(op: str, dim: int) -> None:
    if dim > MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: head dim is {dim}, expected 1 to {MAX_HEAD_DIM} by the Triton kernels; "
            "set SGL_KERNELS_BACKEND=reference for larger ones"
        )


def rows_contiguous(tensor: Tensor) -> bool:
    return tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 or tensor.numel() == 0


def require_mass(
    op: str, mass: Tensor | None, head_mass: Tensor | None, batch: int, heads: int, slots: int
) -> None:
    for name, tensor, shape in (
        ("mass", mass, (batch, slots)),
        ("head_mass", head_mass, (batch, heads, slots)),
    ):
        if tensor is not None:
            fits = tensor.shape == shape and tensor.dtype == torch.float32 and rows_contiguous(tensor)
            require(fits, op, f"{name} {shape} float32, the last dimension contiguous")


def require_index(op: str, name: str, index: Tensor, batch: int, dims: int) -> None:
    fits = index.dim() == dims and index.shape[0] == batch and index.dtype == torch.int32
    require(fits, op, f"{name} int32 of {dims} dimensions, the first one {batch}")
