import subprocess
import sys

import pytest
import torch
from kernel_helpers import (
    DEVICE,
    DTYPES,
    GEOMETRIES,
    arange,
    assert_as_accurate,
    combinations,
    full,
    int32,
    normal,
    ones,
    permutation,
    relative_error,
    same_bits,
    size,
    span,
    tensor,
    zeros,
)

from sgl_kernels import compositions, prefill_mass, reference

OPS = ("prefill_mass",)


def prefill_inputs(batch, heads, kv_heads, dim, length, dtype=torch.float32):
    return (
        normal(batch, heads, length, dim, seed=1, dtype=dtype),
        normal(batch, kv_heads, length, dim, seed=2, dtype=dtype),
    )


def run(op, q, k, query_index, visual_index, dtype=torch.float32, **options):
    mass = zeros(visual_index.shape, dtype=dtype)
    head_mass = zeros(q.shape[0], q.shape[1], visual_index.shape[1], dtype=dtype)
    op(q, k, query_index, visual_index, mass, head_mass=head_mass, **options)
    return mass, head_mass


def log_sum_exp(q, k):
    """(B, Hq, S) of the causal logits, in fp64."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    future = ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).logsumexp(-1)


@pytest.mark.parametrize(("geometry", "dtype"), combinations(GEOMETRIES, DTYPES), ids=str)
def test_accuracy(isa, geometry, dtype):
    heads, kv_heads, dim = geometry
    length, rows = size(400, 340), 21
    q, k = prefill_inputs(2, heads, kv_heads, dim, length, dtype)
    query_index = span(length - rows, length, batch=2)
    visual_index = span(7, 307, batch=2)
    mass, head_mass = run(prefill_mass, q, k, query_index, visual_index)
    truth, head_truth = run(
        reference.prefill_mass, q.double(), k.double(), query_index, visual_index, torch.float64
    )
    plain = torch.zeros_like(mass)
    compositions.eager_prefill(q, k, k, query_index, visual_index, plain)
    assert_as_accurate("mass", mass, truth, plain)
    assert relative_error(mass, truth) < 2e-6
    assert relative_error(head_mass, head_truth) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_log_sum_exp(isa, dtype):
    q, k = prefill_inputs(2, 6, 2, 64, 300, dtype)
    query_index = span(270, 300, batch=2)
    visual_index = span(260, batch=2)
    truth, head_truth = run(
        reference.prefill_mass, q.double(), k.double(), query_index, visual_index, torch.float64
    )
    lse = log_sum_exp(q, k).float()
    for op in (prefill_mass, reference.prefill_mass):
        mass, head_mass = run(op, q, k, query_index, visual_index, softmax_lse=lse)
        # Half an ulp of a log-sum-exp near 6 is 2.4e-7 of every probability.
        assert relative_error(mass, truth) < 4e-6
        assert relative_error(head_mass, head_truth) < 4e-6


def test_given_log_sum_exp_leaves_other_keys_alone(isa):
    q, k = prefill_inputs(1, 4, 2, 32, 300)
    query_index, visual_index = span(280, 300), span(100, 200)
    lse = log_sum_exp(q, k).float()
    expected, _ = run(prefill_mass, q, k, query_index, visual_index, softmax_lse=lse)
    k[:, :, :100] = torch.nan
    k[:, :, 200:] = torch.nan
    mass, _ = run(prefill_mass, q, k, query_index, visual_index, softmax_lse=lse)
    assert same_bits(mass, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_see_only_the_past(isa, dtype):
    """Text before, between and after two images; rows in any order, some named twice, some padding."""
    q, k = prefill_inputs(1, 4, 2, 32, 600, dtype)
    rows = torch.cat([arange(0, 10), arange(250, 262), arange(590, 600), int32([255, 255])])
    rows = rows[permutation(len(rows), 6)]
    query_index = torch.cat([rows, tensor([-1, 600, 2**31 - 1])]).int()[None]
    visual_index = torch.cat([arange(10, 250), arange(262, 590)]).int()[None]
    mass, head_mass = run(prefill_mass, q, k, query_index, visual_index)
    truth = run(reference.prefill_mass, q.double(), k.double(), query_index, visual_index, torch.float64)
    assert relative_error(mass, truth[0]) < 2e-6
    assert relative_error(head_mass, truth[1]) < 2e-6


def test_mass_is_conserved(isa):
    q, k = prefill_inputs(2, 6, 2, 64, 520)
    query_index = full((2, 40), -1, dtype=torch.int32)
    query_index[0] = arange(40) * 13
    query_index[1, :5] = int32([0, 1, 519, 256, 255])
    mass, head_mass = run(prefill_mass, q, k, query_index, span(520, batch=2))
    torch.testing.assert_close(mass.sum(1), tensor([6.0 * 40, 6.0 * 5]), rtol=1e-6, atol=0)
    torch.testing.assert_close(head_mass.sum(2), tensor([[40.0], [5.0]]).expand(2, 6), rtol=1e-6, atol=0)


def test_mass_is_added_to(isa):
    q, k = prefill_inputs(1, 4, 2, 32, 100)
    query_index, visual_index = span(80, 100), span(10, 70)
    once, head_once = run(prefill_mass, q, k, query_index, visual_index)
    mass, head_mass = once.clone(), head_once.clone()
    prefill_mass(q, k, query_index, visual_index, mass, head_mass=head_mass)
    assert torch.equal(mass, once + once)
    assert torch.equal(head_mass, head_once + head_once)


def test_padding_duplicates_and_out_of_range_slots(isa):
    q, k = prefill_inputs(1, 4, 2, 32, 100)
    visual_index = int32([[5, -1, 5, 100, 2**31 - 1, -(2**31), 99]])
    mass, _ = run(prefill_mass, q, k, int32([[98, 60]]), visual_index)
    assert mass[0, 0] > 0
    assert mass[0, 0] == mass[0, 2]
    assert torch.equal(mass[0, [1, 3, 4, 5, 6]], zeros(5))


def test_strided_inputs(isa):
    packed = normal(2, 300, 10, 48, seed=1)  # (B, S, heads of q then k, D + padding)
    q, k = (packed[:, :, heads].transpose(1, 2)[..., :32] for heads in (slice(0, 8), slice(8, 10)))
    query_index = arange(500, dtype=torch.int32).reshape(2, 250)[:, 200::2]
    visual_index = arange(400, dtype=torch.int32).reshape(200, 2).t()
    mass, head_mass = zeros(2, 300)[:, :200], zeros(2, 300, 8).transpose(1, 2)[:, :, 100:]
    prefill_mass(q, k, query_index, visual_index, mass)
    dense, _ = run(
        prefill_mass, q.contiguous(), k.contiguous(), query_index.contiguous(), visual_index.contiguous()
    )
    assert same_bits(mass, dense)
    with pytest.raises(ValueError, match=r"head_mass has strides .* expected 1 in the last dimension"):
        prefill_mass(q, k, query_index, visual_index, mass, head_mass=head_mass)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_logits_behave_as_in_softmax(isa, value):
    q, k = prefill_inputs(1, 2, 1, 16, 300)
    q[0, 0] = 1.0
    k[0, 0, 290] = value
    query_index, visual_index = span(280, 300), span(300)
    ours = run(prefill_mass, q, k, query_index, visual_index)
    expected = run(reference.prefill_mass, q, k, query_index, visual_index)
    for result, truth in zip(ours, expected, strict=True):
        torch.testing.assert_close(result, truth, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_of_n_is_n_times_alone(isa, compiled, dtype):
    lengths, slots, rows = [520, 300, 40], [400, 200, 30], [25, 64, 3]
    q, k = prefill_inputs(3, 14, 2, 64, max(lengths), dtype)
    query_index = full((3, max(rows)), -1, dtype=torch.int32)
    visual_index = full((3, max(slots)), -1, dtype=torch.int32)
    for b in range(3):
        query_index[b, : rows[b]] = arange(lengths[b] - rows[b], lengths[b])
        visual_index[b, : slots[b]] = arange(slots[b])
    for with_lse in (False, True):
        lse = log_sum_exp(q, k).float() if with_lse else None
        mass, head_mass = run(prefill_mass, q, k, query_index, visual_index, softmax_lse=lse)
        for b in range(3):
            one, n, length = slice(b, b + 1), slots[b], lengths[b]
            single, head_single = run(
                prefill_mass,
                q[one, :, :length],
                k[one, :, :length],
                query_index[one, : rows[b]],
                visual_index[one, :n],
                softmax_lse=None if lse is None else lse[one, :, :length],
            )
            assert same_bits(single, mass[one, :n])
            assert same_bits(head_single, head_mass[one, :, :n])


def test_threads_do_not_change_bits(isa, compiled, threads):
    length = size(900, 600)
    q, k = prefill_inputs(2, 14, 2, 64, length)
    query_index, visual_index = span(length - 50, length, batch=2), span(length - 100, batch=2)
    results = [run(prefill_mass, q, k, query_index, visual_index) for _ in threads(1, 2, 3, 1)]
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_permuting_slots_permutes_mass(isa):
    q, k = prefill_inputs(1, 8, 2, 64, 600)
    query_index, visual_index = span(560, 600), span(500)
    order = permutation(500, 7)
    mass, head_mass = run(prefill_mass, q, k, query_index, visual_index)
    moved, head_moved = run(prefill_mass, q, k, query_index, visual_index[:, order])
    assert torch.equal(moved, mass[:, order])
    assert torch.equal(head_moved, head_mass[:, :, order])


def test_rows_one_by_one_sum_to_all_rows(isa):
    q, k = prefill_inputs(1, 4, 2, 32, 300)
    query_index, visual_index = span(280, 300), span(270)
    together, _ = run(prefill_mass, q, k, query_index, visual_index)
    one_by_one = torch.zeros_like(together)
    for row in query_index[0]:
        prefill_mass(q, k, row[None, None], visual_index, one_by_one)
    torch.testing.assert_close(one_by_one, together, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("batch", "length", "rows", "slots"), [(0, 9, 2, 3), (2, 0, 2, 3), (2, 9, 0, 3), (2, 9, 2, 0)]
)
def test_empty(batch, length, rows, slots):
    q, k = prefill_inputs(batch, 4, 2, 16, length)
    index = full((batch, rows), 4, dtype=torch.int32)
    mass, _ = run(prefill_mass, q, k, index, full((batch, slots), 4, dtype=torch.int32))
    assert mass.shape == (batch, slots)
    if length == 0 or rows == 0:
        assert torch.equal(mass, torch.zeros_like(mass))


IN_A_FRESH_PROCESS = """
import os, resource, torch, sgl_kernels
if library := os.environ.get("SGL_TEST_LIBRARY"):
    torch.ops.load_library(library)
length = {length}
q, k = torch.randn(1, 4, length, 16), torch.randn(1, 2, length, 16)
index = torch.arange(length, dtype=torch.int32)[None]
mass = torch.zeros(1, length)
sgl_kernels.prefill_mass(q, k, index[:, :9], index[:, :9], mass[:, :9])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sgl_kernels.prefill_mass(q, k, index[:, -64:], index, mass)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_has_no_square_matrix(compiled):
    """The attention matrix would take 1 GiB here, 64 MiB in a small run."""
    length = size(8192, 2048)
    if DEVICE == "cpu":  # resident memory only ever grows, so the test needs a process without a past
        code = IN_A_FRESH_PROCESS.format(length=length)
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
        )
        used = int(result.stdout) * 1024
    else:
        q, k = prefill_inputs(1, 4, 2, 16, length)
        mass = zeros(1, length)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        prefill_mass(q, k, span(length - 64, length), span(length), mass)
        used = torch.cuda.max_memory_allocated() - before
    assert used < 16 * 2**20
