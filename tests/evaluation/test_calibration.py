"""The promises, kept over a thousand draws of each of several worlds whose true loss is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from sgl_runtime import SGLConfig
from sgl_runtime.errors import ConfigError, SGLError
from sgl_runtime.evaluation.calibration import (
    FORMAT,
    Setting,
    choose_calls,
    choose_pruning,
    choose_threshold,
    mismatches,
    read_calibration,
)

from .made_results import CALIBRATION

DRAWS = 1000
DELTA = 0.1
LIMIT = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / DRAWS)  # three standard errors of the share of failures
THRESHOLDS = tuple(step / 20 for step in range(20, -1, -1))

Draw = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class World:
    """``draw`` gives decision, small and large scores; ``loss`` is the true R(t). The scores are uniform."""

    draw: Callable[[np.random.Generator], Draw]
    loss: Callable[[float], float]


def _answers(generator: np.random.Generator, decision: np.ndarray, small: np.ndarray, large: float) -> Draw:
    """0 or 1: the small VLM is right with probability ``small`` (n,), the large one with ``large``."""
    right = generator.random((2, len(decision)))
    return decision, (right[0] < small).astype(float), (right[1] < large).astype(float)


def informative(generator: np.random.Generator) -> Draw:
    decision = generator.random(400)
    return _answers(generator, decision, decision, 0.8)


def useless(generator: np.random.Generator) -> Draw:
    return _answers(generator, generator.random(400), np.full(400, 0.6), 0.8)


def _adversarial_accuracy(decision: np.ndarray) -> np.ndarray:
    """Sure mistakes at the top, then better than the large VLM, then worse: R crosses alpha three times."""
    return np.select([decision >= 0.9, decision >= 0.6, decision >= 0.3], [0.2, 1.0, 0.4], 1.0)


def adversarial(generator: np.random.Generator) -> Draw:
    decision = generator.random(400)
    return _answers(generator, decision, _adversarial_accuracy(decision), 0.8)


def adversarial_loss(threshold: float) -> float:
    middle = (np.arange(10_000) + 0.5) / 10_000  # exact: pieces end at multiples of 1/10,000
    return float(np.where(middle >= threshold, 0.8 - _adversarial_accuracy(middle), 0).mean())


def fractional(generator: np.random.Generator) -> Draw:
    """VQA accuracy, in thirds: means s and 0.8 of a three-annotator score."""
    decision = generator.random(400)
    return decision, generator.binomial(3, decision) / 3, generator.binomial(3, 0.8, 400) / 3


def hovering(generator: np.random.Generator) -> Draw:
    """All of the loss is in the top twentieth, and alpha is just below it at every threshold."""
    decision = generator.random(400)
    small, large = (
        np.where(decision >= 0.95, 0.0, 1.0),
        np.where(decision >= 0.95, generator.random(400) < 0.82, 1),
    )
    return decision, small, large


def copies(generator: np.random.Generator) -> Draw:
    """100 images of four questions that all have one answer and one score."""
    decision = generator.random(100)
    one, small, large = _answers(generator, decision, decision, 0.8)
    return np.repeat(one, 4), np.repeat(small, 4), np.repeat(large, 4)


def informative_loss(threshold: float) -> float:
    return 0.8 * (1 - threshold) - (1 - threshold**2) / 2


WORLDS = {
    "informative": World(informative, informative_loss),
    "useless": World(useless, lambda threshold: 0.2 * (1 - threshold)),
    "adversarial": World(adversarial, adversarial_loss),
    "fractional": World(fractional, informative_loss),
    "hovering": World(hovering, lambda threshold: 0.82 * min(0.05, 1 - threshold)),
    "copies": World(copies, informative_loss),
}
IMAGES = np.repeat(np.arange(100), 4)


def failures(world: World, alpha: float, groups: np.ndarray | None) -> tuple[float, float]:
    """Share of draws whose threshold loses more than alpha, and mean share that exits."""
    generator, failed, exits = np.random.default_rng(0), 0, 0.0
    for _ in range(DRAWS):
        choice = choose_threshold(
            *world.draw(generator), alpha=alpha, delta=DELTA, groups=groups, thresholds=THRESHOLDS
        )
        failed += choice.threshold is not None and world.loss(choice.threshold) > alpha
        exits += choice.exit_share
    return failed / DRAWS, exits / DRAWS


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("alpha", [0.04, 0.08])
def test_loss_exceeds_alpha_at_most_delta_of_the_time(name: str, alpha: float) -> None:
    failed, _ = failures(WORLDS[name], alpha, IMAGES if name == "copies" else None)
    assert failed <= LIMIT


def test_questions_about_one_image_are_not_independent() -> None:
    """Four copies taken for four examples break the promise, so the test above is one that can fail."""
    failed, _ = failures(WORLDS["copies"], 0.04, None)
    assert failed > LIMIT


def test_images_of_unequal_numbers_of_questions_count_once() -> None:
    """One image of 60 bad questions among 300 images: its loss is that of one image, in any order of rows."""
    groups = np.concatenate([np.zeros(60), np.arange(1, 300)])
    small, large, decision = (groups > 0).astype(float), np.ones(359), np.ones(359)
    choice = choose_threshold(decision, small, large, alpha=0.03, groups=groups)
    assert choice.threshold == 0
    assert choice.loss == pytest.approx(1 / 300)
    assert choose_threshold(decision, small, large, alpha=0.03).threshold is None
    order = np.random.default_rng(0).permutation(359)
    assert choose_threshold(decision, small[order], large, alpha=0.03, groups=groups[order]) == choice


@pytest.mark.parametrize(
    ("name", "alpha", "least"),
    [("informative", 0.02, 0.3), ("informative", 0.08, 0.5), ("fractional", 0.02, 0.35)],
)
def test_power_of_a_good_score(name: str, alpha: float, least: float) -> None:
    """Who knew the truth would exit ``0.2 + sqrt(0.04 + 2 alpha)`` of the questions: 48 and 65 %."""
    _, exits = failures(WORLDS[name], alpha, None)
    assert least <= exits <= 0.2 + math.sqrt(0.04 + 2 * alpha)


def test_a_score_that_says_nothing_buys_little() -> None:
    """Random routing may exit 20 % at alpha = 0.04."""
    _, exits = failures(WORLDS["useless"], 0.04, None)
    assert 0.01 < exits < 0.2


def test_threshold_is_the_lowest_of_an_unbroken_sequence() -> None:
    """Exits cost nothing above 0.5 and all between 0.4 and 0.5; below, the small VLM makes up for it."""
    decision = (np.arange(2000) + 0.5) / 2000
    small = np.where((decision >= 0.4) & (decision < 0.5), 0.0, 1.0)
    large = np.where(decision < 0.4, 0.0, 1.0)
    assert np.mean(large - small) < 0
    choice = choose_threshold(decision, small, large, alpha=0.02, thresholds=THRESHOLDS)
    assert choice.threshold == 0.5
    assert (choice.exit_share, choice.loss, choice.holds, choice.note) == (0.5, 0.0, True, "")


def test_sorted_rows_promise_no_more_than_mixed_ones() -> None:
    """A data set whose easy half comes first, and loses nothing, while 10 % are lost in all."""
    right, wrong = np.ones(1000), np.repeat([1.0, 0.8], 500)
    choice = choose_threshold(right, wrong, right, alpha=0.05)
    assert choice.threshold is None


def test_labels_are_not_needed() -> None:
    """5 % of the 1,000 surest answers differ from the large VLM's, and all others: 5 % in all at 0.475."""
    decision, agreement = np.linspace(0, 1, 2000), np.zeros(2000)
    agreement[1000:] = np.tile([1.0] * 19 + [0.0], 50)
    choice = choose_threshold(decision, agreement, alpha=0.05)
    assert choice.threshold is not None
    assert 0.475 < choice.threshold <= 0.49
    assert choice.loss == pytest.approx(0.025 + 0.5 - choice.threshold, abs=0.001)
    assert choice == choose_threshold(decision, agreement, np.ones(2000), alpha=0.05)


