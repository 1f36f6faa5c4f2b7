"""What plots show is what tables say."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from PIL import Image

from sgl_runtime.errors import SGLError
from sgl_runtime.evaluation import plots
from sgl_runtime.evaluation.summary import summarize

from .made_results import make_results

STAGES = {
    "guided": {"small_vision": 0.004, "small_decode": 0.01, "large_decode": 0.02},
    "large alone": {"large_vision": 0.015, "large_decode": 0.0215},
}


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    return summarize(make_results()[0], thresholds=[0.5])


def bars(axes: Axes) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Points, and the lower and upper ends of their intervals, by label."""
    found = {}
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer):
            line, _, [interval] = container
            ends = np.array([segment[:, 1] for segment in interval.get_segments()])
            found[str(container.get_label())] = (np.asarray(line.get_xydata()), ends[:, 0], ends[:, 1])
    return found


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_accuracy_is_the_table(summary: dict[str, Any]) -> None:
    figure = plots.accuracy_figure(summary["methods"])
    [axes] = figure.axes
    found = bars(axes)
    assert list(found) == ["guided", "random"]
    moved = []
    for name, (points, low, high) in found.items():
        rows = [row for row in summary["methods"] if row["method"] == name][::-1]
        factors = points[:, 0] / [100 * row["token_ratio"] for row in rows]
        assert factors == pytest.approx(factors[0])
        moved.append(factors[0])
        assert points[:, 1] == pytest.approx([100 * row["mean"] for row in rows])
        assert low == pytest.approx([100 * row["low"] for row in rows])
        assert high == pytest.approx([100 * row["high"] for row in rows])
    assert moved[0] < 1 < moved[1] < 1.05
    assert moved[0] * moved[1] == pytest.approx(1)
    assert axes.get_xscale() == "log"
    assert "logarithmic" in axes.get_xlabel()
    means = {row["method"]: 100 * row["mean"] for row in summary["methods"] if row["token_ratio"] is None}
    levels = {line.get_label(): line.get_ydata() for line in axes.lines if line.get_label() in legend(figure)}
    assert levels["large unpruned"] == pytest.approx([means["large"]] * 2)
    assert levels["small alone"] == pytest.approx([means["small"]] * 2)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["5 %", "36 %", "64 %"]
    assert legend(figure) == ["large unpruned", "small alone", "guided", "random"]


def test_exits_are_the_table(summary: dict[str, Any]) -> None:
    exits = summary["exits"]
    figure = plots.exit_figure(exits)
    axes = figure.axes[0]
    lines = {str(line.get_label()): np.asarray(line.get_xydata()) for line in axes.lines}
    names = {"both (decision score)": "both", "confidence": "confidence", "consistency": "consistency"}
    for label, name in names.items():
        curve = exits["curves"][name]
        expected = 100 * np.array([curve["share"], curve["accuracy"]]).T
        assert lines[label] == pytest.approx(expected)
    ends = np.array([[0, 100 * exits["large"]], [100, 100 * exits["small"]]])
    assert lines["random routing"] == pytest.approx(ends)
    [(points, low, high)] = bars(axes).values()
    rows = exits["points"]
    assert points == pytest.approx(100 * np.array([[r["share"], r["accuracy"]["mean"]] for r in rows]))
    assert low == pytest.approx([100 * row["accuracy"]["low"] for row in rows])
    assert high == pytest.approx([100 * row["accuracy"]["high"] for row in rows])
    [mark] = exits["marks"]
    [diamond] = [line for line in axes.lines if line.get_marker() == "D"]
    assert diamond.get_xydata() == pytest.approx(100 * np.array([[mark["share"], mark["accuracy"]["mean"]]]))
    assert diamond.get_label() == "exit_threshold 0.5000"
    assert not axes.texts  # it would lie over intervals
    [upper] = axes.child_axes
    shares = upper.get_xticks().tolist()
    assert len(shares) > 2
    thresholds = {100 * row["share"]: row["threshold"] for row in rows}
    assert [tick.get_text() for tick in upper.get_xticklabels()] == [f"{thresholds[s]:.2f}" for s in shares]
    assert set(legend(figure)) == {*names, "random routing", "95 % interval", "exit_threshold 0.5000"}


