"""From an evaluation's results to a calibration: which arrays go into which test, how delta is shared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

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
)
from sgl_runtime.evaluation.results import Results

GUIDED = "guided"


@dataclass(frozen=True, eq=False)
class _Measured:
    """Arrays over the examples that the small VLM, the large one and every guided setting answered."""

    decision: np.ndarray
    small: np.ndarray
    large: np.ndarray
    settings: list[Setting]
    groups: np.ndarray


def calibrate(
    results: Results,
    *,
    alpha: float,
    delta: float,
    reference: str,
    calls: float | None,
    setting: tuple[float, int | float] | None,
    today: str,
) -> tuple[Calibration, str]:
    """Choose the pruning and the exit threshold that keep a promise; return them and a note, or "".

    Without a ``setting`` half of ``delta`` goes to the choice of pruning and the rest, shared out over the
    settings, to the threshold, so that the promise holds for whatever is chosen.

    Parameters
    ----------
    results
        Of "small", "large" and "guided" on calibration data.
    alpha, delta, reference
        "labels": at most ``alpha`` of the score is lost against the unpruned large VLM. "large": at most
        ``alpha`` of the answers differ from its. Both with probability ``1 - delta``.
    calls
        Instead: at most this share of the requests goes to the large VLM; ``alpha`` then bounds pruning only.
    setting
        Keep ratio and prune layer to use; None chooses the fastest that passes.
    today
        ISO date to write down.

    Raises
    ------
    ConfigError
        ``reference`` or ``setting`` is none that there is, or results of a method are missing.
    SGLError
        There are too few examples for such a promise.
    """
    measured = _measured(results, reference)
    pruning, note, left = _pruning(measured, setting, results, alpha, delta)
    if calls is not None:
        choice = choose_calls(measured.decision, calls=calls, delta=left, groups=measured.groups)
    else:
        choice = choose_threshold(
            measured.decision,
            measured.small,
            pruning.scores,
            alpha=alpha,
            delta=left,
            groups=measured.groups,
            reference_score=measured.large,
        )
    if not choice.holds:
        raise SGLError(
            f"Pruning at {pruning.keep_ratio:g}@{pruning.prune_layer} alone may lose more than {alpha:g}: no "
            f"exit threshold keeps the promise. Keep more tokens, or tolerate more. {choice.note}"
        )
    return _written(results, measured, pruning, choice, alpha, delta, reference, calls, today), " ".join(
        part for part in (note, choice.note) if part
    )


def _pruning(
    measured: _Measured,
    setting: tuple[float, int | float] | None,
    results: Results,
    alpha: float,
    delta: float,
) -> tuple[Setting, str, float]:
    """Return the pruning to use, a note, and the delta that is left for the threshold."""
    unpruned = Setting(1.0, 0, measured.large, np.inf)
    if setting is not None:
        keep_ratio, layer = setting
        layers = results.header["pair"]["large"]["layers"]
        wanted = int(layers * layer) if isinstance(layer, float) else layer
        for known in measured.settings:
            if (known.keep_ratio, known.prune_layer) == (keep_ratio, wanted):
                return known, "", delta
        told = ", ".join(f"{one.keep_ratio:g}@{one.prune_layer}" for one in measured.settings)
        raise ConfigError(
            f"There are no results of {keep_ratio:g}@{layer}, but of {told}: run `sgl-vlm eval` with it."
        )
    choice = choose_pruning(
        measured.settings, measured.large, alpha=alpha, delta=delta / 2, groups=measured.groups
    )
    left = delta / (2 * (len(measured.settings) + 1))
    return (unpruned if choice.setting is None else choice.setting), choice.note, left


def _measured(results: Results, reference: str) -> _Measured:
    if reference not in ("labels", "large"):
        raise ConfigError(f"reference must be 'labels' or 'large', got {reference!r}.")
    by_method: dict[tuple[str, Any, Any], dict[str, dict[str, Any]]] = {}
    for row in results.rows:
        key = (row["method"], row["keep_ratio"], row["prune_layer"])
        by_method.setdefault(key, {})[row["id"]] = row
    guided = [key for key in by_method if key[0] == GUIDED]
    missing = [name for name in ("small", "large") if (name, None, None) not in by_method]
    if missing or not guided:
        raise ConfigError(
            f"The results lack {', '.join([*missing, *([] if guided else [GUIDED])])}: calibration needs "
            "small, large and guided. Run `sgl-vlm eval` with them."
        )
    used = [("small", None, None), ("large", None, None), *guided]
    ids = sorted(set.intersection(*(set(by_method[key]) for key in used)))
    if not ids:
        raise ConfigError("No example was answered by all of small, large and guided: finish the evaluation.")

    def scores(key: tuple[str, Any, Any]) -> np.ndarray:
        rows = by_method[key]
        if reference == "large":
            asked = by_method["large", None, None]
            return np.array([float(rows[i]["prediction"] == asked[i]["prediction"]) for i in ids])
        if any(rows[i]["score"] is None for i in ids):
            raise ConfigError(
                "The results have no scores, their metric needs a judge: use --reference large."
            )
        return np.array([float(rows[i]["score"]) for i in ids])

    small = by_method["small", None, None]
    return _Measured(
        decision=np.array([float(small[i]["decision_score"]) for i in ids]),
        small=scores(("small", None, None)),
        large=scores(("large", None, None)),
        settings=[
            Setting(key[1], key[2], scores(key), float(np.mean([by_method[key][i]["seconds"] for i in ids])))
            for key in guided
        ],
        groups=np.array([small[i]["group"] for i in ids]),
    )


def _written(
    results: Results,
    measured: _Measured,
    pruning: Setting,
    choice: ExitChoice,
    alpha: float,
    delta: float,
    reference: str,
    calls: float | None,
    today: str,
) -> Calibration:
    header = results.header
    found = {"exit_share": choice.exit_share}
    if choice.loss is not None:
        found["loss"] = choice.loss
    promise = "calls" if calls is not None else "accuracy" if reference == "labels" else "agreement"
    return Calibration(
        exit_threshold=choice.threshold,
        keep_ratio=pruning.keep_ratio,
        prune_layer=pruning.prune_layer,
        exit_score=header["settings"]["exit_score"],
        consistency_keep_ratio=header["settings"]["consistency_keep_ratio"],
        promise=promise,
        alpha=alpha if calls is None else calls,
        delta=delta,
        procedure=LOSS_PROCEDURE if calls is None else CALLS_PROCEDURE,
        pair={name: header["pair"][name]["fingerprint"] for name in ("small", "large")},
        data_set=header["data set"]["name"],
        examples=len(measured.decision),
        groups=len(np.unique(measured.groups)),
        measured=found,
        date=today,
        versions=header["versions"],
    )
