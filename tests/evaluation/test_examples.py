"""Pictures of examples: which are drawn, and that they show what the pipeline did."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sgl_runtime import SGLPipeline, pictures, tiny
from sgl_runtime.config import SGLConfig
from sgl_runtime.evaluation import examples as examples_module
from sgl_runtime.evaluation.data import DataSet, Example, load
from sgl_runtime.evaluation.examples import draw_examples
from sgl_runtime.evaluation.methods import make_methods
from sgl_runtime.evaluation.rankings import RANKINGS
from sgl_runtime.evaluation.results import Results, run
from sgl_runtime.tiny.export import export

Done = tuple[SGLPipeline, DataSet, Results]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("scenes")
    dataset = load(export("calibration", 4, folder))
    pipe = SGLPipeline.from_pretrained(
        tiny.SMALL, tiny.LARGE, config=SGLConfig(max_new_tokens=8, max_batch=4, exit_threshold=0.0)
    )
    methods = make_methods([RANKINGS["guided"]], [(0.2, 2), (0.01, 0)], 10)
    results = run(pipe, dataset, methods, folder / "results.jsonl", checkpoints=(tiny.SMALL, tiny.LARGE))
    return pipe, dataset, results


def with_losses(results: Results, lost: set[str]) -> Results:
    """The same where guided at 0.2@2 is wrong on ``lost`` alone, and the large VLM always right."""
    rows = [
        {**row, "score": float(row["keep_ratio"] != 0.2 or row["id"] not in lost)} for row in results.rows
    ]
    return replace(results, rows=rows)


@pytest.fixture
def titles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    real = examples_module.save_guidance

    def save(path: Path, panels: object, *, title: str) -> None:
        found.append(title)
        real(path, panels, title=title)  # type: ignore[arg-type]

    monkeypatch.setattr(examples_module, "save_guidance", save)
    return found


def test_half_are_losses_and_no_image_comes_twice(done: Done, titles: list[str], tmp_path: Path) -> None:
    pipe, dataset, results = done
    lost = {"0-0", "0-1", "2-3"}
    drawn = draw_examples(pipe, dataset, with_losses(results, lost), tmp_path / "new", 4)
    paths = [path for path, _ in drawn]
    assert [path.name.split("-")[0] for path in paths] == ["lost", "lost", "kept", "kept"]
    assert len(set(paths)) == 4
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths)
    asked = {example.id: example for example in dataset.examples}
    answers = {row["id"]: row["prediction"] for row in results.rows if row["keep_ratio"] == 0.2}
    for title, (_, caption), name in zip(titles, drawn, ["0-0", "2-3", "1-0", "3-0"], strict=True):
        expected = [
            f"question: {asked[name].question}",
            f"large VLM guided at keep ratio 0.2, prune layer 2: {answers[name]}",
            f"right: {asked[name].answers[0]}",
            "lost against large unpruned" if name in lost else "not lost against large unpruned",
        ]
        assert title == "\n".join(expected)
        assert caption == "; ".join(expected)
    for path in paths:
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 20


def test_few_losses_leave_room(done: Done, titles: list[str], tmp_path: Path) -> None:
    pipe, dataset, results = done
    drawn = draw_examples(pipe, dataset, with_losses(results, set()), tmp_path, 3)
    assert [path.name.split("-")[0] for path, _ in drawn] == ["kept"] * 3
    assert draw_examples(pipe, dataset, results, tmp_path, 0) == []


def test_what_cannot_be_drawn_is_left_out(done: Done, titles: list[str], tmp_path: Path) -> None:
    pipe, dataset, results = done
    gone = [replace(example, images=(str(tmp_path / "gone.png"),)) for example in dataset.examples[:4]]
    two = [replace(example, images=example.images * 2) for example in dataset.examples[4:8]]
    rest: tuple[Example, ...] = dataset.examples[8:]
    mixed = replace(dataset, examples=(*gone, *two, *rest))
    assert len(draw_examples(pipe, mixed, with_losses(results, set()), tmp_path, 2)) == 1
    assert titles[0].startswith(f"question: {rest[0].question}\n")
    only = [row for row in results.rows if row["method"] != "guided"]
    assert draw_examples(pipe, dataset, replace(results, rows=only), tmp_path, 2) == []


def test_another_setting_is_drawn(done: Done, titles: list[str], tmp_path: Path) -> None:
    pipe, dataset, results = done
    key = ("guided", 0.01, 0)
    rows = [{**row, "score": float(row["keep_ratio"] != 0.01 or row["id"] != "2-1")} for row in results.rows]
    drawn = draw_examples(pipe, dataset, replace(results, rows=rows), tmp_path, 1, key=key)
    [answer] = [row["prediction"] for row in rows if row["keep_ratio"] == 0.01 and row["id"] == "2-1"]
    assert f"\nlarge VLM guided at keep ratio 0.01, prune layer 0: {answer}\n" in titles[0]
    assert [path.name.split("-")[0] for path, _ in drawn] == ["lost"]
    draw_examples(pipe, dataset, results, tmp_path, 1, key=("large", None, None))
    assert "\nlarge VLM, unpruned: " in titles[1]


def test_pictures_of_an_earlier_call_go(done: Done, tmp_path: Path) -> None:
    pipe, dataset, results = done
    others = ["lost-mine.png", "kept-0123456789ab.jpg", "kept-0123456789abc.png", "notes.txt"]
    for name in [*others, "kept-0123456789ab.png", "lost-0123456789ab.png"]:
        (tmp_path / name).touch()
    [(path, _)] = draw_examples(pipe, dataset, results, tmp_path, 1)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*others, path.name])
    assert draw_examples(pipe, dataset, results, tmp_path, 0) == []
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(others)


def test_long_and_foreign_text(
    done: Done, titles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "_FAMILIES", ("DejaVu Sans",))
    pipe, dataset, results = done
    first = replace(dataset.examples[0], question=f"{dataset.examples[0].question} 街", answers=("x" * 200,))
    asked = replace(dataset, examples=(first,))
    [(_, caption)] = draw_examples(pipe, asked, with_losses(results, set()), tmp_path, 1)
    lines = titles[0].split("\n")
    assert lines[0] == "question: see the report"
    assert lines[2] == f"right: {'x' * 82}…"
    monkeypatch.setattr(examples_module, "drawable", lambda text, instead: text)
    wide = replace(first, answers=("街" * 80,))
    draw_examples(pipe, replace(dataset, examples=(wide,)), with_losses(results, set()), tmp_path / "wide", 1)
    assert titles[1].split("\n")[2] == f"right: {'街' * 40}…"
    assert f"question: {first.question}; " in caption
    assert f"right: {'x' * 200}; " in caption


def test_what_needs_a_judge_is_neither_lost_nor_not(done: Done, tmp_path: Path) -> None:
    pipe, dataset, results = done
    rows = [{**row, "score": None} for row in results.rows]
    judged = replace(dataset, metric="judge")
    [(_, caption)] = draw_examples(pipe, judged, replace(results, rows=rows), tmp_path, 1)
    assert caption.endswith("; not scored")


def test_fonts_fill_each_others_gaps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """STIX, which matplotlib brings, stands for a font of Chinese: U+1D81 is in it and not in DejaVu Sans."""
    panels = [pictures.Panel(Image.new("RGB", (64, 64)), "image")] * 2

    def title(text: str) -> np.ndarray:
        pictures.save_guidance(tmp_path / "p.png", panels, title=text)
        with Image.open(tmp_path / "p.png") as image:
            return np.asarray(image.convert("L"))[:40]

    monkeypatch.setattr(pictures, "_FAMILIES", ("DejaVu Sans", "No Such Font"))
    assert pictures.drawable("Ω é\n", "none") == "Ω é\n"
    assert pictures.drawable("a \u1d81", "none") == "none"
    assert np.array_equal(title("\u1d81"), title(""))
    monkeypatch.setattr(pictures, "_FAMILIES", ("DejaVu Sans", "STIXGeneral"))
    assert pictures.drawable("a \u1d81", "none") == "a \u1d81"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a glyph that is missing
        assert title("\u1d81").min() < 100
