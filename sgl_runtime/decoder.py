"""The language model as our loop runs it. Everything in this file is traced: it branches on shapes and
settings only, reads no value back, and allocates nothing that outlives a step.

A prompt goes through `lower` (layers < K, every token), `draft_rows` (the draft through the same layers, over
their cache) and `upper` (pruning, the draft joined behind what was kept, layers >= K, logits). An unpruned
prompt without a draft is the case K = number of layers. An answer then grows by `decode`, one token a step.
Every token keeps the rotary angles of where it stood.
Prompts of a batch are padded behind their ends: causal attention never looks there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import sgl_kernels
from sgl_runtime import hf
from sgl_runtime.attention import cached_attention, prefill_attention
from sgl_runtime.memory import DecodeState, KVCache


@dataclass(frozen=True, eq=False)
class Rows:
    """Prompts on their way through the layers.

    Attributes
    ----------
    hidden : (B, S, C)
    cos, sin : (B, S, D), the rotary angles of each row
    planes : (B, S, C) each; the i-th is added behind layer i, zeros for text
    """

    hidden: Tensor
    cos: Tensor
    sin: Tensor
    planes: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class MassRows:
    """Where the mass of a prefill goes: text rows (B, R), visual slots (B, N), a (B, N) buffer per layer."""

    text_rows: Tensor
    visual_index: Tensor
    mass: list[Tensor]


@dataclass(frozen=True, eq=False)
class Selection:
    """What pruning keeps: `num_keep` (B,) int32 visual tokens with the largest `ranking` (B, N) fp32."""

    ranking: Tensor
    visual_index: Tensor
    num_keep: Tensor


class Decoder:
    """Embedding, decoder layers, final norm and head, with the rotary tables of every position."""

    def __init__(self, view: hf.ModelView) -> None:
        self.embed = view.embed
        group = view.num_heads // view.num_kv_heads
        self.layers = [DecoderLayer(layer, view.head_dim, group) for layer in view.layers]
        self.norm = view.norm
        self.lm_head = view.lm_head
        self.softmax_scale = view.softmax_scale
        self.capturable = view.capturable
        self._rope = view.rope
        self._context = view.context
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._device = view.device
        self._make_tables(1)

    def reserve_positions(self, length: int) -> None:
        """Make the rotary tables (positions, D) cover ``length`` positions."""
        if self.cos.shape[0] < length:
            self._make_tables(length)

    def prompt_rope(self, length: int, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return cos and sin (length, D) of a prompt whose positions are (3, length), or None: 0, 1, ..."""
        if positions is not None:
            return self._rope(positions)
        self.reserve_positions(length)
        return self.cos[:length], self.sin[:length]

    def lower(
        self, rows: Rows, cache: KVCache | None, at: Tensor, stop: int, mass: MassRows | None
    ) -> Tensor:
        """Run prompts through the layers before ``stop``; cache row ``at[b]`` gets request b."""
        return self._prefill(rows, cache, at, range(stop), mass)

    def draft_rows(
        self,
        tokens: Tensor,
        seq_lens: Tensor,
        next_angle: Tensor,
        cache: KVCache,
        at: Tensor,
        stop: int,
        columns: Tensor,
    ) -> Tensor:
        """Run draft tokens (B, T) behind prompts of ``seq_lens`` through the layers before ``stop``.

        They turn like positions ``next_angle`` and on. Of the cache the first ``len(columns)`` slots are
        looked at.
        """
        span = columns.shape[0]
        hidden = self.embed(tokens.clamp_min(0))  # (B, T, C)
        slots, angles = (_ramp(first, tokens.shape[1]) for first in (seq_lens, next_angle))  # (B, T)
        cos, sin = self.cos[angles], self.sin[angles]  # (B, T, D)
        for i in range(stop):
            layer = self.layers[i]
            q, k, v = layer.project(hidden, cos, sin)
            cache.extend(i, at, slots, k, v)
            keys, values = (x[i][:, :, :span].index_select(0, at) for x in (cache.keys, cache.values))
            attended = cached_attention(q, keys, values, seq_lens, self.softmax_scale)
            hidden = layer.finish(hidden, attended)
        return hidden

    def upper(
        self,
        rows: Rows,
        seq_lens: Tensor,
        next_angle: Tensor,
        cache: KVCache | None,
        at: Tensor,
        start: int,
        selection: Selection | None,
        draft: Tensor | None,
        columns: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Prune, join the draft, run the layers from ``start`` on.

        Parameters
        ----------
        rows
            What entered layer ``start``.
        next_angle : (B,) int32
            The rotary position behind each prompt.
        selection
            None keeps everything.
        draft : (B, T, C), optional
            What the draft's rows are on entry to layer ``start``.
        columns : (S_out,) int32
            0, 1, ...: as many as kept rows and draft are padded to, at least the longest.

        Returns
        -------
        logits : (B, T + 1, vocabulary), of the last prompt row and the draft's rows
        kept_index : (B, S_out) int32, original positions of the prompt's rows that are left
        kept_lens : (B,) int32, how many those are
        """
        out_len = columns.shape[0]
        hidden, extras = rows.hidden, (rows.cos, rows.sin, *rows.planes[start:])
        if selection is not None:
            hidden, kept_index, kept_lens, extras = sgl_kernels.prune_gather(
                hidden,
                selection.ranking,
                selection.visual_index,
                seq_lens,
                selection.num_keep,
                extras=extras,
                out_len=out_len,
            )
        else:
            kept_index, kept_lens = columns.expand(hidden.shape[0], -1), seq_lens
            more = (0, 0, 0, out_len - hidden.shape[1])
            hidden, extras = pad(hidden, more), tuple(pad(extra, more) for extra in extras)
        cos, sin, *planes = extras
        num_rows = 1
        if draft is not None:
            num_rows += draft.shape[1]
            place = _ramp(kept_lens, draft.shape[1])[..., None]  # (B, T, 1)
            angles = _ramp(next_angle, draft.shape[1])
            hidden, cos, sin = (
                prompt.scatter(1, place.expand_as(rows_), rows_)
                for prompt, rows_ in ((hidden, draft), (cos, self.cos[angles]), (sin, self.sin[angles]))
            )
        left = Rows(hidden, cos, sin, (*rows.planes[:start], *planes))
        hidden = self._prefill(left, cache, at, range(start, len(self.layers)), None)
        last = _ramp(kept_lens - 1, num_rows)[..., None]  # (B, T + 1, 1)
        hidden = hidden.gather(1, last.expand(-1, -1, hidden.shape[2]))
        return self.lm_head(self.norm(hidden)), kept_index, kept_lens

    def decode(self, state: DecodeState, cache: KVCache, with_mass: bool) -> Tensor:
        """Feed ``state.token`` of every request and return the logits (B, vocabulary) of the next.

        A finished request reads no cache, adds no mass and keeps its position.
        """
        hidden = self.embed(state.token)[:, None]  # (B, 1, C)
        angle = state.position + state.turned
        cos, sin = self.cos[angle][:, None], self.sin[angle][:, None]  # (B, 1, D)
        places = [  # slot to write and length to read, (B,): in layers < K, in layers >= K
            (slot, torch.where(state.finished, 0, slot + 1).int())
            for slot in (state.position, state.position - state.dropped)
        ]
        for i, layer in enumerate(self.layers):
            slots, lens = places[0] if i < cache.prune_layer else places[1]
            q, k, v = (heads[:, :, 0] for heads in layer.project(hidden, cos, sin))  # (B, heads, D)
            cache.append(i, slots, k, v)
            attended = sgl_kernels.decode_attention(
                q,
                cache.keys[i][: q.shape[0]],
                cache.values[i][: q.shape[0]],
                lens,
                visual_index=state.visual_index if with_mass else None,
                mass=state.mass if with_mass else None,
                softmax_scale=self.softmax_scale,
            )
            hidden = layer.finish(hidden, attended[:, :, None])
        return self.lm_head(self.norm(hidden))[:, 0]

    def step(self, state: DecodeState, cache: KVCache, with_mass: bool) -> None:
        """`decode`, then choose the next token and keep the books: a whole step with no word to the host."""
        state.choose(self.decode(state, cache, with_mass))

    def _prefill(
        self, rows: Rows, cache: KVCache | None, at: Tensor, layers: range, mass: MassRows | None
    ) -> Tensor:
        hidden = rows.hidden
        for i in layers:
            layer = self.layers[i]
            q, k, v = layer.project(hidden, rows.cos, rows.sin)  # (B, heads, S, D)
            if cache is not None:
                cache.fill(i, at, k, v)
            attended, lse = prefill_attention(q, k, v, self.softmax_scale, need_lse=mass is not None)
            if mass is not None:
                sgl_kernels.prefill_mass(
                    q,
                    k,
                    mass.text_rows,
                    mass.visual_index,
                    mass.mass[i],
                    softmax_lse=lse,
                    softmax_scale=self.softmax_scale,
                )
            hidden = layer.finish(hidden, attended)
            if i < len(rows.planes):
                hidden = hidden + rows.planes[i]
        return hidden

    def _make_tables(self, length: int) -> None:
        # Only padding lies beyond the context; it would make a "dynamic" rotary type turn all positions anew.
        positions = torch.arange(length, device=self._device).clamp_max(self._context - 1)
        self.cos, self.sin = self._rope(positions)
        self._tables.append((self.cos, self.sin))  # captured graphs go on reading the shorter ones


class GatedMLP(nn.Module):
    """The dense MLP of a layer; gate and up are one matrix product."""

    def __init__(self, gate_up: nn.Module, activation: Callable[[Tensor], Tensor], down: nn.Module) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.activation = activation
        self.down_proj = down

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden).chunk(2, -1)
        return self.down_proj(self.activation(gate) * up)


class DecoderLayer(nn.Module):
    """One pre-norm layer; q, k and v are one matrix product."""

    def __init__(self, layer: hf.Layer, head_dim: int, group: int) -> None:
        super().__init__()
        self.input_norm = layer.input_norm
        self.qkv = join(layer.qkv)
        self.q_norm = layer.q_norm
        self.k_norm = layer.k_norm
        self.o_proj = layer.o_proj
        self.post_norm = layer.post_norm
        if layer.experts is not None:
            self.mlp = layer.experts
        else:
            assert layer.activation is not None
            assert layer.down_proj is not None
            self.mlp = GatedMLP(join(layer.gate_up), layer.activation, layer.down_proj)
        self.head_dim = head_dim
        self.group = group

    def project(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated q (B, Hq, S, D), rotated k and v (B, Hkv, S, D) of hidden (B, S, C)."""
        joint = self.qkv(self.input_norm(hidden))
        # Not unflatten: torch.compile cannot look into it while a default device is set.
        heads = joint.reshape(*joint.shape[:2], -1, self.head_dim)  # (B, S, Hq + 2 Hkv, D)
        kv = heads.shape[2] // (self.group + 2)
        qk, v = heads.split((heads.shape[2] - kv, kv), 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((qk.shape[2] - kv, kv), 2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), 2)
        q, k = _rotate(qk, cos[:, :, None], sin[:, :, None]).split((qk.shape[2] - kv, kv), 2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Add the output projection of attended (B, Hq, S, D), then the MLP."""
        hidden = hidden + self.o_proj(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.post_norm(hidden))


class Separate(nn.Module):
    """Projections that cannot be one matrix: quantised ones, and those whose own hooks do something."""

    def __init__(self, projections: list[nn.Module]) -> None:
        super().__init__()
        self.projections = nn.ModuleList(projections)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([project(hidden) for project in self.projections], -1)


def join(projections: list[nn.Module]) -> nn.Module:
    """Return one Linear whose output is that of several, one after the other.

    Their weights become views of the joint one, so that nothing is held twice and the model stays whole.
    """
    if len(projections) == 1:
        return projections[0]
    if not all(_is_plain(projection) for projection in projections):
        return Separate(projections)
    linears = [p for p in projections if isinstance(p, nn.Linear)]
    rows = sum(linear.out_features for linear in linears)
    joint = nn.Linear(linears[0].in_features, rows, bias=linears[0].bias is not None, device="meta")
    for name in ("weight", "bias"):
        if getattr(joint, name) is not None:
            whole = _joined([getattr(linear, name) for linear in linears])
            setattr(joint, name, nn.Parameter(whole, requires_grad=False))
    return joint


def _is_plain(projection: nn.Module) -> bool:
    """Whether a projection is its weight and bias and nothing else: no hook, no replaced forward."""
    return (
        type(projection) is nn.Linear
        and type(projection.weight) is nn.Parameter
        and not projection._forward_hooks
        and not projection._forward_pre_hooks
        and "forward" not in vars(projection)
    )


def _joined(parts: list[nn.Parameter]) -> Tensor:
    """Return the parts one after the other; afterwards, if not before, they are views of it."""
    first, at = parts[0].detach(), 0
    adjacent = True
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        adjacent &= same and part.is_contiguous() and part.storage_offset() == first.storage_offset() + at
        at += part.numel()
    if adjacent:  # a VLM was made of this model before
        return first.as_strided((at // first[0].numel(), *first.shape[1:]), first.stride())
    whole = torch.cat([part.detach() for part in parts])
    for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = view
    return whole


def _ramp(first: Tensor, count: int) -> Tensor:
    """Return (B, count) int64: first[b], first[b] + 1, ..."""
    return first.long()[:, None] + torch.arange(count, device=first.device)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding, half-split: states (B, S, heads, D), cos and sin (B or 1, S, 1, D)."""
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat((-second, first), -1) * sin
