"""What a results file says, method by method: a row each, as dictionaries and as Markdown."""

from __future__ import annotations

import numpy as np

from sgl_runtime.config import token_ratio
from sgl_runtime.evaluation.data import DataSet
from sgl_runtime.evaluation.intervals import bootstrap
from sgl_runtime.evaluation.metrics import METRICS
from sgl_runtime.evaluation.results import Results, Row, by_method

_COLUMNS = 12  # of means per category, on the screen


def table(results: Results, dataset: DataSet | None = None) -> list[Row]:
    """Return a row per method: mean score with its interval, time, and the share of visual tokens.

    Parameters
    ----------
    dataset
        Where given, metrics that are more than a mean (MME) add their own numbers under "summary".

    Returns
    -------
    list of dict
        ``method``, ``keep_ratio``, ``prune_layer``, ``token_ratio`` (design: average over the layers; None
        for "small" and "large"), ``count`` (examples), ``mean``, ``low``, ``high`` (95 % bootstrap interval;
        images are drawn, not questions; None where a judge is needed), ``stages`` (mean seconds of those in
        `methods.Answered`) and their sum ``seconds``, ``summary``.
    """
    examples = {} if dataset is None else {example.id: example for example in dataset.examples}
    metric, layers = METRICS[results.header["data set"]["metric"]], results.header["pair"]["large"]["layers"]
    found = []
    for (name, keep_ratio, prune_layer), by_example in by_method(results.rows).items():
        rows = list(by_example.values())
        scores = [row["score"] for row in rows]
        interval, summary = None, {}
        if metric.automatic:
            interval = bootstrap(scores, [row["group"] for row in rows])
        if metric.automatic and examples:
            summary = metric.summary(scores, [examples[row["id"]] for row in rows])
        found.append(
            {
                "method": name,
                "keep_ratio": keep_ratio,
                "prune_layer": prune_layer,
                "token_ratio": _token_ratio(keep_ratio, prune_layer, layers),
                "count": len(rows),
                **{name: getattr(interval, name, None) for name in ("mean", "low", "high")},
                "seconds": float(np.mean([row["seconds"] for row in rows])),
                "stages": _mean_stages(rows),
                "summary": summary,
            }
        )
    return found


def markdown(rows: list[Row], metric: str) -> str:
    """Return the rows of `table` as a Markdown table; shares in percent."""
    scale = 100 if METRICS[metric].shares else 1
    summaries = list(dict.fromkeys(name for row in rows for name in row["summary"]))[:_COLUMNS]
    titles = [
        "method",
        "keep ratio",
        "prune layer",
        "token ratio",
        "examples",
        "score",
        "seconds",
        *summaries,
    ]
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        mean, low, high = (row[name] for name in ("mean", "low", "high"))
        ratio, layer = row["keep_ratio"], row["prune_layer"]
        lines.append(
            [
                row["method"],
                "" if ratio is None else f"{ratio:g}",
                "" if layer is None else str(layer),
                "" if ratio is None else f"{100 * row['token_ratio']:.0f} %",
                str(row["count"]),
                "" if mean is None else f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
                f"{row['seconds']:.3f}",
                *(
                    f"{scale * row['summary'][name]:.1f}" if name in row["summary"] else ""
                    for name in summaries
                ),
            ]
        )
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n" for cells in lines)


def _mean_stages(rows: list[Row]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row["stages"])
    return {name: float(np.mean([row["stages"].get(name, 0.0) for row in rows])) for name in names}


def _token_ratio(keep_ratio: float | None, prune_layer: int | None, layers: int) -> float | None:
    if keep_ratio is None or prune_layer is None:
        return None
    return token_ratio(layers, prune_layer, keep_ratio)
