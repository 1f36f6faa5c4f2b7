"""The command line: ``sgl-vlm demo | run | bench | eval | calibrate | convert | env``.

Bad input: one line on stderr, exit code 2.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sgl_runtime.cli_convert import convert
from sgl_runtime.errors import SGLError
from sgl_runtime.evaluation.cli import calibrate, evaluate

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Large vision-language models guided by small ones: pruning of visual tokens and early exit.",
)

KeepRatio = Annotated[float, typer.Option(help="Share of visual tokens the large VLM keeps, in (0, 1].")]
PruneLayer = Annotated[
    str, typer.Option(help="Prune on entry to this layer: 3 is layer 3, 0.2 is 20 % of the depth.")
]
ExitThreshold = Annotated[
    float | None,
    typer.Option(help="Exit with the small answer from this decision score on; never if not given."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]


def main() -> None:
    """Entry point of ``sgl-vlm``."""
    try:
        app()
    except (SGLError, OSError) as error:  # OSError: an output that cannot be written
        typer.echo(f"sgl-vlm: error: {error}", err=True)
        sys.exit(2)


@app.command(epilog="Examples: sgl-vlm demo --out pictures; sgl-vlm demo --web")
def demo(
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("sgl-vlm-demo"),
    keep_ratio: KeepRatio = 0.05,
    prune_layer: PruneLayer = "0",
    exit_threshold: ExitThreshold = 0.9,
    as_json: AsJson = False,
    web: Annotated[
        bool, typer.Option("--web", help="Serve a page on which you ask about your own pictures.")
    ] = False,
    host: Annotated[str, typer.Option(help="--web: the address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="--web: the port; 0 is any that is free.")
    ] = 7860,
    small: Annotated[str | None, typer.Option(help="--web: another small VLM, directory or hub id.")] = None,
    large: Annotated[str | None, typer.Option(help="--web: the large VLM that goes with it.")] = None,
) -> None:
    """Ask the bundled tiny pair about the bundled pictures: no download, no arguments."""
    pair = _demo_pair(small, large, web)
    if web:
        from sgl_runtime.web import listening, serve

        with listening(host, port) as listener:  # before the models, which may take minutes to load
            serve(_pipeline(*pair, _config(keep_ratio, prune_layer, exit_threshold, 128)), listener)
        return
    from sgl_runtime import tiny
    from sgl_runtime.images import open_image

    started = time.perf_counter()
    _check_target(out / "picture.png")
    pipe = _pipeline(*pair, _config(keep_ratio, prune_layer, exit_threshold, 8))
    answers = []
    for number, sample in enumerate(tiny.samples(), start=1):
        result = pipe(sample["image"], sample["prompt"])
        picture = out / f"{number}-{Path(sample['image']).stem}.png"
        _save_picture(pipe, picture, open_image(sample["image"]), sample["prompt"], result)
        answers.append({**sample, **result.to_dict(), "picture": str(picture)})
        if not as_json:
            _print_answer(sample["prompt"], result, right=sample["answer"])
            typer.echo(f"  picture        {picture}\n")
    if as_json:
        typer.echo(json.dumps({"answers": answers}))
    else:
        right = sum(answer["text"] == answer["answer"] for answer in answers)
        exits = sum(answer["exited"] for answer in answers)
        typer.echo(
            f"{right} of {len(answers)} right, {exits} answered by the small VLM alone, "
            f"{time.perf_counter() - started:.1f} s in all. Open the pictures in {out}/."
        )


@app.command(
    epilog="Example: sgl-vlm run --small SMALL_DIR --large LARGE_DIR --image sign.png "
    '--prompt "What does the sign say?"'
)
def run(
    small: Annotated[str, typer.Option(help="Checkpoint of the small VLM: a directory or a hub id.")],
    large: Annotated[str, typer.Option(help="Checkpoint of the large VLM.")],
    prompt: Annotated[
        str, typer.Option(help="The question; <image> and <video> may mark where each of them goes.")
    ],
    image: Annotated[list[str] | None, typer.Option(help="Image file; may be given several times.")] = None,
    video: Annotated[
        list[str] | None, typer.Option(help="Video file or directory of frames; likewise, behind the images.")
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames taken of a video.")] = 8,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    keep_ratio: KeepRatio = 0.2,
    keep_scope: Annotated[
        str, typer.Option(help="request: the best of all images; image: of each its own share.")
    ] = "request",
    prune_layer: PruneLayer = "0.2",
    exit_threshold: ExitThreshold = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    as_json: AsJson = False,
    save_map: Annotated[
        Path | None, typer.Option(help="Write a PNG of the mass and the kept tokens.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantize: Annotated[
        str | None, typer.Option(help="Weights of the large VLM's layers in 8 bits: int8 or fp8.")
    ] = None,
    tensor_parallel: Annotated[
        bool,
        typer.Option("--tensor-parallel", help="Share the large VLM among the processes torchrun started."),
    ] = False,
) -> None:
    """Answer one question about images and videos."""
    from sgl_runtime import parallel
    from sgl_runtime.errors import ConfigError
    from sgl_runtime.images import open_image
    from sgl_runtime.videos import Video, open_video

    config = _config(keep_ratio, prune_layer, exit_threshold, max_new_tokens, keep_scope=keep_scope)
    images, videos = image or [], [Video(path, frames) for path in video or []]
    if save_map is not None:
        if videos or len(images) != 1:
            raise ConfigError(
                f"--save-map draws one image, got {len(images)} and {len(videos)} videos. Leave it out or "
                "ask about one image."
            )
        if parallel.is_first():
            _check_target(save_map)
    opened = [open_image(path) for path in images]  # before the models, which may take minutes to load
    for each in videos:
        open_video(each)
    options = {"device": device, "dtype": dtype, "quantize": quantize, "tensor_parallel": tensor_parallel}
    if parallel.is_first():  # tells the memory that is taken, on stderr
        logging.basicConfig(format="%(message)s")
        logging.getLogger("sgl_runtime").setLevel(logging.INFO)
    pipe = _pipeline(small, large, config, **options)
    asked = {"role": "user", "content": prompt}
    result = pipe(
        [*opened, *videos], prompt if system is None else [{"role": "system", "content": system}, asked]
    )
    parallel.leave()
    if not parallel.is_first():
        return
    if save_map is not None:
        _save_picture(pipe, save_map, opened[0], prompt, result)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        _print_answer(prompt, result)
        if save_map is not None:
            typer.echo(f"  picture        {save_map}")


@app.command(
    epilog="Examples: sgl-vlm bench --op decode_attention --shape B=4,S=8192,N=7168 "
    "--backend cuda,triton,torch; sgl-vlm bench --pipeline --pair mid"
)
def bench(
    op: Annotated[str | None, typer.Option(help="The op, for example decode_attention.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="B=4,S=8192,...: may be given several times; what it leaves out has a default."),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="Some of cpu, cuda, triton, reference, torch; what is active and torch if not given."
        ),
    ] = None,
    pipeline: Annotated[
        bool, typer.Option("--pipeline", help="Time the whole pipeline instead of an op.")
    ] = False,
    pair: Annotated[
        str,
        typer.Option(help="--pipeline: tiny, mid, internvl3-1b-14b, internvl2-2b-26b or qwen2.5-vl-3b-32b."),
    ] = "tiny",
    batch: Annotated[
        list[int] | None, typer.Option(help="--pipeline: requests at once; may be given several times.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; bfloat16 if not given, on the CPU's pipeline float32."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Time an op on your own shapes, beside stock torch and the bandwidth of a copy; or the whole pipeline,
    beside the research code's way of running it."""
    from sgl_runtime.errors import ConfigError

    if pipeline == (op is not None):
        raise ConfigError("sgl-vlm bench times an op (--op NAME) or the pipeline (--pipeline): give one.")
    _kernels()
    if op is None:
        from sgl_runtime import bench_pipeline, bench_report

        task = bench_pipeline.make_task(pair, device, dtype or "auto", batches=batch or [1])
        document = bench_pipeline.run(task)
        text = bench_report.table(document)
    else:
        from sgl_runtime import bench as benchmark

        document = benchmark.run(benchmark.make_task(op, shape or [], backend, dtype or "bfloat16", device))
        text = benchmark.table(document)
    typer.echo(json.dumps(document, default=str) if as_json else text)


