"""What a results file says, in numbers: methods against each other, the early exit, what guidance lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sgl_runtime.config import SGLConfig, token_ratio
from sgl_runtime.errors import ConfigError
from sgl_runtime.evaluation.data import DataSet, Example
from sgl_runtime.evaluation.intervals import bootstrap, bootstrap_difference
from sgl_runtime.evaluation.methods import Key
from sgl_runtime.evaluation.metrics import METRICS
from sgl_runtime.evaluation.results import Results, Row, by_method, describe, key_of
from sgl_runtime.evaluation.table import table

_SHARES = tuple(step / 10 for step in range(1, 11))
_CURVE = 201  # points of a curve, at most
_ROUNDING = 1e-9  # sums in another order differ by less, scores by more


def summarize(
    results: Results,
    dataset: DataSet | None = None,
    *,
    routed_to: Key | None = None,
    thresholds: Sequence[float] = (),
    worst: int = 20,
) -> dict[str, Any]:
    """Return the numbers of a report; every value can be written as JSON.

    Parameters
    ----------
    dataset
        What was evaluated: gives questions, answers, the metric's own numbers and the rows that were skipped.
    routed_to
        Name, keep ratio and prune layer of the method that answers what does not exit; default "guided" at
        the token ratio nearest to that of the default `SGLConfig`. Its losses are what is listed.
    thresholds
        Exit thresholds to mark, for example a calibrated one.
    worst
        How many lost examples to list.

    Returns
    -------
    dict
        ``header`` of the results. ``examples``: how many there are, were answered by every method, failed,
        were skipped, are missing, and in how many groups (images). ``methods``: the rows of `table.table`,
        small alone and large unpruned first, each with its ``label`` and ``difference`` (mean, low, high;
        paired, to large unpruned; over what both answered). ``stages``: mean seconds by stage of what a user
        would run: either VLM alone, and the small one guiding. ``front``: see `_front`, and ``exits``: see
        `_exits`; None without a guided method or without scores.
        ``disagreements``: what large unpruned won against ``routed_to``, the most first, and their
        ``disagreement_count``. ``errors`` and ``skipped``: what has no answer, and why.

    Raises
    ------
    ConfigError
        There is no answer, small alone or large unpruned is missing (every table has both), ``routed_to`` is
        not in the results, or ``dataset`` is another.
    """
    by_key = _by_key(results)
    examples = _examples(results, dataset)
    rows = _methods(results, by_key, dataset)
    scored = METRICS[results.header["data set"]["metric"]].automatic
    routed = _routed(rows, routed_to or guided_key(results))
    lost: list[Row] = []
    exits = front = None
    if scored and routed is not None:
        lost = _lost(by_key, routed, examples)
        exits = _exits(by_key, routed, thresholds)
        front = _front(by_key, [row for row in rows if row["method"] == "guided"])
    count = results.header["data set"]["count"]
    answered = set.intersection(*(set(found) for found in by_key.values()))
    return {
        "header": results.header,
        "examples": {
            "count": count,
            "answered": len(answered),
            "errors": len(results.errors),
            "skipped": results.header["data set"]["bad"],
            "missing": count - len(answered | set(results.errors)),
            "groups": len({row["group"] for row in results.rows}),
        },
        "runs": results.runs,
        "methods": rows,
        "stages": _stages(rows),
        "front": front,
        "exits": exits,
        "disagreement_count": len(lost),
        "disagreements": lost[:worst],
        "errors": results.errors,
        "skipped": [[row.line, row.reason] for row in dataset.bad] if dataset is not None else [],
    }


def _labels(rows: list[Row]) -> list[str]:
    """Return what methods are called in tables, each once: "small alone", "guided at 36 %".

    Of settings with about the same token ratio, "guided at 36 % (0.2 @ 2)".
    """
    names: dict[str, str] = {"small": "small alone", "large": "large unpruned"}
    short: list[str] = [
        names.get(row["method"], str(row["method"]))
        if row["token_ratio"] is None
        else f"{row['method']} at {100 * row['token_ratio']:.0f} %"
        for row in rows
    ]
    return [
        label if short.count(label) == 1 else f"{label} ({row['keep_ratio']:g} @ {row['prune_layer']})"
        for label, row in zip(short, rows, strict=True)
    ]


def guided_key(results: Results) -> Key | None:
    """Return "guided" at the setting whose token ratio is nearest to the default `SGLConfig`'s, if any."""
    layers, default = results.header["pair"]["large"]["layers"], SGLConfig()
    ratio = token_ratio(layers, default.layer_of(layers), default.keep_ratio)
    settings = {(row["keep_ratio"], row["prune_layer"]) for row in results.rows if row["method"] == "guided"}
    found = min(settings, key=lambda at: (abs(token_ratio(layers, at[1], at[0]) - ratio), at), default=None)
    return None if found is None else ("guided", *found)


