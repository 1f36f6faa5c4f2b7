"""Exit thresholds and keep ratios with a promise that holds with probability 1 - delta.

Learn then Test (Angelopoulos et al., arXiv 2110.01052): each candidate is a hypothesis "its expected loss is
above alpha", tested from the safest candidate on until one is not rejected (fixed-sequence testing). All
candidates before it keep their loss at or below alpha, together with probability ``1 - delta``, whatever the
distribution, for any number of examples, and though the loss is neither monotone nor positive.

The loss of an example is the reference's score minus that of the answer that is given, in [-1, 1]: negative
where the small VLM is right and the large one wrong. Its variance is small, most answers being the same, so
the p-value is one that adapts to it (`bounds.betting_p_value`).

The unit is the group: what must be independent are the images, not the questions about one. Every image
counts once, with the mean over its questions, and so the promise is about the mean over images.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from sgl_runtime.config import SGLConfig
from sgl_runtime.errors import ConfigError, SGLError
from sgl_runtime.files import whole_file

from .bounds import betting_p_value, binomial_cdf, hoeffding_bentkus
from .intervals import finite, group_means, group_numbers

#: Exit thresholds that are tested: fixed before any score is seen.
THRESHOLDS = tuple(step / 200 for step in range(200, -1, -1))
LOSS_PROCEDURE = "fixed-sequence testing (arXiv 2110.01052), betting p-values (arXiv 2010.09686)"
CALLS_PROCEDURE = (
    "quantile with a binomial bound (Clopper-Pearson; over groups Hoeffding-Bentkus, arXiv 2101.02703)"
)


#: What can be promised: see `choose_threshold` (with labels, without) and `choose_calls`.
PROMISES = ("accuracy", "agreement", "calls")
FORMAT = "sgl-vlm calibration 1"

_MANY = 100_000  # examples: nobody labels more to learn a threshold
_TYPES = {str: "text", int: "a whole number", Mapping: "a table", (int, float): "a number"}
_Candidate = TypeVar("_Candidate")


@dataclass(frozen=True)
class Calibration:
    """What was calibrated, on what, and what it promises; a small JSON file.

    Attributes
    ----------
    exit_threshold, keep_ratio, prune_layer, exit_score, consistency_keep_ratio
        As in `SGLConfig`: the calibrated ones, and those that the scores depend on.
    promise
        "accuracy": at most ``alpha`` of it is lost against the large VLM. "agreement": at most ``alpha`` of
        the answers differ from the large VLM's. "calls": at most ``alpha`` of the requests go to it.
    alpha, delta
        The promise holds with probability ``1 - delta``.
    procedure
        `LOSS_PROCEDURE` or `CALLS_PROCEDURE`.
    keep_scope, max_new_tokens
        As in `SGLConfig`: what was answered with.
    pair, compute
        Fingerprints of the checkpoints, and in what they computed: {"small": ..., "large": ...}.
    metric, suffix
        What scored the answers, and what stood behind each question.
    data_set, data_sha256, examples, groups
        Name, hash, number of examples and of independent groups (images).
    measured
        What came of it on these examples, by name: "exit_share", "loss", ...
    date
        ISO, for example "2025-06-30".
    versions
        Of the software, by name.

    Raises
    ------
    ConfigError
        A value is out of range or of another type.
    """

    exit_threshold: float | None
    keep_ratio: float
    prune_layer: int | float
    exit_score: str
    consistency_keep_ratio: float
    keep_scope: str
    max_new_tokens: int
    promise: str
    alpha: float
    delta: float
    procedure: str
    pair: Mapping[str, str]
    compute: Mapping[str, str]
    metric: str
    suffix: str
    data_set: str
    data_sha256: str
    examples: int
    groups: int
    measured: Mapping[str, float]
    date: str
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        SGLConfig(**self.settings())
        check_open_share("alpha", self.alpha)
        check_open_share("delta", self.delta)
        if self.promise not in PROMISES:
            raise ConfigError(f"promise must be one of {', '.join(PROMISES)}, got {self.promise!r}.")
        for name in ("procedure", "metric", "suffix", "data_set", "data_sha256", "date"):
            _check_type(name, getattr(self, name), str)
        for name in ("examples", "groups"):
            _check_type(name, getattr(self, name), int)
        for name, kind in (("pair", str), ("compute", str), ("versions", str), ("measured", (int, float))):
            _check_type(name, getattr(self, name), Mapping)
            for key, value in getattr(self, name).items():
                _check_type(f"{name}[{key!r}]", value, kind)
        for name in ("pair", "compute"):
            if set(getattr(self, name)) != {"small", "large"}:
                raise ConfigError(
                    f"{name} must name the small and the large VLM, got {sorted(getattr(self, name))}."
                )
        if not 1 <= self.groups <= self.examples:
            raise ConfigError(
                f"There are {self.groups} groups of {self.examples} examples: 1 or more expected."
            )
        try:
            date.fromisoformat(self.date)
        except ValueError as error:
            raise ConfigError(f"date must be ISO, as 2025-06-30, got {self.date!r}.") from error

    def settings(self) -> dict[str, Any]:
        """Return the fields of `SGLConfig` that are fixed by the calibration."""
        names = ("exit_threshold", "keep_ratio", "prune_layer", "exit_score", "consistency_keep_ratio")
        return {name: getattr(self, name) for name in (*names, "keep_scope", "max_new_tokens")}

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Return the calibration in ``text``; ConfigError says what is wrong with it."""
        try:
            stored = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"It is not JSON: {error}.") from error
        if not isinstance(stored, dict) or stored.pop("format", None) != FORMAT:
            raise ConfigError(f'It is no calibration: "format" should be "{FORMAT}".')
        names = {field.name for field in fields(cls)}
        wrong = {"lacks": names - stored.keys(), "has the unknown": stored.keys() - names}
        told = [f"{verb} {', '.join(sorted(keys))}" for verb, keys in wrong.items() if keys]
        if told:
            raise ConfigError(f"It {' and '.join(told)}.")
        return cls(**stored)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        with whole_file(path) as partial:
            partial.write_text(self.to_json(), encoding="utf-8")


