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
from sgl_runtime.decoder import Rows
from sgl_runtime.errors import PromptError, SGLError
from sgl_runtime.families.base import Visual, describe
from sgl_runtime.mapping import Cells
from sgl_runtime.memory import bucket, draft_bucket


@dataclass(frozen=True, eq=False)
class Prompt:
    """The inputs of one request, checked, on the device.

    Attributes
    ----------
    input_ids : (1, S) int64
    visuals : what goes through the vision tower, in prompt order, floats in the compute dtype
    visual_index : (1, N) int32, positions of the visual tokens, ascending
    text_rows : (1, R) int32, positions of the text tokens after the first visual token: the rows that count
    spans : lengths of the runs of adjacent visual tokens
    positions : (3, S) int64, rotary positions; None: 0, 1, ...
    next_angle : the rotary position behind the prompt
    cells : which image and which part of it each visual token covers; None when the processor did not say
    """

    input_ids: Tensor
    visuals: list[Visual]
    visual_index: Tensor
    text_rows: Tensor
    spans: tuple[int, ...]
    positions: Tensor | None
    next_angle: int
    cells: Cells | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        pixels = [tensor for visual in self.visuals for tensor in visual.tensors.values()]
        rest = [] if self.positions is None else [self.positions]
        if self.cells is not None:
            rest += [self.cells.image, self.cells.boxes]
        return self.input_ids, self.visual_index, self.text_rows, *pixels, *rest

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_visual(self) -> int:
        return self.visual_index.shape[1]

    @property
    def image_of(self) -> Tensor:
        """(N,) int64, the number of each visual token's image; that of its run where nobody said."""
        if self.cells is not None:
            return self.cells.image
        spans = torch.tensor(self.spans, device=self.visual_index.device)
        return torch.arange(len(spans), device=spans.device).repeat_interleave(spans)


@dataclass(frozen=True, eq=False)
class Request:
    """An encoded prompt, reusable across runs.

    Attributes
    ----------
    rows : text embeddings and image features (1, S, C), rotary angles, DeepStack planes
    finite : () bool, whether all image features are
    """

    prompt: Prompt
    rows: Rows
    finite: Tensor

    @property
    def hidden(self) -> Tensor:
        return self.rows.hidden


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
    at : (B,) int64, the same on the device
    seq_lens, next_angle : (B,) int32, tokens of the prompts, and the rotary positions behind them
    visual_index : (B, S) int32, -1 behind the last visual token
    rows : what entered the first layer
    hidden : (B, S, C), what entered the prune layer
    mass : (B, S) fp32, of the visual slots; None unless asked for
    """

    requests: list[Request]
    members: list[int]
    at: Tensor
    seq_lens: Tensor
    next_angle: Tensor
    visual_index: Tensor
    rows: Rows
    hidden: Tensor
    mass: Tensor | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(request.prompt.length for request in self.requests)

    @property
    def begun(self) -> Rows:
        """What entered the prune layer."""
        return replace(self.rows, hidden=self.hidden)

    def only(self, members: Iterable[int]) -> Group | None:
        """Return the group without the requests that are not in ``members``; None when none is left."""
        members = set(members)
        left = [i for i, member in enumerate(self.members) if member in members]
        if len(left) == len(self.members):
            return self
        if not left:
            return None
        index = torch.tensor(left, device=self.at.device)
        every, planes = self.rows, tuple(plane[index] for plane in self.rows.planes)
        rows = Rows(every.hidden[index], every.cos[index], every.sin[index], planes)
        tensors = ("at", "seq_lens", "next_angle", "visual_index", "hidden", "mass")
        picked: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[index] for name in tensors
        }
        return replace(
            self,
            requests=[self.requests[i] for i in left],
            members=[self.members[i] for i in left],
            rows=rows,
            **picked,
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
        return torch.tensor(padded, device=self.at.device)


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
        ``input_ids`` (1, S) or (S,) integers, and the tensors that the family's vision tower takes, as
        transformers' processors make them; ``attention_mask``, if there, must be all ones. Our own
        processors add ``visual_image`` (N,) and ``visual_cells`` (N, 3, 2), see `sgl_runtime.mapping.Cells`.

    Raises
    ------
    PromptError
        Wrong shapes or ids, no image, visual tokens that do not match the images, or a prompt that ends in
        one.
    """
    ids = _checked_ids(model, name, inputs)
    family = model.family
    try:
        visuals = family.visuals({**inputs, "input_ids": ids[None]})
        angles = family.positions(ids, visuals)
    except PromptError as error:
        raise PromptError(f"The {name} VLM's inputs: {error}") from error
    visual = torch.isin(ids, torch.tensor(family.visual_ids))  # (S,)
    positions = visual.nonzero()[:, 0]
    wanted = sum(each.tokens for each in visuals)
    if not visuals or len(positions) != wanted:
        per_visual = _shortened([each.tokens for each in visuals])
        raise PromptError(
            f"The {name} VLM's prompt has {len(positions)} visual tokens (id "
            f"{', '.join(map(str, family.visual_ids))}), but its images need {wanted}: {per_visual}."
        )
    if visual[-1]:
        raise PromptError(f"The {name} VLM's prompt ends in a visual token; it must end in text.")
    text = (~visual).nonzero()[:, 0]
    jumps = (positions.diff() != 1).nonzero()[:, 0] + 1
    bounds = [0, *jumps.tolist(), len(positions)]
    device = model.device
    return Prompt(
        input_ids=ids[None].to(device),
        visuals=[_placed(each, device, model.dtype) for each in visuals],
        visual_index=positions[None].int().to(device),
        text_rows=text[text > positions[0]][None].int().to(device),
        spans=tuple(b - a for a, b in pairwise(bounds)),
        positions=None if angles is None else angles.to(device),
        next_angle=len(ids) if angles is None else int(angles[:, -1].max()) + 1,
        cells=_cells(name, inputs, len(positions), device),
    )


