"""What only a GPU can show: captured graphs, run-to-run bits at full occupancy, opcheck on CUDA tensors.

The rest of the suite runs there too, with SGL_TEST_DEVICE=cuda. The calls are those of op_calls.py, which the
CPU tests compile and check as well.
"""

import pytest
import torch
from kernel_helpers import DTYPES, missing_kernel, same_bits
from op_calls import CALLS, LARGE, assert_equals_reference, public_calls, raw_calls
from torch.utils._pytree import tree_map_only

from sgl_kernels import registry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def on_gpu(values):
    return tree_map_only(torch.Tensor, lambda t: t.cuda(), values)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=CALLS)
def call(request, dtype):
    """(function, its arguments of a seed, on the GPU)."""
    op = request.param.split()[0]
    if not registry.has_kernel(op, "CUDA"):
        missing_kernel(f"{op} is served by the reference on CUDA")
    function, values = public_calls(LARGE, dtype)[request.param]
    return function, lambda seed: on_gpu(values(seed))


def test_replay_follows_inputs_that_change_in_place(call):
    function, values = call
    inputs = values(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what happens at a first call only must not happen in the capture
        function(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*inputs)
    for seed in (1, 2, 0):
        fresh = values(seed)
        for static, new in zip(inputs, fresh, strict=True):
            static.copy_(new)
        for written in outputs:
            written.fill_(77)
        graph.replay()
        expected = function(*fresh)
        torch.cuda.synchronize()
        assert all(same_bits(a, b) for a, b in zip(outputs, expected, strict=True))


def test_hundred_runs_give_the_same_bits(call):
    function, values = call
    inputs = values(0)
    first = function(*inputs)
    for _ in range(99):
        assert all(same_bits(a, b) for a, b in zip(first, function(*inputs), strict=True))


def test_batch_of_n_is_n_times_alone(call):
    function, values = call
    inputs = values(0)
    together = function(*inputs)
    for b in range(LARGE.batch):
        alone = function(*(t[b : b + 1] for t in inputs))
        assert all(same_bits(a, t[b : b + 1]) for a, t in zip(alone, together, strict=True))


def test_large_results_equal_the_reference(call, request, dtype):
    """The sizes of the other tests fill no GPU; a race may need one that is full."""
    _, values = call
    assert_equals_reference(request.node.callspec.params["call"], LARGE, dtype, values(0), truth_on="cuda")


@pytest.mark.parametrize("number", range(len(raw_calls())))
def test_opcheck(number):
    op, arguments = raw_calls()[number]
    torch.library.opcheck(op.default, on_gpu(arguments))
