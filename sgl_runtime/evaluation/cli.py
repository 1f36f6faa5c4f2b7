"""``sgl-vlm eval`` and ``sgl-vlm calibrate``."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sgl_runtime.errors import ConfigError

if TYPE_CHECKING:
    from sgl_runtime.config import SGLConfig
    from sgl_runtime.evaluation.calibrating import Candidate
    from sgl_runtime.evaluation.calibration import Calibration


def evaluate(
    small: Annotated[str, typer.Option(help="Checkpoint of the small VLM: a directory or a hub id.")],
    large: Annotated[str, typer.Option(help="Checkpoint of the large VLM.")],
    data: Annotated[
        str, typer.Option(help="JSONL, Parquet or a benchmark's files: docs/evaluation_data.md.")
    ],
    out: Annotated[Path, typer.Option(help="Directory of the results; a stopped run goes on there.")],
    layout: Annotated[str, typer.Option(help="Name of the data's layout.")] = "auto",
    metric: Annotated[
        str | None, typer.Option(help="Default: the layout's; for JSONL exact match, or multiple choice.")
    ] = None,
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
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, in tokens; default 32, or the calibration's.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Examples that go through the VLMs together.")] = 1,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Check the promise of this file, of `sgl-vlm calibrate`, on these examples."),
    ] = None,
    pictures: Annotated[int, typer.Option(min=0, help="Heat maps in the report; half of what was lost.")] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Answer a data set with the small VLM, the large one, and the large one pruned in several ways, and
    score all of it side by side."""
    from sgl_runtime.evaluation import data as data_sets
    from sgl_runtime.evaluation import report, results
    from sgl_runtime.evaluation.calibrating import check
    from sgl_runtime.evaluation.calibration import read_calibration
    from sgl_runtime.evaluation.examples import draw_examples
    from sgl_runtime.evaluation.methods import make_methods
    from sgl_runtime.evaluation.rankings import find_ranking
    from sgl_runtime.evaluation.table import markdown, table
    from sgl_runtime.pipeline import SGLPipeline

    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out must be a directory, {out} is a file.")
    promise = None if calibration is None else read_calibration(calibration)
    settings = [read_setting(text) for text in setting or ["0.4@0.4", "0.2@0.2", "0.05@0.05"]]
    names = ranking or ["guided", "oracle", "fastv", "random"]
    if promise is not None and promise.keep_ratio < 1:
        settings.append((promise.keep_ratio, promise.prune_layer))
        names = ["guided", *(name for name in names if name != "guided")]
    rankings = [find_ranking(name) for name in names]
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
    config = _config(promise, dataset.metric, max_new_tokens, batch)
    pipe = SGLPipeline.from_pretrained(small, large, config=config, device=device, dtype=dtype)
    methods = make_methods(rankings, settings, pipe.large.num_layers)
    file = out / "results.jsonl"
    try:
        found = results.run(pipe, dataset, methods, file, checkpoints=(small, large), seed=seed)
    except KeyboardInterrupt:
        typer.echo(f"Stopped. What is answered is in {file}; the same command goes on from there.", err=True)
        raise
    rows = table(found, dataset)
    key = None if promise is None else check(found, promise)["routed_to"]
    examples = draw_examples(pipe, dataset, found, out / "examples", pictures, key=key)
    page = report.write_report(found, out, dataset=dataset, examples=examples, calibration=promise)
    if as_json:
        typer.echo(json.dumps({"table": rows, "errors": found.errors}))
    else:
        typer.echo(markdown(rows, dataset.metric))
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

    if out.is_dir() or (out.exists() and out.samefile(results)):
        raise ConfigError(f"--out must be the file of the calibration to write, {out} is something else.")
    chosen = None if setting is None else read_setting(setting)
    found = calibrating.calibrate(
        stored.load(results),
        alpha=alpha,
        delta=delta,
        reference=reference,
        calls=calls,
        setting=chosen,
        today=date.today().isoformat(),
    )
    found.calibration.write(out)
    typer.echo("Keeps the promise, fastest first (seconds a request, share that exits, loss here):")
    for candidate in found.candidates:
        typer.echo(f"  {_told(candidate)}")
    if found.note:
        typer.echo(f"  {found.note}")
    unpruned = found.calibration.measured["seconds_large_unpruned"]
    typer.echo(f"The large VLM alone, unpruned: {unpruned:.4f} s a request.")
    if found.candidates[0].seconds >= unpruned:
        typer.echo("  Nothing that keeps the promise is faster than that, without drafts and overlap.")
    typer.echo(f"Written, the first: {out}. SGLConfig.from_file({str(out)!r}) reads it.")


def _config(promise: Calibration | None, metric: str, max_new_tokens: int | None, batch: int) -> SGLConfig:
    """Return what is answered with: for a promise, what it was made with."""
    from sgl_runtime.config import SGLConfig
    from sgl_runtime.evaluation.metrics import METRICS

    given: dict[str, Any] = {"max_new_tokens": 32}
    if promise is not None:
        names = ("max_new_tokens", "exit_score", "consistency_keep_ratio", "keep_scope")
        given = {name: promise.settings()[name] for name in names}
        if promise.promise == "accuracy" and not METRICS[metric].automatic:
            raise ConfigError(
                f"A promise of accuracy cannot be checked with the metric {metric!r}: it needs a judge."
            )
    if max_new_tokens is not None:
        given["max_new_tokens"] = max_new_tokens
    return SGLConfig(**given, max_batch=batch, compile=False)


def _told(candidate: Candidate) -> str:
    setting, exits = candidate.setting, candidate.exits
    threshold = "none" if exits.threshold is None else f"{exits.threshold:g}"
    loss = "" if exits.loss is None else f", loss {exits.loss:+.4f}"
    return (
        f"keep_ratio {setting.keep_ratio:g}, prune_layer {setting.prune_layer}, exit_threshold {threshold}: "
        f"{candidate.seconds:.4f} s, {100 * exits.exit_share:.0f} %{loss}"
    )


def read_setting(text: str) -> tuple[float, int | float]:
    """Return keep ratio and prune layer of a text as "0.2@0.2" or "0.05@0"; ConfigError for others."""
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