def test_pruning_and_exits_together() -> None:
    """The pruned large VLM loses 3 % by itself; each exit of the lower half loses as much as it gives."""
    generator = np.random.default_rng(1)
    decision, small, unpruned = generator.random(3000), np.ones(3000), np.ones(3000)
    pruned = (generator.random(3000) >= 0.03).astype(float)
    small[decision < 0.5] = 0.0
    alone = choose_threshold(decision, small, pruned, alpha=0.05)
    both = choose_threshold(decision, small, pruned, alpha=0.05, reference_score=unpruned)
    assert alone.threshold is not None
    assert both.threshold is not None
    assert alone.threshold < both.threshold < 0.5
    assert both.loss == pytest.approx(np.mean(1 - np.where(decision >= both.threshold, small, pruned)))
    lost = choose_threshold(decision, small, pruned, alpha=0.01, reference_score=unpruned)
    assert (lost.threshold, lost.exit_share, lost.holds) == (None, 0.0, False)
    assert "keep more visual tokens" in lost.note


def test_no_threshold_is_said() -> None:
    decision = np.linspace(0, 1, 500)
    worse = choose_threshold(decision, np.zeros(500), np.ones(500), alpha=0.001)
    assert (worse.threshold, worse.exit_share, worse.loss, worse.holds) == (None, 0.0, 0.0, True)
    assert "too few" in worse.note
    sure = choose_threshold(np.ones(500), np.zeros(500), np.ones(500), alpha=0.05)
    assert sure.threshold is None
    assert "never exit, tolerate a larger loss" in sure.note


