"""What the runtime must say, from transformers alone and slowly: masses, answers, pruned answers.

Embeddings, positions and DeepStack planes are those that transformers' own forward hands its text model, so
one oracle serves every family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .models import EOS, Case, Inputs


@dataclass(frozen=True, eq=False)
class Embedded:
    """A prompt as the text model sees it.

    Attributes
    ----------
    hidden : (1, S, C)
    positions : (1, S) or, with M-RoPE, (3, 1, S) int64
    planes : (1, S, C) each, zero at text tokens; plane i is added behind layer i
    visual : (N,) int64, positions of the visual tokens
    """

    hidden: Tensor
    positions: Tensor
    planes: list[Tensor]
    visual: Tensor

    @property
    def length(self) -> int:
        return self.hidden.shape[1]


def decoder_of(case: Case, model: Any) -> Any:
    """Return the text model."""
    return getattr(model.model, case.decoder)


@torch.no_grad()
def embed(case: Case, model: Any, inputs: Inputs) -> Embedded:
    """Run transformers' forward and keep what its text model is given."""
    seen: dict[str, Any] = {}
    handle = decoder_of(case, model).register_forward_pre_hook(
        lambda _module, _args, options: seen.update(options), with_kwargs=True
    )
    try:
        model(**inputs, use_cache=False)
    finally:
        handle.remove()
    hidden, positions = seen["inputs_embeds"], seen.get("position_ids")
    if positions is None:
        positions = torch.arange(hidden.shape[1])[None]
    marks = [model.config.image_token_id, getattr(model.config, "video_token_id", None) or -1]
    visual = torch.isin(inputs["input_ids"][0], torch.tensor(marks)).nonzero()[:, 0]
    planes = []
    for features in seen.get("deepstack_visual_embeds") or []:
        planes.append(torch.zeros_like(hidden).index_copy(1, visual, features[None]))
    assert len(planes) == case.planes
    return Embedded(hidden, positions, planes, visual)


@torch.no_grad()
def extend(model: Any, prompt: Embedded, answer: list[int]) -> Embedded:
    """Append answer tokens: text, whatever their ids, behind the prompt's largest position."""
    count = len(answer)
    tokens = model.get_input_embeddings()(torch.tensor([answer], dtype=torch.long))
    after = prompt.positions.max() + 1 + torch.arange(count)
    after = after.expand(*prompt.positions.shape[:-1], count)
    planes = [torch.nn.functional.pad(plane, (0, 0, 0, count)) for plane in prompt.planes]
    hidden = torch.cat((prompt.hidden, tokens), 1)
    return Embedded(hidden, torch.cat((prompt.positions, after), -1), planes, prompt.visual)


def greedy(model: Any, inputs: Inputs, max_new_tokens: int) -> list[int]:
    """The answer of transformers' own generate, end of sequence included."""
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def attention_matrices(case: Case, model: Any, prompt: Embedded, answer: list[int]) -> Tensor:
    """Eager attention (layers, heads, S, S) over the prompt and all answer tokens but the last.

    The prompt's embeddings may be those of an fp32 model and ``model`` its copy in fp64.
    """
    whole = extend(model, prompt, answer[:-1])
    options: dict[str, Any] = {}
    if whole.planes:
        is_visual = torch.zeros(1, whole.length, dtype=torch.bool)
        is_visual[0, whole.visual] = True
        options["visual_pos_masks"] = is_visual
        options["deepstack_visual_embeds"] = [
            plane[0, whole.visual].to(model.dtype) for plane in whole.planes
        ]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        out = decoder_of(case, model)(
            inputs_embeds=whole.hidden.to(model.dtype),
            attention_mask=torch.ones(1, whole.length, dtype=torch.long),
            position_ids=whole.positions,
            output_attentions=True,
            use_cache=False,
            **options,
        )
    finally:
        model.set_attn_implementation(before)
    return torch.cat(out.attentions)


def text_rows(prompt: Embedded, length: int) -> Tensor:
    """The rows that count (R,): all but the visual tokens'; those before the first see none of them."""
    is_text = torch.ones(length, dtype=torch.bool)
    is_text[prompt.visual] = False
    return is_text.nonzero()[:, 0]


def masses(attention: Tensor, visual: Tensor, rows: Tensor) -> Tensor:
    """Mass per layer (layers, N) fp64, from attention matrices, for the given rows."""
    return attention.double()[:, :, rows][..., visual].sum((1, 2))


def kept_positions(prompt: Embedded, ranking: list[float], num_keep: int) -> list[int]:
    """Text positions and those of the `num_keep` best visual tokens; ties go to the lower position."""
    visual = prompt.visual.tolist()
    best = sorted(range(len(visual)), key=lambda j: (-ranking[j], visual[j]))[:num_keep]
    return sorted(set(range(prompt.length)) - set(visual) | {visual[j] for j in best})


@torch.no_grad()
def pruned_logits(
    case: Case, model: Any, prompt: Embedded, answer: list[int], layer: int, kept: list[int]
) -> Tensor:
    """Logits (rows, vocabulary) of the surviving rows: a loop over transformers' layers, without a cache."""
    decoder = decoder_of(case, model)
    whole = extend(model, prompt, answer)
    hidden, positions, planes = whole.hidden, whole.positions, whole.planes
    for i, block in enumerate(decoder.layers):
        if i == layer:
            survivors = torch.tensor([*kept, *range(prompt.length, whole.length)])
            hidden, positions = hidden[:, survivors], positions[..., survivors]
            planes = [plane[:, survivors] for plane in planes]
        rows = hidden.shape[1]
        mask = torch.full((rows, rows), torch.finfo(hidden.dtype).min).triu(1)[None, None]
        rotary = decoder.rotary_emb(hidden, positions)
        hidden = block(hidden, attention_mask=mask, position_embeddings=rotary)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if i < len(planes):
            hidden = hidden + planes[i]
    return model.lm_head(decoder.norm(hidden))[0]


def pruned_greedy(
    case: Case, model: Any, prompt: Embedded, layer: int, kept: list[int], max_new_tokens: int
) -> tuple[list[int], list[float]]:
    """Greedy answer and log-probabilities of a model pruned on entry to ``layer``."""
    answer: list[int] = []
    logprobs: list[float] = []
    while len(answer) < max_new_tokens and EOS not in answer:
        scores = pruned_logits(case, model, prompt, answer, layer, kept)[-1].float().log_softmax(-1)
        answer.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
    return answer, logprobs
