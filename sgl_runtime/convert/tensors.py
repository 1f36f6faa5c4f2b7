"""The tensors of a chat-format checkpoint, matched with those that transformers' model needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_runtime.checkpoints import first_line, safetensors_of
from sgl_runtime.convert.config import native_config, read_chat_config
from sgl_runtime.convert.names import Rule, module_name, rule
from sgl_runtime.errors import CheckpointError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_OUTPUT_LAYERS = ("language_model.output.weight", "language_model.lm_head.weight")


@dataclass(frozen=True)
class Source:
    """A tensor of the chat format, as its file's header describes it, and what it becomes."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    rule: Rule

    @property
    def nbytes(self) -> int:
        return DTYPES[self.dtype].itemsize * torch.Size(self.shape).numel()

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of its parts; ValueError when it cannot be split."""
        try:
            parts = self.rule.split(torch.empty(self.shape, device="meta"))
        except (RuntimeError, IndexError) as error:
            raise ValueError(str(error)) from error
        return [tuple(part.shape) for part in parts]

    def read(self) -> list[Tensor]:
        """Return its parts, contiguous; only this tensor's pages of the file get into memory."""
        from safetensors import safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                parts = self.rule.split(file.get_tensor(self.name))
        except Exception as error:  # safetensors raises many kinds on a damaged file
            raise CheckpointError(f"{self.path} could not be read: {first_line(error)}") from error
        return [part.contiguous() for part in parts]


@dataclass(frozen=True)
class Plan:
    """A chat-format checkpoint that has been checked: every tensor is used once, and none is missing.

    Attributes
    ----------
    chat : its configuration, see `read_chat_config`
    config : transformers' ``InternVLConfig``
    sources : its tensors, in the order in which they are read
    """

    directory: Path
    chat: dict[str, Any]
    config: Any
    sources: tuple[Source, ...]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of transformers' own format, holding one source tensor at a time."""
        for source in self.sources:
            yield from zip(source.rule.targets, source.read(), strict=True)


def make_plan(directory: Path, image_token_id: int) -> Plan:
    """Read a chat-format checkpoint's configuration and headers, and check them against the model.

    Raises
    ------
    CheckpointError
        Not such a checkpoint, not safetensors, or tensors that are missing, unused or wrongly shaped; at
        most ten of them are named.
    """
    chat = read_chat_config(directory)
    if not 0 <= image_token_id < chat["llm_config"]["vocab_size"]:
        raise CheckpointError(
            f"{directory}: the image token's id is {image_token_id}, the model's vocabulary has "
            f"{chat['llm_config']['vocab_size']} entries. The tokenizer or the given id is another model's."
        )
    sources = tuple(_headers(directory, chat["llm_config"]))
    names = {source.name for source in sources}
    tied = not names.intersection(_OUTPUT_LAYERS)
    if tied and not chat["llm_config"].get("tie_word_embeddings", False):
        raise CheckpointError(
            f"{directory} lacks tensors: an output layer ({' or '.join(_OUTPUT_LAYERS)}), and its "
            "config.json does not say that the embedding is the output layer too (tie_word_embeddings)."
        )
    config = native_config(chat, image_token_id=image_token_id, tied=tied, dtype=_dtype(sources))
    _check(directory, sources, _model_shapes(config, tied))
    return Plan(directory, chat, config, sources)


def _headers(directory: Path, llm: Mapping[str, Any]) -> Iterator[Source]:
    from safetensors import safe_open

    seen: dict[str, Path] = {}
    for path in safetensors_of(directory):
        try:
            with safe_open(path, framework="pt") as file:
                slices = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118
                found = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices]
        except Exception as error:  # as in Source.read
            raise CheckpointError(f"{path} could not be read: {first_line(error)}") from error
        for name, dtype, shape in found:
            if name in seen:
                raise CheckpointError(f"{path} and {seen[name]} both hold the tensor {name}.")
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{path} holds {name} in {dtype}; supported are {', '.join(DTYPES)}. Convert the "
                    "checkpoint that is not quantised."
                )
            seen[name] = path
            yield Source(name, path, dtype, shape, rule(name, llm))


def _dtype(sources: tuple[Source, ...]) -> str:
    """Return the name of the dtype in which most of the weights are."""
    sizes = {dtype: sum(s.nbytes for s in sources if s.dtype == dtype) for dtype in DTYPES}
    return str(DTYPES[max(sizes, key=lambda dtype: sizes[dtype])]).removeprefix("torch.")


def _model_shapes(config: Any, tied: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the model, by its name in the model; allocates nothing."""
    from transformers import InternVLForConditionalGeneration

    try:
        with torch.device("meta"):
            model = InternVLForConditionalGeneration(config)
    except Exception as error:  # whatever a configuration that makes no sense raises
        raise CheckpointError(f"config.json describes no model: {first_line(error)}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del shapes["lm_head.weight"]
    return shapes


def _check(directory: Path, sources: tuple[Source, ...], wanted: dict[str, tuple[int, ...]]) -> None:
    unused, wrong, taken = [], [], dict[str, str]()
    for source in sources:
        names = [module_name(target) for target in source.rule.targets]
        if not names or any(name not in wanted for name in names):
            unused.append(source.name)
            continue
        expected = [wanted[name] for name in names]
        try:
            got = source.shapes()
        except ValueError:
            got = []
        if got != expected:
            parts = ", ".join(map(str, expected))
            wrong.append(f"{source.name} of shape {source.shape}, which should give {parts}")
        for name in names:
            if name in taken:
                unused.append(f"{source.name} (beside {taken[name]})")
            taken[name] = source.name
    missing = [name for name in wanted if name not in taken]
    for what, found in (("lacks", missing), ("holds unknown", unused), ("holds wrongly shaped", wrong)):
        if found:
            more = f" and {len(found) - 10} more" if len(found) > 10 else ""
            whose = " (by transformers' names)" if found is missing else ""
            raise CheckpointError(f"{directory} {what} tensors{whose}: {', '.join(found[:10])}{more}.")
