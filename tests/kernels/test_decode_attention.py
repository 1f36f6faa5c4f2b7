import pytest
import torch
from kernel_helpers import (
    DTYPES,
    GEOMETRIES,
    arange,
    assert_as_accurate,
    combinations,
    decode_inputs,
    full,
    int32,
    normal,
    ones,
    permutation,
    relative_error,
    same_bits,
    size,
    span,
    zeros,
)

from sgl_kernels import compositions, decode_attention, reference

OPS = ("decode_attention",)


def run(op, q, k, v, seq_lens, visual_index, dtype=torch.float32):
    batch, heads, slots = q.shape[0], q.shape[1], visual_index.shape[1]
    mass = zeros(batch, slots, dtype=dtype)
    head_mass = zeros(batch, heads, slots, dtype=dtype)
    out = op(q, k, v, seq_lens, visual_index=visual_index, mass=mass, head_mass=head_mass)
    return out, mass, head_mass


@pytest.mark.parametrize(("geometry", "dtype"), combinations(GEOMETRIES, DTYPES), ids=str)
def test_accuracy(isa, geometry, dtype):
    heads, kv_heads, dim = geometry
    slots = 600  # two whole splits and a part
    q, k, v = decode_inputs(2, heads, kv_heads, dim, slots, dtype)
    visual_index = permutation(slots, 4)[:300].int().repeat(2, 1)
    seq_lens = int32([slots, slots])
    out, mass, head_mass = run(decode_attention, q, k, v, seq_lens, visual_index)
    wide = [t.double() for t in (q, k, v)]
    out64, mass64, head_mass64 = run(reference.decode_attention, *wide, seq_lens, visual_index, torch.float64)
    plain_mass = torch.zeros_like(mass)
    plain_out = compositions.eager_decode(q, k, v, visual_index, plain_mass)
    assert_as_accurate("out", out, out64, plain_out)
    assert_as_accurate("mass", mass, mass64, plain_mass)
    # The plain version keeps no head mass; fp32 sums of fp32 probabilities have no excuse to differ by more.
    assert relative_error(head_mass, head_mass64) < 2e-6
    assert relative_error(head_mass.sum(1), mass64) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_lengths_and_garbage_past_them(isa, dtype):
    lengths = [0, 1, 15, 255, 256, 257, 511]
    q, k, v = decode_inputs(len(lengths), 6, 2, 64, 512, dtype)
    visual_index = span(3, 403, batch=len(lengths))
    wide = [t.double() for t in (q, k, v)]
    expected = run(reference.decode_attention, *wide, int32(lengths), visual_index, torch.float64)
    for b, length in enumerate(lengths):
        k[b, :, length:] = torch.nan
        v[b, :, length:] = torch.inf
    out, mass, head_mass = run(decode_attention, q, k, v, int32(lengths), visual_index)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert relative_error(out, expected[0]) < 4 * torch.finfo(dtype).eps
    assert relative_error(mass, expected[1]) < 2e-6
    assert relative_error(head_mass, expected[2]) < 2e-6
    assert torch.equal(mass == 0, expected[1] == 0)


def test_mass_is_conserved(isa):
    q, k, v = decode_inputs(3, 14, 2, 64, 700)
    lengths = int32([700, 300, 1])
    _, mass, head_mass = run(decode_attention, q, k, v, lengths, span(700, batch=3))
    torch.testing.assert_close(mass.sum(1), full((3,), 14.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(head_mass.sum(2), ones(3, 14), rtol=1e-6, atol=0)


def test_mass_is_added_to(isa):
    q, k, v = decode_inputs(1, 4, 2, 32, 100)
    visual_index = span(50)
    _, once, head_once = run(decode_attention, q, k, v, int32([100]), visual_index)
    mass, head_mass = once.clone(), head_once.clone()
    decode_attention(q, k, v, int32([100]), visual_index=visual_index, mass=mass, head_mass=head_mass)
    assert torch.equal(mass, once + once)
    assert torch.equal(head_mass, head_once + head_once)


def test_padding_duplicates_and_out_of_range_slots(isa):
    q, k, v = decode_inputs(1, 4, 2, 32, 100)
    visual_index = int32([[5, -1, 5, 100, 99, 2**31 - 1, -(2**31), 60]])
    _, mass, _ = run(decode_attention, q, k, v, int32([60]), visual_index)
    assert mass[0, 0] > 0
    assert mass[0, 0] == mass[0, 2]
    assert torch.equal(mass[0, [1, 3, 4, 5, 6, 7]], zeros(6))


def test_length_out_of_range_is_clamped(isa):
    q, k, v = decode_inputs(2, 4, 2, 32, 100)
    full = decode_attention(q, k, v, int32([100, 0]))
    assert same_bits(decode_attention(q, k, v, int32([2**31 - 1, -7])), full)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(isa, dtype):
    q = normal(2, 8, 64, seed=1, dtype=dtype)[..., :32]
    cache = normal(2, 300, 2, 4, 48, seed=2, dtype=dtype)  # (B, S, K or V, Hkv, D + padding)
    k, v = (cache[:, :, i].transpose(1, 2)[..., :32] for i in (0, 1))
    wide_index = arange(400, dtype=torch.int32).reshape(2, 200)
    visual_index = wide_index[:, ::2]
    mass = zeros(2, 300)[:, 100:200]
    lens = int32([300, 0, 200, 0])[::2]
    out = decode_attention(q, k, v, lens, visual_index=visual_index, mass=mass)
    dense_mass = zeros(2, 100)
    dense = decode_attention(
        *(t.contiguous() for t in (q, k, v, lens)), visual_index=visual_index.contiguous(), mass=dense_mass
    )
    assert same_bits(out, dense)
    assert same_bits(mass, dense_mass)


def test_softmax_scale(isa):
    q, k, v = decode_inputs(1, 4, 2, 32, 100)
    out = decode_attention(q, k, v, int32([100]), softmax_scale=0.5)
    truth = reference.decode_attention(*(t.double() for t in (q, k, v)), int32([100]), softmax_scale=0.5)
    assert relative_error(out, truth) < 2e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 299, slice(0, 256), slice(None)], ids=str)
