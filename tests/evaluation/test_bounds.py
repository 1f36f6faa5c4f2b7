"""Tails and p-values: published values, exact sums, and p-values small no more often than they may be."""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np
import pytest

from sgl_runtime.evaluation.bounds import betting_p_value, binomial_cdf, hoeffding_bentkus


@pytest.mark.parametrize("trials", [1, 7, 40, 1000])
@pytest.mark.parametrize("share", [1e-6, 0.03, 0.5, 0.97])
def test_binomial_cdf_is_the_sum_of_exact_terms(trials: int, share: float) -> None:
    terms = [math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(trials + 1)]
    for successes in {0, trials // 3, trials // 2, trials - 1}:
        expected = math.fsum(terms[: successes + 1])
        assert binomial_cdf(successes, trials, share) == pytest.approx(expected, rel=1e-10)


def test_binomial_cdf_of_many_trials_is_the_exact_fraction() -> None:
    trials, ways, total = 20_000, 1, 1
    for k in range(1, 9_901):
        ways = ways * (trials - k + 1) // k
        total += ways
    assert binomial_cdf(9_900, trials, 0.5) == pytest.approx(total / 2**trials, rel=1e-9)


def test_binomial_cdf_at_the_ends() -> None:
    assert binomial_cdf(-1, 5, 0.5) == 0 == binomial_cdf(4, 5, 1.0)
    assert binomial_cdf(5, 5, 0.5) == 1 == binomial_cdf(0, 5, 0.0)


# Newcombe, Statistics in Medicine 17 (1998), Table I, method 5: 95 % intervals of Clopper and Pearson.
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2527, 0.3676), (15, 148, 0.0578, 0.1617), (0, 20, 0.0, 0.1684), (1, 29, 0.0009, 0.1776)],
)
def test_shares_not_rejected_are_the_published_intervals(
    successes: int, trials: int, low: float, high: float
) -> None:
    def limit(count: int) -> float:
        shares = np.linspace(0, 1, 10**6, endpoint=False)
        first = bisect_left(shares, True, key=lambda share: binomial_cdf(count, trials, share) <= 0.025)
        return float(shares[first]) if first < len(shares) else 1.0

    assert limit(successes) == pytest.approx(high, abs=6e-5)
    assert 1 - limit(trials - successes) == pytest.approx(low, abs=6e-5)


def test_hoeffding_bentkus_by_hand() -> None:
    """No loss at all: (1 - bound)^n. Half the bound, n = 100: e times the binomial tail is the smaller."""
    assert hoeffding_bentkus(0.0, 30, 0.1) == pytest.approx(0.9**30)
    divergence = 0.1 * math.log(0.1 / 0.2) + 0.9 * math.log(0.9 / 0.8)
    tail = math.e * math.fsum(math.comb(100, k) * 0.2**k * 0.8 ** (100 - k) for k in range(11))
    assert tail < math.exp(-100 * divergence)
    assert hoeffding_bentkus(0.1, 100, 0.2) == pytest.approx(tail)
    assert hoeffding_bentkus(0.0975, 100, 0.2) == pytest.approx(tail)  # 9.75 losses count as 10
    assert hoeffding_bentkus(0.5, 100, 0.2) == 1.0
    means = [hoeffding_bentkus(mean, 50, 0.3) for mean in np.linspace(0, 1, 101)]
    assert means == sorted(means)


def test_betting_by_hand() -> None:
    """Two values of 0 against a bound of 1/2, in the paper's steps."""
    first = min(math.sqrt(2 * math.log(10) / (2 * 0.25)), 0.75 / 0.5)
    variance = (0.25 + 0.25**2) / 2  # after the first value, whose running mean is 1/4
    second = min(math.sqrt(2 * math.log(10) / (2 * variance)), 0.75 / 0.5)
    expected = 1 / ((1 + first / 2) * (1 + second / 2))
    assert betting_p_value(np.zeros(2), 0.5, 0.1) == pytest.approx(expected)


def test_betting_takes_the_best_moment() -> None:
    assert betting_p_value(np.array([0.0, 1.0, 1.0]), 0.5, 0.1) < 1
    assert betting_p_value(np.ones(9), 0.5, 0.1) == 1.0


@pytest.mark.parametrize("delta", [0.05, 0.2])
@pytest.mark.parametrize(
    ("support", "chances"),
    [
        ((0.0, 1.0), (0.9, 0.1)),
        ((0.0, 0.5, 1.0), (0.02, 0.94, 0.04)),  # a loss of 2 % in [-1, 1]: mostly none, seldom a win
        ((0.25, 0.5, 0.75, 1.0), (0.1, 0.6, 0.2, 0.1)),
    ],
)
def test_p_values_are_superuniform_at_the_boundary(
    support: tuple[float, ...], chances: tuple[float, ...], delta: float
) -> None:
    """At most u of the p-values are below u where the expectation is the bound; 4 standard errors."""
    draws, size = 4000, 120
    bound = float(np.dot(support, chances))
    values = np.random.default_rng(0).choice(support, (draws, size), p=chances)
    for p_values in (
        np.array([betting_p_value(row, bound, delta) for row in values]),
        np.array([hoeffding_bentkus(float(row.mean()), size, bound) for row in values]),
    ):
        for level in (0.01, 0.05, 0.1, 0.2, 0.5):
            margin = 4 * math.sqrt(level * (1 - level) / draws)
            assert (p_values <= level).mean() <= level + margin


def test_betting_adapts_to_the_variance() -> None:
    """The loss of 1,000 routed answers, 99 % of them the same; Hoeffding-Bentkus sees a coin's."""
    loss = np.random.default_rng(1).permutation([1.0] * 6 + [-1.0] * 4 + [0.0] * 990)
    rescaled, bound = (loss + 1) / 2, (0.02 + 1) / 2
    assert betting_p_value(rescaled, bound, 0.1) < 0.01
    assert hoeffding_bentkus(float(rescaled.mean()), 1000, bound) > 0.5
