"""One VLM, run by a loop of our own around the modules of its transformers model.

A request goes through four calls: `prompt` (host side: finds visual positions and text rows), `encode`
(vision tower and embeddings), `prefill` (all prompt rows through all layers, pruned on entry to a layer if
asked) and `decode` (one token through all layers). `generate` strings them together. Steps branch on shapes
only and never read a value back, so that they can be compiled; the token is read once per step, outside of
it.

Mass buffers are (layers, 1, visual tokens) fp32. `mass_buffer` makes one that keeps layers apart or, with
stride 0 over the layers, one that adds all of them up; `prefill` and `decode` do not tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import sgl_kernels
from sgl_runtime import hf
from sgl_runtime.cache import KVCache, KVMemory
from sgl_runtime.clock import Clock
from sgl_runtime.errors import NumericalError, PromptError


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
    def length(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_visual(self) -> int:
        return self.visual_index.shape[1]


@dataclass(frozen=True, eq=False)
class Request:
    """An encoded prompt, reusable across runs: `hidden` (1, S, C), text embeddings and image features."""

    prompt: Prompt
    hidden: Tensor


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
    """A greedy answer: ids (end of sequence included), their log-probabilities, `kept_index` of `prefill`."""

    token_ids: list[int]
    logprobs: list[float]
    kept_index: Tensor | None

    @property
    def confidence(self) -> float:
        """Geometric mean of the tokens' probabilities, after logits processors."""
        return math.exp(sum(self.logprobs) / len(self.logprobs))