def _by_key(results: Results) -> dict[Key, dict[str, Row]]:
    found = by_method(results.rows)
    if not found:
        first = next(iter(results.errors.items()), None)
        told = "" if first is None else f", the first of {first[0]}: {first[1].rstrip('.')}"
        raise ConfigError(
            f"The results hold no answer and {len(results.errors)} errors{told}. Run `sgl-vlm eval` to its "
            "end, or mend what it failed on."
        )
    lacking = [name for name in ("small", "large") if (name, None, None) not in found]
    if lacking:
        raise ConfigError(
            f"The results have no answers of {' and '.join(lacking)}, next to which a report prints all "
            "others. Run `sgl-vlm eval` again with them; it adds them to the file."
        )
    return found


def _examples(results: Results, dataset: DataSet | None) -> dict[str, Example]:
    if dataset is None:
        return {}
    evaluated, given = results.header["data set"], describe(dataset)
    if given != evaluated:
        old, new = (f"{one['count']} of {one['name']} ({one['metric']})" for one in (evaluated, given))
        raise ConfigError(
            f"The results are of other examples, {old}, than the data set's, {new}: load it as it was."
        )
    return {example.id: example for example in dataset.examples}


def _methods(results: Results, by_key: dict[Key, dict[str, Row]], dataset: DataSet | None) -> list[Row]:
    rows = table(results, dataset)
    names = list(dict.fromkeys(["small", "large", *(row["method"] for row in rows)]))
    rows.sort(key=lambda row: (names.index(row["method"]), -(row["token_ratio"] or 0)))
    large = by_key["large", None, None]
    for row, label in zip(rows, _labels(rows), strict=True):
        row["label"] = label
        mine = by_key[key_of(row)]
        both = [name for name in mine if name in large]
        row["difference"] = None
        if row["mean"] is not None and row["method"] != "large" and both:
            scores, base = ([found[name]["score"] for name in both] for found in (mine, large))
            groups = [mine[name]["group"] for name in both]
            row["difference"] = bootstrap_difference(scores, base, groups)._asdict()
    return rows


def _routed(rows: list[Row], wanted: Key | None) -> Row | None:
    keys = {key_of(row): row for row in rows}
    if wanted is not None and wanted not in keys:
        raise ConfigError(f"The results have no answers of {wanted}; there are: {', '.join(map(str, keys))}.")
    return None if wanted is None else keys[wanted]


def _exits(
    by_key: dict[Key, dict[str, Row]], routed: Row, thresholds: Sequence[float]
) -> dict[str, Any] | None:
    """Return the accuracy of early exits when ``routed`` answers the rest.

    ``curves`` by score variant: share of exits, accuracy and threshold, as lists, from "never exit" on.
    ``points``: rows for tenths of the examples, by the pipeline's own score, with ``accuracy``, ``random``
    (as many exits by chance: its expectation) and the paired ``gain`` over it, each with its interval.
    ``marks``: the same for given thresholds.
    """
    small_rows = by_key["small", None, None]
    large_rows = by_key[key_of(routed)]
    both = [name for name in small_rows if name in large_rows]
    if not both:
        return None
    found = [small_rows[name] for name in both]
    small = np.array([row["score"] for row in found])
    large = np.array([large_rows[name]["score"] for name in both])
    groups = [row["group"] for row in found]
    scores = {name: _column(found, name) for name in ("confidence", "consistency", "decision_score")}
    decision = scores["decision_score"]
    if decision is None:
        raise ConfigError(
            "The answers of small have no decision_score: the file was not made by this version."
        )
    variants = {"confidence": scores["confidence"], "consistency": scores["consistency"]}
    if all(values is not None for values in variants.values()):
        variants["both"] = (variants["confidence"] + variants["consistency"]) / 2  # type: ignore[operator]
    descending = np.sort(decision)[::-1]
    tenths = [float(descending[max(1, round(share * len(found))) - 1]) for share in _SHARES]

    def point(threshold: float | None) -> Row:
        exited = np.zeros(len(small), bool) if threshold is None else decision >= threshold
        answered, share = np.where(exited, small, large), float(exited.mean())
        chance = share * small + (1 - share) * large
        return {
            "threshold": threshold,
            "share": share,
            "accuracy": bootstrap(answered, groups)._asdict(),
            "random": bootstrap(chance, groups)._asdict(),
            "gain": bootstrap_difference(answered, chance, groups)._asdict(),
        }

    return {
        "routed_to": routed["label"],
        "examples": len(found),
        "small": float(small.mean()),
        "large": float(large.mean()),
        "curves": {name: _curve(v, small, large) for name, v in variants.items() if v is not None},
        "points": [point(threshold) for threshold in (None, *dict.fromkeys(tenths))],
        "marks": [point(threshold) for threshold in thresholds],
    }


