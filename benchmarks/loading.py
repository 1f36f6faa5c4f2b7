"""Time and peak memory of converting and loading a checkpoint with the layers of InternVL2-26B, but fewer.

    python -m benchmarks.loading --share 0.1 --place /tmp --out benchmarks/results

Writes a chat-format checkpoint of random bits (the widths, vocabulary and vision tower of the 26B model, a
share of its layers), then converts it, converts it again (which only verifies), loads what was written, and
loads the chat format directly. Loading ends when every page of the weights has been read: transformers maps
files, and would otherwise seem to load in no time. Each step runs in a process of its own; the page cache is
asked to drop the files before each. The last columns are the whole model's, extrapolated: time by bytes;
memory by bytes where the weights stay in memory, as measured where they pass through.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.provenance import environment

GIB = 1 << 30
LAYERS, BLOCKS = 48, 45  # of the language model and the vision tower of InternVL2-26B
HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 6144, 16384, 48, 8, 92553
TOWER, TOWER_FFN, PATCH, POSITIONS = 3200, 12800, 14, 1025
IMAGE_TOKEN_ID = 92546
SOURCE_SHARD = 5 * GIB  # about as large as those on the hub
STEPS = {
    "convert": "sgl-vlm convert IN OUT",
    "verify": "the same again: every shard is checked and kept",
    "load": "OUT on the CPU in bfloat16",
    "load chat format": "IN directly, likewise",
}
THROUGH = ("convert", "verify")  # steps that the weights only pass through


def main(
    share: Annotated[float, typer.Option(help="Share of the model's layers, in (0, 1].")] = 0.1,
    place: Annotated[Path, typer.Option(help="A directory where twice the checkpoint fits.")] = Path("/tmp"),
    out: Annotated[Path | None, typer.Option(help="Write loading.json and loading.md here.")] = None,
    step: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure every step and print a table."""
    if step:
        typer.echo(json.dumps(_run(step, place)))
        return
    load = os.getloadavg()[0]
    room = Path(tempfile.mkdtemp(prefix="sgl-loading-", dir=place))
    try:
        shapes = _shapes(max(1, round(LAYERS * share)), max(1, round(BLOCKS * share)))
        _write(room / "chat", shapes)
        measured = {name: _measure(name, room) for name in STEPS}
    finally:
        shutil.rmtree(room)
    size, whole = _nbytes(shapes), _nbytes(_shapes(LAYERS, BLOCKS))
    largest = max(math.prod(shape) for shape in shapes.values()) * 2
    document = {
        "environment": environment(),
        "model": "InternVL2-26B with random weights in bfloat16",
        "layers": dict(zip(("language model", "vision tower"), _depths(shapes), strict=True)),
        "load_average_before": load,
        "bytes": size,
        "largest_tensor_bytes": largest,
        "whole_model_bytes": whole,
        "steps": {
            name: {**found, "whole_model_extrapolated": _extrapolate(name, found, whole, size)}
            for name, found in measured.items()
        },
    }
    table = _table(document)
    typer.echo(table)
    if out is not None:
        (out / "loading.json").write_text(json.dumps(document, indent=1) + "\n")
        (out / "loading.md").write_text(table + "\n")


