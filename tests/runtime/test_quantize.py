from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from sgl_runtime import SGLConfig, SGLPipeline, hf, tiny
from sgl_runtime.engine import VLM
from sgl_runtime.errors import ConfigError
from sgl_runtime.quantize import SCHEMES, check_scheme, quantize_linears

CPU = torch.device("cpu")
CASES = [(scheme, dtype) for scheme in SCHEMES for dtype in (torch.float32, torch.bfloat16)]

torchao = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("torchao") is None,
    reason='torchao is missing: pip install "sgl-vlm[quant]"',
)


def make_net(dtype: torch.dtype) -> nn.Sequential:
    """Odd sizes, with and without a bias, rows of very different scales; a norm and a convolution stay."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(250, 515), nn.LayerNorm(515), nn.Linear(515, 33, bias=False), nn.Unflatten(1, (3, 11))
    )
    net.append(nn.Conv1d(3, 2, 3))
    with torch.no_grad():
        for index in (0, 2):
            net[index].weight *= torch.logspace(-3, 2, net[index].out_features)[:, None]
    return net.to(dtype).eval()


def linears(net: nn.Module) -> list[nn.Linear]:
    return [module for module in net.modules() if isinstance(module, nn.Linear)]


def stored(weight: Any) -> int:
    """Bytes of all plain tensors that a weight is made of."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    return sum(stored(getattr(weight, name)) for name in weight.__tensor_flatten__()[0])


@torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_are_at_most_half_a_step_off(dtype: torch.dtype) -> None:
    net = make_net(dtype)
    before = [linear.weight.detach().float() for linear in linears(net)]
    quantize_linears(net, "int8", CPU)
    for linear, weight in zip(linears(net), before, strict=True):
        largest = weight.abs().amax(1, keepdim=True)
        step = largest / 127.5  # 255 steps from -largest to largest
        error = linear.weight.dequantize(torch.float32) - weight
        rounding = torch.finfo(dtype).eps * largest  # torchao computes scales in the dtype of the weight
        assert bool((error.abs() <= step / 2 + rounding).all())
        evenly = step[:, 0] / 12**0.5  # what errors that are spread evenly over a step come to
        assert bool((error.square().mean(1).sqrt() / evenly).sub(1).abs().max() < 0.2)


@torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_weights_are_at_most_half_a_step_off(dtype: torch.dtype) -> None:
    net = make_net(dtype)
    before = [linear.weight.detach().float() for linear in linears(net)]
    quantize_linears(net, "fp8", CPU)
    for linear, weight in zip(linears(net), before, strict=True):
        scale = weight.abs().amax(1, keepdim=True) / 448
        error = linear.weight.dequantize(torch.float32) - weight
        step = torch.maximum(weight.abs() * 2**-3, scale * 2**-9)  # 3 bits of mantissa, then subnormals
        assert bool((error.abs() <= step / 2).all())
        relative = float(error.norm() / weight.norm())
        assert 0.01 < relative < 0.04


@torchao
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_zeros_stay_zero(scheme: str) -> None:
    net = make_net(torch.float32)
    with torch.no_grad():
        net[0].weight[[3, 200]] = 0
        quantize_linears(net, scheme, CPU)
        got = net[0](torch.randn(6, 250)) - net[0].bias
    assert got.isfinite().all()
    assert got[:, [3, 200]].abs().max() == 0


@torchao
@pytest.mark.parametrize(("scheme", "dtype"), CASES)
def test_outputs_are_those_of_the_dequantised_weights(scheme: str, dtype: torch.dtype) -> None:
    net, x = make_net(dtype), torch.randn(2, 7, 250, generator=torch.Generator().manual_seed(1)).to(dtype)
    first = net[0]
    quantize_linears(first, scheme, CPU)
    with torch.no_grad():
        weight, bias = first.weight.dequantize(torch.float32), first.bias.float()
        exact = x.double() @ weight.double().T + bias.double()
        plain = nn.functional.linear(x, weight.to(dtype), bias.to(dtype))
        got = first(x)
    assert got.dtype == dtype
    error, allowed = (float((value.double() - exact).norm()) for value in (got, plain))
    assert error <= 2 * allowed