def _stages(rows: list[Row]) -> dict[str, dict[str, float]]:
    small = next(row["stages"] for row in rows if row["method"] == "small")
    return {
        row["label"]: {**(small if row["method"] == "guided" else {}), **row["stages"]}
        for row in rows
        if row["method"] in ("small", "large", "guided")
    }


def _front(by_key: dict[Key, dict[str, Row]], guided: list[Row]) -> dict[str, Any]:
    """Return scores against seconds of a request, of each guided setting at every exit threshold.

    ``curves`` by what answers the rest: ``seconds`` (the small VLM's, and the large VLM's where nothing
    exits), ``accuracy``, ``threshold``, as lists. ``points``: either VLM alone. ``best``: what nothing else
    beats in accuracy at its time, with ``label`` and ``threshold``, the fastest first.
    """
    small_rows, large_rows = by_key["small", None, None], by_key["large", None, None]
    keys = {row["label"]: key_of(row) for row in guided}
    keys["large unpruned"] = ("large", None, None)
    both = [name for name in small_rows if all(name in by_key[key] for key in keys.values())]
    if not both:
        return {"curves": {}, "points": {}, "best": []}
    small = _arrays(small_rows, both)
    decision = np.array([small_rows[name]["decision_score"] for name in both])
    curves = {}
    for label, key in keys.items():
        score, seconds = _arrays(by_key[key], both)
        found = _curve(decision, small[0], score)
        cost = np.array(_curve(decision, np.zeros_like(seconds), seconds)["accuracy"]) + small[1].mean()
        curves[label] = {**found, "seconds": cost.tolist()}
    points = {
        label: {"seconds": float(times.mean()), "accuracy": float(scores.mean())}
        for label, (scores, times) in (("small alone", small), ("large unpruned", _arrays(large_rows, both)))
    }
    every: list[Row] = [{"label": label, "threshold": None, **point} for label, point in points.items()]
    for label, curve in curves.items():
        columns = (curve[name] for name in ("threshold", "seconds", "accuracy"))
        every += [
            {"label": label, "threshold": threshold, "seconds": seconds, "accuracy": accuracy}
            for threshold, seconds, accuracy in zip(*columns, strict=True)
        ]
    best: list[Row] = []
    for point in sorted(every, key=lambda point: (point["seconds"], -point["accuracy"])):
        if not best or point["accuracy"] > best[-1]["accuracy"] + _ROUNDING:
            best.append(point)
    return {"curves": curves, "points": points, "best": best}


def _arrays(rows: dict[str, Row], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.array([rows[name][what] for name in names]) for what in ("score", "seconds"))  # type: ignore[return-value]


def _column(rows: list[Row], name: str) -> np.ndarray | None:
    values = [row.get(name) for row in rows]
    return None if any(value is None for value in values) else np.array(values, dtype=np.float64)


def _curve(score: np.ndarray, small: np.ndarray, large: np.ndarray) -> dict[str, list[Any]]:
    """Return what each threshold gives; examples of the same score exit together."""
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.diff(score[order], append=-np.inf))  # of each run of equal scores
    last = last[np.unique(np.linspace(0, len(last) - 1, min(len(last), _CURVE)).round().astype(int))]
    gained = np.cumsum((small - large)[order])[last] / len(score)
    return {
        "share": [0.0, *((last + 1) / len(score)).tolist()],
        "accuracy": [float(large.mean()), *(large.mean() + gained).tolist()],
        "threshold": [None, *score[order][last].tolist()],
    }


def _lost(by_key: dict[Key, dict[str, Row]], routed: Row, examples: dict[str, Example]) -> list[Row]:
    """Return the examples on which ``routed`` scores below large unpruned."""
    small, large = by_key["small", None, None], by_key["large", None, None]
    pruned = by_key[key_of(routed)]
    lost = []
    for name in pruned:
        if name in large and pruned[name]["score"] < large[name]["score"]:
            example = examples.get(name)
            lost.append(
                {
                    "id": name,
                    "question": example.question if example else None,
                    "answers": list(example.answers) if example else None,
                    "small": small[name]["prediction"] if name in small else None,
                    "large": large[name]["prediction"],
                    "pruned": pruned[name]["prediction"],
                    "loss": large[name]["score"] - pruned[name]["score"],
                }
            )
    return sorted(lost, key=lambda row: -row["loss"])
