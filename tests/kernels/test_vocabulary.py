import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from kernel_helpers import (
    DTYPES,
    arange,
    assert_as_accurate,
    combinations,
    empty,
    normal,
    same_bits,
    size,
    tensor,
    zeros,
)

from sgl_kernels import compositions, greedy_token, reference, token_logprobs

OPS = ("greedy_token", "token_logprobs")
SIZES = [1, 2, 15, 16, 17, 100, 4095, 4096, 4097, 20000]


@pytest.mark.parametrize(("vocab", "dtype"), combinations(SIZES, DTYPES), ids=str)
def test_accuracy(isa, vocab, dtype):
    logits = normal(3, vocab, seed=1, dtype=dtype) * 4
    targets = tensor([0, vocab - 1, vocab // 2])
    token, logprob = greedy_token(logits)
    assert torch.equal(token, logits.double().argmax(-1))
    truth = logits.double().log_softmax(-1)
    picked = token_logprobs(logits, targets)
    if vocab == 1:
        assert torch.equal(logprob, zeros(3))
        assert torch.equal(picked, zeros(3))
        return
    plain = compositions.log_softmax_greedy(logits)[1]
    assert_as_accurate("logprob", logprob, truth.max(-1).values, plain, unit=1.0)
    plain = compositions.log_softmax_gather(logits, targets)
    assert_as_accurate("picked", picked, truth.gather(-1, targets[:, None])[:, 0], plain, unit=1.0)


def test_ties_go_to_the_lowest_id(isa):
    logits = zeros(4, 9000)
    logits[1, [8999, 4096, 4095]] = 1.0
    logits[2] = -0.0
    logits[2, 3] = 0.0
    logits[3] = -torch.inf
    token, logprob = greedy_token(logits)
    assert token.tolist() == [0, 4095, 0, 0]
    assert logprob[3].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_ranks_below_everything_and_shows_in_the_logprob(isa, dtype):
    logits = normal(5, 9000, seed=2).to(dtype)
    logits[0, 100] = torch.nan
    logits[1] = torch.nan
    logits[2] = torch.nan
    logits[2, 5000] = -torch.inf
    logits[3, 17] = torch.inf
    token, logprob = greedy_token(logits)
    finite = logits[0].float().nan_to_num(-1e9)
    assert token.tolist()[:4] == [int(finite.argmax()), 0, 5000, 17]
    assert logprob.isnan().tolist() == [True, True, True, True, False]
    plain = reference.greedy_token(logits)
    assert torch.equal(token, plain[0])
    assert torch.equal(logprob.isnan(), plain[1].isnan())
    assert token_logprobs(logits, arange(5)).isnan().tolist() == [True, True, True, True, False]


def test_masked_tokens(isa):
    logits = normal(2, 5000, seed=3)
    logits[:, ::2] = -torch.inf
    token, logprob = greedy_token(logits)
    assert (token % 2 == 1).all()
    torch.testing.assert_close(logprob, logits.log_softmax(-1).max(-1).values)
    assert token_logprobs(logits, tensor([0, 2])).tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_targets_outside_the_vocabulary(isa, dtype):
    logits = normal(5, 100)
    targets = tensor([-1, 100, -2, 2**31 - 1, 99], dtype=dtype)
    result = token_logprobs(logits, targets)
    assert result[0] == 0
    assert result[1:4].isnan().all()
    torch.testing.assert_close(result[4], logits[4].log_softmax(-1)[99])


def test_leading_dimensions_and_strides(isa):
    logits = normal(2, 3, 5, 60)[:, :, 1:4, 7:]
    targets = arange(18).reshape(2, 3, 3)
    token, logprob = greedy_token(logits)
    assert token.shape == logprob.shape == (2, 3, 3)
    assert torch.equal(token, logits.argmax(-1))
    expected = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(token_logprobs(logits, targets), expected)
    last = greedy_token(logits[:, -1, 0])
    assert torch.equal(last[0], token[:, -1, 0])
    single = greedy_token(logits[0, 0, 0])
    assert single[0].shape == ()
    assert same_bits(single[1], logprob[0, 0, 0])


def test_rows_alone_and_threads_do_not_change_bits(isa, compiled, threads):
    logits = normal(5, size(40000, 10000))
    targets = arange(5) * 7
    results = [(*greedy_token(logits), token_logprobs(logits, targets)) for _ in threads(1, 2, 3)]
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
    for row in range(5):
        one = slice(row, row + 1)
        alone = (*greedy_token(logits[one]), token_logprobs(logits[one], targets[one]))
        assert all(same_bits(a, b[one]) for a, b in zip(alone, results[0], strict=True))


@hypothesis.settings(max_examples=size(100, 15), deadline=None)
@hypothesis.given(
    st.lists(
        st.one_of(st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, -0.0, -math.inf])),
        min_size=1,
        max_size=70,
    )
)
def test_any_row(values):
    logits = tensor([values], dtype=torch.float32)
    token, logprob = greedy_token(logits)
    plain_token, plain_logprob = reference.greedy_token(logits.double())
    assert torch.equal(token, plain_token)
    torch.testing.assert_close(logprob.double(), plain_logprob, equal_nan=True, rtol=1e-5, atol=2e-6)


def test_no_rows():
    token, logprob = greedy_token(empty(0, 10))
    assert token.shape == logprob.shape == (0,)
    assert token_logprobs(empty(0, 10), empty(0, dtype=torch.int64)).shape == (0,)


def test_a_nearly_sure_token_keeps_its_small_logprob(isa):
    """The log-sum-exp in one piece would round it to 0; a sum of 1 and little errs by an ulp of 1."""
    logits = tensor([[176.0, 164.0, 150.0]])
    truth = logits.double().log_softmax(-1)[:, 0]
    _, greedy = greedy_token(logits)
    given = token_logprobs(logits, tensor([0]))
    torch.testing.assert_close(greedy.double(), truth, rtol=0, atol=1.2e-7)
    torch.testing.assert_close(given.double(), truth, rtol=0, atol=1.2e-7)