def test_thresholds_are_rounded_down_and_told_apart() -> None:
    thresholds = [0.998, 0.9928, 0.99, 0.3, 0.29999, 0.0]
    assert plots.rounded_down(thresholds, 2) == ["0.998", "0.992", "0.99", "0.30", "0.29", "0.00"]
    assert plots.rounded_down([1.0, 0.99999], 4) == ["1.0000", "0.9999"]


def test_long_thresholds_do_not_touch(summary: dict[str, Any]) -> None:
    share, point = 0.0, summary["exits"]["points"][-1]
    points = []
    for number in range(10):
        share += 0.1
        points.append({**point, "share": share, "threshold": 0.99999 - number * 1e-6})
    figure = plots.exit_figure({**summary["exits"], "points": points})
    figure.canvas.draw()  # places the labels
    [upper] = figure.axes[0].child_axes
    boxes = [tick.get_window_extent() for tick in upper.get_xticklabels()]
    assert len(boxes) > 3
    assert all(one.x1 < two.x0 for one, two in pairwise(boxes))


def test_confidence_alone_decides_where_there_is_no_consistency() -> None:
    results, _ = make_results()
    for row in results.rows:
        if row["method"] == "small":
            row |= {"consistency": None, "decision_score": row["confidence"]}
    figure = plots.exit_figure(summarize(results)["exits"])
    assert legend(figure) == ["confidence (decision score)", "random routing", "95 % interval"]


def test_stages_are_stacked() -> None:
    figure = plots.stage_figure(STAGES)
    [axes] = figure.axes
    stacked = {
        str(container.get_label()): [(bar.get_x(), bar.get_width()) for bar in container]
        for container in axes.containers
    }
    expected = {
        "small vision": [(0, 4), (0, 0)],
        "small decode": [(4, 10), (0, 0)],
        "large decode": [(14, 20), (0, 21.5)],
        "large vision": [(34, 0), (21.5, 15)],
    }
    assert list(stacked) == list(expected) == legend(figure)
    for name, parts in expected.items():
        assert np.array(stacked[name]) == pytest.approx(np.array(parts))
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(STAGES)
    assert [text.get_text().strip() for text in axes.texts] == ["34.0", "36.5"]


def test_names_are_shown_as_they_are(summary: dict[str, Any]) -> None:
    """No mathematics of dollars, no name that a legend leaves out, each ranking its own look."""
    names = ["_own", "$\\frac{$", *(f"ranking {number}" for number in range(9))]
    rows = [row for row in summary["methods"] if row["token_ratio"] is None]
    rows += [
        {**row, "method": name} for name in names for row in summary["methods"] if row["method"] == "guided"
    ]
    figure = plots.accuracy_figure(rows, title="$\\frac{$")
    assert plots.png(figure)
    assert [name.strip() for name in legend(figure)[2:]] == names
    lines = [container[0] for container in figure.axes[0].containers]  # type: ignore[index]
    assert_told_apart(lines, len(names))
    assert plots.png(plots.stage_figure({"$\\frac{$": {"$\\frac{$": 1.0}}))


def assert_told_apart(lines: list[Any], count: int) -> None:
    """Lines of one colour differ in dash and in marker."""
    assert len(lines) == count > 7
    by_colour: dict[str, list[Any]] = {}
    for line in lines:
        by_colour.setdefault(to_hex(line.get_color()), []).append(line)
    assert len(by_colour) == 7
    for same in by_colour.values():
        assert len({line.get_marker() for line in same}) == len(same)
        assert len({str(line._dash_pattern) for line in same}) == len(same)


def test_settings_are_told_apart_in_time(summary: dict[str, Any]) -> None:
    curve = next(iter(summary["front"]["curves"].values()))
    labels = [f"guided at 36 % (0.2 @ {number})" for number in range(15)]
    figure = plots.front_figure({**summary["front"], "curves": dict.fromkeys(labels, curve)})
    names = [f"{label}, with exits" for label in labels]
    lines = [line for line in figure.axes[0].lines if line.get_label() in names]
    assert_told_apart(lines, 15)
    marked = [
        line.get_marker() for line in figure.axes[0].lines if line.get_label() in summary["front"]["points"]
    ]
    assert not {line.get_marker() for line in lines} & set(marked)
    figure.canvas.draw()  # places the legend
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_levels_that_are_equal_are_both_seen(summary: dict[str, Any]) -> None:
    rows = [{**row, "mean": 0.8} for row in summary["methods"]]
    [axes] = plots.accuracy_figure(rows).axes
    large, small = (
        next(line for line in axes.lines if line.get_label() == name)
        for name in ("large unpruned", "small alone")
    )
    assert axes.lines.index(large) < axes.lines.index(small)  # drawn below it
    assert large.get_linewidth() > 2 * small.get_linewidth()
    assert small.is_dashed()
    assert to_hex(large.get_color()) != to_hex(small.get_color())


