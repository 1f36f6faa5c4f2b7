"""How good the tiny pair is, with and without pruning and early exit, on scenes never seen in training.

    python -m sgl_runtime.tiny.evaluate --scenes 300

Every question is answered by the small VLM, by the unpruned large VLM, and by the large VLM pruned at each
setting under each ranking. An answer counts when it is the true one, letter for letter. Intervals are 95 %
bootstrap intervals; scenes are drawn, not questions: the questions about a scene share its difficulty.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from tqdm import tqdm

import sgl_kernels
from sgl_runtime.clock import Clock
from sgl_runtime.config import SGLConfig, num_kept
from sgl_runtime.errors import SGLError
from sgl_runtime.evaluation.intervals import bootstrap
from sgl_runtime.evaluation.rankings import fastv_ranking
from sgl_runtime.files import whole_file
from sgl_runtime.guidance import guide
from sgl_runtime.pipeline import SGLPipeline
from sgl_runtime.requests import Prune

from . import LARGE, SMALL
from .scenes import KINDS, make_scene

# (prune layer K, keep ratio r) by token ratio, for ten layers. The paper's f = r = 0.4, 0.2 and 0.05 are 64,
# 36 and 5 % here (its 9 % comes from 48 layers).
SETTINGS = {"64 %": (4, 0.4), "36 %": (2, 0.2), "9 %": (0, 0.09), "5 %": (0, 0.05)}
RANKINGS = ("guided", "oracle", "FastV", "random")
EXIT_SETTING = "36 %"  # what the large VLM runs at in the early-exit curve
MAX_NEW_TOKENS = 8
QUESTIONS_PER_SCENE = 4


def answer_question(pipe: SGLPipeline, image: Any, prompt: str, seed: int) -> dict[str, Any]:
    """Return the small answer with its scores, the large answer, and one per setting and ranking."""
    assert pipe.small_processor is not None
    assert pipe.large_processor is not None
    small, large = pipe.small, pipe.large
    asked = small.encode([small.prompt(pipe.small_processor(image, prompt))])
    [guidance] = guide(small, asked, SGLConfig(max_new_tokens=MAX_NEW_TOKENS), Clock(small.model.device))
    if isinstance(guidance, SGLError):
        raise guidance
    [request] = large.encode([large.prompt(pipe.large_processor(image, prompt))])
    unpruned = large.generate(request, MAX_NEW_TOKENS, with_mass=True)
    assert unpruned.mass is not None
    noise = torch.rand(guidance.mass.shape, generator=torch.Generator().manual_seed(seed))
    out = {
        "small": pipe.small_processor.decode(guidance.answer.token_ids),
        "confidence": guidance.confidence,
        "consistency": guidance.consistency,
        "score": guidance.decision_score,
        "large": pipe.large_processor.decode(unpruned.token_ids),
    }
    for setting, (layer, keep) in SETTINGS.items():
        rankings = {
            "guided": guidance.mass,
            "oracle": unpruned.mass,
            "FastV": fastv_ranking(large, request, layer),
            "random": noise,
        }
        for name, ranking in rankings.items():
            prune = Prune(layer, ranking, num_kept(request.prompt.num_visual, keep))
            answer = large.generate(request, MAX_NEW_TOKENS, prune=prune)
            out[f"{name} {setting}"] = pipe.large_processor.decode(answer.token_ids)
    return out


def answer_scene(pipe: SGLPipeline, split: str, index: int) -> list[dict[str, Any]]:
    """Answer QUESTIONS_PER_SCENE questions about scene ``index`` of ``split``."""
    scene = make_scene(split, index, QUESTIONS_PER_SCENE)
    rows = []
    for number, question in enumerate(scene.questions):
        asked = {"scene": index, "kind": question.kind, "prompt": question.text, "truth": question.answer}
        rows.append(asked | answer_question(pipe, scene.image, question.text, 1000 * index + number))
    return rows


def collect(
    small: Path, large: Path, split: str, scenes: Sequence[int], workers: int
) -> list[dict[str, Any]]:
    """Every answer, in the order of ``scenes``. Models this small run best on one thread each."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (small, large)) as pool:
        answered = pool.map(_answer_in_worker, [split] * len(scenes), scenes)
        return [row for rows in tqdm(answered, f"{split} scenes", len(scenes), unit="scene") for row in rows]


