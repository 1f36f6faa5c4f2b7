"""Where a tensor lies must not show in the bits of a sum.

Triton compiles alignment into a kernel, and alignment decides how a tile lies in registers, so a request
alone could be summed in another order than in a batch. Compiled for sm_90, both must sum the same layouts.
"""

import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="TRITON LAYOUTS ARE NOT TESTED: triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from benchmarks.triton_aot import Driver  # noqa: E402
from sgl_kernels.triton import interpreting, launching  # noqa: E402
from sgl_kernels.triton.decode_attention import decode_attention  # noqa: E402
from sgl_kernels.triton.prefill_mass import prefill_mass  # noqa: E402
from sgl_kernels.triton.vocabulary import greedy_token, token_logprobs  # noqa: E402

pytestmark = pytest.mark.skipif(interpreting(), reason="the interpreter has no layouts")

BF16, FP32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64


def aligned(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype)


def skewed(*shape, dtype=FP32):
    """One element off the start of its memory, every stride but the last one odd."""
    padded = [size + 1 | 1 for size in shape]
    tensor = torch.empty(torch.Size(padded).numel() + 1, dtype=dtype)[1:].view(padded)
    return tensor[tuple(slice(size) for size in shape)]


def decode(make, slots, dtype, dim=128):
    cache = make(2, 2, 130, dim, dtype=dtype)
    given = make(2, slots, dtype=I32), make(2, slots), make(2, 14, slots)
    q, out = make(2, 14, dim, dtype=dtype), aligned(2, 14, dim, dtype=dtype)
    decode_attention(q, cache, cache, make(2, dtype=I32), *given, 0.1, out)


def prefill(make, slots, dtype, has_lse):
    q, k = (make(2, heads, 130, 64, dtype=dtype) for heads in (14, 2))
    index, mass = (make(2, 17, dtype=I32), make(2, slots, dtype=I32)), (make(2, slots), make(2, 14, slots))
    prefill_mass(q, k, *index, *mass, make(2, 14, 130) if has_lse else None, 0.1)


def vocabulary(make, op, size):
    op(make(2, size, dtype=BF16), aligned(2, dtype=I64), aligned(2))


CALLS = {
    "decode_attention bf16": lambda make, slots: decode(make, slots, BF16),
    "decode_attention fp32": lambda make, slots: decode(make, slots, FP32),
    "prefill_mass bf16": lambda make, slots: prefill(make, slots, BF16, has_lse=False),
    "prefill_mass fp32": lambda make, slots: prefill(make, slots, FP32, has_lse=True),
    "greedy_token, even vocabulary": lambda make, _: vocabulary(make, greedy_token, 4096),
    "token_logprobs, odd vocabulary": lambda make, _: vocabulary(make, token_logprobs, 4097),
}


@pytest.fixture
def compiled_sums(monkeypatch):
    """Compiles what a call would launch; returns the layouts it sums in, of each launch."""
    monkeypatch.setattr(driver, "_active", Driver(GPUTarget("cuda", 90, 32)))
    launches = []

    def launch(kernel, grid, _device, *arguments, **constants):
        compiled = kernel.warmup(*arguments, grid=grid, **constants)
        launches.append((kernel.fn.__name__, sums(compiled.asm["ttgir"])))

    monkeypatch.setattr(launching, "launch", launch)
    monkeypatch.setattr(launching, "device_key", lambda _device: "sm_90")

    def run(call, *arguments):
        launches.clear()
        call(*arguments)
        return launches.copy()

    return run


def sums(ttgir):
    """Operand types of float reductions and result types of matrix products, layouts written out."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.M))
    found = re.findall(r"\}\) : \((tensor<[^)]*f32[^)]*)\) ->", ttgir)
    found += re.findall(r"(?:tt\.dot|warp_group_dot) .*-> (tensor<.*f32.*>)", ttgir)
    assert found
    for alias in sorted(layouts, key=len, reverse=True):
        found = [line.replace(alias, layouts[alias]) for line in found]
    return sorted(found)


@pytest.mark.parametrize("name", CALLS)
def test_alignment_and_number_of_slots_do_not_change_the_order_of_sums(compiled_sums, name):
    batched = compiled_sums(CALLS[name], aligned, 160)
    alone = compiled_sums(CALLS[name], skewed, 31)
    assert batched == alone
