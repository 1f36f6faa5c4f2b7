"""Does every way of running the tiny pair give the answers that its evaluation recorded?

    python -m benchmarks.tiny_unchanged --scenes 300

Answers in benchmarks/results/tiny/answers.jsonl are those of `sgl-vlm eval`: no compilation, no drafts. Here
the pipeline gives them again with all of these, on and off; what differs is printed, and counted in the
exit status.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from tqdm import tqdm

from benchmarks.tiny_quality import MAX_NEW_TOKENS, SETTINGS
from sgl_runtime import SGLConfig, SGLPipeline, tiny
from sgl_runtime.evaluation.cli import read_setting
from sgl_runtime.tiny.export import QUESTIONS_PER_SCENE
from sgl_runtime.tiny.scenes import make_scene

RECORDED = Path(__file__).parent / "results" / "tiny" / "answers.jsonl"
WAYS = {
    "one by one": {},
    "batches": {"max_batch": 8},
    "compiled": {"compile": True},
    "compiled batches, side by side": {"compile": True, "max_batch": 8, "schedule": "latency"},
}


def main(
    scenes: Annotated[int, typer.Option(help="How many scenes, of four questions each.", min=2)] = 300,
    setting: Annotated[str, typer.Option(help=f"One of {', '.join(SETTINGS)}.")] = "0.2@2",
) -> None:
    """Ask everything again in every way."""
    torch.set_num_threads(1)  # models this small run best on one
    keep_ratio, layer = read_setting(setting)
    config = SGLConfig(
        max_new_tokens=MAX_NEW_TOKENS, prune_layer=layer, keep_ratio=keep_ratio, compile=False, max_batch=1
    )
    rows = [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]
    starts = range(0, min(len(rows), scenes * QUESTIONS_PER_SCENE), QUESTIONS_PER_SCENE)
    recorded = [rows[at : at + QUESTIONS_PER_SCENE] for at in starts]
    pipe = SGLPipeline.from_pretrained(tiny.SMALL, tiny.LARGE, config=config)
    different = 0
    for way, changes in WAYS.items():
        different += _differences(pipe.with_config(replace(config, **changes)), recorded, way, setting)
    raise typer.Exit(min(different, 125))


def _differences(pipe: SGLPipeline, by_scene: list[list[dict]], way: str, setting: str) -> int:
    wrong = asked = accepted = 0
    width = max(1, pipe.config.max_batch // 4)  # scenes in a batch
    for at in tqdm(range(0, len(by_scene), width), way, leave=False):
        rows = [row for scene in by_scene[at : at + width] for row in scene]
        requests = [(_image(row), row["question"]) for row in rows]
        batches = [requests] if pipe.config.max_batch > 1 else [[request] for request in requests]
        for row, result in zip(rows, (r for batch in batches for r in pipe.batch(batch)), strict=True):
            asked, accepted = asked + 1, accepted + result.accepted_draft
            expected = (row["small"], row[f"guided {setting}"])
            score = abs(result.decision_score - row["decision_score"]) > 1e-3 * row["decision_score"]
            if (result.small_text, result.text) != expected or score:
                wrong += 1
                got = (result.small_text, result.text, result.decision_score)
                print(f"{way}: {row['id']}, {row['question']!r}: {got}, recorded {expected}")
    print(f"{way}: {wrong} of {asked} answers differ; {accepted} draft tokens taken over")
    return wrong


def _image(row: dict) -> Image.Image:
    scene, _ = row["id"].split("-")
    return make_scene("test", int(scene), QUESTIONS_PER_SCENE).image


if __name__ == "__main__":
    typer.run(main)
