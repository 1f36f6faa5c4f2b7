"""P-values for the mean of bounded values that hold at any sample size and for any distribution."""

from __future__ import annotations

import math

import numpy as np

_LARGEST_BET = 0.75  # of what could lose everything in one step (arXiv 2010.09686: 1/2 or 3/4)


def binomial_cdf(successes: int, trials: int, share: float) -> float:
    """Return ``P(X <= successes)`` for ``X ~ Binomial(trials, share)``.

    The exact p-value of "the share is above ``share``" after ``successes``; the shares that it does not
    reject make the interval of Clopper and Pearson (Biometrika 26, 1934).
    """
    if successes >= trials or share <= 0:
        return 1.0 if successes >= 0 else 0.0
    if successes < 0 or share >= 1:
        return 0.0
    k = np.arange(1, successes + 1)
    steps = np.log(trials - k + 1) - np.log(k) + math.log(share) - math.log1p(-share)
    log_mass = trials * math.log1p(-share) + np.concatenate([[0.0], np.cumsum(steps)])
    top = float(log_mass.max())
    return min(1.0, math.exp(top) * float(np.exp(log_mass - top).sum()))


def hoeffding_bentkus(mean: float, size: int, bound: float) -> float:
    """Return a p-value of "the expectation is above ``bound``" for ``size`` values in [0, 1].

    The better of two tails (Bates et al., arXiv 2101.02703; Angelopoulos et al., arXiv 2110.01052). It
    depends on the values through their mean alone and grows with it.

    Parameters
    ----------
    mean
        Of independent, identically distributed values in [0, 1].
    bound
        In (0, 1).
    """
    low = min(mean, bound)
    divergence = _times_log(low, bound) + _times_log(1 - low, 1 - bound)
    bentkus = math.e * binomial_cdf(math.ceil(size * mean), size, bound)
    return min(1.0, math.exp(-size * divergence), bentkus)


def _times_log(share: float, other: float) -> float:
    return share * math.log(share / other) if share > 0 else 0.0


def betting_p_value(values: np.ndarray, bound: float, delta: float) -> float:
    """Return a p-value of "the expectation is above ``bound``" that adapts to the variance.

    One over the most that a gambler ever had who started with 1 and bet, value by value, that the next is
    below ``bound``: above it no strategy grows, whatever the distribution (Ville's inequality). The bets are
    the predictable plug-in ones of Waudby-Smith and Ramdas (arXiv 2010.09686; as a bound of a risk in arXiv
    2101.02703, section 3.1), sized for a test at ``delta``.

    Parameters
    ----------
    values
        (n,) in [0, 1], independent and identically distributed, or in a random order.
    bound
        In (0, 1).
    delta
        Level at which the test is to be strong; the p-value is valid at every level.
    """
    seen = np.arange(1, len(values) + 1)
    mean = (0.5 + np.cumsum(values)) / (1 + seen)
    variance = (0.25 + np.cumsum((values - mean) ** 2)) / (1 + seen)
    before = np.concatenate([[0.25], variance[:-1]])
    bet = np.minimum(np.sqrt(2 * math.log(1 / delta) / (len(values) * before)), _LARGEST_BET / (1 - bound))
    return math.exp(-max(0.0, float(np.cumsum(np.log1p(bet * (bound - values))).max())))