def read_calibration(path: str | Path) -> Calibration:
    """Return the calibration that `Calibration.write` stored.

    Raises
    ------
    ConfigError
        The file cannot be read, or is not a calibration; the message says what is wrong.
    """
    try:
        return Calibration.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # a ConfigError is a ValueError
        raise ConfigError(
            f"{path} cannot be used as a calibration. {error} Write a new one with `sgl-vlm calibrate`."
        ) from error


def mismatches(calibration: Calibration, pair: Mapping[str, str], compute: Mapping[str, str]) -> list[str]:
    """Return a sentence for each VLM that is another one, or computes in another way, than was calibrated.

    Parameters
    ----------
    pair, compute
        By "small" and "large": `checkpoint_fingerprint`, and `compute_of`.
    """
    told = [
        f"The {name} VLM is not the one that was calibrated on {calibration.date} (fingerprint "
        f"{pair.get(name, 'unknown')[:12]}, calibrated {known[:12]}): the promise does not cover it. Run "
        "`sgl-vlm calibrate` with this pair."
        for name, known in sorted(calibration.pair.items(), reverse=True)
        if pair.get(name) != known
    ]
    return told + [
        f"The {name} VLM computes in {compute.get(name)}, it was calibrated in {known}: scores and answers "
        "differ a little, and the promise does not cover it."
        for name, known in sorted(calibration.compute.items(), reverse=True)
        if compute.get(name) != known
    ]


@dataclass(frozen=True)
class ExitChoice:
    """The chosen exit threshold and what it did on the examples it was chosen by.

    Attributes
    ----------
    threshold : exit when the decision score reaches it; None never exits
    exit_share : mean over groups of the share that exits
    loss : mean over groups of the loss; None where nothing was scored
    holds : whether the promise is kept. False: it is not even without any exit
    note : "" or why nothing exits and what to do
    """

    threshold: float | None
    exit_share: float
    loss: float | None
    holds: bool
    note: str


@dataclass(frozen=True, eq=False)
class Setting:
    """The large VLM at one pruning setting: scores in [0, 1] and seconds (n,) of the examples."""

    keep_ratio: float
    prune_layer: int | float
    scores: np.ndarray
    seconds: np.ndarray


@dataclass(frozen=True, eq=False)
class PruningChoice:
    """The fastest setting whose loss is bounded; None where there is none, and ``note`` says what to do.

    ``passed`` are all settings whose loss is bounded, from the one that keeps most on.
    """

    setting: Setting | None
    passed: tuple[Setting, ...]
    note: str


