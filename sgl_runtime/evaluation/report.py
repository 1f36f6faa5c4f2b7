"""An evaluation for people: tables in Markdown, one HTML file that needs nothing else, and the numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

from sgl_runtime.errors import ConfigError
from sgl_runtime.evaluation import plots
from sgl_runtime.evaluation.calibrating import check
from sgl_runtime.evaluation.calibration import Calibration
from sgl_runtime.evaluation.data import DataSet
from sgl_runtime.evaluation.metrics import METRICS
from sgl_runtime.evaluation.page import render
from sgl_runtime.evaluation.results import Results, Row
from sgl_runtime.evaluation.summary import summarize
from sgl_runtime.files import whole_file

_SECONDS = (
    "In brackets: 95 % bootstrap intervals; images are drawn, not questions. Differences are paired, over "
    "the examples that both answered. Seconds are of the VLM that answers, per example: guidance costs what "
    "small alone took on top."
)
_LISTED = 20  # errors and skipped rows
_FEW = 30  # images, below which a bootstrap of their means covers less than it says
_REFERENCES = ("small alone", "large unpruned")
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A PNG: the file's name, its bytes, what is seen, and whether it is a plot."""

    name: str
    png: bytes
    caption: str
    plot: bool


@dataclass(frozen=True)
class Section:
    """A table with pictures: ``kinds`` says of each column whether it is "number", "text" or neither ("")."""

    title: str
    columns: Sequence[str] = ()
    kinds: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    pictures: Sequence[Picture] = ()
    note: str = ""


