"""Pictures of examples: which are drawn, and that they show what the pipeline did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sgl_runtime import SGLPipeline, tiny
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
    paths = draw_examples(pipe, dataset, with_losses(results, lost), tmp_path / "new", 4)
    assert [path.name.split("-")[0] for path in paths] == ["lost", "lost", "kept", "kept"]
    assert len(set(paths)) == 4
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths)
    asked = {example.id: example for example in dataset.examples}
    answers = {row["id"]: row["prediction"] for row in results.rows if row["keep_ratio"] == 0.2}
    for title, name in zip(titles, ["0-0", "2-3", "1-0", "3-0"], strict=True):
        expected = f"{asked[name].question}  →  {answers[name]}"
        assert title == (f"{expected}  (lost: {asked[name].answers[0]})" if name in lost else expected)
    for path in paths:
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 20


def test_few_losses_leave_room(done: Done, titles: list[str], tmp_path: Path) -> None:
    pipe, dataset, results = done
    paths = draw_examples(pipe, dataset, with_losses(results, set()), tmp_path, 3)
    assert [path.name.split("-")[0] for path in paths] == ["kept"] * 3
    assert draw_examples(pipe, dataset, results, tmp_path, 0) == []


def test_what_cannot_be_drawn_is_left_out(done: Done, titles: list[str], tmp_path: Path) -> None:
    pipe, dataset, results = done
    gone = [replace(example, images=(str(tmp_path / "gone.png"),)) for example in dataset.examples[:4]]
    two = [replace(example, images=example.images * 2) for example in dataset.examples[4:8]]
    rest: tuple[Example, ...] = dataset.examples[8:]
    mixed = replace(dataset, examples=(*gone, *two, *rest))
    paths = draw_examples(pipe, mixed, with_losses(results, set()), tmp_path, 2)
    assert len(paths) == 1
    assert titles[0].startswith(rest[0].question)
    only = [row for row in results.rows if row["method"] != "guided"]
    assert draw_examples(pipe, dataset, replace(results, rows=only), tmp_path, 2) == []
