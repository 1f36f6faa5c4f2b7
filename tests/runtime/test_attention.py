"""Prefill and draft attention against fp64; the choice of a backend, with stand-ins for the packages."""

from __future__ import annotations

import importlib.metadata
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

import sgl_kernels
from sgl_runtime import attention
from sgl_runtime.attention import attention_backend, cached_attention, prefill_attention

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
SHAPES = [(1, 4, 4, 33, 64), (2, 14, 2, 129, 64), (2, 12, 2, 65, 128), (1, 10, 1, 50, 80), (1, 2, 1, 1, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE = 0.17


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing decided yet, and nothing decided left behind."""
    decisions = attention._decided, attention._package
    for decision in decisions:
        decision.cache_clear()
    yield
    for decision in decisions:
        decision.cache_clear()


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as projections leave them: transposed views of (B, S, heads, D)."""
    batch, heads, kv_heads, length, dim = shape
    generator = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(batch, length, n, dim, generator=generator).to(device, dtype).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    )
    return q * 2, k, v


def truth(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Output and LSE in fp64; `seen` (B or 1, 1, rows, keys) says which row sees which key."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = torch.where(seen, q @ k.mT * SCALE, -torch.inf)
    return logits.softmax(-1) @ torch.where(seen.any(-2)[..., None], v, 0), logits.logsumexp(-1)


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """The same in the inputs' dtype, as written with PyTorch: the error that is allowed twice."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = torch.where(seen, q @ k.mT * SCALE, -torch.inf)
    return logits.softmax(-1) @ torch.where(seen.any(-2)[..., None], v, 0)


def causal(length: int, device: Any) -> Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()


def assert_no_worse(ours: Tensor, theirs: Tensor, true: Tensor) -> None:
    error, allowed = ((x.double() - true).abs().max().item() for x in (ours, theirs))
    assert error <= 2 * allowed + 4 * torch.finfo(ours.dtype).eps * true.abs().max().item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    q, k, v = inputs(shape, dtype, device)
    seen = causal(shape[3], device)
    out, lse = prefill_attention(q, k, v, SCALE, need_lse=True)
    true_out, true_lse = truth(q, k, v, seen)
    assert out.dtype == dtype
    assert_no_worse(out, plain(q, k, v, seen), true_out)
    backend = attention_backend(q.device, dtype, shape[4])
    assert (lse is None) == (backend == "torch-sdpa")
    if lse is not None:
        assert lse.dtype == torch.float32
        assert lse.shape == q.shape[:3]
        accurate = (
            2e-6 if dtype == torch.float32 else 2e-3
        )  # logits of products that are exact, summed in fp32
        assert (lse - true_lse).abs().max() <= accurate * max(1.0, true_lse.abs().max())
    without, none = prefill_attention(q, k, v, SCALE)
    assert none is None
    assert_no_worse(without, plain(q, k, v, seen), true_out)


def test_on_the_cpu_the_lse_is_free_and_changes_no_bit() -> None:
    for dtype in DTYPES:
        q, k, v = inputs((2, 6, 2, 700, 64), dtype)
        out, lse = prefill_attention(q, k, v, SCALE, need_lse=True)
        assert lse is not None
        expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=SCALE)
        assert torch.equal(out, expected)
        for b in range(2):  # alone as in the batch
            alone, alone_lse = prefill_attention(
                q[b : b + 1], k[b : b + 1], v[b : b + 1], SCALE, need_lse=True
            )
            assert torch.equal(alone[0], out[b])
            assert torch.equal(alone_lse[0], lse[b])


def test_padding_rows_change_nothing() -> None:
    q, k, v = inputs((1, 6, 2, 640, 64), torch.float32)
    out, lse = prefill_attention(q, k, v, SCALE, need_lse=True)
    garbage = [torch.nn.functional.pad(x, (0, 0, 0, 100), value=1e4) for x in (q, k, v)]
    padded, padded_lse = prefill_attention(*garbage, SCALE, need_lse=True)
    torch.testing.assert_close(padded[:, :, :640], out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded_lse[:, :, :640], lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_lse_is_what_prefill_mass_takes(dtype: torch.dtype, device: str) -> None:
    q, k, v = inputs((2, 14, 2, 200, 64), dtype, device)
    visual = torch.arange(5, 170, dtype=torch.int32, device=device).repeat(2, 1)
    rows = torch.arange(170, 200, dtype=torch.int32, device=device).repeat(2, 1)
    _, lse = prefill_attention(q, k, v, SCALE, need_lse=True)
    if lse is None:
        pytest.skip(f"{attention_backend(q.device, dtype, 64)} gives no LSE")
    given, computed = torch.zeros(2, 2, 165, device=device)
    sgl_kernels.prefill_mass(q, k, rows, visual, given, softmax_lse=lse, softmax_scale=SCALE)
    sgl_kernels.prefill_mass(q, k, rows, visual, computed, softmax_scale=SCALE)
    torch.testing.assert_close(given, computed, rtol=2e-6 if dtype == torch.float32 else 1e-3, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 128])
def test_cached(rows: int, dtype: torch.dtype, device: str) -> None:
    q = inputs((3, 12, 12, rows, 64), dtype, device)[0]
    _, k, v = inputs((3, 4, 4, 300, 64), dtype, device)
    seq_lens = torch.tensor([0, 60, 300 - rows], dtype=torch.int32, device=device)
    last = seq_lens[:, None] + torch.arange(rows, device=device)
    seen = (torch.arange(300, device=device) <= last[..., None])[:, None]
    clean = cached_attention(q, k, v, seq_lens, SCALE)
    for b, n in enumerate(seq_lens.tolist()):
        k[b, :, n + rows :], v[b, :, n + rows :] = torch.nan, torch.inf
    out = cached_attention(q, k, v, seq_lens, SCALE)
    assert torch.equal(out, clean)
    k, v = (x.nan_to_num(0, 0, 0) for x in (k, v))
    assert_no_worse(out, plain(q, k, v, seen), truth(q, k, v, seen)[0])


def test_cached_rows_are_the_last_rows_of_a_prefill() -> None:
    q, k, v = inputs((2, 6, 2, 90, 64), torch.float32)
    whole, _ = prefill_attention(q, k, v, SCALE)
    lens = torch.tensor([80, 80], dtype=torch.int32)
    torch.testing.assert_close(
        cached_attention(q[:, :, 80:], k, v, lens, SCALE), whole[:, :, 80:], rtol=1e-5, atol=1e-6
    )


def test_compiles_whole_and_once() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> tuple[Tensor, ...]:
        out, lse = prefill_attention(q, k, v, SCALE, need_lse=True)
        assert lse is not None
        return (
            out,
            lse,
            prefill_attention(q, k, v, SCALE)[0],
            cached_attention(q[:, :, -3:], k, v, lens, SCALE),
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length, batch in itertools.product((20, 33, 47), (2, 3)):
            arguments = (
                *inputs((batch, 12, 4, length, 16), torch.float32),
                torch.full((batch,), length - 3).int(),
            )
            for ours, eager in zip(compiled(*arguments), step(*arguments), strict=True):
                assert torch.equal(ours, eager)
                assert ours.stride() == eager.stride()


def flash(version: int, calls: list[Any]) -> Callable[..., Any]:
    """A package's flash_attn_func on the CPU: (B, S, heads, D), and its own way to hand out the LSE."""

    def attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        calls.append((version, softmax_scale))
        out, lse = prefill_attention(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale, need_lse=True)
        padded = torch.nn.functional.pad(lse, (0, 5)) if version == 2 else lse
        return out.transpose(1, 2), padded

    def version_2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False):
        assert causal
        assert not dropout_p
        out, lse = attend(q, k, v, softmax_scale)
        return (out, lse, None) if return_attn_probs else out

    def version_3(q, k, v, softmax_scale=None, causal=False, return_attn_probs=False):
        assert causal
        out, lse = attend(q, k, v, softmax_scale)
        return (out, lse) if return_attn_probs else out

    def early_version_3(q, k, v, softmax_scale=None, causal=False):
        assert causal
        return attend(q, k, v, softmax_scale)

    def version_4(q, k, v, softmax_scale=None, causal=False, return_lse=False):
        assert causal
        out, lse = attend(q, k, v, softmax_scale)
        return out, (lse if return_lse else None)

    return {2: version_2, 3: version_3, 3.1: early_version_3, 4: version_4}[version]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, fresh: None) -> Callable[..., list[Any]]:
    """Make the given versions look installed; return the list of their calls to come."""

    def do(*versions: float, broken: tuple[int, ...] = ()) -> list[Any]:
        calls: list[Any] = []
        names = {f"flash-attn-{int(version)}": version for version in versions}
        distributions = {attention.DISTRIBUTIONS[name] for name in names}

        def installed(distribution: str) -> str:
            if distribution not in distributions:
                raise importlib.metadata.PackageNotFoundError(distribution)
            return "1"

        monkeypatch.setattr(importlib.metadata, "version", installed)
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        for name, version in names.items():
            module = ModuleType(attention.MODULES[name])
            if version not in broken:
                module.flash_attn_func = flash(version, calls)
            monkeypatch.setitem(sys.modules, attention.MODULES[name], module)
        return calls

    return do


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def do(major: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        monkeypatch.setattr(torch.version, "hip", None)

    return do


@pytest.mark.parametrize(
    ("major", "versions", "dtype", "head_dim", "expected"),
    [
        (7, (2, 3, 4), torch.float16, 64, "torch-sdpa"),
        (8, (2, 3, 4), torch.bfloat16, 64, "flash-attn-2"),
        (8, (3, 4), torch.bfloat16, 64, "torch-flash"),
        (9, (2, 3, 4), torch.bfloat16, 128, "flash-attn-3"),
        (9, (2, 4), torch.bfloat16, 128, "flash-attn-4"),
        (9, (2, 4), torch.float16, 80, "flash-attn-2"),
        (9, (4,), torch.float16, 80, "torch-flash"),
        (9, (), torch.bfloat16, 128, "torch-flash"),
        (9, (2, 3), torch.bfloat16, 264, "torch-sdpa"),
        (9, (2, 3), torch.bfloat16, 84, "torch-sdpa"),
        (9, (2, 3, 4), torch.float32, 128, "torch-sdpa"),
        (10, (2, 3, 4), torch.bfloat16, 128, "flash-attn-4"),
        (10, (2, 3), torch.bfloat16, 128, "torch-flash"),
        (12, (2, 3, 4), torch.bfloat16, 128, "torch-flash"),
    ],
)
def test_choice_on_cuda(install, gpu, major, versions, dtype, head_dim, expected) -> None:
    install(*versions)
    gpu(major)
    assert attention_backend(torch.device("cuda"), dtype, head_dim) == expected


def test_choice_on_the_cpu(fresh: None) -> None:
    assert attention_backend(torch.device("cpu"), torch.float32, 64) == "torch-flash"
    assert attention_backend(torch.device("cpu"), torch.float64, 64) == "torch-sdpa"
    assert attention_backend(torch.device("meta"), torch.float32, 64) == "torch-sdpa"


def test_amd_takes_what_torch_picks(fresh: None, gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(9)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert attention_backend(torch.device("cuda"), torch.bfloat16, 64) == "torch-sdpa"


def test_a_broken_package_is_named_and_left_out(install, gpu) -> None:
    install(2, 3, broken=(3,))
    gpu(9)
    with pytest.warns(UserWarning, match="flash-attn-3 is installed but cannot be used.*flash_attn_func"):
        assert attention_backend(torch.device("cuda"), torch.bfloat16, 64) == "flash-attn-2"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert attention_backend(torch.device("cuda"), torch.float16, 128) == "flash-attn-2"


@pytest.mark.parametrize("version", [2, 3, 3.1, 4])
def test_packages_are_called_as_they_are_written(install, version: float) -> None:
    calls = install(version)
    q, k, v = inputs((2, 4, 2, 40, 64), torch.bfloat16)
    expected = prefill_attention(q, k, v, SCALE, need_lse=True)
    attend = attention._package(f"flash-attn-{int(version)}")
    assert attend is not None
    out, lse = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), SCALE)
    assert torch.equal(out.transpose(1, 2), expected[0])
    assert torch.equal(lse, expected[1])
    assert calls == [(version, SCALE)]


