"""Writing a converted checkpoint, resumably: shard after shard, each whole or not there.

OUT keeps a record, conversion.json, of the source and of the finished shards with their checksums. A second
run keeps the shards that still have theirs. config.json comes last, so nothing loads half a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sgl_runtime.checkpoints import read_json
from sgl_runtime.convert.tensors import DTYPES, Plan, Source
from sgl_runtime.errors import CheckpointError
from sgl_runtime.files import whole_file

RECORD = "conversion.json"
PARTIAL = ".{}.partial"
_CHUNK = 1 << 24


def open_output(out: Path, plan: Plan, shard_bytes: int) -> dict[str, Any]:
    """Return the record of ``out``, a new one in a new directory.

    Raises
    ------
    CheckpointError
        The directory holds something that no conversion began, or a conversion of something else.
    """
    record: dict[str, Any] = {"source": _fingerprint(plan), "shard_bytes": shard_bytes, "shards": {}}
    path, left = out / RECORD, list(out.glob(PARTIAL.format("*")))  # what a killed run was writing
    if path.exists():
        found = read_json(path)
        if {**found, "shards": {}} != record or not isinstance(found["shards"], dict):
            raise CheckpointError(
                f"{out} was begun from another checkpoint, or {plan.directory} has changed since. Delete it "
                "or choose another place."
            )
        record = found
    elif out.exists() and (not out.is_dir() or len(list(out.iterdir())) > len(left)):
        raise CheckpointError(f"{out} exists and was not begun by sgl-vlm convert; choose another place.")
    out.mkdir(parents=True, exist_ok=True)
    for partial in left:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    _check_room(out, sum(source.nbytes for source in plan.sources))
    write_json(path, record)
    return record


def write_shards(out: Path, plan: Plan, record: dict[str, Any], progress: Callable[[int], Any]) -> None:
    """Write the weights and their index; shards that ``record`` knows and that are unchanged stay.

    Parameters
    ----------
    progress
        Called with the number of source bytes that have been dealt with since the last call.
    """
    groups = _groups(plan.sources, record["shard_bytes"])
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = (
            "model.safetensors" if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        )
        path = out / name
        if not (path.is_file() and record["shards"].get(name) == _checksum(path)):
            record["shards"][name] = _write_shard(path, group, progress)
            write_json(out / RECORD, record)
        else:
            progress(sum(source.nbytes for source in group))
        weight_map.update({target: name for source in group for target in source.rule.targets})
    if len(groups) > 1:
        total = sum(source.nbytes for source in plan.sources)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(out / "model.safetensors.index.json", index)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_room(out: Path, total: int) -> None:
    free = shutil.disk_usage(out).free
    wanted = total - sum(path.stat().st_size for path in out.glob("*.safetensors"))
    if wanted > free:
        raise CheckpointError(
            f"{out} needs {wanted / 2**30:.1f} GiB more, {free / 2**30:.1f} GiB are free there. Make room "
            "or choose another place."
        )


def _fingerprint(plan: Plan) -> dict[str, Any]:
    """Return what tells one source, or one version of it, from another."""
    files = sorted({source.path for source in plan.sources})
    config = (plan.directory / "config.json").read_bytes()
    return {
        "config": hashlib.sha256(config).hexdigest(),
        "image_token_id": plan.config.image_token_id,
        "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
    }


def _groups(sources: tuple[Source, ...], shard_bytes: int) -> list[list[Source]]:
    groups: list[list[Source]] = [[]]
    size = 0
    for source in sources:
        if groups[-1] and size + source.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(source)
        size += source.nbytes
    return groups


def _write_shard(path: Path, group: list[Source], progress: Callable[[int], Any]) -> str:
    """Write a safetensors file with one source tensor in memory at a time; return its checksum.

    safetensors' own writer takes all tensors of a file at once.
    """
    digest = hashlib.sha256()
    with whole_file(path) as partial, partial.open("wb") as file:

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        put(_header(group))
        for source in group:
            for part in source.read():
                put(part.flatten().view(torch.uint8).numpy().data)
            progress(source.nbytes)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(group: list[Source]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for source in group:
        for target, shape in zip(source.rule.targets, source.shapes(), strict=True):
            begin, end = end, end + DTYPES[source.dtype].itemsize * torch.Size(shape).numel()
            entries[target] = {"dtype": source.dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data to begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
