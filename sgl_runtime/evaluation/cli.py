"""``sgl-vlm eval`` and ``sgl-vlm calibrate``."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from sgl_runtime.errors import ConfigError


def evaluate(
    small: Annotated[str, typer.Option(help="Checkpoint of the small VLM: a directory or a hub id.")],
    large: Annotated[str, typer.Option(help="Checkpoint of the large VLM.")],
    data: Annotated[str, typer.Option(help="JSONL, Parquet, or a benchmark's files: docs/evaluation.md.")],
    out: Annotated[Path, typer.Option(help="Directory of the results; a stopped run goes on there.")],
    layout: Annotated[str, typer.Option(help="Name of the data's layout.")] = "auto",
    metric: Annotated[str | None, typer.Option(help="Default: the layout's; exact match for JSONL.")] = None,
    image_root: Annotated[Path | None, typer.Option(help="Where relative image paths start.")] = None,
    ranking: Annotated[
        list[str] | None,
        typer.Option(help="guided, oracle, fastv, random, ..., or your own as module:name. Several times."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(help="KEEP_RATIO@PRUNE_LAYER, as 0.2@0.2 or 0.05@0. Several times."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many examples.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random ranking, and of the draw with --limit.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave broken rows out.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 32,
    batch: Annotated[int, typer.Option(help="Examples that go through the VLMs together.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Answer a data set with the small VLM, the large one, and the large one pruned in several ways, and
    score all of it side by side."""
    from sgl_runtime.config import SGLConfig
    from sgl_runtime.evaluation import data as data_sets
    from sgl_runtime.evaluation import report, results
    from sgl_runtime.evaluation.methods import make_methods
    from sgl_runtime.evaluation.rankings import find_ranking
    from sgl_runtime.pipeline import SGLPipeline

    settings = [_setting(text) for text in setting or ["0.4@0.4", "0.2@0.2", "0.05@0.05"]]
    rankings = [find_ranking(name) for name in ranking or ["guided", "oracle", "fastv", "random"]]
    drawn = seed if limit is not None else None
    dataset = data_sets.load(
        data,
        layout=layout,
        metric=metric,
        image_root=image_root,
        limit=limit,
        skip_bad=skip_bad,
        seed=drawn,
    )
    for row in dataset.bad:
        typer.echo(f"Left out: row {row.line}: {row.reason}", err=True)
    config = SGLConfig(max_new_tokens=max_new_tokens, max_batch=batch, compile=False)
    pipe = SGLPipeline.from_pretrained(small, large, config=config, device=device, dtype=dtype)
    methods = make_methods(rankings, settings, pipe.large.num_layers)
    file = out / "results.jsonl"
    found = results.run(pipe, dataset, methods, file, checkpoints=(small, large), seed=seed)
    rows = results.table(found, dataset)
    page = report.write_report(found, out, dataset=dataset)
    typer.echo(json.dumps({"table": rows, "errors": found.errors}) if as_json else results.markdown(rows))
    if not as_json:
        for number, error in list(found.errors.items())[:10]:
            typer.echo(f"No answer: {number}: {error}", err=True)
        typer.echo(f"{len(found.errors)} without answer. Written: {file}, {page}")


def calibrate(
    results: Annotated[
        Path, typer.Argument(metavar="RESULTS", help="results.jsonl of `sgl-vlm eval` on calibration data.")
    ],
    out: Annotated[Path, typer.Option(help="The calibration to write, for SGLConfig.from_file.")],
    alpha: Annotated[
        float, typer.Option(help="Tolerated loss of score, in (0, 1): 0.01 is one point.")
    ] = 0.01,
    delta: Annotated[float, typer.Option(help="Probability, in (0, 1), that the promise is broken.")] = 0.1,
    reference: Annotated[
        str, typer.Option(help="labels: loss of score; large: disagreement with the large VLM, no labels.")
    ] = "labels",
    calls: Annotated[
        float | None, typer.Option(help="Instead of a loss: the share of requests the large VLM may get.")
    ] = None,
    setting: Annotated[
        str | None,
        typer.Option(help="KEEP_RATIO@PRUNE_LAYER; if not given, the fastest that keeps the promise."),
    ] = None,
) -> None:
    """Choose an exit threshold, and a keep ratio, with a promise on what they cost (Learn then Test)."""
    from sgl_runtime.evaluation import calibrating
    from sgl_runtime.evaluation import results as stored

    chosen = None if setting is None else _setting(setting)
    made, note = calibrating.calibrate(
        stored.load(results),
        alpha=alpha,
        delta=delta,
        reference=reference,
        calls=calls,
        setting=chosen,
        today=date.today().isoformat(),
    )
    made.write(out)
    threshold = "never" if made.exit_threshold is None else f"{made.exit_threshold:g}"
    typer.echo(f"keep_ratio {made.keep_ratio:g}, prune_layer {made.prune_layer}, exit_threshold {threshold}")
    for name, value in made.measured.items():
        typer.echo(f"  {name:<12} {value:.4f}")
    if note:
        typer.echo(f"  {note}")
    typer.echo(f"Written: {out}. SGLConfig.from_file({str(out)!r}) reads it.")


def _setting(text: str) -> tuple[float, int | float]:
    from sgl_runtime.config import read_prune_layer

    keep, at, layer = text.partition("@")
    try:
        if not at:
            raise ValueError
        return float(keep), read_prune_layer(layer)
    except ValueError:
        raise ConfigError(
            f"A setting must be KEEP_RATIO@PRUNE_LAYER, as 0.2@0.2 or 0.05@0, got {text!r}."
        ) from None
