"""Reports say what the summary says, carry everything with them, and run nothing that a model wrote."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sgl_runtime.errors import ConfigError
from sgl_runtime.evaluation.calibrating import check
from sgl_runtime.evaluation.report import write_report
from sgl_runtime.evaluation.results import Results, describe
from sgl_runtime.evaluation.summary import summarize

from .made_results import CALIBRATION, make_results, rows_of

PLOTS = ("accuracy", "exits", "time", "stages")
EVIL = "<script>alert(1)</script> | <img src=http://evil.example/x onerror=alert(2)> [x](http://evil.example)"
PROMISE = replace(
    CALIBRATION,
    exit_threshold=0.5,
    alpha=0.3,
    pair={"small": "ab" * 32, "large": "ab" * 32},
    data_sha256="0" * 64,
)


class Page(HTMLParser):
    """Tables by heading as lists of cells, all tags with attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._into: list[str] = []
        self._heading = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._into.append("")
        if tag == "tr":
            self.tables.setdefault(self._heading, []).append([])

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._into:
            self._into[-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "h2":
            self._heading = self._into[-1]
        if tag in ("th", "td"):
            self.tables[self._heading][-1].append(self._into[-1])


def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def markdown_table(text: str, heading: str) -> list[list[str]]:
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    cells = [[re.sub(r"\\(.)", r"\1", c) for c in re.split(r" \| ", f" {line} "[3:-3])] for line in lines]
    return [cells[0], *cells[2:]]


def test_tables_are_the_summary(tmp_path: Path) -> None:
    results, dataset = make_results()
    path = write_report(results, tmp_path, dataset=dataset, calibration=PROMISE)
    assert path == tmp_path / "report.html"
    expected = summarize(results, dataset, thresholds=[0.5])
    stored = json.loads((tmp_path / "report.json").read_text())
    assert {name: stored[name] for name in expected} == json.loads(json.dumps(expected))
    page, text = page_of(path), (tmp_path / "report.md").read_text()
    rows = page.tables["Scores"]
    assert rows == markdown_table(text, "Scores")
    for cells, row in zip(rows[1:], expected["methods"], strict=True):
        assert cells[0] == row["label"]
        assert cells[4] == f"{100 * row['mean']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        if row["difference"] is not None:
            assert cells[5].startswith(f"{100 * row['difference']['mean']:+.1f} [")
        assert cells[7] == "60"
    exits = page.tables["Early exit"]
    assert exits == markdown_table(text, "Early exit")
    points = [*expected["exits"]["points"], *expected["exits"]["marks"]]
    assert exits[1][0] == "0 %: guided at 36 %"
    assert exits[-1][:2] == [f"at a given threshold: {100 * points[-1]['share']:.0f} %", "0.5000"]
    for cells, point in zip(exits[1:], points, strict=True):
        assert cells[2].startswith(f"{100 * point['accuracy']['mean']:.1f} [")
        assert cells[4].startswith(f"{100 * point['gain']['mean']:+.1f} [")
    categories = page.tables["Scores by category, %"]
    assert categories[0] == ["answered by", "even", "odd"]
    small = rows_of(results, "small")
    assert categories[1][1] == f"{100 * sum(row['score'] for row in small[::2]) / 30:.1f}"
    lost = page.tables["What guided at 36 % lost against large unpruned"]
    assert [cells[0] for cells in lost[1:]] == [row["id"] for row in expected["disagreements"]]
    assert page.tables["Rows that were skipped"][1:] == [["7", "it has no image"]]


def test_a_promise_is_checked(tmp_path: Path) -> None:
    results, dataset = make_results()
    page = page_of(write_report(results, tmp_path / "kept", dataset=dataset, calibration=PROMISE))
    found = check(results, PROMISE)
    [row] = page.tables["The calibrated promise"][1:]
    interval = f"{100 * found['mean']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
    share = f"{100 * found['exit_share']:.0f} %"
    assert row == ["loss of score at most 30 %", "90 %", "0.2 @ 2", "0.5", share, interval, "yes"]
    assert page.tables["The calibrated promise"][0][-1] == "mean within promise"
    assert found["low"] < 0.3
    assert "does not reach beyond the promised 30 %" in page.text
    assert "calibrated on" not in page.text
    other = replace(
        PROMISE,
        alpha=0.001,
        pair={"small": "c", "large": "d"},
        data_sha256=results.header["data set"]["sha256"],
    )
    page = page_of(write_report(results, tmp_path / "broken", dataset=dataset, calibration=other))
    assert page.tables["The calibrated promise"][1][-1] == "no"
    assert "These are the examples it was calibrated on" in page.text
    assert "The large VLM is not the one that was calibrated" in page.text
    between = replace(PROMISE, alpha=(found["mean"] + found["high"]) / 2)
    page = page_of(write_report(results, tmp_path / "unsure", dataset=dataset, calibration=between))
    assert page.tables["The calibrated promise"][1][-1] == "yes"
    assert "It reaches beyond the promised" in page.text
    assert "do not show whether the promise is kept" in page.text
    with pytest.raises(ConfigError, match=r"no results of 0\.3@2"):
        write_report(results, tmp_path / "none", calibration=replace(PROMISE, keep_ratio=0.3))


def test_small_alone_is_in_every_table_of_scores(tmp_path: Path) -> None:
    results, dataset = make_results()
    tables = page_of(write_report(results, tmp_path, dataset=dataset)).tables
    headings = [heading for heading in tables if heading.startswith(("Scores", "Early exit", "What guided"))]
    assert len(headings) == 4
    for heading in headings:
        assert any("small alone" in cell for cells in tables[heading] for cell in cells), heading


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    results, dataset = make_results()
    picture = tmp_path / "street.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    path = write_report(results, tmp_path / "out", dataset=dataset, examples=[(picture, "街で: a <street>")])
    page = page_of(path)
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    prefix = "data:image/png;base64,"
    assert all(image.startswith(prefix) for image in images)
    embedded = [base64.b64decode(image[len(prefix) :]) for image in images]
    plots = [(tmp_path / "out" / f"{name}.png").read_bytes() for name in PLOTS]
    assert embedded == [*plots, picture.read_bytes()]
    assert "街で: a <street>" in page.text
    assert [attributes["alt"] for tag, attributes in page.tags if tag == "img"][-1] == "街で: a <street>"
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "a", "form"}
    style = re.search(r"<style>(.*)</style>", path.read_text(), re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert re.search(r"https?:|//[a-z]", re.sub(r"base64,[^\"]*", "", path.read_text())) is None
    [policy] = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"report.html", "report.md", "report.json", *(f"{name}.png" for name in PLOTS)}