def test_number_that_is_said_to_be_enough_is() -> None:
    few = choose_threshold(np.ones(20), np.ones(20), np.ones(20), alpha=0.05)
    assert few.threshold is None
    enough = int(few.note.split("it takes ")[1].rstrip("."))
    assert choose_threshold(*np.ones((3, enough)), alpha=0.05).threshold == 0
    assert choose_threshold(*np.ones((3, enough // 2)), alpha=0.05).threshold is None


@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_constant_scores_all_exit_or_none(score: float) -> None:
    decision, right = np.full(400, score), np.ones(400)
    assert choose_threshold(decision, right, right, alpha=0.05).exit_share == 1.0
    worse = choose_threshold(decision, 0 * right, right, alpha=0.05)
    assert worse.exit_share == 0.0
    assert worse.threshold is None or worse.threshold > score


def test_calls_exceed_the_budget_at_most_delta_of_the_time() -> None:
    """Uniform scores: C(t) = t. The exact test spends its delta, the one over groups less."""
    generator, budget = np.random.default_rng(0), 0.3
    single = np.array([choose_calls(generator.random(400), calls=budget).threshold for _ in range(DRAWS)])
    assert DELTA / 2 <= (single > budget).mean() <= LIMIT
    assert single.mean() > 0.26
    images = np.repeat(generator.random((DRAWS, 100)), 4).reshape(DRAWS, 400)
    grouped = np.array([choose_calls(row, calls=budget, groups=IMAGES).threshold for row in images])
    assert (grouped > budget).mean() <= LIMIT
    assert grouped.mean() > 0.2
    assert (np.array([choose_calls(row, calls=budget).threshold for row in images]) > budget).mean() > LIMIT


def test_calls_by_hand() -> None:
    """Of 20 scores none may be below the threshold: 0.9**20 > 0.1 is not enough, 0.9**22 < 0.1 is."""
    scores = np.linspace(0.5, 0.9, 22)
    choice = choose_calls(scores, calls=0.1)
    assert (choice.threshold, choice.exit_share, choice.loss) == (0.5, 1.0, None)
    with pytest.raises(SGLError, match="take at least 22"):
        choose_calls(scores[:20], calls=0.1)
    assert choose_calls(np.full(50, 0.7), calls=0.5).threshold == 0.7


def settings(*rows: tuple[float, float, float]) -> list[Setting]:
    return [Setting(keep, 2, np.full(4, accuracy), np.full(4, seconds)) for keep, accuracy, seconds in rows]


def _pruned(generator: np.random.Generator, losses: dict[float, float], size: int) -> list[Setting]:
    """Right at 0.8 less the loss; a lower keep ratio is faster, but 0.2 is slower than 0.4."""
    noise = generator.random(size)
    return [
        Setting(keep, 2, (noise < 0.8 - loss).astype(float), np.full(size, 0.5 if keep == 0.2 else keep))
        for keep, loss in losses.items()
    ]


def test_fastest_setting_that_passes() -> None:
    generator = np.random.default_rng(0)
    measured = _pruned(generator, {0.05: 0.0, 0.1: 0.2, 0.2: 0.005, 0.4: 0.0}, 2000)
    large = measured[-1].scores
    choice = choose_pruning(measured, large, alpha=0.02)
    assert [setting.keep_ratio for setting in choice.passed] == [0.4, 0.2]
    assert choice.setting is choice.passed[0]
    none = choose_pruning(measured[1:2], large, alpha=0.02)
    assert (none.setting, none.passed) == (None, ())
    assert "do not prune, tolerate a larger loss" in none.note
    assert "it takes" in choose_pruning(settings((0.5, 0.9, 1)), np.full(4, 0.9), alpha=0.02).note


def test_settings_lose_more_than_alpha_at_most_delta_of_the_time() -> None:
    """0.2 loses a little more than alpha, and is passed on the way to 0.05, which does not."""
    generator, failed = np.random.default_rng(0), 0
    losses = {0.4: 0.0, 0.2: 0.031, 0.05: 0.0}
    for _ in range(DRAWS):
        measured = _pruned(generator, losses, 400)
        large = (generator.random(400) < 0.8).astype(float)
        passed = choose_pruning(measured, large, alpha=0.03, delta=DELTA).passed
        failed += any(losses[setting.keep_ratio] > 0.03 for setting in passed)
    assert failed / DRAWS <= LIMIT


GOOD = np.full(50, 0.5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"alpha": 0}, r"alpha must lie in \(0, 1\), got 0"),
        ({"alpha": 1}, "1 promises nothing"),
        ({"alpha": float("nan")}, "got nan"),
        ({"delta": 0.0}, "delta must lie"),
        ({"delta": True}, "got True"),
        ({"thresholds": ()}, "at least one"),
        ({"thresholds": (0.5, 90)}, r"numbers in \[0, 1\]"),
        ({"decision_score": np.array([])}, r"decision_score .* shape \(0,\)"),
        ({"decision_score": np.append(GOOD[1:], np.nan)}, "1 of 50 are not, the first at index 49: nan"),
        ({"small_score": GOOD[1:]}, "got 49 for 50 examples"),
        ({"large_score": 100 * GOOD}, "Divide percentages by 100"),
        ({"large_score": -GOOD}, r"\[0, 1\], got -0.5"),
        ({"reference_score": np.full(50, np.inf)}, "reference_score must be finite"),
        ({"groups": [1, 2]}, "for 50 examples"),
    ],
)
def test_bad_input_is_told(change: dict[str, object], told: str) -> None:
    given = {"decision_score": GOOD, "small_score": GOOD, "large_score": GOOD, "alpha": 0.1} | change
    with pytest.raises(SGLError, match=told):
        choose_threshold(**given)  # type: ignore[arg-type]


