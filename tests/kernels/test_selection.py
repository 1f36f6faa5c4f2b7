import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from kernel_helpers import (
    SMALL,
    arange,
    full,
    int32,
    normal,
    ones,
    permutation,
    same_bits,
    size,
    span,
    tensor,
    uniform,
    zeros,
)

from sgl_kernels import prune_gather, reference, select_tokens

TINY = 1e-42  # subnormal in fp32


def brute_force(mass, visual_index, seq_len, num_keep, out_len):
    """The rule of the design in plain Python: no tensor code in common with any implementation."""
    slots = [(m, p) for m, p in zip(mass.tolist(), visual_index.tolist(), strict=True) if 0 <= p < seq_len]
    nan_last = sorted(slots, key=lambda s: (s[0] != s[0], -s[0] if s[0] == s[0] else 0.0, s[1]))
    kept = {position for _, position in nan_last[: max(0, num_keep)]}
    visual = {position for _, position in slots}
    return [p for p in range(max(0, seq_len)) if p not in visual or p in kept][:out_len]


def check(mass, visual_index, seq_lens, num_keep, out_len):
    kept_index, kept_lens = select_tokens(mass, visual_index, seq_lens, num_keep, out_len=out_len)
    assert kept_index.dtype == kept_lens.dtype == torch.int32
    for b, length in enumerate(seq_lens.tolist()):
        keep = int(num_keep[b]) if isinstance(num_keep, torch.Tensor) else num_keep
        expected = brute_force(mass[b], visual_index[b], length, keep, out_len)
        assert kept_lens[b] == len(expected)
        assert kept_index[b].tolist() == expected + [-1] * (out_len - len(expected))
    plain = reference.select_tokens(mass, visual_index, seq_lens, num_keep, out_len=out_len)
    assert torch.equal(kept_index, plain[0])
    assert torch.equal(kept_lens, plain[1])


