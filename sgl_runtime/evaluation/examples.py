"""Pictures for a report: where the small VLM looked, and what the large VLM saw."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from sgl_runtime.errors import SGLError
from sgl_runtime.evaluation.data import DataSet, Example, open_source
from sgl_runtime.evaluation.methods import Key
from sgl_runtime.evaluation.metrics import METRICS
from sgl_runtime.evaluation.results import Results
from sgl_runtime.evaluation.summary import guided_key
from sgl_runtime.images import open_image
from sgl_runtime.pictures import guidance_panels, save_guidance
from sgl_runtime.pipeline import SGLPipeline

_LONGEST = 90  # characters of a title


def draw_examples(
    pipe: SGLPipeline,
    dataset: DataSet,
    results: Results,
    folder: Path,
    count: int,
) -> list[Path]:
    """Write at most ``count`` PNGs of examples with one image, half of them such as guidance lost.

    Parameters
    ----------
    pipe
        What ``results`` were made with; asked again, without exits, at the guided setting of `guided_key`.
    folder
        Where to; each file is whole or not there.

    Returns
    -------
    list of Path
        One of each image at most: first what was lost against the unpruned large VLM, then what was not.
    """
    key = guided_key(results)
    if key is None:
        return []
    config = replace(
        pipe.config, keep_ratio=key[1] or 1.0, prune_layer=key[2] or 0, exit_threshold=None, max_batch=1
    )
    pipe, suffix = pipe.with_config(config), METRICS[dataset.metric].suffix
    pictures = []
    for example, lost in _chosen(dataset, results, key, count):
        question = example.question + suffix
        try:
            image = open_image(open_source(example.images[0]))
            result = pipe(image, question)
        except SGLError:  # it was answered before: a file that has gone since costs its picture only
            continue
        name = hashlib.sha256(example.id.encode()).hexdigest()[:12]
        path = folder / f"{'lost' if lost else 'kept'}-{name}.png"
        told = f"{_short(example.question)}  →  {_short(result.text or '')}"
        title = f"{told}  (lost: {_short(example.answers[0])})" if lost and example.answers else told
        save_guidance(path, guidance_panels(pipe, image, question, result), title=title)
        pictures.append(path)
    return pictures


def _chosen(dataset: DataSet, results: Results, key: Key, count: int) -> list[tuple[Example, bool]]:
    guided = {
        row["id"]: row["score"]
        for row in results.rows
        if (row["method"], row["keep_ratio"], row["prune_layer"]) == key
    }
    large = {row["id"]: row["score"] for row in results.rows if row["method"] == "large"}
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


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"
