"""InternVL2, 2.5 and 3 in their research code's InternVLChatModel format, as transformers' own InternVL.

The chat format's tensors, configuration, conversation template and tokenizer are read as data; the Python
files beside them are never run.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgl_runtime.checkpoints import as_checkpoint_error, checkpoint_directory
from sgl_runtime.convert import config as settings
from sgl_runtime.convert.config import is_chat_format, read_chat_config
from sgl_runtime.convert.names import module_name
from sgl_runtime.convert.shards import PARTIAL, open_output, write_json, write_shards
from sgl_runtime.convert.templates import chat_template, conversation
from sgl_runtime.convert.tensors import Plan, make_plan
from sgl_runtime.convert.tokenizer import CONTEXT, has_tokenizer, load_tokenizer
from sgl_runtime.errors import CheckpointError, ConfigError

__all__ = [
    "convert",
    "is_chat_format",
    "load_chat_format",
    "native_settings",
    "native_tensors",
    "native_tokenizer",
]

SHARD_BYTES = 4 << 30
_log = logging.getLogger(__name__)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    image_token_id: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a chat-format checkpoint in transformers' own format; the weights stay the same bit for bit.

    A run that was stopped is taken up again by the same call. At most one tensor of the source is in memory.

    Parameters
    ----------
    source
        A directory or a hub id.
    out
        A directory that does not exist, is empty, or holds an earlier run of the same conversion.
    image_token_id
        The id of ``<IMG_CONTEXT>``; needed only where ``source`` has no tokenizer to ask.
    shard_bytes
        Most bytes of one output file, where no single tensor is larger.

    Returns
    -------
    Path
        ``out``.

    Raises
    ------
    CheckpointError
        ``source`` is no chat-format checkpoint or cannot be expressed in transformers' format, or ``out`` is
        something else, or there is no room for it.
    ConfigError
        The tokenizer says otherwise than ``image_token_id``.
    """
    from tqdm import tqdm

    directory, out = checkpoint_directory(source), Path(out)
    tokenizer, plan, images, generation = _read(directory, image_token_id)
    record = open_output(out, plan, shard_bytes)
    total = sum(source.nbytes for source in plan.sources)
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=f"{out}") as bar:
        write_shards(out, plan, record, bar.update)
    if tokenizer is None:
        _log.warning(
            "%s holds no tokenizer, so %s lacks one, and answers end at the text model's own end token only.",
            directory,
            out,
        )
    else:
        _save_tokenizer(tokenizer, out)
    tokens = {"image_seq_length": plan.config.image_seq_length, "processor_class": "InternVLProcessor"}
    write_json(out / "processor_config.json", tokens)
    write_json(out / "preprocessor_config.json", images)
    write_json(out / "generation_config.json", generation)
    write_json(out / "config.json", json.loads(plan.config.to_json_string()))
    return out


def native_tensors(
    directory: Path, *, image_token_id: int | None = None
) -> tuple[Any, Iterator[tuple[str, Tensor]]]:
    """Return a chat-format checkpoint's ``InternVLConfig`` and what its converted files would hold.

    The tensors come under their names on disk and in the dtype in which they are stored, one source tensor
    in memory at a time. Raises as `convert` does.
    """
    _, plan, _, _ = _read(directory, image_token_id)
    return plan.config, plan.tensors()


def load_chat_format(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    image_token_id: int | None = None,
) -> nn.Module:
    """Load a chat-format checkpoint as transformers' ``InternVLForConditionalGeneration``, writing nothing.

    Its weights are those that transformers loads, in ``dtype``, from what `convert` writes. Raises as
    `convert` does.
    """
    from transformers import GenerationConfig, InternVLForConditionalGeneration
    from transformers.initialization import no_init_weights

    _, plan, _, generation = _read(directory, image_token_id)
    with no_init_weights():
        model: Any = InternVLForConditionalGeneration._from_config(plan.config, dtype=dtype)
    model.tie_weights()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in plan.tensors():
            weights[module_name(name)].copy_(tensor)
    model.generation_config = GenerationConfig(**generation)
    return model.to(device).eval()


def native_tokenizer(directory: Path) -> Any | None:
    """Return a chat-format checkpoint's tokenizer with its chat template, or None when it has none.

    Raises
    ------
    CheckpointError
        The tokenizer cannot be read without remote code, lacks the image tokens or the token that ends a
        turn, or the conversation template is not known.
    """
    with as_checkpoint_error(f"{directory} holds settings that do not work"):
        chat = read_chat_config(directory)
        talk = conversation(chat.get("template"))
        if not has_tokenizer(directory):
            return None
        tokenizer = load_tokenizer(directory, talk.stop)
        tokenizer.chat_template = chat_template(talk)
        return tokenizer


def native_settings(directory: Path) -> tuple[dict[str, Any], str]:
    """Return what preprocessor_config.json would hold for a chat-format checkpoint, and its chat template."""
    with as_checkpoint_error(f"{directory} holds settings that do not work"):
        chat = read_chat_config(directory)
        return settings.image_settings(chat), chat_template(conversation(chat.get("template")))


def _read(
    directory: Path, image_token_id: int | None
) -> tuple[Any | None, Plan, dict[str, Any], dict[str, Any]]:
    """Return the tokenizer, what is to be done, the image and generation settings; nothing is written yet."""
    with as_checkpoint_error(f"{directory} holds settings that do not work"):
        tokenizer = native_tokenizer(directory)
        plan = _plan(directory, tokenizer, image_token_id)
        images = settings.image_settings(plan.chat)
        stop = conversation(plan.chat.get("template")).stop
        stop_id = None if tokenizer is None else tokenizer.convert_tokens_to_ids(stop)
        return tokenizer, plan, images, settings.generation_settings(directory, plan.chat, stop_id)


def _plan(directory: Path, tokenizer: Any | None, image_token_id: int | None) -> Plan:
    if tokenizer is not None:
        known = tokenizer.convert_tokens_to_ids(CONTEXT)
        if image_token_id not in (None, known):
            raise ConfigError(
                f"The id of {CONTEXT} was given as {image_token_id}, but the tokenizer in {directory} says "
                f"{known}. Leave it out."
            )
        image_token_id = known
    if image_token_id is None:
        raise CheckpointError(
            f"{directory} holds no tokenizer, so the id of {CONTEXT} is not known. Put the tokenizer's files "
            "beside config.json, or give the id (--image-token-id)."
        )
    return make_plan(directory, image_token_id)


def _save_tokenizer(tokenizer: Any, out: Path) -> None:
    """Save a tokenizer's files, each whole or not at all."""
    room = out / PARTIAL.format(f"tokenizer.{os.getpid()}")
    try:
        tokenizer.save_pretrained(room)
        for path in sorted(room.iterdir()):
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(room, ignore_errors=True)