def test_text_of_others_is_only_text(tmp_path: Path) -> None:
    clean, dataset = make_results()
    tags = page_of(write_report(clean, tmp_path / "clean", dataset=dataset)).tags
    results, _ = make_results()
    rows = [
        {**row, "prediction": EVIL, "method": EVIL if row["method"] == "random" else row["method"]}
        for row in results.rows
    ]
    examples = tuple(
        replace(example, question=EVIL, answers=(EVIL,), extra={"category": EVIL})
        for example in dataset.examples
    )
    evil = replace(dataset, name=EVIL, examples=examples)
    header: dict[str, Any] = {**results.header, "data set": describe(evil)}
    path = write_report(Results(header, rows, {EVIL: EVIL}), tmp_path / "evil", dataset=evil)
    page = page_of(path)
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in tags}
    assert [t for t, _ in page.tags].count("img") == [t for t, _ in tags].count("img")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script" not in path.read_text()
    lost = page.tables["What guided at 36 % lost against large unpruned"]
    assert lost[1][1:6] == [EVIL] * 5
    assert page.tables["Errors"][1] == [EVIL, EVIL]
    text = (tmp_path / "evil" / "report.md").read_text()
    assert "<" not in text
    assert "](http" not in text.replace("\\]", "")
    for line in text.split("## What guided")[1].split("## Errors")[0].splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) == 8


def test_what_failed_is_told(tmp_path: Path) -> None:
    results, dataset = make_results()
    torn = {str(number): f"ImageError: image {number} is torn" for number in range(30)}
    rows = [row for row in results.rows if row["id"] not in torn and row["id"] != "59"]
    page = page_of(write_report(Results(results.header, rows, torn), tmp_path, dataset=dataset))
    assert "Incomplete: 1 of 60 examples lack an answer" in page.text
    assert "30 of 60 examples failed" in page.text
    assert "Rows of the data set that are broken and were skipped: 1." in page.text
    assert page.tables["Errors"][1:] == [list(error) for error in list(torn.items())[:20]]
    assert "The first 20 of 30." in page.text
    about = dict(page.tables["What was evaluated"])  # type: ignore[arg-type]
    assert (about["answered by all"], about["errors"], about["rows skipped"]) == ("29 of 60", "30", "1")


def test_few_images_are_told(tmp_path: Path) -> None:
    results, _ = make_results()
    for groups in (30, 29):
        rows = [row for row in results.rows if int(row["id"]) < 2 * groups]
        text = page_of(write_report(replace(results, rows=rows), tmp_path / str(groups))).text
        assert ("Few images" in text) == (groups < 30)
    assert "Few images (29): below 30 the 95 % intervals are too narrow" in text


def test_thresholds_are_not_rounded_up(tmp_path: Path) -> None:
    results, _ = make_results()
    for row in rows_of(results, "small"):
        row |= {"confidence": 0.999999, "consistency": 0.999999, "decision_score": 0.999999}
    table = page_of(write_report(results, tmp_path)).tables["Early exit"]
    assert [cells[1] for cells in table[1:]] == ["none", "0.9999"]


def test_results_without_scores_or_rankings(tmp_path: Path) -> None:
    results, _ = make_results()
    header = {**results.header, "data set": {**results.header["data set"], "metric": "judge"}}
    judged = Results(header, [{**row, "score": None} for row in results.rows])
    page = page_of(write_report(judged, tmp_path / "judged"))
    assert "The metric needs a judge" in page.text
    assert {cells[4] for cells in page.tables["Scores"][1:]} == {""}
    only = Results(results.header, [row for row in results.rows if row["method"] in ("small", "large")])
    page = page_of(write_report(only, tmp_path / "only"))
    assert len(page.tables["Scores"]) == 3
    [picture] = [attributes for tag, attributes in page.tags if tag == "img"]
    assert picture["alt"] == "Mean time per stage of an example"


def test_bad_input_leaves_no_report(tmp_path: Path) -> None:
    results, _ = make_results()
    text = tmp_path / "notes.png"
    text.write_text("notes")
    for path, told in ((text, "is no PNG file"), (tmp_path / "gone.png", "cannot be read: No such file")):
        with pytest.raises(ConfigError, match=told):
            write_report(results, tmp_path / "out", examples=[(path, "a caption")])
    with pytest.raises(ConfigError, match="hold no answer and 0 errors"):
        write_report(Results(results.header, []), tmp_path / "out")
    assert not (tmp_path / "out").exists()