app.command(
    "eval", epilog="Example: sgl-vlm eval --small SMALL --large LARGE --data questions.jsonl --out runs/mine"
)(evaluate)
app.command(epilog="Example: sgl-vlm calibrate runs/mine/results.jsonl --alpha 0.01 --out calibration.json")(
    calibrate
)
app.command(epilog="Example: sgl-vlm convert InternVL2-2B InternVL2-2B-hf")(convert)


@app.command(epilog="Example: sgl-vlm env --json")
def env(as_json: AsJson = False) -> None:
    """Show versions, the backend of each op, CPU features, the first load error: for bug reports."""
    import importlib.metadata

    sgl_kernels = _kernels()
    found: dict[str, Any] = dict(sgl_kernels.collect_env())
    found["packages"] = {
        name: importlib.metadata.version(name)
        for name in ("transformers", "tokenizers", "safetensors", "pillow", "numpy")
    }
    typer.echo(json.dumps(found, default=str) if as_json else _lines(found))


def _config(
    keep_ratio: float,
    prune_layer: str,
    exit_threshold: float | None,
    max_new_tokens: int,
    keep_scope: str = "request",
) -> Any:
    from sgl_runtime.config import SGLConfig, read_prune_layer
    from sgl_runtime.errors import ConfigError

    try:
        layer = read_prune_layer(prune_layer)
    except ValueError:
        raise ConfigError(
            f"--prune-layer must be a layer such as 3 or a share such as 0.2, got {prune_layer!r}."
        ) from None
    return SGLConfig(
        keep_ratio=keep_ratio,
        prune_layer=layer,
        exit_threshold=exit_threshold,
        max_new_tokens=max_new_tokens,
        keep_scope=keep_scope,
        compile=False,  # takes longer than the few questions of one command
        max_batch=1,
    )


