"""What benchmarks time: sides that are compared compute the same, and counted bytes are those of the data."""

import contextlib
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from kernel_helpers import relative_error

import sgl_kernels
from sgl_kernels import reference
from sgl_kernels.bench import timing, workloads
from sgl_kernels.bench.workloads import build, parse_shape

CPU = torch.device("cpu")
SMALL_SHAPES = {
    "decode_attention": "B=2 Hq=6 Hkv=2 D=16 S=50 N=30",
    "prefill_mass": "B=2 Hq=6 Hkv=2 D=16 S=50 N=30 R=7",
    "select_tokens": "B=2 S=50 N=30 r=0.2",
    "prune_gather": "B=2 S=50 N=30 r=0.2 C=12",
    "greedy_token": "B=3 V=70",
    "token_logprobs": "B=3 V=70",
}


def small(op, dtype=torch.float32):
    torch.manual_seed(0)
    return build(op, parse_shape(op, SMALL_SHAPES[op]), dtype, CPU)


@pytest.mark.parametrize("op", ["decode_attention", "prefill_mass"])
def test_attention_sides_agree(op):
    """Each side adds the same mass, or attends without one to the same result."""
    workload = small(op)
    mass = workload.inputs[-1] if op == "decode_attention" else workload.inputs[-2]
    truth_side = workload.sides(reference)[""]
    truth_out = truth_side(*wide(workload))
    mass.zero_()
    workload.sides(reference)[""](*workload.inputs)
    truth = mass.double()
    for name, side in {**workload.sides(sgl_kernels), **workload.stock}.items():
        mass.zero_()
        out = side(*workload.inputs)
        if "no mass" in name:
            assert not mass.any(), name
        elif name != "given lse":  # its LSE is a stand-in
            assert relative_error(mass, truth) < 2e-6, name
        if op == "decode_attention":
            assert relative_error(out.reshape(truth_out.shape), truth_out) < 2e-6, name


def wide(workload):
    return [t.double() if t.is_floating_point() else t for t in workload.inputs]


def test_selection_sides_agree():
    workload = small("prune_gather")
    hidden, kept_index, kept_lens, _ = workload.sides(sgl_kernels)[""](*workload.inputs)
    assert kept_lens.tolist() == [26, 26]
    sides = {**workload.sides(sgl_kernels), **workload.stock}
    assert torch.equal(sides["selection"](*workload.inputs)[0], kept_index)
    assert torch.equal(sides["topk, sort, cat, index_select"](*workload.inputs), hidden)
    assert sides["plain copy"](*workload.inputs).shape == hidden.shape
    workload = small("select_tokens")
    kept_index, _ = workload.sides(sgl_kernels)[""](*workload.inputs)
    assert torch.equal(workload.stock["topk, cat, sort"](*workload.inputs), kept_index)


@pytest.mark.parametrize("op", ["greedy_token", "token_logprobs"])
def test_vocabulary_sides_agree(op):
    workload = small(op)
    ours = workload.sides(sgl_kernels)[""](*workload.inputs)
    (stock,) = [side(*workload.inputs) for side in workload.stock.values()]
    torch.testing.assert_close(stock, ours)


def test_costs():
    decode = small("decode_attention", torch.bfloat16)
    q, k, v, _, visual, mass = decode.inputs
    both_caches = (k.numel() + v.numel()) * 2
    assert decode.cost("").bytes == both_caches + 2 * q.numel() * 2 + visual.numel() * 4 + mass.numel() * 8
    assert decode.cost("").flops == 2 * 2 * 2 * 6 * 50 * 16
    assert decode.cost("eager") == decode.cost("")
    assert decode.cost("no mass").bytes == both_caches + 2 * q.numel() * 2
    prefill = small("prefill_mass")
    keys_not_visual = 2 * 2 * (50 - 30) * 16 * 4
    lse = 2 * 6 * 7 * 4
    assert prefill.cost("").bytes - prefill.cost("given lse").bytes == keys_not_visual - lse
    prune = small("prune_gather", torch.bfloat16)
    assert prune.cost("plain copy").bytes == 2 * 2 * 26 * 12 * 2
    assert prune.cost("").bytes == prune.cost("plain copy").bytes + prune.cost("selection").bytes
    assert small("greedy_token").cost("").bytes == 3 * 70 * 4 + 3 * 12


