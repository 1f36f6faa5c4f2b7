"""SGL the way its research code runs it, on plain transformers: the baseline of `sgl-vlm bench --pipeline`.

One request at a time. The small VLM runs with eager attention and ``output_attentions``, by which
transformers hands out the attention matrices of all layers; masses are summed from them. The consistency
pass puts the surviving tokens' embeddings together and runs them. The large VLM is a loop over transformers'
layers around a ``DynamicCache``, with hidden states sliced on entry to the prune layer. Nothing is slower
than it has to be: no attention matrix where none is needed (vision towers and the large VLM use SDPA), logits
of the last row only, image features computed once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sgl_runtime.clock import Clock
from sgl_runtime.config import SGLConfig, num_kept


@dataclass(frozen=True, eq=False)
class ResearchResult:
    """What `SGLResult` says under the same names, as far as the research code knows it."""

    token_ids: list[int]
    small_token_ids: list[int]
    confidence: float
    consistency: float
    mass: Tensor
    kept_visual: Tensor
    timings: dict[str, float]


class ResearchPipeline:
    """The small VLM, always followed by the pruned large one.

    Parameters
    ----------
    small_model, large_model
        transformers' ``InternVLForConditionalGeneration``, on one device. Their text models' attention
        implementations are set, and left so.
    config
        Only keep_ratio, prune_layer, consistency_keep_ratio and max_new_tokens matter: there is no exit.
    """

    def __init__(self, small_model: Any, large_model: Any, config: SGLConfig) -> None:
        self.small = small_model.eval()
        self.large = large_model.eval()
        self.config = config
        self.small.model.language_model.set_attn_implementation("eager")
        self.large.model.language_model.set_attn_implementation("sdpa")

    @torch.no_grad()
    def generate(self, small_inputs: Mapping[str, Any], large_inputs: Mapping[str, Any]) -> ResearchResult:
        """Answer one request; inputs as in `SGLPipeline.generate`."""
        clock = Clock(self.large.device)
        with clock.stage("small_vision"):
            hidden, visual = _embed(self.small, small_inputs)
        ids, logprobs, mass = self._answer_with_mass(hidden, visual, clock)
        with clock.stage("consistency"):
            consistency = self._consistency(hidden, visual, mass, ids)
        with clock.stage("large_vision"):
            hidden, visual = _embed(self.large, large_inputs)
        kept = mass.topk(num_kept(len(visual), self.config.keep_ratio)).indices.sort().values
        answer = self._pruned_answer(hidden, visual, kept, clock)
        return ResearchResult(
            token_ids=answer,
            small_token_ids=ids,
            confidence=math.exp(sum(logprobs) / len(logprobs)),
            consistency=consistency,
            mass=mass.cpu(),
            kept_visual=kept.cpu(),
            timings=clock.seconds,
        )

    def _answer_with_mass(
        self, hidden: Tensor, visual: Tensor, clock: Clock
    ) -> tuple[list[int], list[float], Tensor]:
        """Return the small VLM's answer, its log-probabilities and the mass (N,) of the visual tokens."""
        from transformers import DynamicCache

        model, cache = self.small, DynamicCache()
        mass = torch.zeros(len(visual), device=hidden.device)
        text, first = (
            _without(hidden.shape[1], visual),
            torch.zeros(1, dtype=torch.int64, device=hidden.device),
        )
        run = partial(
            model.model.language_model, past_key_values=cache, use_cache=True, output_attentions=True
        )
        with clock.stage("small_prefill"):
            out = run(inputs_embeds=hidden)
            _add_attention(mass, out.attentions, text, visual)
            token, logprob = _greedy(model.lm_head(out.last_hidden_state[:, -1]))
        ids, logprobs = [token], [logprob]
        with clock.stage("small_decode"):
            while len(ids) < self.config.max_new_tokens and token not in _eos_ids(model):
                out = run(input_ids=torch.tensor([[token]], device=hidden.device))
                _add_attention(mass, out.attentions, first, visual)
                token, logprob = _greedy(model.lm_head(out.last_hidden_state[:, -1]))
                ids.append(token)
                logprobs.append(logprob)
        return ids, logprobs, mass

    def _consistency(self, hidden: Tensor, visual: Tensor, mass: Tensor, ids: list[int]) -> float:
        """Return the probability of the answer given the few best visual tokens, all of it in one pass."""
        model, length = self.small, hidden.shape[1]
        kept = mass.topk(num_kept(len(visual), self.config.consistency_keep_ratio)).indices
        survivors = _survivors(length, visual, kept)
        answer = torch.tensor(ids, device=hidden.device)
        rows = torch.cat((hidden[:, survivors], model.get_input_embeddings()(answer[None, :-1])), 1)
        positions = torch.cat((survivors, length + torch.arange(len(ids) - 1, device=hidden.device)))
        out = model.model.language_model(
            inputs_embeds=rows,
            position_ids=positions[None],
            attention_mask=torch.ones_like(positions)[None],  # without, gaps would separate packed sequences
            use_cache=False,
        )
        scores = model.lm_head(out.last_hidden_state[0, -len(ids) :]).float().log_softmax(-1)
        return math.exp(float(scores.gather(1, answer[:, None]).sum()))

    def _pruned_answer(self, hidden: Tensor, visual: Tensor, kept: Tensor, clock: Clock) -> list[int]:
        from transformers import DynamicCache

        model, cache, length = self.large, DynamicCache(), hidden.shape[1]
        layer = self.config.layer_of(len(model.model.language_model.layers))
        positions = torch.arange(length, device=hidden.device)[None]
        with clock.stage("large_prefill_full"):
            hidden = _layers(model, hidden, positions, cache, stop=layer)
        with clock.stage("large_prefill_pruned"):
            survivors = _survivors(length, visual, kept)
            hidden = _layers(model, hidden[:, survivors], positions[:, survivors], cache, start=layer)
            token, _ = _greedy(_logits(model, hidden))
        ids = [token]
        with clock.stage("large_decode"):
            while len(ids) < self.config.max_new_tokens and token not in _eos_ids(model):
                step = model.get_input_embeddings()(torch.tensor([[token]], device=hidden.device))
                position = torch.full((1, 1), length + len(ids) - 1, device=hidden.device)
                token, _ = _greedy(_logits(model, _layers(model, step, position, cache)))
                ids.append(token)
        return ids