@torchao
@pytest.mark.parametrize(("scheme", "dtype"), CASES)
def test_only_linears_shrink(scheme: str, dtype: torch.dtype) -> None:
    net = make_net(dtype)
    before = {name: stored(weight) for name, weight in net.named_parameters()}
    quantize_linears(net, scheme, CPU)
    for name, weight in net.named_parameters():
        if name in ("0.weight", "2.weight"):
            rows = weight.shape[0]
            per_row = 5 if scheme == "int8" else 4  # a float32 scale; int8 keeps a zero point of one byte
            assert stored(weight) == weight.numel() + per_row * rows
            assert stored(weight) < before[name] / dtype.itemsize * 1.03
        else:
            assert stored(weight) == before[name]
            assert type(weight) is nn.Parameter


@torchao
@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiles_whole(scheme: str) -> None:
    net, x = make_net(torch.float32), torch.randn(5, 250, generator=torch.Generator().manual_seed(1))
    quantize_linears(net, scheme, CPU)
    with torch.no_grad():
        plain = net(x)
        compiled = torch.compile(net, fullgraph=True)(x)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


def test_unknown_scheme() -> None:
    with pytest.raises(ConfigError, match="quantize='int4' is not a scheme; write one of int8, fp8"):
        check_scheme("int4", CPU, torch.float32)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_float16_is_refused(scheme: str) -> None:
    with pytest.raises(ConfigError, match=f"quantize='{scheme}' does not go with float16.*dtype='bfloat16'"):
        quantize_linears(nn.Linear(4, 4, dtype=torch.float16), scheme, CPU)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_torchao(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match=r'needs torchao .*: pip install "sgl-vlm\[quant\]"'):
        check_scheme(scheme, CPU, torch.float32)


@torchao
def test_why_float16_is_refused() -> None:
    """torchao by itself: infinite outputs, rows that vanish. When this fails, lift the refusal."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    linear = nn.Linear(256, 64, bias=False, dtype=torch.float16)
    x = torch.zeros(1, 256, dtype=torch.float16)
    x[:, 3] = 3000
    with torch.no_grad():
        assert float(linear(x).abs().max()) < 300
        quantize_(linear, Int8WeightOnlyConfig(set_inductor_config=False))
        assert not linear(x).isfinite().all()
        small = nn.Linear(256, 64, bias=False, dtype=torch.float16)
        small.weight.mul_(2.0**-14)
        quantize_(small, Float8WeightOnlyConfig(set_inductor_config=False))
        assert float(small.weight.scale.max()) == 0


def test_fp8_on_an_older_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"capability 8\.9 or newer, cuda:0 has 8\.0.*quantize='int8'"):
        check_scheme("fp8", torch.device("cuda", 0), torch.bfloat16)


@torchao
def test_inductor_settings_stay() -> None:
    from torch._inductor import config

    before = config.save_config()
    for scheme in SCHEMES:
        quantize_linears(make_net(torch.float32), scheme, CPU)
    assert config.save_config() == before


@torchao
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_pipeline_answers_with_the_quantised_weights(scheme: str) -> None:
    config = SGLConfig(max_new_tokens=8)
    requests = [(sample["image"], sample["prompt"]) for sample in tiny.samples()]
    pipe = SGLPipeline.from_pretrained(tiny.SMALL, tiny.LARGE, config=config, device="cpu", quantize=scheme)
    model = hf.load_model(tiny.LARGE, CPU, torch.float32, quantize=scheme)
    for linear in linears(model.model.language_model.layers):
        linear.weight = nn.Parameter(linear.weight.dequantize(torch.float32))
    processors = {"small_processor": pipe.small_processor, "large_processor": pipe.large_processor}
    same = SGLPipeline(pipe.small, VLM(model, "large"), config, **processors)
    for got, want in zip(pipe.batch(requests), same.batch(requests), strict=True):
        assert got.token_ids == want.token_ids
        assert got.accepted_draft == want.accepted_draft


@torchao
def test_only_the_large_vlms_decoder_layers_are_quantised() -> None:
    model = hf.load_model(tiny.LARGE, CPU, torch.float32, quantize="int8")
    quantised = {name for name, weight in model.named_parameters() if type(weight) is not nn.Parameter}
    inside = {
        f"model.language_model.layers.{name}.weight"
        for name, module in model.model.language_model.layers.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert quantised == inside
    assert len(inside) == 7 * len(model.model.language_model.layers)
    pipe = SGLPipeline.from_pretrained(tiny.SMALL, tiny.LARGE, device="cpu", quantize="int8")
    small = [weight for layer in pipe.small.decoder.layers for weight in layer.parameters()]
    assert {type(weight) for weight in small} == {nn.Parameter}


def test_a_wrong_scheme_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="quantize='int3'"):
        SGLPipeline.from_pretrained("nowhere/at-all", "nowhere/at-all", device="cpu", quantize="int3")