def test_bad_budgets_and_settings_are_told() -> None:
    for calls in (0, 1, 1.5):
        with pytest.raises(ConfigError, match="calls must lie"):
            choose_calls(GOOD, calls=calls)
    with pytest.raises(SGLError, match="at least one keep ratio"):
        choose_pruning([], GOOD, alpha=0.1)
    uneven = [*settings((1, 1, 1)), Setting(0.5, 2, np.ones(3), np.ones(3))]
    with pytest.raises(SGLError, match=r"keep_ratio=0\.5 must have one value per example: got 3 for 4"):
        choose_pruning(uneven, np.ones(4), alpha=0.1)


@pytest.mark.parametrize(
    "change", [{}, {"exit_threshold": None}, {"prune_layer": 0.2}, {"exit_threshold": 0.1 + 0.2}]
)
def test_a_file_comes_back_as_it_was(tmp_path: Path, change: dict[str, object]) -> None:
    calibration = replace(CALIBRATION, **change)  # type: ignore[arg-type]
    calibration.write(tmp_path / "new" / "pair.json")
    back = read_calibration(tmp_path / "new" / "pair.json")
    assert back == calibration
    assert type(back.prune_layer) is type(calibration.prune_layer)
    assert SGLConfig(**back.settings()).exit_threshold == calibration.exit_threshold
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["pair.json"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"exit_threshold": 90}, "exit_threshold .* looks like a percentage"),
        ({"keep_ratio": None}, "keep_ratio must be a number"),
        ({"alpha": 0}, "alpha must lie"),
        ({"delta": "0.1"}, "delta must lie"),
        ({"promise": "speed"}, "accuracy, agreement, calls"),
        ({"pair": {"small": "a"}}, r"got \['small'\]"),
        ({"pair": ["a", "b"]}, "pair must be a table"),
        ({"pair": {"small": "a", "large": 1}}, r"pair\['large'\] must be text"),
        ({"examples": 12.5}, "examples must be a whole number"),
        ({"groups": 1201}, "1201 groups of 1200"),
        ({"measured": {"loss": "low"}}, r"measured\['loss'\] must be a number"),
        ({"date": "30.6.2025"}, "ISO"),
        ({"format": "sgl-vlm calibration 0"}, 'should be "sgl-vlm calibration 1"'),
        ({"extra": 1}, "has the unknown extra"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, change: dict[str, object], told: str) -> None:
    path = tmp_path / "pair.json"
    path.write_text(json.dumps(json.loads(CALIBRATION.to_json()) | change), encoding="utf-8")
    with pytest.raises(ConfigError, match=told) as caught:
        read_calibration(path)
    assert str(path) in str(caught.value)
    assert "sgl-vlm calibrate" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not JSON"),
        ("[]", "no calibration"),
        (json.dumps({"format": FORMAT, "alpha": 0.1}), "lacks compute, consistency_keep_ratio, data_set"),
    ],
)
def test_another_file_is_told(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=told):
        read_calibration(path)


def test_a_missing_or_binary_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("none.json", "binary", "."):
        with pytest.raises(ConfigError, match="cannot be used as a calibration"):
            read_calibration(tmp_path / name)


def test_another_pair_is_told() -> None:
    pair, compute = CALIBRATION.pair, CALIBRATION.compute
    assert mismatches(CALIBRATION, pair, compute) == []
    [large] = mismatches(CALIBRATION, {"small": "a" * 64, "large": "c" * 64}, compute)
    assert "The large VLM" in large
    assert "cccccccccccc, calibrated bbbbbbbbbbbb" in large
    small, large = mismatches(CALIBRATION, {"small": "d" * 64}, compute)
    assert "The small VLM" in small
    assert "unknown" in large
    [large] = mismatches(CALIBRATION, pair, {"small": "float32", "large": "float32, Int8Tensor"})
    assert "The large VLM computes in float32, Int8Tensor, it was calibrated in float32" in large


def test_tiny_alphas_are_refused_quickly() -> None:
    decision, small, large = np.ones((3, 50))
    assert "it takes more than 100000" in choose_threshold(decision, small, large, alpha=1e-9).note
