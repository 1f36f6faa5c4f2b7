"""Means with bootstrap intervals. Groups are drawn: questions about one image share its difficulty."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from sgl_runtime.errors import SGLError

_DRAWN_AT_ONCE = 1 << 22  # group numbers: 32 MiB


class Interval(NamedTuple):
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the mean of ``values`` and its percentile interval from the cluster bootstrap.

    Whole groups are drawn with replacement, and the mean of a draw is over its values, so that a group counts
    as often as it has values (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, sections 8.3 and
    13.3).

    Parameters
    ----------
    values
        (n,) numbers: scores, seconds.
    groups
        (n,) names or numbers of what the values are about, for example images. None: each is its own group.
    level
        Of the interval, in (0, 1).
    resamples
        Draws.
    seed
        The same gives the same interval.

    Raises
    ------
    SGLError
        There are no values, one is not finite, or there are not as many groups as values.
    """
    value = finite("values", values)
    if not 0 < level < 1:
        raise SGLError(f"The level of an interval must lie in (0, 1), got {level!r}; 0.95 is usual.")
    group = group_numbers(groups, len(value))
    total, count = np.bincount(group, weights=value), np.bincount(group)
    generator, drawn = np.random.default_rng(seed), []
    for first in range(0, resamples, step := max(1, _DRAWN_AT_ONCE // len(total))):
        draws = generator.integers(0, len(total), (min(step, resamples - first), len(total)))
        drawn.append(total[draws].sum(1) / count[draws].sum(1))
    low, high = np.percentile(np.concatenate(drawn), [50 * (1 - level), 50 * (1 + level)])
    return Interval(float(value.mean()), float(low), float(high))


def bootstrap_difference(
    values: ArrayLike,
    baseline: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return `bootstrap` of ``values - baseline``, two results of the same examples in the same order.

    Pairing takes out what makes an example hard for both; the interval excludes 0 where two separate ones may
    still overlap.
    """
    value, base = finite("values", values), finite("baseline", baseline)
    if value.shape != base.shape:
        raise SGLError(
            f"A paired difference needs two results per example, got {len(value)} values and {len(base)} of "
            "the baseline. Leave out the examples that only one of them has."
        )
    return bootstrap(value - base, groups, level=level, resamples=resamples, seed=seed)


def group_means(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return the mean of each group, (groups,), of ``values`` (n,) in the groups of `group_numbers`."""
    means: np.ndarray = np.bincount(group, weights=values) / np.bincount(group)
    return means


def group_numbers(groups: ArrayLike | None, size: int) -> np.ndarray:
    """Return (n,) numbers from 0 for ``groups``, in the order of their sorted names; None: each its own."""
    if groups is None:
        return np.arange(size)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    if group.shape != (size,):
        raise SGLError(
            f"Every example belongs to one group, got groups of shape {np.shape(groups)} for {size} examples."
        )
    return group


def finite(name: str, values: ArrayLike) -> np.ndarray:
    """Return ``values`` as a float64 vector.

    Raises
    ------
    SGLError
        It is empty, not one-dimensional, or holds NaN or an infinity; the message counts them.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise SGLError(
            f"{name} must be one number per example, of at least one, got an array of shape {array.shape}."
        )
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise SGLError(
            f"{name} must be finite, but {bad.size} of {array.size} are not, the first at index {bad[0]}: "
            f"{array[bad[0]]}. Leave out the examples that failed."
        )
    return array