@pytest.mark.parametrize("op", workloads.DEFAULTS)
def test_shape_fields_are_those_of_the_op(op):
    assert parse_shape(op, "") == workloads.DEFAULTS[op]
    assert parse_shape(op, "B=7")["B"] == 7
    build(op, parse_shape(op, ""), torch.bfloat16, torch.device("meta"))


@pytest.mark.parametrize(
    ("op", "text", "message"),
    [
        ("softmax", "", r"op is 'softmax', expected one of decode_attention"),
        ("decode_attention", "C=3", r"has no 'C=3', expected fields such as B=1 Hq=16"),
        ("decode_attention", "B", r"B of the shape is '', expected an integer"),
        ("decode_attention", "B=2.5", r"'2.5', expected an integer"),
        ("decode_attention", "B=0", r"B of the shape is 0, expected at least 1"),
        ("decode_attention", "Hq=7", r"Hq is 7 and Hkv is 8, expected Hq to be a multiple"),
        ("prune_gather", "S=100", r"N is 1792 and S is 100, expected at most S"),
        ("prefill_mass", "R=4096", r"R is 4096 and S is 2048"),
        ("prune_gather", "r=20", r"r of the shape is 20, expected a keep ratio in \(0, 1\]"),
        ("prune_gather", "r=nan", r"r of the shape is nan"),
        ("prune_gather", "r=x", r"r of the shape is 'x', expected a number"),
    ],
)
def test_bad_shapes(op, text, message):
    with pytest.raises(ValueError, match=message):
        parse_shape(op, text)


def test_sides_take_turns():
    order = []
    sides = {name: lambda _, name=name: order.append(name) for name in "ab"}
    timings = timing.time_sides(sides, (torch.zeros(1),), rounds=3)
    assert "".join(order) == "abababab"  # the first turn warms up
    for one in timings.values():
        assert one.samples == 3
        assert one.p10_us <= one.median_us <= one.p90_us
        assert (one.method, one.calls_per_sample) == ("clock", 1)


def test_ceilings():
    limit = timing.ceilings(CPU, torch.float32, copied=1 << 20, size=64)
    assert 1e7 < limit.copy_bytes_per_s < 1e13
    assert 1e6 < limit.matmul_flops_per_s < 1e14


class FakeCuda:
    """As much of torch.cuda as the timer uses; events read a clock that only calls move."""

    def __init__(self, capturable):
        self.now_ms, self.capturable, self.replayed, self.captured = 0.0, capturable, 0, None

    def event(self, enable_timing):
        assert enable_timing
        return FakeEvent(self)

    def work(self, *_):
        if self.captured is None:
            self.now_ms += 0.010  # 10 us, launched alone
        else:
            self.captured += 1

    def graph_of(self):
        fake = self

        class Graph:
            def replay(self):
                fake.replayed += 1
                fake.now_ms += 0.002 * self.calls  # 2 us, from a graph

        return Graph()

    @contextlib.contextmanager
    def capture(self, graph):
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captured = 0
        yield
        graph.calls, self.captured = self.captured, None


class FakeEvent:
    def __init__(self, cuda):
        self.cuda, self.at = cuda, None

    def record(self):
        self.at = self.cuda.now_ms

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return later.at - self.at


@pytest.fixture(params=[True, False], ids=["graph", "events"])
def cuda(request, monkeypatch):
    fake = FakeCuda(request.param)
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fake.graph_of)
    monkeypatch.setattr(torch.cuda, "graph", fake.capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (40_000, 80_000))
    properties = SimpleNamespace(L2_cache_size=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return fake


def test_gpu_samples_are_replays_over_more_than_the_cache(cuda):
    """Only the arithmetic of the timer: that real graphs replay what was captured is for a GPU to show."""
    inputs = (torch.zeros(10), torch.zeros(20))  # 120 bytes
    assert len(timing._copies(inputs, touched=40)[0]) == 50
    assert len(timing._copies(inputs, touched=1)[0]) == 83  # a quarter of the memory
    copies, l2_bytes = timing._copies(inputs, touched=120)
    assert (len(copies), l2_bytes) == (17, 1000)
    assert len({pair[0].data_ptr() for pair in copies}) == 17
    sampler = timing._GraphSampler(cuda.work, copies)
    assert sampler.calls % 17 == 0
    assert sampler.calls == pytest.approx(timing.GRAPH_US / 10, abs=17)
    expected = (2.0, "graph") if cuda.capturable else (10.0, "events")
    assert (pytest.approx(sampler.sample()), sampler.method) == expected
    assert cuda.replayed == int(cuda.capturable)