def test_non_finite_logits_behave_as_in_softmax(isa, value, where):
    q, k, v = decode_inputs(1, 2, 1, 16, 300)
    q[0, 0] = 1.0  # head 0 sees the value with its sign; head 1 has mixed signs, so inf becomes NaN
    k[0, 0, where] = value
    visual_index = span(300)
    ours = run(decode_attention, q, k, v, int32([300]), visual_index)
    expected = run(reference.decode_attention, q, k, v, int32([300]), visual_index)
    for result, truth in zip(ours, expected, strict=True):
        assert torch.equal(result.isnan(), truth.isnan())
        torch.testing.assert_close(result, truth, equal_nan=True)


def test_huge_logits_do_not_overflow(isa):
    q, k, v = decode_inputs(1, 2, 1, 16, 300)
    ours = run(decode_attention, q * 1e4, k, v, int32([300]), span(300))
    truth = run(reference.decode_attention, q * 1e4, k, v, int32([300]), span(300))
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_of_n_is_n_times_alone(isa, compiled, dtype):
    lengths = [700, 256, 31, 0]
    q, k, v = decode_inputs(4, 14, 2, 64, 700, dtype)
    visual_index = full((4, 500), -1, dtype=torch.int32)
    for b, n in enumerate((500, 200, 31, 0)):
        visual_index[b, :n] = arange(n)
    together = run(decode_attention, q, k, v, int32(lengths), visual_index)
    for b, (length, n) in enumerate(zip(lengths, (500, 200, 31, 0), strict=True)):
        one = slice(b, b + 1)
        # Alone the cache is shorter and the padding gone.
        kv = (k[one, :, : max(1, length)], v[one, :, : max(1, length)])
        out, mass, head_mass = run(decode_attention, q[one], *kv, int32([length]), visual_index[one, :n])
        assert same_bits(out, together[0][one])
        assert same_bits(mass, together[1][one, :n])
        assert same_bits(head_mass, together[2][one, :, :n])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_bits(isa, compiled, threads, dtype):
    slots = size(1500, 700)
    q, k, v = decode_inputs(2, 14, 2, 64, slots, dtype)
    visual_index = span(slots - 300, batch=2)
    results = [
        run(decode_attention, q, k, v, int32([slots, slots // 2]), visual_index) for _ in threads(1, 2, 3, 1)
    ]
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_permuting_keys_permutes_mass(isa):
    q, k, v = decode_inputs(1, 8, 2, 64, 600)
    visual_index = span(600)
    order = permutation(600, 5)
    out, mass, _ = run(decode_attention, q, k, v, int32([600]), visual_index)
    moved_out, moved, _ = run(decode_attention, q, k[:, :, order], v[:, :, order], int32([600]), visual_index)
    torch.testing.assert_close(moved, mass[:, order], rtol=2e-6, atol=0)
    torch.testing.assert_close(moved_out, out, rtol=1e-5, atol=1e-6)
    # Permuting only the slots moves the very same numbers.
    _, picked, _ = run(decode_attention, q, k, v, int32([600]), visual_index[:, order])
    assert same_bits(picked, mass[:, order])


def test_splits_do_not_show(isa):
    """Keys moved across a split boundary by an ignorable key in front give the same answer."""
    q, k, v = decode_inputs(1, 4, 2, 32, 513)
    k[:, :, 0] = -q.reshape(1, 2, 2, 32).mean(2) * 1e3
    q = q.reshape(1, 2, 2, 32).mean(2).repeat_interleave(2, 1)
    shifted = decode_attention(q, k, v, int32([513]))
    plain = decode_attention(q, k[:, :, 1:], v[:, :, 1:], int32([512]))
    torch.testing.assert_close(shifted, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4, 2, 16, 8), (2, 0, 2, 16, 8), (2, 4, 2, 16, 0)])
def test_empty(shape):
    batch, heads, kv_heads, dim, slots = shape
    q, k, v = decode_inputs(batch, heads, kv_heads, dim, slots)
    mass = zeros(batch, 3)
    visual_index = zeros(batch, 3, dtype=torch.int32)
    out = decode_attention(q, k, v, full((batch,), slots).int(), visual_index=visual_index, mass=mass)
    assert out.shape == (batch, heads, dim)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(mass, torch.zeros_like(mass))
