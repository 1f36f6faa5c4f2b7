"""Files that data sets lie in: JSON, JSONL, Parquet, TSV with images inside, pickles of plain values."""

from __future__ import annotations

import base64
import csv
import io
import json
import pickle
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sgl_runtime.errors import ConfigError, DataError
from sgl_runtime.images import reason

Row = dict[str, Any]
Entries = Iterable[tuple[int, Any]]  # line (or place in a JSON list, from 1) and what stands there


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; DataError when it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a JSON file that can be read: {error}.") from error


def listed(path: Path, *keys: str) -> Iterator[tuple[int, Any]]:
    """Yield the entries of the list that a JSON file holds, under ``keys``."""
    content = read_json(path)
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, list):
        where = f' under "{".".join(keys)}"' if keys else ""
        raise DataError(f"{path} has no list of questions{where}. Is it a file of another layout?")
    yield from enumerate(content, 1)


def mapped(path: Path) -> Entries:
    """Yield the ``(key, value)`` pairs of the object that a JSON file holds."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} must map ids to questions. Is it a file of another layout?")
    yield from enumerate(content.items(), 1)


def jsonl_entries(path: Path) -> Entries:
    """Yield the lines of a JSONL file as they are, blank ones left out."""
    with path.open("rb") as file:
        for line, text in enumerate(file, 1):
            if text.strip():
                yield line, text


def jsonl_row(text: bytes) -> Row:
    """Return one line of a JSONL file as a row, without what is null in it; ValueError when it is none."""
    row = json.loads(text.decode("utf-8-sig"))
    if not isinstance(row, dict):
        raise ValueError(f"a line must be an object, got {type(row).__name__}")
    return without_nulls(row)


def parquet_entries(path: Path) -> Entries:
    """Yield the rows of a Parquet file; DataError when it cannot be read to its end."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError('Parquet needs pyarrow, which is not here: pip install "sgl-vlm[eval]".') from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches())
            yield from enumerate((row for batch in batches for row in batch), 1)
    except (OSError, pyarrow.ArrowException) as error:  # a damaged page is an OSError
        raise DataError(
            f"{path} is not a Parquet file that can be read ({reason(error)}). Write or download it again."
        ) from error


def without_nulls(row: Row) -> Row:
    """Return a row without the columns that are null in it."""
    return {key: value for key, value in row.items() if value is not None}


def tsv_records(path: Path) -> Iterator[tuple[int, int, int, list[str]]]:
    """Yield line, first byte, end and fields of each record of a tab-separated file, the header's first."""
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 30))  # an image is one field
    ends = [0]

    def lines() -> Iterator[str]:
        with path.open("rb") as file:
            for text in file:
                ends.append(ends[-1] + len(text))
                yield text.decode("utf-8-sig" if len(ends) == 2 else "utf-8", errors="replace")

    line, reader = 0, csv.reader(lines(), delimiter="\t")
    try:
        for fields in reader:
            yield line + 1, ends[line], ends[reader.line_num], fields
            line = reader.line_num
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}, is no tab-separated record: {error}.") from error


def is_base64(text: str) -> bool:
    """Tell whether a text is something, in base64."""
    try:
        return bool(base64.b64decode(text, validate=True))
    except ValueError:
        return False


EMBEDDED = re.compile(r"(.+)#bytes=(\d+)-(\d+)")


def embedded_image(name: str) -> bytes | None:
    """Return the encoded image that ``<file>#bytes=<first>-<end>`` names; None for any other name."""
    place = EMBEDDED.fullmatch(name)
    if place is None:
        return None
    begin, end = int(place[2]), int(place[3])
    with open(place[1], "rb") as file:
        header = file.readline().decode("utf-8-sig").rstrip("\r\n").split("\t")
        file.seek(begin)
        record = file.read(end - begin).decode("utf-8", errors="replace")
    [fields] = csv.reader(io.StringIO(record, newline=""), delimiter="\t")
    return base64.b64decode(fields[header.index("image")])


class _PlainUnpickler(pickle.Unpickler):
    """Reads a pickle of lists, dicts, texts and numbers; no code in it is run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_plain_pickle(path: Path) -> Any:
    """Read a pickle of lists, dicts, texts and numbers, of Python 2 too; anything else is refused."""
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="utf-8").load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(f"{path} is not a pickle of plain values that can be read: {error}.") from error
