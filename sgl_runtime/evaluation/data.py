"""Data sets of questions about images: read, checked row by row, sampled.

docs/evaluation_data.md has the schema and the benchmarks' layouts.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgl_runtime.errors import ConfigError, DataError, SGLError
from sgl_runtime.evaluation.layouts import LAYOUTS, find, with_choices
from sgl_runtime.evaluation.metrics import METRICS, Metric, choices_problem
from sgl_runtime.evaluation.readers import EMBEDDED, Entries, Row, embedded_image
from sgl_runtime.images import cut, reason

_SHOWN = 10  # bad rows that an error lists
_DEEPEST = 50  # lists and objects in each other: those of many more cannot be copied or written again
# Columns by the names that are accepted for them; every other column goes to ``extra``.
_NAMES = {
    "id": ("id", "question_id"),
    "images": ("images", "image"),
    "question": ("question",),
    "answers": ("answers", "answer"),
}


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes
    ----------
    id : unique in the set
    images : absolute paths; ``<path>#bytes=<first>-<end>`` inside a TSV file. `open_source` takes both
    question : what is asked, options included, the metric's suffix not
    answers : accepted answers, or one per annotator
    extra : what the metric needs beside: choices, box, category, ...; ``group``, where there is one, a text
    """

    id: str
    images: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    extra: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its line (in a JSON file or MME its place, from 1), and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class DataSet:
    """Examples with what they are scored with (a name of `METRICS`), and the rows that were left out."""

    name: str
    metric: str
    examples: tuple[Example, ...]
    bad: tuple[BadRow, ...]


def load(
    path: str | os.PathLike[str],
    *,
    layout: str = "auto",
    metric: str | None = None,
    image_root: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    seed: int | None = None,
) -> DataSet:
    """Read a data set.

    Parameters
    ----------
    path
        A JSONL or Parquet file, a benchmark's own file, or the directory that holds one.
    layout
        A name of `layouts.LAYOUTS`, or "auto".
    metric
        A name of `METRICS`; default the layout's, for JSONL and Parquet "multiple_choice" where every usable
        row has choices, else "exact".
    image_root
        Where relative image paths start; default the file's directory, then the one above, and in each the
        folders that the benchmark keeps images in.
    limit
        How many examples to keep: the first, or with ``seed`` a random draw, in the order of the file.
    skip_bad
        Leave broken rows out; they are listed in ``DataSet.bad``. Else they are an error.
    seed
        Of the draw: the same seed and file give the same examples.

    Raises
    ------
    DataError
        Nothing was found, rows are broken and ``skip_bad`` is off (the first ten are listed), or none is
        usable.
    ConfigError
        ``metric`` or ``limit`` is none that there is, or a package of the extra ``eval`` is missing.
    """
    if metric is not None and metric not in METRICS:
        raise ConfigError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}.")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}.")
    name, file = find(Path(os.path.abspath(path)), layout)
    rows = list(_rows(name, file, _image_folders(name, file, image_root)))
    used = metric or _default_metric(name, rows)
    examples, bad = _checked(rows, METRICS[used])
    if bad and not (skip_bad and examples):
        raise DataError(_complaint(file, len(examples), bad))
    if not examples:
        raise DataError(f"{file} has no rows.")
    return DataSet(file.stem, used, tuple(_sample(examples, limit, seed)), tuple(bad))


def open_source(image: str) -> str | bytes:
    """Return what the pipeline opens for an entry of `Example.images`: the path, or the encoded image."""
    embedded = embedded_image(image)
    return image if embedded is None else embedded


def _image_folders(layout: str, file: Path, image_root: str | os.PathLike[str] | None) -> list[Path]:
    if image_root is not None:
        roots = [Path(os.path.abspath(image_root))]
        if not roots[0].is_dir():
            raise DataError(f"image_root {roots[0]} is not a directory.")
    else:
        roots = [file.parent, file.parent.parent] if LAYOUTS[layout].folders != ("",) else [file.parent]
    return [root / folder for root in roots for folder in (*LAYOUTS[layout].folders, "")]


def _rows(layout: str, file: Path, folders: Sequence[Path]) -> Iterator[tuple[int, Example | str]]:
    """Yield each row's line with its example, or with why it cannot be used by any metric."""
    for line, entry in _entries(layout, file):
        try:
            yield line, _example(_row(LAYOUTS[layout].row, entry), line, folders)
        except _RowError as error:
            yield line, str(error)


def _default_metric(layout: str, rows: Sequence[tuple[int, Example | str]]) -> str:
    examples = [example for _, example in rows if isinstance(example, Example)]
    own = LAYOUTS[layout].metric
    all_have_choices = bool(examples) and all("choices" in example.extra for example in examples)
    return "multiple_choice" if own == "exact" and all_have_choices else own