@pytest.mark.parametrize(
    ("settings", "joined"),
    [
        ([(0.05, 0, 0.05), (0.2, 2, 0.36), (0.4, 4, 0.64)], True),
        ([(0.1, 2, 0.28), (0.2, 2, 0.36), (0.4, 2, 0.52)], True),
        ([(0.1, 4, 0.46), (0.3, 2, 0.44)], False),
    ],
)
def test_lines_join_what_goes_one_way(
    summary: dict[str, Any], settings: list[tuple[float, int, float]], joined: bool
) -> None:
    guided = next(row for row in summary["methods"] if row["method"] == "guided")
    names = ("keep_ratio", "prune_layer", "token_ratio")
    rows = [{**guided, **dict(zip(names, setting, strict=True))} for setting in settings]
    [axes] = plots.accuracy_figure([*summary["methods"][:2], *rows]).axes
    [line] = [container[0] for container in axes.containers]  # type: ignore[index]
    assert (line.get_linestyle() == "-") == joined
    assert (line.get_linestyle() == "None") != joined


def test_one_ratio_is_one_place(summary: dict[str, Any]) -> None:
    rows = [row for row in summary["methods"] if row["keep_ratio"] in (None, 0.2)]
    [axes] = plots.accuracy_figure(rows).axes
    places = [
        axes.transAxes.inverted().transform(axes.transData.transform(points))[0, 0]
        for points, _, _ in bars(axes).values()
    ]
    assert len(places) == 2
    assert 0.01 < places[1] - places[0] < 0.03
    assert sum(places) == pytest.approx(1)


def test_labels_do_not_touch(summary: dict[str, Any]) -> None:
    rows = [
        {**row, "token_ratio": ratio}
        for row in summary["methods"][:3]
        for ratio in ([None] if row["token_ratio"] is None else [0.35, 0.36, 0.64])
    ]
    [axes] = plots.accuracy_figure(rows).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["35 %", "\n36 %", "64 %"]


def test_pngs_are_readable(summary: dict[str, Any], tmp_path: Path) -> None:
    for make, shown in (
        (plots.accuracy_figure, summary["methods"]),
        (plots.exit_figure, summary["exits"]),
        (plots.front_figure, summary["front"]),
        (plots.stage_figure, STAGES),
    ):
        path, figure = tmp_path / "plots" / f"{make.__name__}.png", make(shown)  # type: ignore[operator]
        plots.save(figure, path)
        assert path.read_bytes() == plots.png(make(shown))  # type: ignore[operator]
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            assert image.width == 1400
        sizes = [
            text.get_fontsize() for text in figure.findobj(lambda artist: hasattr(artist, "get_fontsize"))
        ]
        # Nine points are 12 pixels; the picture is 700 pixels wide and 7 inches.
        assert min(sizes) * 700 / (72 * figure.get_figwidth()) >= 12
        assert list(path.parent.glob(".*")) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stages.png"
    path.write_bytes(b"old")

    def fail(self: Path, data: bytes) -> int:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space"):
        plots.save(plots.stage_figure(STAGES), path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["stages.png"]


def test_nothing_to_plot(summary: dict[str, Any]) -> None:
    unscored = [{**row, "mean": None} for row in summary["methods"]]
    for rows in ([], summary["methods"][:2], unscored):
        with pytest.raises(SGLError, match="no score of a pruned large VLM"):
            plots.accuracy_figure(rows)
    with pytest.raises(SGLError, match="no curve"):
        plots.exit_figure({**summary["exits"], "curves": {}})
    with pytest.raises(SGLError, match="nothing to plot against time"):
        plots.front_figure({"curves": {}, "points": {}, "best": []})
    for empty in ({}, {"guided": {}}):
        with pytest.raises(SGLError, match="no times"):
            plots.stage_figure(empty)
    for seconds in (-1.0, float("nan"), float("inf")):
        with pytest.raises(SGLError, match="small_vision of guided took"):
            plots.stage_figure({"guided": {"small_vision": seconds}})
