"""Results as they are made: a file that only grows, says what it belongs to, and goes on after a crash.

The first line holds the header: the pair, the data set, settings, seed and versions. Then comes a line per
example and method, or one that says why an example has no answer; in front of those of each run, one that
says when and on which machine. The lines of a batch are written together
and are on the disk before the next batch begins, so that at most one batch is lost.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from sgl_runtime.engine import VLM
from sgl_runtime.errors import ConfigError, SGLError
from sgl_runtime.evaluation.data import DataSet, Example, open_source
from sgl_runtime.evaluation.methods import Answered, Key, Method, answer_batch
from sgl_runtime.evaluation.metrics import METRICS, Metric
from sgl_runtime.evaluation.rankings import code_of
from sgl_runtime.files import whole_file
from sgl_runtime.fingerprint import checkpoint_fingerprint, compute_of
from sgl_runtime.pipeline import SGLPipeline

FORMAT = 1
_HEADER = {"pair", "data set", "settings", "seed", "versions"}
_SETTINGS = ("max_new_tokens", "consistency_keep_ratio", "exit_score", "keep_scope")
Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """What a results file holds.

    Attributes
    ----------
    header : see `make_header`
    rows : one per example and method; a later line takes the place of an earlier one
    errors : why examples have no answer, by id
    runs : of each run that added rows, ``started`` (ISO, UTC) and ``machine``
    """

    header: dict[str, Any]
    rows: list[Row]
    errors: dict[str, str] = field(default_factory=dict)
    runs: list[dict[str, str]] = field(default_factory=list)


def make_header(
    pipe: SGLPipeline, dataset: DataSet, checkpoints: tuple[str | Path, str | Path], seed: int
) -> dict[str, Any]:
    """Return what results belong to; those of two headers that differ are never mixed.

    Parameters
    ----------
    checkpoints
        What ``pipe`` was loaded from: the small and the large VLM.

    Raises
    ------
    CheckpointError
        A checkpoint cannot be read.
    """
    vlms = ((pipe.small, checkpoints[0]), (pipe.large, checkpoints[1]))
    return {
        "format": FORMAT,
        "pair": {vlm.name: _describe(vlm, source) for vlm, source in vlms},
        "data set": describe(dataset),
        "settings": {name: getattr(pipe.config, name) for name in _SETTINGS}
        | {"device": pipe.large.model.device.type},
        "seed": seed,
        "versions": {name: version(name) for name in ("sgl-vlm", "torch", "transformers")},
    }


def describe(dataset: DataSet) -> dict[str, Any]:
    """Return what tells a data set from others: name, metric, what is asked, counts, hash of the examples.

    The hash covers what images hold, not where they lie.
    """
    examples = [
        {**asdict(example), "images": [_content(image) for image in example.images]}
        for example in dataset.examples
    ]
    rows = json.dumps(examples, sort_keys=True, default=str)
    return {
        "name": dataset.name,
        "metric": dataset.metric,
        "suffix": METRICS[dataset.metric].suffix,
        "count": len(dataset.examples),
        "bad": len(dataset.bad),
        "sha256": hashlib.sha256(rows.encode()).hexdigest(),
    }


def load(path: str | Path) -> Results:
    """Read a results file, without a last line that a crash has cut.

    Raises
    ------
    ConfigError
        There is no such file, it is not a results file, or a line in its middle is damaged.
    """
    if not Path(path).is_file():
        raise ConfigError(f"There is no results file {path}. Make one with `sgl-vlm eval`.")
    return _read(Path(path))[0]


def run(
    pipe: SGLPipeline,
    dataset: DataSet,
    methods: Sequence[Method],
    out: str | Path,
    *,
    checkpoints: tuple[str | Path, str | Path],
    seed: int = 0,
    batch: int | None = None,
) -> Results:
    """Answer every example by every method and append the scores to ``out``; what is there is not done again.

    Examples that cannot be answered (an image that does not open, a prompt that is too long, NaN) are entered
    as errors; the next run tries them again. A run with other methods adds them to the file.

    Parameters
    ----------
    pipe
        From `SGLPipeline.from_pretrained`.
    methods
        From `methods.make_methods`.
    out
        The results file, new or of the same header.
    checkpoints
        What ``pipe`` was loaded from: the small and the large VLM.
    seed
        Of random numbers.
    batch
        Examples that go through the VLMs together; default ``max_batch`` of the pipeline's configuration.

    Returns
    -------
    Results
        All of the file, with what other runs entered.

    Raises
    ------
    ConfigError
        ``out`` belongs to another pair, data set, setting, seed, version or ranking, holds no results, or is
        being written by another process.
    MemoryLimitError
        A batch does not fit.
    OSError
        ``out`` cannot be written. What it holds stays, and the next run goes on from there.
    """
    if pipe.large.model.processes > 1:
        raise ConfigError("An evaluation writes one file from one process: load the pair in one process.")
    header, path = make_header(pipe, dataset, checkpoints, seed), Path(out)
    metric = METRICS[dataset.metric]
    code = {m.name: code_of(m.ranking) for m in methods if m.ranking is not None}
    with _Appender(path, header) as appender:
        before = appender.results
        _check_code(path, before.rows, code)
        done = {(row["id"], key_of(row)) for row in before.rows}
        missing = {
            example.id: tuple(m for m in methods if (example.id, m.key) not in done)
            for example in dataset.examples
        }
        left = [example for example in dataset.examples if missing[example.id]]
        size = batch or pipe.config.max_batch
        lines: list[Row] = [{"run": _this_run(pipe, size)}]
        total, known = len(dataset.examples), dict(before.errors)
        with tqdm(total=total, initial=total - len(left), desc=dataset.name, unit="example") as bar:
            for some in _batches(left, missing, size):
                wanted = missing[some[0].id]
                outcomes = answer_batch(pipe, some, wanted, suffix=metric.suffix, seed=seed)
                for example, outcome in zip(some, outcomes, strict=True):
                    lines += _lines(metric, example, outcome, known, code)
                appender.append(lines)
                lines = []
                bar.update(len(some))
                bar.set_postfix(errors=len(known), refresh=False)
    return load(path)


class _Appender:
    """A results file that is open for appending, by one process; `results` is what it held before."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise ConfigError(
                f"Another process is writing {path}. Wait for it, or give another name to write to."
            ) from None
        try:
            self._open(path, header)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, path: Path, header: dict[str, Any]) -> None:
        if not path.exists():
            with whole_file(path) as partial, partial.open("wb") as stream:
                stream.write(_line({"header": header}))
                stream.flush()
                os.fsync(stream.fileno())
        self.results, whole = _read(path)
        _check_header(path, self.results.header, header)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.ftruncate(self._file, whole)

    def __enter__(self) -> _Appender:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
        self._lock.release()

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows and wait until they are on the disk."""
        left = b"".join(map(_line, rows))
        try:
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError as error:
            raise OSError(
                f"{self._path} could not be written: {error.strerror}. What is in it stays; when there is "
                "room, the same command goes on from there."
            ) from error


def _read(path: Path) -> tuple[Results, int]:
    """Return what a file holds, and its bytes up to the end of its last whole line."""
    rows: dict[tuple[str, Key], Row] = {}
    errors: dict[str, str] = {}
    runs: list[dict[str, str]] = []
    header: dict[str, Any] | None = None
    with path.open("rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        whole = 0
        for number, line in enumerate(stream, 1):
            found = _parsed(line)
            if found is None and header is not None and whole + len(line) == end:
                break  # a crash has cut it
            if header is None:
                header = found.get("header") if found else None
                if (
                    not isinstance(header, dict)
                    or header.get("format") != FORMAT
                    or not header.keys() >= _HEADER
                ):
                    raise ConfigError(
                        f"{path} is not a results file of this version. Give another name to write to."
                    )
            elif found is not None and "run" in found:
                runs.append(found["run"])
            elif found is None or not _is_row(found):
                raise ConfigError(
                    f"{path}, line {number} is damaged, and not by a crash: there are lines behind it. "
                    "Restore the file, or cut the line."
                )
            elif "error" in found:
                errors[found["id"]] = found["error"]
            else:
                errors.pop(found["id"], None)
                rows[found["id"], key_of(found)] = found
            whole += len(line)
    if header is None:
        raise ConfigError(f"{path} is empty. Delete it, or give another name to write to.")
    return Results(header, list(rows.values()), errors, runs), whole


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return a whole line's object; None when it is not one."""
    if not line.endswith(b"\n"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _is_row(found: dict[str, Any]) -> bool:
    """Return whether a line is as `_lines` writes it: files are also edited by hand."""

    def number(name: str, least: float, most: float) -> bool:
        value = found.get(name)
        return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most

    if not all(isinstance(found.get(name), str) for name in ("id", "group")):
        return False
    if "error" in found:
        return isinstance(found["error"], str)
    scores = ("decision_score", "confidence") if found.get("method") == "small" else ()
    return (
        all(isinstance(found.get(name), str) for name in ("method", "prediction"))
        and (found.get("keep_ratio") is None or number("keep_ratio", 0, 1))
        and (found.get("prune_layer") is None or number("prune_layer", 0, math.inf))
        and ("score" in found and (found["score"] is None or number("score", 0, 1)))
        and number("seconds", 0, 1e9)
        and isinstance(found.get("stages"), dict)
        and all(number(name, 0, 1) for name in scores)
    )


def _lines(
    metric: Metric,
    example: Example,
    outcome: list[Answered] | SGLError,
    known: dict[str, str],
    code: dict[str, str | None],
) -> Iterator[Row]:
    """What to write of an example; ``known`` errors, which are kept up to date, are not repeated."""
    group = example.extra.get("group", _content(example.images[0])[:16])
    about = {"id": example.id, "group": str(group)}
    if isinstance(outcome, SGLError):
        told = f"{type(outcome).__name__}: {outcome}"
        if known.get(example.id) != told:
            known[example.id] = told
            yield {**about, "error": told}
        return
    known.pop(example.id, None)
    for answered in outcome:
        method = answered.method
        row = {
            **about,
            "method": method.name,
            "keep_ratio": method.keep_ratio,
            "prune_layer": method.prune_layer,
            "prediction": answered.prediction,
            "score": _score(metric, answered.prediction, example),
            "seconds": answered.seconds,
            "stages": answered.stages,
            **answered.scores,
        }
        if code.get(method.name) is not None:
            row["code"] = code[method.name]
        yield row


def _score(metric: Metric, prediction: str, example: Example) -> float | None:
    return float(metric.score(prediction, example)) if metric.automatic else None


def _content(image: str) -> str:
    """Return a hash of what an entry of `Example.images` holds; what cannot be read is known by its name."""
    try:
        stat = os.stat(image.partition("#bytes=")[0])
        return _hash(image, stat.st_mtime_ns, stat.st_size)
    except OSError:
        return image


@cache
def _hash(image: str, *_stamp: int) -> str:
    source = open_source(image)
    return hashlib.sha256(source if isinstance(source, bytes) else Path(source).read_bytes()).hexdigest()


def _this_run(pipe: SGLPipeline, batch: int) -> dict[str, str]:
    device = pipe.large.model.device
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    machine = models[0] if models else platform.processor() or platform.machine()
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}, {machine}"
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{machine}, {torch.get_num_threads()} threads, {platform.system()}, batches of {batch}",
    }


