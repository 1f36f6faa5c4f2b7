"""From an evaluation's results to a calibration: which arrays go into which test, how delta is shared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sgl_runtime.config import SGLConfig
from sgl_runtime.errors import ConfigError, SGLError
from sgl_runtime.evaluation.calibration import (
    CALLS_PROCEDURE,
    LOSS_PROCEDURE,
    Calibration,
    ExitChoice,
    Setting,
    choose_calls,
    choose_pruning,
    choose_threshold,
    mismatches,
)
from sgl_runtime.evaluation.intervals import bootstrap, group_means, group_numbers
from sgl_runtime.evaluation.results import Results, by_method

GUIDED = "guided"


@dataclass(frozen=True, eq=False)
class Candidate:
    """A pruning setting with its exit threshold, and the seconds a request then takes on average.

    ``seconds`` are the small VLM's and, of what does not exit, the large VLM's (`methods.Answered`).
    """

    setting: Setting
    exits: ExitChoice
    seconds: float


@dataclass(frozen=True, eq=False)
class Calibrated:
    """What was chosen, out of which candidates that keep the promise (fastest first), and a note or ""."""

    calibration: Calibration
    candidates: tuple[Candidate, ...]
    note: str


@dataclass(frozen=True, eq=False)
class _Measured:
    """Arrays over the examples that the small VLM, the large one and every guided setting answered."""

    decision: np.ndarray
    small: np.ndarray
    small_seconds: np.ndarray
    unpruned: Setting
    settings: list[Setting]
    groups: np.ndarray

    @property
    def large(self) -> np.ndarray:
        return self.unpruned.scores

    def candidate(self, setting: Setting, exits: ExitChoice) -> Candidate:
        """Return what a setting takes with its exits, on these examples."""
        asked = self.decision < (np.inf if exits.threshold is None else exits.threshold)
        return Candidate(setting, exits, float(np.mean(self.small_seconds + asked * setting.seconds)))


def calibrate(
    results: Results,
    *,
    alpha: float,
    delta: float,
    reference: str,
    calls: float | None,
    setting: tuple[float, int | float] | None,
    today: str,
) -> Calibrated:
    """Choose the pruning and the exit threshold that keep a promise at the least measured time.

    Without a ``setting`` each one in the results, and no pruning, gets the threshold that keeps the promise
    with an equal part of ``delta``. All of these promises hold together, so that the fastest may be taken.

    Parameters
    ----------
    results
        Of "small", "large" and "guided" on calibration data.
    alpha, delta, reference
        "labels": at most ``alpha`` of the score is lost against the unpruned large VLM. "large": at most
        ``alpha`` of the answers differ from its. Both with probability ``1 - delta``.
    calls
        Instead: at most this share of the requests goes to the large VLM. Without a ``setting`` pruning is
        chosen to lose at most ``alpha``, each of the two with half of ``delta``; with one nothing is promised
        of the score.
    setting
        Keep ratio and prune layer to use; None chooses.
    today
        ISO date to write down.

    Raises
    ------
    ConfigError
        ``reference`` or ``setting`` is none that there is, or results of a method are missing.
    SGLError
        There are too few examples for such a promise, or no threshold keeps it at ``setting``.
    """
    measured = _measured(results, reference)
    fixed = None if setting is None else _find(measured, setting, results)
    if calls is not None:
        candidates, note = _by_calls(measured, fixed, alpha, delta, calls)
    else:
        candidates, note = _by_loss(measured, fixed, alpha, delta)
    made = _written(results, measured, candidates[0], alpha, delta, reference, calls, today)
    return Calibrated(made, candidates, " ".join([*filter(None, [note]), *_doubts(results, measured)]))


def check(results: Results, calibration: Calibration) -> dict[str, Any]:
    """Return how a promise fares on other examples than those it was made on.

    Parameters
    ----------
    results
        Of "small", "large" and, where the calibration prunes, of "guided" at its setting.

    Returns
    -------
    dict
        ``promise``, ``alpha``, ``delta``, and the settings of the calibration; ``routed_to``: the method that
        answers what does not exit. Over the groups of ``results``: ``exit_share``, ``mean``, ``low``,
        ``high`` (95 % bootstrap) of what was promised to be at most alpha, and ``kept``: whether the mean is.
        ``differences``: sentences about what is not as it was calibrated. ``same_data``: whether the examples
        are the very ones it was calibrated on.

    Raises
    ------
    ConfigError
        Results that are needed are missing.
    """
    reference = "large" if calibration.promise == "agreement" else "labels"
    prunes = calibration.keep_ratio < 1
    measured = _measured(results, reference, guided=prunes)
    pruned = None
    if prunes:
        pruned = _find(measured, (calibration.keep_ratio, calibration.prune_layer), results)
    answered = (pruned or measured.unpruned).scores
    threshold = np.inf if calibration.exit_threshold is None else calibration.exit_threshold
    exited = measured.decision >= threshold
    promised = measured.large - np.where(exited, measured.small, answered)
    if calibration.promise == "calls":
        promised = 1.0 - exited
    group = group_numbers(measured.groups, len(exited))
    interval = bootstrap(group_means(promised, group), np.arange(group.max() + 1))
    return {
        "promise": calibration.promise,
        "alpha": calibration.alpha,
        "delta": calibration.delta,
        "keep_ratio": calibration.keep_ratio,
        "prune_layer": calibration.prune_layer,
        "exit_threshold": calibration.exit_threshold,
        "routed_to": ("large", None, None)
        if pruned is None
        else (GUIDED, pruned.keep_ratio, pruned.prune_layer),
        "groups": int(group.max()) + 1,
        "exit_share": float(group_means(exited, group).mean()),
        **interval._asdict(),
        "kept": interval.mean <= calibration.alpha,
        "differences": _differences(results, calibration),
        "same_data": calibration.data_sha256 == results.header["data set"]["sha256"],
    }


def _by_loss(
    measured: _Measured, fixed: Setting | None, alpha: float, delta: float
) -> tuple[tuple[Candidate, ...], str]:
    settings = [measured.unpruned, *measured.settings] if fixed is None else [fixed]
    found = []
    for setting in settings:
        exits = choose_threshold(
            measured.decision,
            measured.small,
            setting.scores,
            alpha=alpha,
            delta=delta / len(settings),
            groups=measured.groups,
            reference_score=None if setting is measured.unpruned else measured.large,
        )
        if exits.holds:
            found.append(measured.candidate(setting, exits))
        elif fixed is not None:
            raise SGLError(
                f"Pruning at {fixed.keep_ratio:g}@{fixed.prune_layer} alone may lose more than {alpha:g}: no "
                f"exit threshold keeps the promise. Keep more tokens, or tolerate more. {exits.note}"
            )
    found.sort(key=lambda candidate: candidate.seconds)
    return tuple(found), found[0].exits.note


def _by_calls(
    measured: _Measured, fixed: Setting | None, alpha: float, delta: float, calls: float
) -> tuple[tuple[Candidate, ...], str]:
    if fixed is not None:
        exits = choose_calls(measured.decision, calls=calls, delta=delta, groups=measured.groups)
        return (measured.candidate(fixed, exits),), ""
    pruning = choose_pruning(
        measured.settings, measured.large, alpha=alpha, delta=delta / 2, groups=measured.groups
    )
    exits = choose_calls(measured.decision, calls=calls, delta=delta / 2, groups=measured.groups)
    found = [measured.candidate(setting, exits) for setting in (*pruning.passed, measured.unpruned)]
    return tuple(sorted(found, key=lambda candidate: candidate.seconds)), pruning.note


def _doubts(results: Results, measured: _Measured) -> list[str]:
    """Return sentences about results that are not what a calibration should rest on."""
    told, count = [], results.header["data set"]["count"]
    if len(measured.decision) < count:
        told.append(
            f"Only {len(measured.decision)} of {count} examples were answered by all: the promise is about "
            "such as those. Run `sgl-vlm eval` to its end."
        )
    if len({run["machine"] for run in results.runs}) > 1:
        told.append(
            "Times were measured on several machines or in batches of several sizes: compare them with care."
        )
    return told


def _differences(results: Results, calibration: Calibration) -> list[str]:
    header = results.header
    pair, compute = (
        {name: vlm[what] for name, vlm in header["pair"].items()} for what in ("fingerprint", "compute")
    )
    now = {
        **header["settings"],
        "metric": header["data set"]["metric"],
        "suffix": header["data set"]["suffix"],
    }
    names = ("exit_score", "consistency_keep_ratio", "keep_scope", "max_new_tokens", "metric", "suffix")
    return mismatches(calibration, pair, compute) + [
        f"{name} was {getattr(calibration, name)!r} and is {now[name]!r}: the promise does not cover it."
        for name in names
        if now[name] != getattr(calibration, name)
    ]


def _find(measured: _Measured, setting: tuple[float, int | float], results: Results) -> Setting:
    keep_ratio, layer = setting
    asked = SGLConfig(keep_ratio=keep_ratio, prune_layer=layer)
    wanted = asked.layer_of(results.header["pair"]["large"]["layers"])
    for known in measured.settings:
        if (known.keep_ratio, known.prune_layer) == (keep_ratio, wanted):
            return known
    told = ", ".join(f"{one.keep_ratio:g}@{one.prune_layer}" for one in measured.settings)
    raise ConfigError(
        f"There are no results of {keep_ratio:g}@{layer}, but of {told}: run `sgl-vlm eval` with it."
    )


def _measured(results: Results, reference: str, guided: bool = True) -> _Measured:
    """Return the arrays; without ``guided`` no setting is needed."""
    if reference not in ("labels", "large"):
        raise ConfigError(f"reference must be 'labels' or 'large', got {reference!r}.")
    found = by_method(results.rows)
    settings = [key for key in found if key[0] == GUIDED and guided]
    missing = [name for name in ("small", "large") if (name, None, None) not in found]
    missing += [GUIDED] if guided and not settings else []
    if missing:
        raise ConfigError(
            f"The results lack {', '.join(missing)}: calibration needs small, large and guided. Run "
            "`sgl-vlm eval` with them."
        )
    used = [("small", None, None), ("large", None, None), *settings]
    ids = sorted(set.intersection(*(set(found[key]) for key in used)))
    if not ids:
        raise ConfigError("No example was answered by all of small, large and guided: finish the evaluation.")

    def scores(key: tuple[str, Any, Any]) -> np.ndarray:
        rows = found[key]
        if reference == "large":
            asked = found["large", None, None]
            return np.array([float(rows[i]["prediction"] == asked[i]["prediction"]) for i in ids])
        if any(rows[i]["score"] is None for i in ids):
            raise ConfigError(
                "The results have no scores, their metric needs a judge: use --reference large."
            )
        return np.array([float(rows[i]["score"]) for i in ids])

    def seconds(key: tuple[str, Any, Any]) -> np.ndarray:
        return np.array([found[key][i]["seconds"] for i in ids])

    small, large = ("small", None, None), ("large", None, None)
    return _Measured(
        decision=np.array([float(found[small][i]["decision_score"]) for i in ids]),
        small=scores(small),
        small_seconds=seconds(small),
        unpruned=Setting(1.0, 0, scores(large), seconds(large)),
        settings=[Setting(key[1] or 1.0, key[2] or 0, scores(key), seconds(key)) for key in settings],
        groups=np.array([found[small][i]["group"] for i in ids]),
    )


def _written(
    results: Results,
    measured: _Measured,
    chosen: Candidate,
    alpha: float,
    delta: float,
    reference: str,
    calls: float | None,
    today: str,
) -> Calibration:
    header, pruning, choice = results.header, chosen.setting, chosen.exits
    found = {"exit_share": choice.exit_share}
    if choice.loss is not None:
        found["loss"] = choice.loss
    found |= {
        "seconds": chosen.seconds,
        "seconds_large_unpruned": float(np.mean(measured.unpruned.seconds)),
    }
    promise = "calls" if calls is not None else "accuracy" if reference == "labels" else "agreement"
    return Calibration(
        exit_threshold=choice.threshold,
        keep_ratio=pruning.keep_ratio,
        prune_layer=pruning.prune_layer,
        exit_score=header["settings"]["exit_score"],
        consistency_keep_ratio=header["settings"]["consistency_keep_ratio"],
        keep_scope=header["settings"]["keep_scope"],
        max_new_tokens=header["settings"]["max_new_tokens"],
        promise=promise,
        alpha=alpha if calls is None else calls,
        delta=delta,
        procedure=LOSS_PROCEDURE if calls is None else CALLS_PROCEDURE,
        pair={name: header["pair"][name]["fingerprint"] for name in ("small", "large")},
        compute={name: header["pair"][name]["compute"] for name in ("small", "large")},
        metric=header["data set"]["metric"],
        suffix=header["data set"]["suffix"],
        data_set=header["data set"]["name"],
        data_sha256=header["data set"]["sha256"],
        examples=len(measured.decision),
        groups=len(np.unique(measured.groups)),
        measured=found,
        date=today,
        versions=header["versions"],
    )