def _add_attention(mass: Tensor, attentions: tuple[Tensor, ...], text: Tensor, visual: Tensor) -> None:
    """Add to ``mass`` what visual tokens get from text rows in each layer's (1, heads, rows, keys)."""
    for attention in attentions:
        mass += attention[0][:, text][..., visual].sum((0, 1), dtype=torch.float32)


def _embed(model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return embeddings with image features in place (1, S, C), and the visual positions (N,)."""
    ids = inputs["input_ids"].to(model.device)
    visual = (ids[0] == model.config.image_token_id).nonzero()[:, 0]
    hidden = model.get_input_embeddings()(ids)
    pixels = inputs["pixel_values"].to(hidden.device, hidden.dtype)
    features = model.get_image_features(
        pixel_values=pixels,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        return_dict=True,
    ).pooler_output
    hidden[0, visual] = features.flatten(0, 1).to(hidden.dtype)
    return hidden, visual


def _layers(
    model: Any, hidden: Tensor, positions: Tensor, cache: Any, start: int = 0, stop: int | None = None
) -> Tensor:
    """Run rows through decoder layers; without a mask, SDPA is causal for many rows and sees all for one."""
    decoder = model.model.language_model
    rope = decoder.rotary_emb(hidden, positions)
    for layer in decoder.layers[start:stop]:
        hidden = layer(
            hidden,
            attention_mask=None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=rope,
        )
    return hidden


def _logits(model: Any, hidden: Tensor) -> Tensor:
    return model.lm_head(model.model.language_model.norm(hidden[:, -1]))


def _greedy(logits: Tensor) -> tuple[int, float]:
    """Return the most likely token of logits (1, vocabulary) and its log-probability."""
    best, token = logits[0].float().log_softmax(-1).max(-1)
    return int(token), float(best)


def _survivors(length: int, visual: Tensor, kept: Tensor) -> Tensor:
    """Return the positions of text and of the kept visual tokens, ascending."""
    return torch.cat((_without(length, visual), visual[kept])).sort().values


def _without(length: int, visual: Tensor) -> Tensor:
    stays = torch.ones(length, dtype=torch.bool, device=visual.device)
    stays[visual] = False
    return stays.nonzero()[:, 0]


def _eos_ids(model: Any) -> list[int]:
    ids = model.generation_config.eos_token_id
    return ids if isinstance(ids, list) else [ids]