def _cells(name: str, inputs: Mapping[str, Any], count: int, device: torch.device) -> Cells | None:
    image, boxes = inputs.get("visual_image"), inputs.get("visual_cells")
    if image is None and boxes is None:
        return None
    for what, value, shape in (("visual_image", image, (count,)), ("visual_cells", boxes, (count, 3, 2))):
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            raise PromptError(f"The {name} VLM's {what} must be a tensor {shape}, got {describe(value)}.")
    assert image is not None
    assert boxes is not None
    if image.is_floating_point() or bool(((image < 0) | (image >= count)).any()):
        raise PromptError(
            f"The {name} VLM's visual_image must number images from 0 on, got {describe(image)} with values "
            f"from {float(image.min()):g} to {float(image.max()):g}."
        )
    return Cells(image.to(device, torch.int64), boxes.to(device, torch.float32))


def _placed(visual: Visual, device: torch.device, dtype: torch.dtype) -> Visual:
    tensors = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None)
        for name, tensor in visual.tensors.items()
    }
    return Visual(tensors, visual.tokens)


def _shortened(counts: list[int]) -> str:
    shown = " + ".join(map(str, counts[:8]))
    return f"{shown} + ... ({len(counts)} in all)" if len(counts) > 8 else shown or "there are none"


def _group(requests: list[Request], members: list[int], length: int) -> Group:
    prompts = [request.prompt for request in requests]

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.cat([pad(tensor, (0, 0, 0, length - tensor.shape[1])) for tensor in tensors])

    every = [request.rows for request in requests]
    rows = Rows(
        joined([rows.hidden for rows in every]),
        joined([rows.cos for rows in every]),
        joined([rows.sin for rows in every]),
        tuple(joined(list(planes)) for planes in zip(*(rows.planes for rows in every), strict=True)),
    )
    device = rows.hidden.device

    def counts(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return Group(
        requests=requests,
        members=members,
        at=torch.tensor(members, device=device),
        seq_lens=counts([prompt.length for prompt in prompts]),
        next_angle=counts([prompt.next_angle for prompt in prompts]),
        visual_index=torch.cat([pad(p.visual_index, (0, length - p.num_visual), value=-1) for p in prompts]),
        rows=rows,
        hidden=rows.hidden,
    )


def _checked_ids(model: hf.ModelView, name: str, inputs: Mapping[str, Any]) -> Tensor:
    who = f"The {name} VLM's"
    if not isinstance(inputs, Mapping):
        raise PromptError(f"{who} inputs must be a mapping with input_ids and pixel_values, got {inputs!r}.")
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.squeeze(0).dim() != 1 or not ids.numel():
        raise PromptError(f"{who} input_ids must be an integer tensor (1, S), got {describe(ids)}.")
    ids = ids.reshape(-1).long().cpu()
    if ids.min() < 0 or ids.max() >= model.vocab_size:
        raise PromptError(
            f"{who} input_ids must be in 0 to {model.vocab_size - 1}, got {int(ids.min())} to "
            f"{int(ids.max())}. Does the tokenizer belong to the model?"
        )
    if mask is not None and not bool((torch.as_tensor(mask) == 1).all()):
        raise PromptError(f"{who} attention_mask must be all ones: give one request, without padding.")
    return ids