def _checked(rows: Sequence[tuple[int, Example | str]], metric: Metric) -> tuple[list[Example], list[BadRow]]:
    examples: dict[str, tuple[int, Example]] = {}
    bad: list[BadRow] = []
    for line, example in rows:
        if isinstance(example, str):
            bad.append(BadRow(line, example))
            continue
        problem = metric.problem(example)
        if problem is None and example.id in examples:
            problem = f"its id {cut(repr(example.id))} is that of line {examples[example.id][0]}"
        if problem is None:
            examples[example.id] = (line, example)
        else:
            bad.append(BadRow(line, problem))
    return [example for _, example in examples.values()], bad


def _entries(layout: str, file: Path) -> Entries:
    try:
        yield from LAYOUTS[layout].entries(file)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, SGLError):
            raise
        raise DataError(f"{file} is not what {layout} files are like ({reason(error)}).") from error


class _RowError(Exception):
    """Why a row cannot be used."""


def _row(read: Callable[[Any], Row], entry: Any) -> Row:
    try:
        row = read(entry)
        for column, value in row.items():
            _check_texts({column: value}, column)
        return row
    except KeyError as error:
        raise _RowError(f"{cut(str(error))} is missing") from error
    except RecursionError as error:
        raise _RowError("lists or objects in it are nested too deep to be read") from error
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise _RowError(str(error)) from error


def _check_texts(value: Any, column: str, depth: int = 0) -> None:
    """Refuse what could be read and not written again: too deep, or no Unicode."""
    if depth > _DEEPEST:
        raise _RowError(f"{cut(repr(column))} is nested more than {_DEEPEST} deep")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _RowError(
                f"{cut(repr(column))} holds half a character, a lone surrogate, which is no text: "
                f"{cut(repr(value))}"
            ) from error
    inner = (*value, *value.values()) if isinstance(value, dict) else value
    for one in inner if isinstance(inner, (list, tuple)) else ():
        _check_texts(one, column, depth + 1)


def _example(row: Row, line: int, folders: Sequence[Path]) -> Example:
    given = {column: _given(row, names) for column, names in _NAMES.items()}
    extra = {key: value for key, value in row.items() if not any(key in names for names in _NAMES.values())}
    question = given["question"]
    if not isinstance(question, str) or not question.strip():
        raise _RowError(f"question must be a text, got {cut(repr(question))}")
    if "choices" in extra:
        problem = choices_problem(extra["choices"])
        if problem is not None:
            raise _RowError(problem)
        question = with_choices(question, extra["choices"])
    if "group" in extra:
        extra["group"] = _plain(extra["group"], "group")
    number = given["id"]
    return Example(
        id=f"line-{line}" if number is None else _plain(number, "id"),
        images=_images(given["images"], folders),
        question=question,
        answers=tuple(_plain(answer, "answers") for answer in _as_list(given["answers"])),
        extra=extra,
    )


def _given(row: Row, names: tuple[str, ...]) -> Any:
    present = [name for name in names if row.get(name) is not None]
    if len(present) > 1:
        raise _RowError(f"it has both {present[0]} and {present[1]}; give one")
    return row[present[0]] if present else None


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _plain(value: Any, column: str) -> str:
    """Return a text or a number as text."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (is_number or isinstance(value, str)) or not str(value).strip():
        raise _RowError(f"{column} must hold texts or numbers, got {cut(repr(value))}")
    return str(value)


def _images(given: Any, folders: Sequence[Path]) -> tuple[str, ...]:
    images = _as_list(given)
    if not images:
        raise _RowError("it has no image")
    return tuple(_image(image, folders) for image in images)


def _image(image: Any, folders: Sequence[Path]) -> str:
    if not isinstance(image, str) or not image:
        raise _RowError(f"an image must be the path of a file, got {cut(repr(image))}")
    place = EMBEDDED.fullmatch(image)
    if place is not None and os.path.isfile(place[1]):
        return image
    for folder in folders:
        file = folder / image  # an absolute path stays what it is
        if os.path.isfile(file):  # is_file() raises where a name is too long for one
            return os.path.abspath(file)
    raise _RowError(f"image {cut(image)} is not in {' or '.join(dict.fromkeys(map(str, folders)))}")


def _complaint(file: Path, usable: int, bad: Sequence[BadRow]) -> str:
    shown = [f"  line {row.line}: {row.reason}" for row in bad[:_SHOWN]]
    more = [f"  and {len(bad) - _SHOWN} more"] * (len(bad) > _SHOWN)
    advice = "Mend them, or leave them out with skip_bad (--skip-bad)." if usable else "No row can be used."
    return "\n".join([f"{file}: {len(bad)} of {usable + len(bad)} rows are broken. {advice}", *shown, *more])


def _sample(examples: list[Example], limit: int | None, seed: int | None) -> list[Example]:
    if limit is None or limit >= len(examples):
        return examples
    if seed is None:
        return examples[:limit]
    drawn = random.Random(seed).sample(range(len(examples)), limit)
    return [examples[number] for number in sorted(drawn)]
