"""Static memory of one VLM: ragged keys and values, the state of the requests that are being decoded.

Layers before the prune layer hold every token, layers from it on the kept ones, so each has a capacity of its
own. Everything is allocated once for stated limits; a run writes into it and allocates nothing per token.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields

import psutil
import torch
from torch import Tensor
from torch.nn.functional import pad

import sgl_kernels
from sgl_runtime.errors import MemoryLimitError

log = logging.getLogger(__name__)

NEVER = 1 << 30  # the prune layer of a run that does not prune


def bucket(length: int) -> int:
    """Return what ``length`` is padded to: one of sixteen lengths a power of two, so a sixteenth at most."""
    step = max(16, 1 << max(0, (length - 1).bit_length() - 5))
    return -(-length // step) * step


def draft_bucket(length: int) -> int:
    """Return the rows that a draft of which ``length`` tokens are fed is padded to."""
    return max(8, -(-length // 8) * 8)


def batch_bucket(batch: int) -> int:
    """Return the power of two of rows that ``batch`` requests are decoded with."""
    return 1 << (batch - 1).bit_length()


@dataclass(frozen=True)
class Capacity:
    """Slots of a KV cache: `full` in the layers before `prune_layer`, `pruned` in the others.

    A `prune_layer` of `NEVER` asks for nothing: `pruned` is then that of an unpruned run, like `full`.
    `batch` requests share it; `new_tokens` is the longest answer, `visual` the most visual tokens of a
    prompt.
    """

    batch: int
    full: int
    pruned: int
    prune_layer: int
    new_tokens: int
    visual: int

    def holds(self, other: Capacity) -> bool:
        """Whether a run that needs ``other`` fits; without pruning it may where ``pruned`` is large."""
        sizes = ("batch", "full", "pruned", "new_tokens", "visual")
        same_layer = other.prune_layer in (self.prune_layer, NEVER)
        return same_layer and all(getattr(self, name) >= getattr(other, name) for name in sizes)

    def joined(self, other: Capacity) -> Capacity:
        """Return what holds both, with the prune layer of ``other`` if it has one."""
        larger = {f.name: max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        layer = self.prune_layer if other.prune_layer == NEVER else other.prune_layer
        return Capacity(**{**larger, "prune_layer": layer})


class KVCache:
    """Views of one allocation: keys and values (batch, kv_heads, slots, head_dim) of each layer."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], prune_layer: int) -> None:
        self.keys = keys
        self.values = values
        self.prune_layer = prune_layer
        self._every_row = torch.arange(keys[0].shape[0], device=keys[0].device)

    def fill(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Write prompts' k and v (B, kv_heads, S, head_dim) from slot 0 of cache rows ``rows`` (B,)."""
        self.keys[layer][:, :, : k.shape[2]].index_copy_(0, rows, k)
        self.values[layer][:, :, : v.shape[2]].index_copy_(0, rows, v)

    def extend(self, layer: int, rows: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write k and v (B, kv_heads, T, head_dim) to slots (B, T) of rows (B,)."""
        self.keys[layer][rows[:, None], :, slots] = k.transpose(1, 2)
        self.values[layer][rows[:, None], :, slots] = v.transpose(1, 2)

    def append(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write one token's k and v (B, kv_heads, head_dim) to ``slots`` (B,) of the first B rows."""
        rows = self._every_row[: k.shape[0]]
        self.keys[layer][rows, :, slots] = k
        self.values[layer][rows, :, slots] = v


@dataclass(frozen=True, eq=False)
class DecodeState:
    """The books of a batch of B requests, on the device, rewritten in place by every step.

    Attributes
    ----------
    token : (B,) int64, the last token chosen, which the next step feeds
    position : (B,) int32, where it goes: tokens fed so far, pruned ones included
    turned : (B,) int32, what its rotary position has more than that (M-RoPE)
    dropped : (B,) int32, visual tokens that layers from the prune layer on lack
    count, limit : (B,) int32, tokens chosen so far, and at most
    finished, failed : (B,) bool; failed when a token's log-probability was not finite
    tokens : (B, new_tokens + 1) int64, logprobs : likewise fp32. The last column is scrap
    visual_index : (B, N) int32, mass : (B, N) fp32
    eos_ids : (E,) int64
    """

    token: Tensor
    position: Tensor
    turned: Tensor
    dropped: Tensor
    count: Tensor
    limit: Tensor
    finished: Tensor
    failed: Tensor
    tokens: Tensor
    logprobs: Tensor
    visual_index: Tensor
    mass: Tensor
    eos_ids: Tensor

    @classmethod
    def empty(cls, capacity: Capacity, eos_ids: list[int], device: torch.device) -> DecodeState:
        """Return the state of a batch in which every request has finished."""
        batch, width = capacity.batch, capacity.new_tokens + 1

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            token=zeros(batch, dtype=torch.int64),
            position=zeros(batch, dtype=torch.int32),
            turned=zeros(batch, dtype=torch.int32),
            dropped=zeros(batch, dtype=torch.int32),
            count=zeros(batch, dtype=torch.int32),
            limit=zeros(batch, dtype=torch.int32),
            finished=torch.ones(batch, dtype=torch.bool, device=device),
            failed=zeros(batch, dtype=torch.bool),
            tokens=zeros(batch, width, dtype=torch.int64),
            logprobs=zeros(batch, width, dtype=torch.float32),
            visual_index=torch.full((batch, capacity.visual), -1, dtype=torch.int32, device=device),
            mass=zeros(batch, capacity.visual, dtype=torch.float32),
            eos_ids=torch.tensor(eos_ids, dtype=torch.int64, device=device),
        )

    def first(self, batch: int) -> DecodeState:
        """Return the state of the first ``batch`` requests, sharing memory."""
        views = {field.name: getattr(self, field.name)[:batch] for field in fields(self)}
        return DecodeState(**{**views, "eos_ids": self.eos_ids})

    def clear(self) -> None:
        """Finish every request, so that a step changes nothing."""
        self.finished.fill_(True)
        self.position.zero_()
        self.turned.zero_()
        self.dropped.zero_()
        self.count.zero_()
        self.failed.zero_()

    def choose(self, logits: Tensor) -> None:
        """Take the most likely token of logits (B, vocabulary), after logits processors, as the next."""
        token, logprob = sgl_kernels.greedy_token(logits)
        going = ~self.finished
        at = self.count.long()[:, None]  # the scrap column, or one that is never read, when finished
        self.tokens.scatter_(1, at, token[:, None])
        self.logprobs.scatter_(1, at, logprob[:, None])
        self.count.add_(going)
        self.position.add_(going)
        self.token.copy_(torch.where(going, token, self.token))
        self.failed.logical_or_(going & ~logprob.isfinite())
        ended = (token[:, None] == self.eos_ids).any(1) | (self.count >= self.limit)
        self.finished.logical_or_(ended | self.failed)

    def enter_mass(self, rows: Tensor, visual_index: Tensor, mass: Tensor) -> None:
        """Put the visual slots (B, S) of a prefill and their mass (B, S) into ``rows`` (B,)."""
        more = self.mass.shape[1] - mass.shape[1]
        self.visual_index[rows] = pad(visual_index, (0, more), value=-1)
        self.mass[rows] = pad(mass, (0, more))

    def begin(
        self,
        rows: Tensor,
        logits: Tensor,
        draft: Tensor,
        limit: int,
        seq_lens: Tensor,
        kept_lens: Tensor,
        next_angle: Tensor,
    ) -> Tensor:
        """Start requests in ``rows`` (B,) with what their prefill says; return accepted draft tokens (B,).

        Parameters
        ----------
        logits : (B, T + 1, vocabulary)
            Of the last prompt row and of the T draft rows.
        draft : (B, T + 1) int64
            Draft tokens, then -1. The last one of a draft is verified but was not fed.
        limit
            Longest answer, at most T + 1 when there is a draft.
        seq_lens, kept_lens : (B,) int32
            Tokens of the prompt before and after pruning.
        next_angle : (B,) int32
            The rotary position behind the prompt.
        """
        token, logprob = sgl_kernels.greedy_token(logits)  # (B, T + 1)
        column = torch.arange(token.shape[1], device=token.device)
        accepted = (token == draft).long().cumprod(1).sum(1)  # (B,)
        count = torch.minimum(accepted + 1, (draft >= 0).sum(1).clamp_min(1)).clamp_max(limit)
        is_eos = torch.isin(token, self.eos_ids) & (column < count[:, None])
        ends = is_eos.any(1)
        count = torch.where(ends, is_eos.long().argmax(1) + 1, count)
        failed = (~logprob.isfinite() & (column < count[:, None])).any(1)
        width = min(token.shape[1], self.tokens.shape[1])
        self.tokens[rows, :width] = token[:, :width]
        self.logprobs[rows, :width] = logprob[:, :width]
        self.token[rows] = token.gather(1, count[:, None] - 1)[:, 0]
        self.count[rows] = count.int()
        self.limit[rows] = limit
        self.position[rows] = seq_lens + count.int() - 1
        self.turned[rows] = next_angle - seq_lens
        self.dropped[rows] = seq_lens - kept_lens
        self.failed[rows] = failed
        self.finished[rows] = ends | failed | (count >= limit)
        return torch.minimum(accepted, count)


class Memory:
    """The KV allocation and decode state of one VLM; made anew, larger, when a run needs more."""

    def __init__(
        self,
        name: str,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        eos_ids: frozenset[int],
    ) -> None:
        self.name = name
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.device = device
        self.eos_ids = sorted(eos_ids)
        self.capacity: Capacity | None = None
        self._storage = torch.empty(0, dtype=dtype, device=device)

    @property
    def allocated(self) -> int:
        """Bytes of keys and values allocated so far; 0 until the first run or `reserve`."""
        return self._storage.nbytes

    def estimate(self, capacity: Capacity) -> int:
        """Return the bytes that keys and values take at ``capacity``."""
        first = min(capacity.prune_layer, self.num_layers)
        slots = first * capacity.full + (self.num_layers - first) * capacity.pruned
        return 2 * capacity.batch * slots * self.num_kv_heads * self.head_dim * self._storage.element_size()

    def reserve(self, capacity: Capacity) -> bool:
        """Make room for runs that need ``capacity``; return whether memory was laid out anew.

        Raises
        ------
        MemoryLimitError
            It does not fit into what is free on the device.
        """
        if self.capacity is not None:
            if self.capacity.holds(capacity):
                return False
            joined = self.capacity.joined(capacity)
            if self.estimate(joined) <= self.allocated + free_memory(self.device):
                capacity = joined  # or the next run of the other kind would lay memory out anew again
        need = self.estimate(capacity)
        self.capacity = None  # until all of it stands
        with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
            if need > self.allocated:
                self._allocate(need, capacity)
            self.cache = self._lay_out(capacity)
            self.state = DecodeState.empty(capacity, self.eos_ids, self.device)
        self.capacity = capacity
        return True

    def _allocate(self, need: int, capacity: Capacity) -> None:
        for name in ("cache", "state"):  # they hold on to the old memory, which goes before the new comes
            vars(self).pop(name, None)
        self._storage = self._storage.new_empty(0)
        free = free_memory(self.device)
        log.info(
            "%s VLM: %.0f MiB for keys and values, batches of up to %d, %d tokens each; %s has %.0f MiB free",
            *(self.name, need / 2**20, capacity.batch, capacity.full, self.device, free / 2**20),
        )
        if need > free:
            raise MemoryLimitError(
                f"The {self.name} VLM's keys and values need {need / 2**30:.2f} GiB for {capacity.batch} "
                f"requests of up to {capacity.full} tokens ({capacity.pruned} in layers from "
                f"{min(capacity.prune_layer, self.num_layers)} on, of {self.num_layers}), but {self.device} "
                f"has {free / 2**30:.2f} GiB free. Lower max_batch, max_prompt_tokens, max_text_tokens or "
                "max_new_tokens."
            )
        self._storage = self._storage.new_empty(need // self._storage.element_size())

    def _lay_out(self, capacity: Capacity) -> KVCache:
        shapes = [
            (capacity.batch, self.num_kv_heads, slots, self.head_dim)
            for slots in (
                capacity.full if layer < capacity.prune_layer else capacity.pruned
                for layer in range(self.num_layers)
            )
        ]
        parts = iter(
            self._storage[: sum(2 * _size(s) for s in shapes)].split([_size(s) for s in shapes for _ in "kv"])
        )
        pairs = [(next(parts).view(shape), next(parts).view(shape)) for shape in shapes]
        return KVCache([k for k, _ in pairs], [v for _, v in pairs], capacity.prune_layer)


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on ``device``."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