class VLM:
    """A vision-language model and its KV memory. `name` ("small", "large") prefixes stages and errors.

    Not thread-safe: the KV memory belongs to one request at a time.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name = name
        self.model = view = hf.view(model)
        hf.logits_processors(
            view.generation_config, 1, view.eos_ids
        )  # a wrong setting shows now, not mid-run
        self.memory = KVMemory(len(view.layers), view.num_kv_heads, view.head_dim, view.dtype, view.device)
        self._rope = (torch.empty(0), torch.empty(0))

    @property
    def num_layers(self) -> int:
        return len(self.model.layers)

    def prompt(self, inputs: Mapping[str, Any]) -> Prompt:
        """Check a processor's output for one request and locate its visual tokens; runs no part of the model.

        Parameters
        ----------
        inputs
            ``input_ids`` (1, S) or (S,) integers and ``pixel_values`` (tiles, 3, height, width) floats;
            ``attention_mask``, if there, must be all ones.

        Raises
        ------
        PromptError
            Wrong shapes or ids, no image, visual tokens that do not match the tiles, or a prompt that ends in
            one.
        """
        ids, pixels = self._checked_inputs(inputs)
        visual = ids == self.model.image_token_id  # (S,)
        positions = visual.nonzero()[:, 0]
        per_tile = self.model.tokens_per_tile
        if len(positions) != pixels.shape[0] * per_tile:
            raise PromptError(
                f"The {self.name} VLM's prompt has {len(positions)} visual tokens (id "
                f"{self.model.image_token_id}), but {pixels.shape[0]} tiles of {per_tile} tokens need "
                f"{pixels.shape[0] * per_tile}."
            )
        if visual[-1]:
            raise PromptError(f"The {self.name} VLM's prompt ends in a visual token; it must end in text.")
        text = (~visual).nonzero()[:, 0]
        jumps = (positions.diff() != 1).nonzero()[:, 0] + 1
        bounds = [0, *jumps.tolist(), len(positions)]
        device = self.model.device
        return Prompt(
            input_ids=ids[None].to(device),
            pixel_values=pixels.to(device, self.model.dtype),
            visual_index=positions[None].int().to(device),
            text_rows=text[text > positions[0]][None].int().to(device),
            spans=tuple(b - a for a, b in pairwise(bounds)),
        )

    def check_room(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Raise PromptError unless the prompt and the answer fit into the model's context."""
        if prompt.length + max_new_tokens > self.model.context:
            raise PromptError(
                f"The prompt has {prompt.length} tokens ({prompt.num_visual} of them visual) and "
                f"max_new_tokens is {max_new_tokens}, but the {self.name} VLM's context holds "
                f"{self.model.context}. Shorten the prompt, use fewer or smaller images, or lower "
                "max_new_tokens."
            )

    @torch.no_grad()
    def encode(self, prompt: Prompt, clock: Clock | None = None) -> Request:
        """Run the vision tower and put its features among the text embeddings."""
        with self._clock(clock).stage(f"{self.name}_vision"):
            features = self.model.image_features(prompt.pixel_values).flatten(0, 1)  # (N, C)
            hidden = self.model.embed(prompt.input_ids)  # (1, S, C)
            hidden = hidden.index_copy(1, prompt.visual_index[0].long(), features[None].to(hidden.dtype))
            if not torch.isfinite(features).all():
                raise self._not_finite("vision", "image features")
        return Request(prompt, hidden)

    def mass_buffer(self, request: Request, *, per_layer: bool = False) -> Tensor:
        """Return zeros (layers, 1, N) fp32 to accumulate mass in.

        Unless ``per_layer``, all layers share memory: ``buffer[0]`` (1, N) is then the sum over layers.
        """
        layers = self.num_layers if per_layer else 1
        mass = torch.zeros(
            layers, 1, request.prompt.num_visual, dtype=torch.float32, device=self.model.device
        )
        return mass.expand(self.num_layers, -1, -1)

    @torch.no_grad()
    def prefill(
        self,
        request: Request,
        cache: KVCache | None = None,
        *,
        mass: Tensor | None = None,
        query_index: Tensor | None = None,
        prune: Prune | None = None,
        num_logits: int = 1,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the prompt through all layers.

        Parameters
        ----------
        request
            From `encode`.
        cache
            Gets keys and values, if given.
        mass : (layers, 1, N) fp32, optional
            Gets each layer's attention mass added. Not together with ``prune``.
        query_index : (1, R) int32, optional
            The rows that count for ``mass``; default: the prompt's text rows.
        prune
            What to keep, on entry to which layer.
        num_logits
            How many of the last rows to return logits of.

        Returns
        -------
        logits : (1, num_logits, vocabulary)
        kept_index : (1, S_kept) int32 or None
            Original positions of the tokens kept, ascending.
        """
        if mass is not None and prune is not None:
            raise ValueError("Mass of a pruned run is not defined: give mass or prune, not both.")
        prompt, hidden, kept_index = request.prompt, request.hidden, None
        length = hidden.shape[1]
        rows = prompt.text_rows if query_index is None else query_index
        cos, sin = (table[None, :length] for table in self._rope_table(length))  # (1, S, D)
        for i, layer in enumerate(self.model.layers):
            if prune is not None and i == prune.layer:
                hidden, kept_index, (cos, sin) = self._prune(request, prune, hidden, (cos, sin))
            q, k, v = self._project(layer, hidden, cos, sin)  # (1, heads, S, D)
            if cache is not None:
                cache.fill(i, k, v)
            if mass is not None:
                sgl_kernels.prefill_mass(
                    q, k, rows, prompt.visual_index, mass[i], softmax_scale=self.model.softmax_scale
                )
            attended = scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True, scale=self.model.softmax_scale
            )
            hidden = self._finish(layer, hidden, attended.transpose(1, 2).flatten(2))
        return self._logits(hidden[:, -num_logits:]), kept_index

    @torch.no_grad()
    def decode(
        self, token: Tensor, cache: KVCache, *, mass: Tensor | None = None, visual_index: Tensor | None = None
    ) -> Tensor:
        """Feed one token (1,) and return the logits (1, vocabulary) of the next; adds its row to ``mass``."""
        hidden = self.model.embed(token)[:, None]  # (1, 1, C)
        cos, sin = (table[cache.position][:, None] for table in self._rope)  # (1, 1, D)
        for i, layer in enumerate(self.model.layers):
            q, k, v = (states[:, :, 0] for states in self._project(layer, hidden, cos, sin))  # (1, heads, D)
            seq_lens = cache.append(i, k, v)
            attended = sgl_kernels.decode_attention(
                q,
                cache.keys[i],
                cache.values[i],
                seq_lens,
                visual_index=visual_index,
                mass=None if mass is None else mass[i],
                softmax_scale=self.model.softmax_scale,
            )
            hidden = self._finish(layer, hidden, attended.flatten(1)[:, None])
        cache.advance()
        return self._logits(hidden)[:, 0]

    @torch.no_grad()
    def generate(
        self,
        request: Request,
        max_new_tokens: int,
        *,
        mass: Tensor | None = None,
        prune: Prune | None = None,
        clock: Clock | None = None,
    ) -> Answer:
        """Answer greedily, until an end-of-sequence token or ``max_new_tokens``.

        ``mass`` (layers, 1, N) gets the rows of the prompt's text and of every token fed; ``prune`` prunes
        the prompt. Not both.

        Raises
        ------
        PromptError
            Prompt and answer do not fit into the model's context.
        NumericalError
            Logits are NaN or infinite; the message names the stage.
        """
        prompt, clock = request.prompt, self._clock(clock)
        self.check_room(prompt, max_new_tokens)
        fed = max_new_tokens - 1
        if prune is None:
            cache = self.memory.cache(prompt.length, fed)
        else:
            num_dropped = prompt.num_visual - prune.num_keep
            cache = self.memory.cache(prompt.length, fed, prune_layer=prune.layer, num_dropped=num_dropped)
        self._rope_table(prompt.length + fed)
        choose = self._chooser(prompt)
        visual_index = None if mass is None else prompt.visual_index
        with clock.stage(f"{self.name}_prefill"):
            logits, kept_index = self.prefill(request, cache, mass=mass, prune=prune)
            token, token_id, logprob = choose(None, logits[:, 0], "prefill")
        ids, logprobs = [token_id], [logprob]
        with clock.stage(f"{self.name}_decode"):
            while len(ids) < max_new_tokens and ids[-1] not in self.model.eos_ids:
                logits = self.decode(token, cache, mass=mass, visual_index=visual_index)
                token, token_id, logprob = choose(token, logits, "decode")
                ids.append(token_id)
                logprobs.append(logprob)
        return Answer(ids, logprobs, kept_index)

    def extended(self, request: Request, token_ids: list[int]) -> Request:
        """Return the request with ``token_ids`` appended as text, whatever their ids are."""
        tokens = torch.tensor([token_ids], dtype=torch.int64, device=self.model.device)
        return replace(request, hidden=torch.cat((request.hidden, self.model.embed(tokens)), 1))

    def _checked_inputs(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        ids, pixels, mask = (inputs.get(key) for key in ("input_ids", "pixel_values", "attention_mask"))
        who = f"The {self.name} VLM's"
        if (
            not isinstance(ids, Tensor)
            or ids.is_floating_point()
            or ids.squeeze(0).dim() != 1
            or not ids.numel()
        ):
            raise PromptError(f"{who} input_ids must be an integer tensor (1, S), got {_describe(ids)}.")
        if not isinstance(pixels, Tensor) or pixels.dim() != 4 or not pixels.shape[0]:
            raise PromptError(
                f"{who} pixel_values must be a tensor (tiles, 3, height, width), got {_describe(pixels)}. "
                "A request needs at least one image."
            )
        if tuple(pixels.shape[1:]) != (3, *self.model.tile_size):
            want = (3, *self.model.tile_size)
            raise PromptError(f"{who} tiles must be {want}, got {tuple(pixels.shape[1:])}.")
        ids = ids.reshape(-1).long().cpu()
        if ids.min() < 0 or ids.max() >= self.model.vocab_size:
            raise PromptError(
                f"{who} input_ids must be in 0 to {self.model.vocab_size - 1}, got {int(ids.min())} to "
                f"{int(ids.max())}. Does the tokenizer belong to the model?"
            )
        if isinstance(mask, Tensor) and not bool((mask == 1).all()):
            raise PromptError(f"{who} attention_mask must be all ones: give one request, without padding.")
        return ids, pixels

    def _rope_table(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin (at least ``length``, D) of the positions 0, 1, ...; grown by doubling."""
        if self._rope[0].shape[0] < length:
            size = min(max(length, 2 * self._rope[0].shape[0], 256), max(length, self.model.context))
            positions = torch.arange(size, device=self.model.device)[None]
            probe = torch.empty(0, dtype=self.model.dtype, device=self.model.device)
            cos, sin = self.model.rotary(probe, positions)
            self._rope = (cos[0], sin[0])
        return self._rope

    def _prune(
        self, request: Request, prune: Prune, hidden: Tensor, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        prompt, length = request.prompt, hidden.shape[1]
        seq_lens = torch.full((1,), length, dtype=torch.int32, device=hidden.device)
        hidden, kept_index, _, (cos, sin) = sgl_kernels.prune_gather(
            hidden,
            prune.ranking,
            prompt.visual_index,
            seq_lens,
            prune.num_keep,
            extras=rope,
            out_len=length - prompt.num_visual + prune.num_keep,
        )
        return hidden, kept_index, (cos, sin)

    def _project(
        self, layer: hf.Layer, hidden: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated q (1, Hq, S, D), rotated k and v (1, Hkv, S, D) of a layer."""
        normed = layer.input_norm(hidden)
        q, k, v = (
            project(normed).unflatten(-1, (-1, self.model.head_dim))  # (1, S, heads, D)
            for project in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = layer.q_norm(q), layer.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def _finish(self, layer: hf.Layer, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + layer.o_proj(attended)
        return hidden + layer.mlp(layer.post_norm(hidden))

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.model.norm(hidden))

    def _chooser(self, prompt: Prompt) -> Any:
        """Return a function from the fed token and the logits to the next token, its id and logprob."""
        processors = hf.logits_processors(self.model.generation_config, prompt.length, self.model.eos_ids)
        ids = prompt.input_ids

        def choose(fed: Tensor | None, logits: Tensor, stage: str) -> tuple[Tensor, int, float]:
            nonlocal ids
            if processors is not None:
                ids = ids if fed is None else torch.cat((ids, fed[:, None]), 1)
                logits = processors(ids, logits.float())
            token, logprob = sgl_kernels.greedy_token(logits)
            token_id, value = int(token), float(logprob)
            if not math.isfinite(value):
                raise self._not_finite(stage, "logits")
            return token.long(), token_id, value

        return choose

    def _clock(self, clock: Clock | None) -> Clock:
        return Clock(self.model.device) if clock is None else clock

    def _not_finite(self, stage: str, what: str) -> NumericalError:
        return NumericalError(
            f"Stage {self.name}_{stage} made {what} that are NaN or infinite (compute dtype "
            f"{self.model.dtype}). Check the weights and the image, or load the model in float32 or bfloat16."
        )


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding, half-split layout: states (1, heads, S, D), cos and sin (1, S, D)."""
    first, second = states.chunk(2, -1)
    return states * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def _describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
