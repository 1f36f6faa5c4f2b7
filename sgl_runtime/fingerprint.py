"""Which checkpoint this is: what results and calibrated thresholds are tied to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_runtime.checkpoints import checkpoint_directory, first_line, safetensors_of
from sgl_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from sgl_runtime.engine import VLM

_WHOLE = 1 << 16  # bytes of a tensor that is read whole
_PIECES, _PIECE = 16, 1 << 12  # of a larger one


def checkpoint_fingerprint(source: str | Path) -> str:
    """Return a SHA-256 (hex) that tells checkpoints apart, of the same shapes too; reads little of them.

    It covers every JSON file and chat template (configuration, tokenizer, image settings), the names, dtypes
    and shapes of all tensors, all bytes of tensors of up to 64 KiB, and 16 evenly spaced pieces of 4 KiB of
    larger ones. Where the directory lies does not matter.

    Raises
    ------
    CheckpointError
        There is no checkpoint, or its weights cannot be read.
    """
    directory = checkpoint_directory(source)
    digest = hashlib.sha256()
    settings = [file for pattern in ("*.json", "*.jinja") for file in directory.glob(pattern)]
    for file in sorted(settings):
        digest.update(file.name.encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    for file in safetensors_of(directory):
        try:
            _add_weights(digest, file)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{file} could not be read as safetensors: {first_line(error)}. Is the download complete?"
            ) from error
    return digest.hexdigest()


def compute_of(vlm: VLM) -> str:
    """Return in what a VLM computes: "bfloat16", or "bfloat16, Int8Tensor" where it is quantised."""
    kinds = {type(weight.data).__name__ for weight in vlm.decoder.layers[0].parameters()} - {"Tensor"}
    return ", ".join([str(vlm.model.dtype).removeprefix("torch."), *sorted(kinds)])


def _add_weights(digest: Any, file: Path) -> None:
    """Add a file's header and pieces of its tensors. The format: 8 bytes of length, JSON, tensors."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(f"its header says to be of {length} bytes")
        header = stream.read(length)
        digest.update(header)
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        for _, entry in sorted(tensors.items()):
            first, last = entry["data_offsets"]
            for offset, size in _pieces(last - first):
                stream.seek(8 + length + first + offset)
                piece = stream.read(size)
                if len(piece) != size:
                    raise ValueError("it ends before its last tensor")
                digest.update(piece)


def _pieces(size: int) -> list[tuple[int, int]]:
    """Return where to read a tensor of ``size`` bytes: (offset, bytes)."""
    if size <= _WHOLE:
        return [(0, size)]
    step = (size - _PIECE) // (_PIECES - 1)
    return [(i * step, _PIECE) for i in range(_PIECES)]
