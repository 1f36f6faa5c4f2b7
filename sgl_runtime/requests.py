"""What goes into a VLM and comes out of it: prompts, encoded requests, groups of them, answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sgl_runtime import hf
from sgl_runtime.errors import PromptError, SGLError
from sgl_runtime.memory import bucket, draft_bucket


@dataclass(frozen=True, eq=False)
class Prompt:
    """The inputs of one request, checked, on the device.

    Attributes
    ----------
    input_ids : (1, S) int64
    pixel_values : (tiles, 3, height, width), compute dtype
    visual_index : (1, N) int32, positions of the visual tokens, ascending
    text_rows : (1, R) int32, positions of the text tokens after the first visual token: the rows that count
    spans : lengths of the runs of adjacent visual tokens
    """

    input_ids: Tensor
    pixel_values: Tensor
    visual_index: Tensor
    text_rows: Tensor
    spans: tuple[int, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.input_ids, self.pixel_values, self.visual_index, self.text_rows

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_visual(self) -> int:
        return self.visual_index.shape[1]


@dataclass(frozen=True, eq=False)
class Request:
    """An encoded prompt, reusable across runs.

    Attributes
    ----------
    hidden : (1, S, C), text embeddings and image features
    finite : () bool, whether all image features are
    """

    prompt: Prompt
    hidden: Tensor
    finite: Tensor


@dataclass(frozen=True, eq=False)
class Prune:
    """On entry to decoder layer `layer`, keep the `num_keep` visual tokens with the largest `ranking`.

    `ranking` (1, N) fp32 may come from anywhere: the small VLM's mass, another model's, random numbers.
    """

    layer: int
    ranking: Tensor
    num_keep: int


@dataclass(frozen=True, eq=False)
class Answer:
    """The greedy answer to one request.

    Attributes
    ----------
    token_ids, logprobs : end of sequence included; log-probabilities are those after logits processors
    kept_index : (S_kept,) int32, original positions of the prompt's tokens that were kept; None when unpruned
    accepted : how many leading tokens of the draft it took over
    mass : (1, N) fp32, attention received by each visual token; None unless asked for
    error : what went wrong with this request; the rest then means nothing
    """

    token_ids: list[int]
    logprobs: list[float]
    kept_index: Tensor | None = None
    accepted: int = 0
    mass: Tensor | None = None
    error: SGLError | None = None

    @property
    def confidence(self) -> float:
        """Geometric mean of the tokens' probabilities, after logits processors."""
        return math.exp(sum(self.logprobs) / len(self.logprobs))


@dataclass(frozen=True, eq=False)
class Group:
    """Requests whose prompts are padded to one length S and share a prefill.

    Attributes
    ----------
    members : the requests' numbers in the batch, which are their rows in the cache too
    rows : (B,) int64, the same on the device
    seq_lens : (B,) int32
    visual_index : (B, S) int32, -1 behind the last visual token
    embedded, hidden : (B, S, C), what entered the first layer, and the prune layer
    mass : (B, S) fp32, of the visual slots; None unless asked for
    """

    requests: list[Request]
    members: list[int]
    rows: Tensor
    seq_lens: Tensor
    visual_index: Tensor
    embedded: Tensor
    hidden: Tensor
    mass: Tensor | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(request.prompt.length for request in self.requests)

    def only(self, members: Iterable[int]) -> Group | None:
        """Return the group without the requests that are not in ``members``; None when none is left."""
        members = set(members)
        at = [i for i, member in enumerate(self.members) if member in members]
        if len(at) == len(self.members):
            return self
        if not at:
            return None
        index = torch.tensor(at, device=self.rows.device)
        tensors = ("rows", "seq_lens", "visual_index", "embedded", "hidden", "mass")
        picked: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[index] for name in tensors
        }
        return replace(
            self, requests=[self.requests[i] for i in at], members=[self.members[i] for i in at], **picked
        )

    def padded_rows(self) -> Tensor:
        """Return the text rows that count, (B, R) int32, padded with -1 to a power of two: few shapes."""
        text = [request.prompt.text_rows for request in self.requests]
        width = max(32, 1 << (max(rows.shape[1] for rows in text) - 1).bit_length())
        return torch.cat([pad(rows, (0, width - rows.shape[1]), value=-1) for rows in text])

    def padded_draft(self, drafts: Mapping[int, Sequence[int]]) -> Tensor:
        """Return the members' drafts, (B, T + 1) int64, padded with -1: T to feed, one more to verify."""
        width = draft_bucket(max(len(drafts[member]) for member in self.members) - 1) + 1
        padded = [[*drafts[member], *[-1] * (width - len(drafts[member]))] for member in self.members]
        return torch.tensor(padded, device=self.rows.device)


@dataclass(frozen=True, eq=False)
class Prefix:
    """A batch of `batch` requests whose prompts have been through the layers before `stop`."""

    groups: list[Group]
    batch: int
    stop: int
    new_tokens: int

    def only(self, members: Iterable[int]) -> list[Group]:
        """Return the groups without the requests that are not in ``members``."""
        return [left for group in self.groups if (left := group.only(members)) is not None]