def test_the_op_around_the_packages(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(3)
    q, k, v = inputs((2, 4, 2, 40, 64), torch.bfloat16)
    expected, expected_lse = prefill_attention(q, k, v, SCALE, need_lse=True)
    cpu = torch.library.Library("sgl_runtime", "IMPL")
    cpu.impl("flash_attention", attention._flash_attention, "CPU")
    real = attention._package("flash-attn-3")
    monkeypatch.setattr(attention, "_package", lambda name: real)
    torch.library.opcheck(
        torch.ops.sgl_runtime.flash_attention.default,
        (q, k, v, SCALE),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    out, lse = torch.ops.sgl_runtime.flash_attention(q, k, v, SCALE)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("backend", ["flash-attn-3", "torch-flash", "torch-sdpa"])
@pytest.mark.parametrize("need_lse", [True, False])
def test_cuda_calls_as_the_schemas_have_them(backend, need_lse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_decided", lambda *of: backend)
    with FakeTensorMode():
        q = torch.empty(2, 50, 14, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        k = torch.empty(2, 50, 2, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        out, lse = prefill_attention(q, k, k, SCALE, need_lse=need_lse)
    assert out.shape == q.shape
    assert out.device.type == "cuda"
    assert (lse is not None) == (need_lse and backend != "torch-sdpa")
    if lse is not None:
        assert (lse.shape, lse.dtype) == ((2, 14, 50), torch.float32)
        assert out.transpose(1, 2).is_contiguous()