def _batches(
    examples: list[Example], missing: dict[str, tuple[Method, ...]], size: int
) -> Iterator[list[Example]]:
    """Split into batches of neighbours that lack the same methods."""
    for _, same in groupby(examples, key=lambda example: missing[example.id]):
        together = list(same)
        for at in range(0, len(together), size):
            yield together[at : at + size]


def _check_header(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    before, now = dict(_flat(old)), dict(_flat(new))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        told = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names)
        raise ConfigError(
            f"{path} holds results of another run: {told}. Give another name to write to, or delete it."
        )


def _check_code(path: Path, rows: list[Row], code: dict[str, str | None]) -> None:
    for name in {
        row["method"] for row in rows if code.get(row["method"], row.get("code")) != row.get("code")
    }:
        raise ConfigError(
            f"{path} holds results of a ranking {name!r} whose file has changed since. Give the ranking "
            "another name, or the results."
        )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _describe(vlm: VLM, source: str | Path) -> dict[str, Any]:
    return {
        "fingerprint": checkpoint_fingerprint(source),
        "layers": vlm.num_layers,
        "compute": compute_of(vlm),
    }


def key_of(row: Row) -> Key:
    """Return which method a row is of: `methods.Method.key`."""
    return row["method"], row["keep_ratio"], row["prune_layer"]


def by_method(rows: Iterable[Row]) -> dict[Key, dict[str, Row]]:
    """Return rows by method, and of each by example."""
    found: dict[Key, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(key_of(row), {})[row["id"]] = row
    return found


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
