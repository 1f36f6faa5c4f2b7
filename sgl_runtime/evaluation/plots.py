"""Plots of an evaluation, readable at 700 pixels and by the colour-blind (colours of Okabe and Ito, 2008)."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from decimal import ROUND_FLOOR, Decimal
from itertools import count, cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_runtime.errors import SGLError
from sgl_runtime.evaluation.results import Row
from sgl_runtime.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
)
_DARK, _GREY, _LIGHT = "#222222", "#777777", "#aaaaaa"
_COLOURS, _MARKERS = (BLUE, RED, GREEN, PINK, ORANGE, SKY, _GREY), "osD^vX<"
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_STAGES = (SKY, BLUE, GREEN, YELLOW, ORANGE, RED, PINK, _GREY)
_WIDTH, _DPI = 7.0, 200  # inches: 10 points are 14 pixels of a picture that is shown 700 wide
_FONT, _SMALL = 10.5, 9.5


def accuracy_figure(methods: Sequence[Row], title: str = "") -> Figure:
    """Return accuracy against token ratio: a line per ranking, 95 % intervals, small alone, large unpruned.

    Points of one token ratio stand beside each other, so that each interval is seen: a ranking's are all
    moved by the same factor. A line joins a ranking's points only where every further setting keeps as much
    or more and prunes as late or later; along others (a grid of keep ratios and prune layers) there is no
    path from one to the next, and points alone are drawn.

    Parameters
    ----------
    methods
        Rows of `table.table`.

    Raises
    ------
    SGLError
        No ranking has a score.
    """
    scored = [row for row in methods if row["mean"] is not None]
    pruned = [row for row in scored if row["token_ratio"] is not None]
    if not pruned:
        raise SGLError(
            "There is no score of a pruned large VLM to plot: evaluate a ranking with an automatic metric."
        )
    figure, axes = _figure(4.4, title)
    names = list(dict.fromkeys(row["method"] for row in pruned))
    ratios = sorted({row["token_ratio"] for row in pruned})
    span = math.log(ratios[-1] / ratios[0])
    span, margin = (span, 0.05 * span) if span else (1.0, 0.5)
    step = 0.018 * span  # about the width of a marker
    for number, name in enumerate(names):
        rows = sorted((row for row in pruned if row["method"] == name), key=lambda row: row["token_ratio"])
        factor = math.exp(step * (number - (len(names) - 1) / 2))
        look = _look(number)
        if not _nested(rows):
            look["linestyle"] = "none"
        axes.errorbar(
            [100 * factor * row["token_ratio"] for row in rows],
            [100 * row["mean"] for row in rows],
            yerr=_errors(rows),
            **look,
            markersize=6,
            zorder=3,
            linewidth=1.8,
            elinewidth=1.2,
            capsize=3,
            label=f" {name}" if name.startswith("_") else name,  # else the legend leaves it out
        )
    _level(axes, scored, "large", label="large unpruned", color=_LIGHT, linewidth=5)
    _level(axes, scored, "small", label="small alone", color=_DARK, linewidth=1.4, linestyle=(0, (5, 2)))
    axes.set_xscale("log")
    edge = math.exp(margin + step * len(names) / 2)
    axes.set_xlim(100 * ratios[0] / edge, 100 * ratios[-1] * edge)
    axes.set_xticks([100 * ratio for ratio in ratios], _staggered(ratios, 0.09 * span))
    axes.minorticks_off()
    axes.set_xlabel("token ratio, logarithmic: share of visual tokens, averaged over the large VLM's layers")
    axes.set_ylabel("score, %")
    _legend(figure, axes)
    return figure


def exit_figure(exits: Mapping[str, Any], title: str = "") -> Figure:
    """Return accuracy against exit share: a line per score, random routing, marks at thresholds.

    Parameters
    ----------
    exits
        From `summary.summarize`.

    Raises
    ------
    SGLError
        There are no curves.
    """
    if not exits["curves"]:
        raise SGLError("There is no curve of exits to plot: the answers of small have no scores.")
    figure, axes = _figure(4.6, title)
    styles = {"both": (BLUE, "-", 2.4), "confidence": (ORANGE, "--", 1.6), "consistency": (GREEN, "-.", 1.6)}
    decisive = "both" if "both" in exits["curves"] else "confidence"
    for name in sorted(exits["curves"], key=lambda name: name != decisive):
        curve = exits["curves"][name]
        colour, style, width = styles[name]
        shares, accuracies = _percent(curve["share"]), _percent(curve["accuracy"])
        label = f"{name} (decision score)" if name == decisive else name
        axes.plot(shares, accuracies, color=colour, linestyle=style, linewidth=width, label=label)
    ends = _percent([exits["large"], exits["small"]])
    axes.plot([0, 100], ends, color=_GREY, linestyle=":", linewidth=1.8, label="random routing")
    points = exits["points"]
    axes.errorbar(
        _percent([point["share"] for point in points]),
        _percent([point["accuracy"]["mean"] for point in points]),
        yerr=_errors([point["accuracy"] for point in points]),
        color=styles[decisive][0],
        linestyle="none",
        marker="o",
        markersize=4,
        elinewidth=1,
        capsize=3,
        label="95 % interval",
    )
    _thresholds(axes, points)
    for mark, marker in zip(exits["marks"], cycle("Ds^v")):
        share = 100 * mark["share"]
        axes.axvline(share, color=RED, linewidth=1.4)
        axes.plot(
            [share],
            [100 * mark["accuracy"]["mean"]],
            color=RED,
            marker=marker,
            markersize=7,
            label=f"exit_threshold {rounded_down([mark['threshold']], 4)[0]}",
        )
    axes.set_xlabel("exits: share of examples that the small VLM answers, %")
    axes.set_ylabel("score, %")
    _legend(figure, axes)
    return figure


def front_figure(front: Mapping[str, Any], title: str = "") -> Figure:
    """Return accuracy against measured time: a line per pruning setting over its exit thresholds, the front.

    Parameters
    ----------
    front
        From `summary.summarize`.

    Raises
    ------
    SGLError
        There are no curves.
    """
    if not front["curves"]:
        raise SGLError("There is nothing to plot against time: no example was answered by every method.")
    figure, axes = _figure(4.6, title)
    for number, (label, curve) in enumerate(front["curves"].items()):
        axes.plot(
            _thousands(curve["seconds"]),
            _percent(curve["accuracy"]),
            **_look(number),
            markevery=[0],
            markersize=6,
            linewidth=1.5,
            label=f"{label}, with exits",
        )
    best = front["best"]
    axes.plot(
        _thousands([point["seconds"] for point in best]),
        _percent([point["accuracy"] for point in best]),
        color=_DARK,
        alpha=0.18,
        linewidth=7,
        solid_capstyle="round",
        zorder=1,
        label="no other is better at its time",
    )
    for (label, point), marker in zip(front["points"].items(), "*P", strict=True):
        where = (1000 * point["seconds"], 100 * point["accuracy"])
        axes.plot(*where, color=_DARK, marker=marker, markersize=10, linestyle="none", label=label)
    axes.set_xlim(left=0)
    axes.set_xlabel("measured milliseconds a request; markers: nothing exits")
    axes.set_ylabel("score, %")
    _legend(figure, axes)
    return figure


def stage_figure(stages: Mapping[str, Mapping[str, float]], title: str = "") -> Figure:
    """Return time per stage as stacked bars.

    Parameters
    ----------
    stages
        Seconds by stage (``SGLResult.timings``, or medians of them), by what was timed.

    Raises
    ------
    SGLError
        There are no times, or one is negative or not finite.
    """
    names = list(dict.fromkeys(name for times in stages.values() for name in times))
    if not names:
        raise SGLError("There are no times of stages to plot.")
    for label, times in stages.items():
        for name, seconds in times.items():
            if not (math.isfinite(seconds) and seconds >= 0):
                raise SGLError(f"Stage {name} of {label} took {seconds} s: expected seconds, at least 0.")
    figure, axes = _figure(1.7 + 0.45 * len(stages), title)
    places, labels = range(len(stages)), list(stages)
    left = [0.0] * len(stages)
    for number, name in enumerate(names):
        widths = [1000 * stages[label].get(name, 0.0) for label in labels]
        colour, hatch = _STAGES[number % len(_STAGES)], "//" if number >= len(_STAGES) else None
        axes.barh(
            places,
            widths,
            0.7,
            left,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=name.replace("_", " "),
        )
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, end in zip(places, left, strict=True):
        axes.annotate(
            f" {end:.1f}", (end, place), va="center", fontsize=_SMALL, color=_DARK, annotation_clip=False
        )
    axes.set_yticks(places, labels)
    for tick in axes.get_yticklabels():
        tick.set_parse_math(False)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("milliseconds; stages that overlap count in full")
    _legend(figure, axes)
    return figure


def rounded_down(thresholds: Sequence[float], digits: int) -> list[str]:
    """Return descending thresholds as text: rounded down, for at a higher one fewer would exit.

    Parameters
    ----------
    digits
        Behind the point; more where it takes more to stay above the next threshold.
    """
    exact = [Decimal(str(threshold)) for threshold in thresholds]
    labels = []
    for value, lower in zip(exact, [*exact[1:], Decimal("-inf")], strict=True):
        down = (value.quantize(Decimal(1).scaleb(-places), ROUND_FLOOR) for places in count(digits))
        labels.append(f"{next(found for found in down if found > lower):f}")
    return labels


def png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG, 1400 pixels wide."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI)
    return stream.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    data = png(figure)
    with whole_file(path) as partial:
        partial.write_bytes(data)


def _figure(height: float, title: str) -> tuple[Figure, Axes]:
    # The object interface: pyplot would keep global state and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if title:
        figure.suptitle(title, fontsize=12, parse_math=False)
    axes.tick_params(labelsize=_SMALL)
    axes.xaxis.label.set_fontsize(_FONT)
    axes.yaxis.label.set_fontsize(_FONT)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _look(number: int) -> dict[str, Any]:
    """Return colour, marker and dash of a line; where a colour comes again, both others differ."""
    turn, colour = divmod(number, len(_COLOURS))
    return {
        "color": _COLOURS[colour],
        "marker": _MARKERS[(colour + turn) % len(_MARKERS)],
        "linestyle": _DASHES[turn % len(_DASHES)],
    }


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(4, 90 // (max(map(len, labels)) + 7)))  # of 90 characters that fit side by side
    legend = figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(columns, len(labels)),
        fontsize=_SMALL,
        frameon=False,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _level(axes: Axes, rows: list[Row], method: str, **look: Any) -> None:
    for row in rows:
        if row["method"] == method:
            axes.axhline(100 * row["mean"], **look)
            axes.axhspan(100 * row["low"], 100 * row["high"], color=_DARK, alpha=0.08, linewidth=0)


def _nested(rows: Sequence[Row]) -> bool:
    """Whether each setting keeps as much as the one before it or more, and prunes as late or later."""
    return all(
        one["keep_ratio"] <= two["keep_ratio"] and one["prune_layer"] <= two["prune_layer"]
        for one, two in pairwise(rows)
    )


def _staggered(ratios: Sequence[float], width: float) -> list[str]:
    """Return labels of ascending ratios, on a lower line where they would touch the one before.

    Parameters
    ----------
    width
        Of a label, on the logarithmic axis.
    """
    lines: list[float] = []  # the last ratio on each
    labels = []
    for ratio in ratios:
        free = (line for line, last in enumerate(lines) if math.log(ratio / last) > width)
        line = next(free, len(lines))
        lines[line : line + 1] = [ratio]
        labels.append(line * "\n" + f"{100 * ratio:.3g} %")
    return labels


def _thresholds(axes: Axes, points: Sequence[Row]) -> None:
    """Mark on an upper axis which threshold gives which share, where there is room for the label."""
    exited = [point for point in points if point["threshold"] is not None]
    labels = rounded_down([point["threshold"] for point in exited], 2)
    shares: list[float] = []
    shown: list[str] = []
    for point, label in zip(exited, labels, strict=True):
        share = 100 * point["share"]
        if not shown or share - shares[-1] > 1 + 0.75 * (len(shown[-1]) + len(label)):
            shares.append(share)
            shown.append(label)
    upper = axes.secondary_xaxis("top")
    upper.set_xticks(shares, shown)
    upper.tick_params(labelsize=_SMALL)
    upper.spines["top"].set_visible(False)
    upper.set_xlabel("exit_threshold on the decision score", fontsize=_FONT)


def _errors(rows: Sequence[Row]) -> list[list[float]]:
    """Return how far intervals reach below and above their means; never negative by rounding."""
    below = [max(0.0, 100 * (row["mean"] - row["low"])) for row in rows]
    return [below, [max(0.0, 100 * (row["high"] - row["mean"])) for row in rows]]


def _thousands(values: Sequence[float]) -> list[float]:
    return [1000 * value for value in values]


def _percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]