def make_groups(requests: Sequence[Request]) -> list[Group]:
    """Group requests by the length that their prompts are padded to."""
    by_length: dict[int, list[int]] = {}
    for number, request in enumerate(requests):
        by_length.setdefault(bucket(request.prompt.length), []).append(number)
    return [_group([requests[i] for i in members], members, length) for length, members in by_length.items()]


def make_prompt(model: hf.ModelView, name: str, inputs: Mapping[str, Any]) -> Prompt:
    """Check a processor's output for one request and locate its visual tokens; runs no part of the model.

    Parameters
    ----------
    model, name
        The VLM, and its name in messages.
    inputs
        ``input_ids`` (1, S) or (S,) integers and ``pixel_values`` (tiles, 3, height, width) floats;
        ``attention_mask``, if there, must be all ones.

    Raises
    ------
    PromptError
        Wrong shapes or ids, no image, visual tokens that do not match the tiles, or a prompt that ends in
        one.
    """
    ids, pixels = _checked_inputs(model, name, inputs)
    visual = ids == model.image_token_id  # (S,)
    positions = visual.nonzero()[:, 0]
    per_tile = model.tokens_per_tile
    if len(positions) != pixels.shape[0] * per_tile:
        raise PromptError(
            f"The {name} VLM's prompt has {len(positions)} visual tokens (id "
            f"{model.image_token_id}), but {pixels.shape[0]} tiles of {per_tile} tokens need "
            f"{pixels.shape[0] * per_tile}."
        )
    if visual[-1]:
        raise PromptError(f"The {name} VLM's prompt ends in a visual token; it must end in text.")
    text = (~visual).nonzero()[:, 0]
    jumps = (positions.diff() != 1).nonzero()[:, 0] + 1
    bounds = [0, *jumps.tolist(), len(positions)]
    return Prompt(
        input_ids=ids[None].to(model.device),
        pixel_values=pixels.to(model.device, model.dtype),
        visual_index=positions[None].int().to(model.device),
        text_rows=text[text > positions[0]][None].int().to(model.device),
        spans=tuple(b - a for a, b in pairwise(bounds)),
    )


def check_match(small: Prompt, large: Prompt) -> None:
    """Raise PromptError unless the i-th visual token of one prompt can stand for the i-th of the other."""
    if small.num_visual != large.num_visual:
        raise PromptError(
            f"The small VLM has {small.num_visual} visual tokens and the large VLM {large.num_visual}; "
            "guidance needs equal counts. Use two VLMs of one family, with the same tile settings."
        )
    if len(small.spans) == len(large.spans) and small.spans != large.spans:
        raise PromptError(
            f"The images' visual tokens differ: {list(small.spans)} in the small VLM and {list(large.spans)} "
            "in the large VLM. Use two VLMs of one family, with the same tile settings."
        )


def _group(requests: list[Request], members: list[int], length: int) -> Group:
    prompts = [request.prompt for request in requests]
    hidden = torch.cat([pad(r.hidden, (0, 0, 0, length - r.prompt.length)) for r in requests])
    device = hidden.device
    return Group(
        requests=requests,
        members=members,
        rows=torch.tensor(members, device=device),
        seq_lens=torch.tensor([p.length for p in prompts], dtype=torch.int32, device=device),
        visual_index=torch.cat([pad(p.visual_index, (0, length - p.num_visual), value=-1) for p in prompts]),
        embedded=hidden,
        hidden=hidden,
    )


def _checked_inputs(model: hf.ModelView, name: str, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    who = f"The {name} VLM's"
    if not isinstance(inputs, Mapping):
        raise PromptError(f"{who} inputs must be a mapping with input_ids and pixel_values, got {inputs!r}.")
    ids, pixels, mask = (inputs.get(key) for key in ("input_ids", "pixel_values", "attention_mask"))
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.squeeze(0).dim() != 1 or not ids.numel():
        raise PromptError(f"{who} input_ids must be an integer tensor (1, S), got {_describe(ids)}.")
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or not pixels.shape[0]:
        raise PromptError(
            f"{who} pixel_values must be a tensor (tiles, 3, height, width), got {_describe(pixels)}. "
            "A request needs at least one image."
        )
    if tuple(pixels.shape[1:]) != (3, *model.tile_size):
        want = (3, *model.tile_size)
        raise PromptError(f"{who} tiles must be {want}, got {tuple(pixels.shape[1:])}.")
    ids = ids.reshape(-1).long().cpu()
    if ids.min() < 0 or ids.max() >= model.vocab_size:
        raise PromptError(
            f"{who} input_ids must be in 0 to {model.vocab_size - 1}, got {int(ids.min())} to "
            f"{int(ids.max())}. Does the tokenizer belong to the model?"
        )
    if isinstance(mask, Tensor) and not bool((mask == 1).all()):
        raise PromptError(f"{who} attention_mask must be all ones: give one request, without padding.")
    return ids, pixels


def _describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