_pipes: list[SGLPipeline] = []  # of a worker process: the one it answers with


def _start_worker(small: Path, large: Path) -> None:
    torch.set_num_threads(1)
    _pipes.append(SGLPipeline.from_pretrained(small, large))


def _answer_in_worker(split: str, index: int) -> list[dict[str, Any]]:
    return answer_scene(_pipes[0], split, index)


def exit_curve(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy when the questions with the highest decision score exit, and when as many random ones do.

    Random routing is its expectation: each question counts ``share`` small and ``1 - share`` large.
    """
    small, large = _right(rows, "small"), _right(rows, f"guided {EXIT_SETTING}")
    score = np.array([row["score"] for row in rows])
    scenes = np.array([row["scene"] for row in rows])
    order = np.argsort(-score, kind="stable")
    points = []
    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        exits = np.zeros(len(rows), dtype=bool)
        exits[order[: round(share * len(rows))]] = True
        routed, chance = np.where(exits, small, large), share * small + (1 - share) * large
        points.append(
            {
                "share": share,
                "threshold": float(score[exits].min()),
                "early exit": bootstrap(routed, scenes),
                "random routing": bootstrap(chance, scenes),
                "gain": bootstrap(routed - chance, scenes),  # of the same scenes: paired
            }
        )
    return points


def report(rows: list[dict[str, Any]]) -> str:
    """Return the tables of the model card in Markdown."""
    lines = ["| answered by | ranking | all | " + " | ".join(KINDS) + " |", "| --- " * (3 + len(KINDS)) + "|"]
    lines += [_table_row("small alone", "", rows, "small"), _table_row("large, unpruned", "", rows, "large")]
    for setting in SETTINGS:
        lines += [_table_row(f"large at {setting}", name, rows, f"{name} {setting}") for name in RANKINGS]
    lines += ["", f"Early exit, large VLM guided at {EXIT_SETTING}:", ""]
    lines += ["| exits | threshold | by decision score | random routing | gain |", "| --- " * 5 + "|"]
    for point in exit_curve(rows):
        cells = " | ".join(_percent(point[name]) for name in ("early exit", "random routing", "gain"))
        lines.append(f"| {point['share']:.0%} | {point['threshold']:.3f} | {cells} |")
    return "\n".join(lines) + "\n"


def _right(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] == row["truth"] for row in rows], dtype=np.float64)


def _percent(values: tuple[float, float, float]) -> str:
    mean, low, high = (100 * value for value in values)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def _table_row(title: str, ranking: str, rows: list[dict[str, Any]], name: str) -> str:
    scenes = np.array([row["scene"] for row in rows])
    by_kind = (f"{100 * _right([r for r in rows if r['kind'] == kind], name).mean():.1f}" for kind in KINDS)
    return (
        f"| {title} | {ranking} | {_percent(bootstrap(_right(rows, name), scenes))} | {' | '.join(by_kind)} |"
    )


def main(
    scenes: Annotated[int, typer.Option(help="How many scenes, of four questions each.", min=5)] = 300,
    split: Annotated[Literal["test", "calibration"], typer.Option(help="Which scenes.")] = "test",
    small: Annotated[Path, typer.Option(help="Checkpoint of the small VLM.")] = SMALL,
    large: Annotated[Path, typer.Option(help="Checkpoint of the large VLM.")] = LARGE,
    workers: Annotated[int, typer.Option(help="Processes, of one thread each.", min=1)] = os.cpu_count() or 1,
    out: Annotated[Path, typer.Option(help="Every answer goes to OUT.json, the tables to OUT.md.")] = Path(
        "runs/tiny-eval"
    ),
) -> None:
    """Measure the pair and print the tables."""
    rows = collect(small, large, split, range(scenes), workers)
    with whole_file(out.with_suffix(".json")) as partial:
        measured = {"environment": sgl_kernels.collect_env(), "split": split, "rows": rows}
        partial.write_text(json.dumps(measured), encoding="utf-8")
    text = report(rows)
    with whole_file(out.with_suffix(".md")) as partial:
        partial.write_text(text, encoding="utf-8")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
