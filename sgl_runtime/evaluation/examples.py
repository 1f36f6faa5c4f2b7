"""Pictures for a report: where the small VLM looked, and what the large VLM saw."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, starmap
from pathlib import Path
from unicodedata import east_asian_width

from sgl_runtime.errors import SGLError
from sgl_runtime.evaluation.data import DataSet, Example, open_source
from sgl_runtime.evaluation.methods import Key
from sgl_runtime.evaluation.metrics import METRICS
from sgl_runtime.evaluation.results import Results, by_method
from sgl_runtime.evaluation.summary import guided_key
from sgl_runtime.images import open_image
from sgl_runtime.pictures import drawable, guidance_panels, save_guidance
from sgl_runtime.pipeline import SGLPipeline

_LONGEST = 90  # letters of a title's line; Chinese ones are twice as wide
_NAME = re.compile(r"(lost|kept)-[0-9a-f]{12}\.png")


def draw_examples(
    pipe: SGLPipeline,
    dataset: DataSet,
    results: Results,
    folder: Path,
    count: int,
    *,
    key: Key | None = None,
) -> list[tuple[Path, str]]:
    """Write at most ``count`` PNGs of examples with one image, half of them such as guidance lost.

    Parameters
    ----------
    pipe
        What ``results`` were made with; asked again, without exits.
    folder
        Where to; each file is whole or not there. Those of an earlier call are removed.
    key
        Whose answers: guided at which setting (``routed_to`` of a report); default `guided_key`.

    Returns
    -------
    list of (Path, str)
        PNG and caption, one of each image at most: first what was lost against the unpruned large VLM, then
        what was not.
    """
    key = key or guided_key(results)
    drawn = [] if key is None else list(_drawn(pipe, dataset, results, folder, count, key))
    for path in {path for path in folder.glob("*.png") if _NAME.fullmatch(path.name)} - {*dict(drawn)}:
        path.unlink()
    return drawn


def _drawn(
    pipe: SGLPipeline, dataset: DataSet, results: Results, folder: Path, count: int, key: Key
) -> Iterator[tuple[Path, str]]:
    _, keep_ratio, layer = key
    who = "large VLM, unpruned"
    if keep_ratio is not None:
        who = f"large VLM guided at keep ratio {keep_ratio:g}, prune layer {layer}"
    config = replace(
        pipe.config, keep_ratio=keep_ratio or 1.0, prune_layer=layer or 0, exit_threshold=None, max_batch=1
    )
    pipe, metric = pipe.with_config(config), METRICS[dataset.metric]
    for example, lost in _chosen(dataset, results, key, count):
        question = example.question + metric.suffix
        try:
            image = open_image(open_source(example.images[0]))
            result = pipe(image, question)
        except SGLError:  # it was answered before: a file that has gone since costs its picture only
            continue
        name = hashlib.sha256(example.id.encode()).hexdigest()[:12]
        path = folder / f"{'lost' if lost else 'kept'}-{name}.png"
        told = {"question": example.question, who: result.text or "(nothing)"}
        if example.answers:
            told["right"] = "; ".join(dict.fromkeys(example.answers))
        verdict = (
            f"{'lost' if lost else 'not lost'} against large unpruned" if metric.automatic else "not scored"
        )
        title = "\n".join([*starmap(_line, told.items()), verdict])
        save_guidance(path, guidance_panels(pipe, image, question, result), title=title)
        yield path, "; ".join([*(f"{label}: {text}" for label, text in told.items()), verdict])


def _chosen(dataset: DataSet, results: Results, key: Key, count: int) -> list[tuple[Example, bool]]:
    answered = by_method(results.rows)
    guided, large = (
        {name: row["score"] for name, row in answered.get(one, {}).items()}
        for one in (key, ("large", None, None))
    )
    pictured = [e for e in dataset.examples if len(e.images) == 1 and e.id in guided and e.id in large]
    seen: set[str] = set()

    def first(number: int, lost: bool) -> list[tuple[Example, bool]]:
        """Return at most ``number`` that are ``lost`` or not, of images that were not taken yet."""
        taken: list[tuple[Example, bool]] = []
        for example in pictured:
            is_lost = guided[example.id] is not None and guided[example.id] < large[example.id]
            if len(taken) < number and is_lost == lost and example.images[0] not in seen:
                seen.add(example.images[0])
                taken.append((example, lost))
        return taken

    losses = first((count + 1) // 2, True)
    return losses + first(count - len(losses), False)


def _line(label: str, text: str) -> str:
    """Return a line of a title: of a long text its beginning, of one that no font has where it stands."""
    line = f"{label}: {' '.join(text.split())}"
    widths = accumulate(1 + (east_asian_width(char) in "WF") for char in line)
    fit = sum(width <= _LONGEST for width in widths)
    short = line if fit == len(line) else f"{line[: fit - 1]}…"
    return drawable(short, f"{label}: see the report")