def choose_threshold(
    decision_score: ArrayLike,
    small_score: ArrayLike,
    large_score: ArrayLike | None = None,
    *,
    alpha: float,
    delta: float = 0.1,
    groups: ArrayLike | None = None,
    reference_score: ArrayLike | None = None,
    thresholds: Iterable[float] = THRESHOLDS,
) -> ExitChoice:
    """Return the lowest exit threshold that loses at most ``alpha`` against always asking the large VLM.

    ``P(R(threshold) <= alpha) >= 1 - delta`` over the draw of the examples, where ``R(t)`` is the
    expectation, over groups, of the mean of ``reference - (small if decision score >= t else large)``.

    Parameters
    ----------
    decision_score
        (n,) of the small VLM.
    small_score, large_score
        (n,) in [0, 1], of the answers of both: 0 or 1, or fractional as VQA accuracy. Without labels give the
        agreement of the small VLM's answer with the large one's as ``small_score``, and no ``large_score``;
        the loss is then disagreement, which is never below the loss of exact-match accuracy.
    alpha
        Tolerated loss, in (0, 1): 0.01 is one point of accuracy.
    delta
        Probability, in (0, 1), that the examples mislead and the loss is larger.
    groups
        (n,) what must be drawn independently, the image of each example. None: all examples are independent.
    reference_score
        (n,) in [0, 1], what is lost against where that is not ``large_score``: the unpruned large VLM, when
        ``large_score`` is the pruned one. The promise then covers pruning and exits together.
    thresholds
        Candidates in [0, 1], chosen without looking at the examples. They are tested from the highest down.

    Raises
    ------
    ConfigError
        ``alpha``, ``delta`` or a threshold is out of range.
    SGLError
        The arrays are empty, of different sizes, not finite or not in [0, 1].
    """
    check_open_share("alpha", alpha)
    check_open_share("delta", delta)
    decision = finite("decision_score", decision_score)
    small = _scores("small_score", small_score, len(decision))
    large = np.ones_like(small) if large_score is None else _scores("large_score", large_score, len(small))
    reference = large if reference_score is None else _scores("reference_score", reference_score, len(small))
    group = group_numbers(groups, len(small))

    def losses(threshold: float) -> np.ndarray:
        return group_means(reference - np.where(decision >= threshold, small, large), group)

    def p_value(threshold: float) -> float:
        return loss_p_value(losses(threshold), alpha, delta)

    holds = reference is large or p_value(np.inf) <= delta
    passed = list(_fixed_sequence(_candidates(thresholds), p_value, delta)) if holds else []
    threshold = passed[-1] if passed else None
    applied = np.inf if threshold is None else threshold
    return ExitChoice(
        threshold,
        float(group_means(decision >= applied, group).mean()),
        float(losses(applied).mean()),
        holds,
        "" if passed else _why_no_exit(holds, int(group.max()) + 1, alpha, delta),
    )


def choose_calls(
    decision_score: ArrayLike, *, calls: float, delta: float = 0.1, groups: ArrayLike | None = None
) -> ExitChoice:
    """Return the highest exit threshold at which the large VLM is asked at most ``calls`` of the time.

    ``P(C(threshold) <= calls) >= 1 - delta``, where ``C(t)`` is the expectation, over groups, of the share
    whose decision score is below t: where images have unequal numbers of questions, the share of all requests
    may be another. C and the p-value grow with t, so that the candidates may be the scores
    themselves. The test is binomial, exact, for single examples and Hoeffding-Bentkus over groups. Nothing is
    promised about accuracy.

    Parameters
    ----------
    decision_score
        (n,) of the small VLM.
    calls
        Budget: share of requests, in (0, 1), that may go to the large VLM.
    delta, groups
        As in `choose_threshold`.

    Raises
    ------
    ConfigError
        ``calls`` or ``delta`` is out of range.
    SGLError
        The scores are empty or not finite, or too few to show so small a share.
    """
    check_open_share("calls", calls)
    check_open_share("delta", delta)
    decision = finite("decision_score", decision_score)
    group = group_numbers(groups, len(decision))
    size = int(group.max()) + 1

    def p_value(threshold: float) -> float:
        asked = decision < threshold
        if size == len(decision):
            return binomial_cdf(int(asked.sum()), size, calls)
        return hoeffding_bentkus(float(group_means(asked, group).mean()), size, calls)

    candidates = np.unique(decision)
    passed = bisect_right(candidates, delta, key=p_value)
    if not passed:
        needed = _least(lambda number: hoeffding_bentkus(0.0, number, calls) <= delta)
        raise SGLError(
            f"{size} independent examples are too few to show, with confidence {1 - delta:g}, that at most "
            f"{calls:g} of the requests go to the large VLM: take at least {needed}, or allow more calls."
        )
    threshold = float(candidates[passed - 1])
    return ExitChoice(threshold, float(group_means(decision >= threshold, group).mean()), None, True, "")