def write_report(
    results: Results,
    folder: Path,
    *,
    dataset: DataSet | None = None,
    examples: Sequence[tuple[Path, str]] = (),
    calibration: Calibration | None = None,
) -> Path:
    """Write report.json, report.md, report.html and the plots' PNG files; each whole or not at all.

    Parameters
    ----------
    results
        From `results.load` or `results.run`.
    folder
        Where to; files of the same names are replaced.
    dataset
        What was evaluated; without it questions, answers and the metric's own numbers are left out.
    examples
        PNG files to embed and their captions: from `examples.draw_examples`.
    calibration
        A promise to check on these results; its setting and threshold are what is marked and listed.

    Returns
    -------
    Path
        report.html.

    Raises
    ------
    ConfigError
        There is nothing to report (see `summary.summarize`), an example is no PNG file, or the results lack
        the calibrated setting.
    """
    folder = Path(folder)
    summary = _summary(results, dataset, calibration)
    summary["report"] = {"made": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    sections = _sections(summary, _embedded(examples))
    about = summary["header"]["data set"]
    title, warnings = f"Evaluation on {about['name']}", _warnings(summary)
    files = {
        picture.name: picture.png for section in sections for picture in section.pictures if picture.plot
    }
    files["report.json"] = (json.dumps(summary, indent=1, allow_nan=False) + "\n").encode()
    files["report.md"] = markdown(title, warnings, sections).encode()
    page = render(title=title, warnings=warnings, sections=sections, references=_REFERENCES)
    files["report.html"] = page.encode()
    for name, data in files.items():
        with whole_file(folder / name) as partial:
            partial.write_bytes(data)
    return folder / "report.html"


def markdown(title: str, warnings: Sequence[str], sections: Sequence[Section]) -> str:
    """Return a report as Markdown; plots are linked as files beside it, other pictures left out."""
    lines = [f"# {_plain(title)}", *(f"\n**{_plain(warning)}**" for warning in warnings)]
    for section in sections:
        links = [f"\n![{_plain(p.caption)}]({p.name})" for p in section.pictures if p.plot]
        if not (section.rows or links or section.note):
            continue
        lines.append(f"\n## {_plain(section.title)}")
        if section.rows:
            columns = section.columns or [""] * len(section.rows[0])
            lines += ["", _line(columns), _line(["---"] * len(columns), plain=False)]
            lines += [_line(row) for row in section.rows]
        lines += [*links, *([f"\n{_plain(section.note)}"] if section.note else [])]
    return "\n".join(lines) + "\n"


def _summary(results: Results, dataset: DataSet | None, calibration: Calibration | None) -> dict[str, Any]:
    if calibration is None:
        return {**summarize(results, dataset), "promise": None}
    promise = check(results, calibration)
    threshold = calibration.exit_threshold
    routed_to = promise["routed_to"]
    marks = () if threshold is None else (threshold,)
    return {**summarize(results, dataset, routed_to=routed_to, thresholds=marks), "promise": promise}


def _sections(summary: dict[str, Any], examples: Sequence[Picture]) -> list[Section]:
    sections = [_about(summary), _methods(summary), *_categories(summary)]
    if summary["promise"] is not None:
        sections.append(_promise(summary["promise"]))
    if summary["exits"] is not None:
        sections += [_exits(summary["exits"]), _disagreements(summary)]
    if summary["front"] is not None and summary["front"]["curves"]:
        sections.append(_front(summary["front"]))
    figure, caption = plots.stage_figure(summary["stages"]), "Mean time per stage of an example"
    pictures = [Picture("stages.png", plots.png(figure), caption, True)]
    sections.append(Section("Time per stage", pictures=pictures))
    if examples:
        sections.append(Section("Where the small VLM looked, and what the large VLM sees", pictures=examples))
    return [*sections, *_failures(summary)]


def _about(summary: dict[str, Any]) -> Section:
    header, counts = summary["header"], summary["examples"]
    about, report = header["data set"], summary["report"]
    rows = [
        [f"{name} VLM", f"{vlm['layers']} layers, {vlm['compute']}, {_short(vlm)}"]
        for name, vlm in header["pair"].items()
    ]
    rows += [
        ["data set", f"{about['name']}, {about['count']} examples, metric {about['metric']}"],
        ["prompt", f"question + {about['suffix']!r}" if about["suffix"] else "question"],
        ["answered by all", f"{counts['answered']} of {counts['count']}"],
        ["errors", f"{counts['errors']}"],
        ["rows skipped", f"{counts['skipped']}"],
        ["settings", ", ".join(f"{name} = {value}" for name, value in header["settings"].items())],
        ["seed", str(header["seed"])],
        ["versions", ", ".join(f"{name} {value}" for name, value in header["versions"].items())],
        *(["run", f"{run['started']} on {run['machine']}"] for run in summary["runs"]),
        ["report made", report["made"]],
    ]
    return Section("What was evaluated", kinds=("", "text"), rows=rows)


def _methods(summary: dict[str, Any]) -> Section:
    methods = summary["methods"]
    columns = (
        "answered by",
        "keep ratio",
        "prune layer",
        "token ratio",
        "score, %",
        "minus large unpruned",
        "seconds",
        "examples",
    )
    rows = []
    for row in methods:
        ratio, layer = row["keep_ratio"], row["prune_layer"]
        rows.append(
            [
                row["label"],
                "" if ratio is None else f"{ratio:g}",
                "" if layer is None else str(layer),
                "" if row["token_ratio"] is None else f"{100 * row['token_ratio']:.0f} %",
                "" if row["mean"] is None else _interval(row),
                "" if row["difference"] is None else _interval(row["difference"], "+"),
                f"{row['seconds']:.3f}",
                str(row["count"]),
            ]
        )
    pictures, note = [], _SECONDS
    if any(row["mean"] is not None and row["token_ratio"] is not None for row in methods):
        caption = "Score against token ratio, with 95 % intervals"
        pictures = [Picture("accuracy.png", plots.png(plots.accuracy_figure(methods)), caption, True)]
        note = f"{_worse_than_small(methods)} {note}"
    kinds = ("", *["number"] * (len(columns) - 1))
    return Section("Scores", columns, kinds, rows, pictures, note)


def _worse_than_small(methods: Sequence[Row]) -> str:
    small = next(row["mean"] for row in methods if row["method"] == "small")
    worse = [row["label"] for row in methods if row["token_ratio"] is not None and row["mean"] < small]
    return f"Below small alone: {', '.join(worse)}." if worse else "No pruned method is below small alone."


def _categories(summary: dict[str, Any]) -> list[Section]:
    methods, metric = summary["methods"], METRICS[summary["header"]["data set"]["metric"]]
    names = list(dict.fromkeys(name for row in methods for name in row["summary"]))
    if not names:
        return []
    scale = 100 if metric.shares else 1
    rows = [
        [
            row["label"],
            *(f"{scale * row['summary'][name]:.1f}" if name in row["summary"] else "" for name in names),
        ]
        for row in methods
    ]
    title = "Scores by category, %" if metric.shares else "Scores of the benchmark"
    return [Section(title, ["answered by", *names], ["", *["number"] * len(names)], rows)]


def _exits(exits: dict[str, Any]) -> Section:
    columns = ("exits", "exit_threshold", "score, %", "random routing", "gain")
    points, marks = exits["points"], exits["marks"]
    exited = [point["threshold"] for point in points if point["threshold"] is not None]
    thresholds = ["none", *plots.rounded_down(exited, 4)]
    thresholds += [plots.rounded_down([point["threshold"]], 4)[0] for point in marks]
    labels = [_exit_label(point, exits["routed_to"]) for point in points]
    labels += [f"at a given threshold: {_share(point)}" for point in marks]
    rows = list(map(_exit_row, labels, thresholds, [*points, *marks]))
    note = (
        f"What does not exit is answered by the large VLM, {exits['routed_to']}; {exits['examples']} "
        "examples. Random routing sends as many examples to the small VLM by chance. Thresholds were looked "
        "up on these examples: sgl-vlm calibrate finds one with a guarantee."
    )
    figure, caption = plots.exit_figure(exits), "Score against the share of early exits"
    pictures = [Picture("exits.png", plots.png(figure), caption, True)]
    return Section("Early exit", columns, ("", *["number"] * 4), rows, pictures, note)


def _promise(promise: dict[str, Any]) -> Section:
    told = {"accuracy": "loss of score", "agreement": "other answers", "calls": "calls of the large VLM"}
    threshold = promise["exit_threshold"]
    row = [
        f"{told[promise['promise']]} at most {100 * promise['alpha']:g} %",
        f"{100 * (1 - promise['delta']):g} %",
        f"{promise['keep_ratio']:g} @ {promise['prune_layer']}",
        "none" if threshold is None else f"{threshold:g}",
        f"{100 * promise['exit_share']:.0f} %",
        _interval(promise),
        "yes" if promise["kept"] else "no",
    ]
    columns = (
        "promise",
        "confidence",
        "pruning",
        "exit_threshold",
        "exits",
        "measured here, %",
        "mean within promise",
    )
    note = (
        f"Means over {promise['groups']} images, against the unpruned large VLM. In brackets: the 95 % "
        f"interval, where the mean over all such images may lie. {_reach(promise)}"
    )
    if promise["same_data"]:
        note += " These are the examples it was calibrated on: other ones are needed to check it."
    note += "".join(f" {difference}" for difference in promise["differences"])
    return Section("The calibrated promise", columns, ("", *["number"] * 5, ""), [row], note=note)


def _reach(promise: dict[str, Any]) -> str:
    """Return what the interval says of the promise, which the mean alone does not."""
    promised = f"the promised {100 * promise['alpha']:g} %"
    if promise["low"] > promise["alpha"]:
        return f"All of it is beyond {promised}: the promise is not kept here."
    if promise["high"] > promise["alpha"]:
        return f"It reaches beyond {promised}: these examples do not show whether the promise is kept."
    return f"It does not reach beyond {promised}."


def _front(front: dict[str, Any]) -> Section:
    caption = "Score against measured time, at every exit threshold of every guided setting"
    picture = Picture("time.png", plots.png(plots.front_figure(front)), caption, True)
    note = (
        "A request takes the small VLM's time and, where nothing exits, the large VLM's. Without drafts and "
        "overlap, which sgl-vlm bench measures. Thresholds were looked up on these examples."
    )
    return Section("Score against time", pictures=[picture], note=note)


def _disagreements(summary: dict[str, Any]) -> Section:
    routed, lost = summary["exits"]["routed_to"], summary["disagreements"]
    title = f"What {routed} lost against large unpruned"
    if not lost:
        return Section(title, note="Nothing: it scores no lower on any example.")
    columns = ("example", "question", "answers", "small alone", "large unpruned", routed, "loss")
    rows = [
        [
            row["id"],
            row["question"] or "",
            "; ".join(dict.fromkeys(row["answers"] or ())),
            row["small"] or "",
            row["large"],
            row["pruned"],
            f"{row['loss']:.2f}",
        ]
        for row in lost
    ]
    count = summary["disagreement_count"]
    note = f"{len(lost)} of the {count} examples with a lower score, the largest losses first."
    return Section(title, columns, ("", *["text"] * 5, "number"), rows, note=note)


def _failures(summary: dict[str, Any]) -> list[Section]:
    sections = []
    errors = list(summary["errors"].items())
    if errors:
        note = "" if len(errors) <= _LISTED else f"The first {_LISTED} of {len(errors)}."
        rows = [list(error) for error in errors[:_LISTED]]
        sections.append(Section("Errors", ("example", "error"), ("", "text"), rows, note=note))
    skipped = summary["skipped"]
    if skipped:
        note = "" if len(skipped) <= _LISTED else f"The first {_LISTED} of {len(skipped)}."
        rows = [[str(line), reason] for line, reason in skipped[:_LISTED]]
        sections.append(Section("Rows that were skipped", ("line", "reason"), ("", "text"), rows, note=note))
    return sections


def _warnings(summary: dict[str, Any]) -> list[str]:
    counts = summary["examples"]
    warnings = []
    if counts["missing"]:
        warnings.append(
            f"Incomplete: {counts['missing']} of {counts['count']} examples lack an answer of some method. "
            "Scores over different examples are no comparison; run the evaluation to its end."
        )
    if counts["groups"] < _FEW:
        warnings.append(
            f"Few images ({counts['groups']}): below {_FEW} the 95 % intervals are too narrow, and no proof."
        )
    if counts["errors"]:
        warnings.append(f"{counts['errors']} of {counts['count']} examples failed and are in no score.")
    if counts["skipped"]:
        warnings.append(f"Rows of the data set that are broken and were skipped: {counts['skipped']}.")
    if all(row["mean"] is None for row in summary["methods"]):
        warnings.append("The metric needs a judge: answers are stored, nothing is scored.")
    return warnings


def _embedded(examples: Sequence[tuple[Path, str]]) -> list[Picture]:
    pictures = []
    for path, caption in examples:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"The example picture {path} cannot be read: {error.strerror}.") from error
        if not data.startswith(_PNG):
            raise ConfigError(f"The example picture {path} is no PNG file: give what draw_examples returns.")
        pictures.append(Picture(Path(path).name, data, caption, False))
    return pictures


def _interval(found: Mapping[str, float], sign: str = "") -> str:
    mean, low, high = (f"{100 * found[name]:{sign}.1f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _share(point: Row) -> str:
    return f"{100 * point['share']:.0f} %"


def _exit_label(point: Row, routed_to: str) -> str:
    ends = {0.0: f": {routed_to}", 1.0: ": small alone"}
    return _share(point) + ends.get(point["share"], "")


def _exit_row(label: str, threshold: str, point: Row) -> list[str]:
    return [
        label,
        threshold,
        _interval(point["accuracy"]),
        _interval(point["random"]),
        _interval(point["gain"], "+"),
    ]


def _short(vlm: Mapping[str, Any]) -> str:
    return f"fingerprint {vlm['fingerprint'][:12]}"


def _line(cells: Sequence[str], plain: bool = True) -> str:
    return f"| {' | '.join(_plain(cell) if plain else cell for cell in cells)} |"


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", escape(" ".join(text.split()), quote=False))