def _shapes(layers: int, blocks: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a chat-format checkpoint, by name."""
    head_dim = HIDDEN // HEADS
    found: dict[str, tuple[int, ...]] = {
        "language_model.model.tok_embeddings.weight": (VOCAB, HIDDEN),
        "language_model.output.weight": (VOCAB, HIDDEN),
        "language_model.model.norm.weight": (HIDDEN,),
        "vision_model.embeddings.class_embedding": (1, 1, TOWER),
        "vision_model.embeddings.position_embedding": (1, POSITIONS, TOWER),
        "vision_model.embeddings.patch_embedding.weight": (TOWER, 3, PATCH, PATCH),
        "vision_model.embeddings.patch_embedding.bias": (TOWER,),
        "mlp1.0.weight": (4 * TOWER,),
        "mlp1.0.bias": (4 * TOWER,),
        "mlp1.1.weight": (HIDDEN, 4 * TOWER),
        "mlp1.1.bias": (HIDDEN,),
        "mlp1.3.weight": (HIDDEN, HIDDEN),
        "mlp1.3.bias": (HIDDEN,),
    }
    layer = {
        "attention.wqkv.weight": ((HEADS + 2 * KV_HEADS) * head_dim, HIDDEN),
        "attention.wo.weight": (HIDDEN, HIDDEN),
        "feed_forward.w1.weight": (FFN, HIDDEN),
        "feed_forward.w2.weight": (HIDDEN, FFN),
        "feed_forward.w3.weight": (FFN, HIDDEN),
        "attention_norm.weight": (HIDDEN,),
        "ffn_norm.weight": (HIDDEN,),
    }
    block = {
        "attn.qkv.weight": (3 * TOWER, TOWER),
        "attn.q_norm.weight": (TOWER,),
        "attn.k_norm.weight": (TOWER,),
        "attn.proj.weight": (TOWER, TOWER),
        "attn.proj.bias": (TOWER,),
        "mlp.fc1.weight": (TOWER_FFN, TOWER),
        "mlp.fc1.bias": (TOWER_FFN,),
        "mlp.fc2.weight": (TOWER, TOWER_FFN),
        "mlp.fc2.bias": (TOWER,),
        "norm1.weight": (TOWER,),
        "norm2.weight": (TOWER,),
        "ls1": (TOWER,),
        "ls2": (TOWER,),
    }
    for i in range(layers):
        found.update({f"language_model.model.layers.{i}.{name}": shape for name, shape in layer.items()})
    for i in range(blocks):
        found.update({f"vision_model.encoder.layers.{i}.{name}": shape for name, shape in block.items()})
    return found


def _write(directory: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write the checkpoint: random bits, the same 64 MiB over and over."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(_config(*_depths(shapes))))
    noise = os.urandom(1 << 26)
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if groups[-1] and _nbytes(groups[-1]) + 2 * math.prod(shape) > SOURCE_SHARD:
            groups.append({})
        groups[-1][name] = shape
    for number, group in enumerate(groups, start=1):
        entries, end = {}, 0
        for name, shape in group.items():
            begin, end = end, end + 2 * math.prod(shape)
            entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        path = directory / f"model-{number:05}-of-{len(groups):05}.safetensors"
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for at in range(0, end, len(noise)):
                file.write(noise[: end - at])


def _config(layers: int, blocks: int) -> dict[str, Any]:
    return {
        "model_type": "internvl_chat",
        "ps_version": "v2",
        "template": "internlm2-chat",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "max_dynamic_patch": 12,
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM"],
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": FFN,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000,
            "rope_scaling": {"type": "dynamic", "factor": 3.0},
            "bias": False,
        },
        "vision_config": {"image_size": 448, "num_hidden_layers": blocks},
    }


def _measure(step: str, room: Path) -> dict[str, Any]:
    """Run one step in a new process."""
    for path in room.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, "-m", "benchmarks.loading", "--step", step, "--place", str(room)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{step} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _run(step: str, room: Path) -> dict[str, Any]:
    import torch
    import transformers.models.internvl.modeling_internvl  # noqa: F401 - its time is not the checkpoint's

    from sgl_runtime import convert, hf

    cpu, dtype = torch.device("cpu"), torch.bfloat16
    before, peak = _anonymous(), [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    if step in ("convert", "verify"):
        convert.convert(room / "chat", room / "native", image_token_id=IMAGE_TOKEN_ID)
    elif step == "load":
        _read(hf.load_model(room / "native", cpu, dtype))
    else:
        _read(convert.load_chat_format(room / "chat", cpu, dtype, image_token_id=IMAGE_TOKEN_ID))
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return {
        "seconds": seconds,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_anonymous_bytes": peak[0],
        "anonymous_bytes_before": before,
        "largest_output_shard_bytes": max(
            (path.stat().st_size for path in (room / "native").glob("*.safetensors")), default=0
        ),
    }


def _read(model: Any) -> None:
    """Read every page of a model's weights."""
    for weight in model.parameters():
        weight.data.flatten()[::2048].sum()


def _anonymous() -> int:
    """Return the bytes of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def _extrapolate(step: str, found: dict[str, Any], whole: int, size: int) -> dict[str, float]:
    peak = found["peak_resident_bytes"]
    return {
        "seconds": found["seconds"] * whole / size,
        "peak_resident_bytes": peak if step in THROUGH else peak + whole - size,
    }


def _table(document: dict[str, Any]) -> str:
    layers, size, whole = document["layers"], document["bytes"], document["whole_model_bytes"]
    lines = [
        f"{document['model']}: {layers['language model']} of {LAYERS} layers, {layers['vision tower']} of "
        f"{BLOCKS} vision layers, {size / GIB:.1f} of {whole / GIB:.1f} GiB; largest tensor "
        f"{document['largest_tensor_bytes'] / GIB:.2f} GiB. {document['environment']['cpu']}, "
        f"{os.cpu_count()} cores, load average {document['load_average_before']:.1f} before the run.",
        "",
        "| step | seconds | peak resident GiB | of it anonymous GiB | whole model: seconds | resident GiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in document["steps"].items():
        guess = found["whole_model_extrapolated"]
        lines.append(
            f"| {name}: {STEPS[name]} | {found['seconds']:.1f} | {found['peak_resident_bytes'] / GIB:.2f} | "
            f"{found['peak_anonymous_bytes'] / GIB:.2f} | {guess['seconds']:.0f} | "
            f"{guess['peak_resident_bytes'] / GIB:.1f} |"
        )
    lines += [
        "",
        "Resident memory counts the pages of mapped files, which the system can drop; anonymous memory it",
        "cannot. The whole model's numbers are extrapolated, not measured: time by bytes; memory by bytes",
        "where the weights stay in memory, as measured where they pass through.",
    ]
    return "\n".join(lines)


def _depths(shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """Return the layers of the language model and of the vision tower."""
    return sum(name.endswith("ffn_norm.weight") for name in shapes), sum(n.endswith("ls1") for n in shapes)


def _nbytes(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(2 * math.prod(shape) for shape in shapes.values())


if __name__ == "__main__":
    typer.run(main)
