"""The bootstrap against normal theory, against its formula, and with groups that answer as one."""

from __future__ import annotations

import numpy as np
import pytest

from sgl_runtime.errors import SGLError
from sgl_runtime.evaluation import intervals
from sgl_runtime.evaluation.intervals import bootstrap, bootstrap_difference


def test_interval_covers_a_binomial_mean() -> None:
    mean, low, high = bootstrap(np.array([1.0] * 80 + [0.0] * 20))
    assert mean == pytest.approx(0.8)
    assert low == pytest.approx(0.8 - 1.96 * 0.04, abs=0.02)
    assert high == pytest.approx(0.8 + 1.96 * 0.04, abs=0.02)


def test_groups_that_answer_as_one_count_once() -> None:
    """Four copies of each question tell no more than one: the interval is that of 25 questions."""
    right = np.repeat([1.0] * 20 + [0.0] * 5, 4)
    names = np.repeat([f"scene {number}" for number in range(25)], 4)
    assert bootstrap(right, names) == pytest.approx(bootstrap(right, np.repeat(np.arange(25), 4)), abs=0.03)
    mean, low, high = bootstrap(right, names)
    assert mean == pytest.approx(0.8)
    assert high - low == pytest.approx(2 * 1.96 * 0.08, abs=0.04)
    assert bootstrap(right).high - bootstrap(right).low < 0.6 * (high - low)


def test_groups_of_unequal_size_count_by_their_questions() -> None:
    values, groups = np.array([1.0, 1.0, 1.0, 0.0]), np.array([7, 7, 7, 9])
    assert bootstrap(values, groups) == (0.75, 0.0, 1.0)


def test_draws_in_pieces_are_the_draws_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=37)
    draws = np.random.default_rng(5).integers(0, 37, (2000, 37))
    low, high = np.percentile(values[draws].mean(1), [5, 95])
    for piece in (1, 1000, 1 << 22):
        monkeypatch.setattr(intervals, "_DRAWN_AT_ONCE", piece)
        got = bootstrap(values, level=0.9, seed=5)
        np.testing.assert_allclose(got, (values.mean(), low, high), rtol=1e-12)


def test_seed_decides() -> None:
    values = np.random.default_rng(2).normal(size=50)
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values, seed=1) != bootstrap(values)


def test_coverage_over_draws_of_scenes() -> None:
    """95 % intervals cover the true mean in 92 to 97 % of 400 draws of 60 scenes of 4 questions."""
    generator, covered = np.random.default_rng(3), 0
    scenes = np.repeat(np.arange(60), 4)
    for _ in range(400):
        difficulty = generator.uniform(0.2, 1.0, 60)[scenes]
        _, low, high = bootstrap(generator.random(240) < difficulty, scenes, resamples=500)
        covered += low <= 0.6 <= high
    assert 0.92 <= covered / 400 <= 0.97


def test_paired_difference_excludes_what_both_share() -> None:
    difficulty = np.random.default_rng(4).random(100)
    got = bootstrap_difference(difficulty + 0.1, difficulty)
    np.testing.assert_allclose(got, (0.1, 0.1, 0.1), rtol=1e-9)
    assert bootstrap(difficulty + 0.1).low < bootstrap(difficulty).high


@pytest.mark.parametrize(
    ("values", "groups", "told"),
    [
        ([], None, "at least one"),
        ([[1.0]], None, r"shape \(1, 1\)"),
        ([1.0, np.nan, np.inf], None, "2 of 3 are not, the first at index 1: nan"),
        ([1.0, 0.0], ["a"], "for 2 examples"),
    ],
)
def test_bad_input_is_told(values: list[float], groups: list[str] | None, told: str) -> None:
    with pytest.raises(SGLError, match=told):
        bootstrap(values, groups)


def test_sizes_and_levels_are_checked() -> None:
    with pytest.raises(SGLError, match="got 2 values and 1"):
        bootstrap_difference([1.0, 2.0], [1.0])
    for level in (0, 1, 95, float("nan")):
        with pytest.raises(SGLError, match="level"):
            bootstrap([1.0, 2.0], level=level)
