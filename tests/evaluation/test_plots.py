"""What plots show is what tables say."""

from __future__ import annotations

import io
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
    for name, (points, low, high) in found.items():
        rows = [row for row in summary["methods"] if row["method"] == name][::-1]
        assert points == pytest.approx(np.array([[100 * r["token_ratio"], 100 * r["mean"]] for r in rows]))
        assert low == pytest.approx([100 * row["low"] for row in rows])
        assert high == pytest.approx([100 * row["high"] for row in rows])
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
    assert [text.get_text().strip() for text in axes.texts] == ["exit_threshold 0.500"]
    [upper] = axes.child_axes
    shares = upper.get_xticks().tolist()
    assert len(shares) > 2
    thresholds = {100 * row["share"]: row["threshold"] for row in rows}
    assert [tick.get_text() for tick in upper.get_xticklabels()] == [f"{thresholds[s]:.2f}" for s in shares]
    assert set(legend(figure)) == {*names, "random routing", "95 % interval"}


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
    looks = {
        (to_hex(line.get_color()), line.get_marker(), line.get_linestyle())
        for line in (container[0] for container in figure.axes[0].containers)  # type: ignore[index]
    }
    assert len(looks) == len(names)
    assert plots.png(plots.stage_figure({"$\\frac{$": {"$\\frac{$": 1.0}}))


def test_labels_do_not_touch(summary: dict[str, Any]) -> None:
    rows = [
        {**row, "token_ratio": ratio}
        for row in summary["methods"][:3]
        for ratio in ([None] if row["token_ratio"] is None else [0.35, 0.36, 0.64])
    ]
    [axes] = plots.accuracy_figure(rows).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["35 %", "64 %"]


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
