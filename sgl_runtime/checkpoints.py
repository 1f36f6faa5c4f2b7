"""Checkpoints as they lie on disk or the hub, before transformers sees them, and where they are to go."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sgl_runtime.errors import CheckpointError, ConfigError, SGLError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device meant by ``device``; "auto" is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device={device!r} is not a torch device; write 'auto', 'cpu' or 'cuda'."
        ) from error
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={device!r} is not supported; write 'auto', 'cpu' or 'cuda'.")
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ConfigError(
            f"device={device!r}, but torch {torch.__version__} sees {count} CUDA devices here. "
            "Write 'auto' or 'cpu', or install a CUDA build of torch."
        )
    return found


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the compute dtype meant by ``dtype``; "auto" is bfloat16 on CUDA and float32 on the CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ConfigError(f"dtype={dtype!r} is not supported; write 'auto' or one of {', '.join(DTYPES)}.")
    return found  # type: ignore[return-value]


def checkpoint_directory(source: str | Path) -> Path:
    """Return the local directory of a checkpoint given as a directory or as a hub id.

    Of a hub repository only JSON, tokenizer and safetensors files are downloaded; no code and no pickle ever
    is.

    Raises
    ------
    CheckpointError
        There is no such directory, or the hub id cannot be resolved (unknown, or offline and not in the
        cache).
    """
    name = str(source)
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return path
    except (OSError, RuntimeError, ValueError) as error:  # an unknown ~user, a name with a NUL byte
        raise CheckpointError(f"{name!r} is not a checkpoint directory ({first_line(error)}).") from error
    if path.exists():
        raise CheckpointError(
            f"{name} is a file; give the directory that holds config.json and *.safetensors."
        )
    if isinstance(source, Path) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"There is no checkpoint directory {name}. Give a directory or a hub id 'owner/name'."
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{name} is neither a directory here nor a checkpoint that the hub could provide "
            f"({first_line(error)}). Check the name and the connection, or download it first and give its "
            "directory."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``; CheckpointError when it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} could not be read as JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected a JSON object.")
    return value


def safetensors_of(directory: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights; CheckpointError when there are none, or pickles."""
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} holds its weights only as pickles ({', '.join(pickles[:3])}), which can run code "
            "when loaded and are refused. Convert the checkpoint to safetensors on a machine that trusts it."
        )
    raise CheckpointError(f"{directory} holds no weights: expected model.safetensors or its shards.")


@contextmanager
def as_checkpoint_error(what: str) -> Iterator[None]:
    """Turn whatever a wrong value in a checkpoint's files makes Python raise into a CheckpointError."""
    try:
        yield
    except (SGLError, OSError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{what} ({type(error).__name__}: {first_line(error)}).") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its kind."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