def _demo_pair(small: str | None, large: str | None, web: bool) -> tuple[str | Path, str | Path]:
    from sgl_runtime import tiny
    from sgl_runtime.errors import ConfigError

    if small is None and large is None:
        return tiny.SMALL, tiny.LARGE
    if not web:
        raise ConfigError("--small and --large are for demo --web; to ask a pair one question: sgl-vlm run.")
    if small is None or large is None:
        given, missing = ("--large", "--small") if small is None else ("--small", "--large")
        raise ConfigError(f"{given} came without {missing}: give both, or neither for the bundled tiny pair.")
    return small, large


def _check_target(path: Path) -> None:
    """Find out before minutes of work that a file cannot be written."""
    from sgl_runtime.errors import ConfigError
    from sgl_runtime.files import whole_file

    if path.is_dir():
        raise ConfigError(f"{path} is a directory; give the name of a file.")
    try:
        with whole_file(path.with_name(f".{path.name}.probe")) as partial:
            partial.touch()
        path.with_name(f".{path.name}.probe").unlink()
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another place.") from error


def _kernels() -> Any:
    """Import the ops; a wrong SGL_KERNELS_* variable is bad input, not a crash."""
    from sgl_runtime.errors import ConfigError

    try:
        import sgl_kernels
    except (ImportError, ValueError) as error:
        raise ConfigError(str(error)) from error
    return sgl_kernels


def _pipeline(small: str | Path, large: str | Path, config: Any, **options: Any) -> Any:
    _kernels()
    from sgl_runtime.pipeline import SGLPipeline

    return SGLPipeline.from_pretrained(small, large, config=config, **options)


def _save_picture(pipe: Any, path: Path, image: Any, prompt: str, result: Any) -> None:
    from sgl_runtime.pictures import guidance_panels, save_guidance

    panels = guidance_panels(pipe, image, prompt, result)
    save_guidance(path, panels, title=f"{prompt}  →  {result.text}")


def _print_answer(prompt: str, result: Any, right: str | None = None) -> None:
    score = f"{result.decision_score:.3f} (confidence {result.confidence:.3f}"
    score += ")" if result.consistency is None else f", consistency {result.consistency:.3f})"
    kept = "-" if result.exited else f"{len(result.kept_visual)} of {len(result.mass)} visual tokens"
    verdict = "" if right is None else (" (right)" if result.text == right else f" (wrong: it is {right})")
    stages = ", ".join(f"{stage} {1e3 * seconds:.1f}" for stage, seconds in result.timings.items())
    typer.echo(prompt)
    for label, value in (
        ("small answer", result.small_text),
        ("decision score", score),
        ("early exit", "yes" if result.exited else "no"),
        ("large keeps", kept),
        ("answer", f"{result.text}{verdict}"),
        ("ms per stage", stages),
    ):
        typer.echo(f"  {label:<14} {value}")


def _lines(values: dict[str, Any], indent: str = "") -> str:
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", _lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {value}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