def adversarial_masses(n):
    rising = arange(n).float()
    random = uniform(n, seed=8)
    hot = zeros(n)
    hot[n // 3] = 1.0
    sparse = torch.where(random > 0.95, random, 0.0)
    cut = full((n,), 0.5)
    cut[:: n // 8 or 1] = 0.9
    special = random.clone()
    special[::5], special[1::5], special[2::5] = torch.nan, torch.inf, -torch.inf
    signed_zeros = torch.where(random > 0.5, 0.0, -0.0)
    subnormal = (random * 10).round() * TINY
    negative = torch.where(random > 0.5, -random, random)
    return {
        "all equal": ones(n),
        "all zero": zeros(n),
        "mostly zeros": sparse,
        "ties at the cut": cut,
        "all nan": full((n,), torch.nan),
        "nan, inf and -inf": special,
        "signed zeros": signed_zeros,
        "subnormals": subnormal,
        "rising": rising,
        "falling": rising.flip(0),
        "one hot spot": hot,
        "both signs": negative,
        "random": random,
    }


@pytest.mark.parametrize("name", adversarial_masses(8))
def test_adversarial_masses(name):
    n = size(300, 70)
    mass = adversarial_masses(n)[name][None]
    visual_index = span(20, 20 + n)
    for num_keep in (0, 1, n // 5, n, n + 5) if SMALL else (0, 1, 2, 60, n - 1, n, n + 5):
        check(mass, visual_index, int32([n + 50]), num_keep, n + 50)


@pytest.mark.parametrize("name", ["random", "nan, inf and -inf", "all equal"])
def test_large(name):
    n = 32768
    mass = adversarial_masses(n)[name][None]
    check(mass, span(5, 5 + n), int32([n + 9]), n // 5, n + 9)


def test_order_of_special_values():
    mass = tensor([[torch.nan, -torch.inf, -1.0, -TINY, -0.0, 0.0, TINY, 1.0, torch.inf]])
    visual_index = span(9)
    best_first = [8, 7, 6, 4, 5, 3, 2, 1, 0]
    for keep in range(10):
        kept_index, kept_lens = select_tokens(mass, visual_index, int32([9]), keep)
        assert kept_index[0, : kept_lens[0]].tolist() == sorted(best_first[:keep])


def test_lower_position_wins_whatever_the_order_of_slots():
    mass = tensor([[1.0, 1.0, 1.0, 1.0]])
    kept_index, _ = select_tokens(mass, int32([[6, 2, 4, 0]]), int32([7]), 2)
    assert kept_index[0].tolist() == [0, 1, 2, 3, 5, -1, -1]


def test_default_width_is_the_longest_request():
    kept_index, kept_lens = select_tokens(uniform(2, 4), int32([[0, 1, 2, 3]] * 2), int32([6, 9]), 2)
    assert kept_index.shape == (2, 9)
    assert kept_lens.tolist() == [4, 7]


cases = st.integers(0, 40).flatmap(
    lambda n: st.tuples(
        st.lists(
            st.one_of(
                st.sampled_from([0.0, -0.0, 1.0, torch.nan, torch.inf, -torch.inf, TINY, -TINY]),
                st.floats(width=32),
            ),
            min_size=n,
            max_size=n,
        ),
        st.lists(
            st.one_of(st.integers(-3, 60), st.sampled_from([2**31 - 1, -(2**31)])), min_size=n, max_size=n
        ),
        st.integers(-2, 60),
        st.integers(-1, 45),
        st.integers(0, 64),
    )
)


@hypothesis.settings(max_examples=size(300, 30), deadline=None)
@hypothesis.given(cases)
def test_any_input(case):
    """Duplicates, out-of-range positions, any order, any width."""
    masses, positions, seq_len, num_keep, out_len = case
    mass = tensor([masses], dtype=torch.float32)
    visual_index = tensor([positions], dtype=torch.int32)
    check(mass, visual_index, int32([seq_len]), int32([num_keep]), out_len)


@hypothesis.settings(max_examples=size(50, 8), deadline=None)
@hypothesis.given(st.integers(1, 30), st.integers(0, 2**31 - 1))
def test_permuting_slots_changes_nothing(n, seed):
    mass = (uniform(1, n, seed=seed) * 4).floor()
    visual_index = permutation(2 * n, seed)[:n].int()[None]
    order = permutation(n, seed + 1)
    keep = n // 2
    one = select_tokens(mass, visual_index, int32([2 * n]), keep)
    other = select_tokens(mass[:, order], visual_index[:, order], int32([2 * n]), keep)
    assert torch.equal(one[0], other[0])


def ragged_batch():
    slots, lengths, keeps = [50, 20, 0, 1], [80, 33, 12, 1], [10, 20, 0, 1]
    mass = uniform(4, 50, seed=9)
    visual_index = full((4, 50), -1, dtype=torch.int32)
    for b, n in enumerate(slots):
        visual_index[b, :n] = arange(min(5, lengths[b] - n), min(5, lengths[b] - n) + n)
    return mass, visual_index, int32(lengths), int32(keeps), slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8], ids=str)
def test_gather(dtype):
    mass, visual_index, seq_lens, num_keep, _ = ragged_batch()
    hidden = (normal(4, 80, 33, seed=10) * 50).to(dtype)
    position_ids = arange(3 * 4 * 80).reshape(3, 4, 80)
    extras = (
        position_ids.permute(1, 2, 0),
        normal(4, 80, 2, 7, seed=11),
        arange(320).reshape(4, 80) > 9,
    )
    out = prune_gather(hidden, mass, visual_index, seq_lens, num_keep, extras=extras)
    hidden_out, kept_index, kept_lens, extras_out = out
    expected = select_tokens(mass, visual_index, seq_lens, num_keep, out_len=80)
    assert torch.equal(kept_index, expected[0])
    assert torch.equal(kept_lens, expected[1])
    assert kept_lens.tolist() == [40, 33, 12, 1]
    for source, result in zip((hidden, *extras), (hidden_out, *extras_out), strict=True):
        assert result.dtype == source.dtype
        for b, n in enumerate(kept_lens.tolist()):
            assert torch.equal(result[b, :n], source[b, kept_index[b, :n].long()])
            assert not result[b, n:].any()


def test_gather_exact_width():
    mass, visual_index = uniform(1, 50, seed=12), span(5, 55)
    hidden = normal(1, 80, 16)
    hidden_out, kept_index, kept_lens, extras_out = prune_gather(
        hidden, mass, visual_index, int32([80]), 10, out_len=40
    )
    assert hidden_out.shape == (1, 40, 16)
    assert kept_lens.tolist() == [40]
    assert torch.equal(hidden_out[0], hidden[0, kept_index[0].long()])
    assert extras_out == ()


def test_too_narrow_drops_the_highest_positions():
    mass, visual_index = uniform(1, 50, seed=12), span(5, 55)
    hidden = normal(1, 80, 16)
    full = prune_gather(hidden, mass, visual_index, int32([80]), 10)
    narrow = prune_gather(hidden, mass, visual_index, int32([80]), 10, out_len=7)
    assert narrow[2].tolist() == [7]
    assert torch.equal(narrow[1], full[1][:, :7])
    assert torch.equal(narrow[0], full[0][:, :7])


def test_gather_never_reads_past_the_sequence():
    hidden = normal(1, 20, 4)
    visual_index = int32([[3, 25, 2**31 - 1, -9, 19]])
    hidden_out, kept_index, kept_lens, _ = prune_gather(
        hidden, uniform(1, 5), visual_index, int32([2**31 - 1]), 0
    )
    assert kept_lens.tolist() == [18]
    assert torch.equal(hidden_out[0, :18], hidden[0, kept_index[0, :18].long()])


def test_strided_hidden():
    mass, visual_index, seq_lens, num_keep, _ = ragged_batch()
    hidden = normal(80, 4, 40).transpose(0, 1)[..., 3:20]
    strided = prune_gather(hidden, mass, visual_index, seq_lens, num_keep)
    dense = prune_gather(hidden.contiguous(), mass, visual_index, seq_lens, num_keep)
    assert same_bits(strided[0], dense[0])


def test_batch_of_n_is_n_times_alone(threads):
    mass, visual_index, seq_lens, num_keep, slots = ragged_batch()
    hidden = normal(4, 80, 700)
    together = prune_gather(hidden, mass, visual_index, seq_lens, num_keep)
    for _ in threads(1, 3):
        for b, length in enumerate(seq_lens.tolist()):
            one = slice(b, b + 1)
            alone = prune_gather(
                hidden[one, :length],
                mass[one, : slots[b]],
                visual_index[one, : slots[b]],
                seq_lens[one],
                int(num_keep[b]),
            )
            assert same_bits(alone[0], together[0][one, :length])
            assert torch.equal(alone[1], together[1][one, :length])


@pytest.mark.parametrize(("batch", "length", "slots"), [(0, 8, 3), (2, 0, 3), (2, 8, 0)])
def test_empty(batch, length, slots):
    hidden, mass = normal(batch, length, 4), uniform(batch, slots)
    visual_index = span(slots, batch=batch)
    seq_lens = full((batch,), length).int()
    hidden_out, kept_index, kept_lens, _ = prune_gather(hidden, mass, visual_index, seq_lens, 1)
    assert hidden_out.shape == (batch, length, 4)
    assert kept_lens.tolist() == [max(0, length - max(0, slots - 1))] * batch
    assert select_tokens(mass, visual_index, seq_lens, 1)[0].shape[0] == batch
    assert torch.equal(kept_index, reference.prune_gather(hidden, mass, visual_index, seq_lens, 1)[1])


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_empty_with_permuted_extras(batch, length):
    """M-RoPE position ids of no request or no position: `.contiguous()` leaves their strides as they are."""
    extras = (
        zeros(3, batch, length, dtype=torch.long).permute(1, 2, 0),
        zeros(batch, length, 2, 7).transpose(2, 3),
    )
    hidden, mass, lens = zeros(batch, length, 4), zeros(batch, 3), zeros(batch).int()
    visual_index = full((batch, 3), -1).int()
    out = prune_gather(hidden, mass, visual_index, lens, 1, extras=extras, out_len=6)
    assert out[0].shape == (batch, 6, 4)
    assert [x.shape for x in out[3]] == [(batch, 6, 3), (batch, 6, 7, 2)]
    assert not any(x.any() for x in (out[0], *out[3]))
    assert out[2].tolist() == [0] * batch


def test_hidden_of_width_one():
    """A dimension of size 1 has no stride that could be wrong."""
    hidden = normal(1, 1, 5).transpose(1, 2)
    assert hidden.stride(2) != 1
    mass, visual_index = uniform(1, 4)[:, :2][:, 1:], int32([[2]])
    hidden_out, kept_index, _, _ = prune_gather(hidden, mass, visual_index, int32([5]), 0, out_len=4)
    assert torch.equal(hidden_out[0], hidden[0, kept_index[0].long()])


@pytest.mark.parametrize("num_keep", [np.int64(3), np.int32(3), np.array(3), 2**63 - 1], ids=repr)
def test_num_keep_of_any_integer_type(num_keep):
    mass, visual_index = uniform(1, 5), span(5)
    arguments = mass, visual_index, int32([8])
    expected = select_tokens(*arguments, min(5, int(num_keep)))
    assert torch.equal(select_tokens(*arguments, num_keep)[0], expected[0])
    gathered = prune_gather(normal(1, 8, 4), *arguments, num_keep, out_len=np.int64(8))
    assert torch.equal(gathered[1], expected[0])