def choose_pruning(
    settings: Sequence[Setting],
    large_score: ArrayLike | None = None,
    *,
    alpha: float,
    delta: float = 0.1,
    groups: ArrayLike | None = None,
) -> PruningChoice:
    """Return the fastest setting that loses at most ``alpha`` against the unpruned large VLM.

    With probability ``1 - delta`` every setting that passes does. They are tested from the highest keep ratio
    down, of equal ones the later prune layer first; all prune layers are ints or all are floats. An exit
    threshold for the chosen setting needs other examples, or a shared ``delta``: with k settings, half of it
    here and a 2k-th of it in `choose_threshold`.

    Parameters
    ----------
    settings
        With scores of the same examples in the same order.
    large_score
        (n,) in [0, 1], of the unpruned large VLM. Without labels: None, and the settings' scores are the
        agreement with its answers.
    alpha, delta, groups
        As in `choose_threshold`.

    Raises
    ------
    ConfigError, SGLError
        As in `choose_threshold`; there is no setting.
    """
    check_open_share("alpha", alpha)
    check_open_share("delta", delta)
    if not settings:
        raise SGLError("There is no pruning setting to choose from: measure at least one keep ratio.")
    size = len(settings[0].scores)
    large = np.ones(size) if large_score is None else _scores("large_score", large_score, size)
    for setting in settings:
        _scores(f"scores at keep_ratio={setting.keep_ratio:g}", setting.scores, size)
    group = group_numbers(groups, size)

    def p_value(setting: Setting) -> float:
        return loss_p_value(group_means(large - setting.scores, group), alpha, delta)

    ordered = sorted(settings, key=lambda setting: (-setting.keep_ratio, -setting.prune_layer))
    passed = tuple(_fixed_sequence(ordered, p_value, delta))
    if passed:
        return PruningChoice(min(passed, key=lambda setting: float(np.mean(setting.seconds))), passed, "")
    number = int(group.max()) + 1
    note = f"No keep ratio is shown to lose at most {alpha:g} with confidence {1 - delta:g}: do not prune"
    return PruningChoice(None, (), f"{note}{_or_more_examples(number, alpha, delta)}")


def loss_p_value(losses: np.ndarray, alpha: float, delta: float) -> float:
    """Return a p-value of "the expected loss is above ``alpha``" for ``losses`` (groups,) in [-1, 1].

    The groups come in a random order, drawn with a fixed seed: data sets are sorted by this and that.
    """
    shuffled = np.random.default_rng(0).permutation(losses)
    return betting_p_value((shuffled + 1) / 2, (alpha + 1) / 2, delta)


def check_open_share(name: str, value: float) -> None:
    """Raise ConfigError unless ``0 < value < 1``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ConfigError(
            f"{name} must lie in (0, 1), got {value!r}: at 0 no number of examples is enough, and 1 promises "
            "nothing."
        )


def _fixed_sequence(
    candidates: Iterable[_Candidate], p_value: Callable[[_Candidate], float], delta: float
) -> Iterator[_Candidate]:
    return takewhile(lambda candidate: p_value(candidate) <= delta, candidates)


def _candidates(thresholds: Iterable[float]) -> list[float]:
    descending = sorted(set(thresholds), reverse=True)
    if not descending or not all(0 <= threshold <= 1 for threshold in descending):
        raise ConfigError(f"thresholds must be numbers in [0, 1], at least one, got {descending}.")
    return descending


def _check_type(name: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"{name} must be {_TYPES[kind]}, got {value!r}.")


def _scores(name: str, values: ArrayLike, size: int) -> np.ndarray:
    scores = finite(name, values)
    if len(scores) != size:
        raise SGLError(f"{name} must have one value per example: got {len(scores)} for {size} examples.")
    if scores.min() < 0 or scores.max() > 1:
        raise SGLError(
            f"{name} must lie in [0, 1], got {scores.min():g} to {scores.max():g}. Divide percentages by 100."
        )
    return scores


def _why_no_exit(holds: bool, size: int, alpha: float, delta: float) -> str:
    promise = f"to lose at most {alpha:g} with confidence {1 - delta:g}"
    more = _or_more_examples(size, alpha, delta)
    if not holds:
        return f"The pruned large VLM alone is not shown {promise}: keep more visual tokens{more}"
    return f"No threshold is shown {promise}: never exit{more}"


def _or_more_examples(size: int, alpha: float, delta: float) -> str:
    needed = _least(lambda number: loss_p_value(np.zeros(number), alpha, delta) <= delta)
    if size < needed:
        told = f"{needed}" if needed < _MANY else f"more than {_MANY}"
        return f". {size} independent examples are too few: even where nothing is lost it takes {told}."
    return f", tolerate a larger loss, or calibrate with more than {size} independent examples."


def _least(enough: Callable[[int], bool]) -> int:
    """Return about the least number, on a scale of steps of a twentieth, that is ``enough``; or `_MANY`."""
    number = 1
    while number < _MANY and not enough(number):
        number += 1 + number // 20
    return min(number, _MANY)
