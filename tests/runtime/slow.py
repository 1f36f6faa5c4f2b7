"""The semantics once more, slowly, on transformers' own forward passes: what the engine is tested against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

TEXT = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
VOCAB, EOS, IMAGE_ID, PER_TILE = 150, 2, 7, 16
Inputs = dict[str, Tensor]


def make_model(
    text: str = "qwen2",
    *,
    seed: int = 0,
    layers: int = 4,
    heads: int = 4,
    image_id: int = IMAGE_ID,
    vocab: int = VOCAB,
    context: int = 256,
    **changes: Any,
) -> InternVLForConditionalGeneration:
    """A random model: two query heads per KV head, 56 x 56 tiles of 16 tokens, attention far from uniform."""
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, **changes}
    text_config = TEXT[text](
        vocab_size=vocab,
        hidden_size=16 * heads,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=16,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
        tie_word_embeddings=False,
        **changes,
    )
    vision = InternVLVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=56,
        patch_size=7,
        layer_scale_init_value=1.0,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=text_config,
        image_token_id=image_id,
        image_seq_length=PER_TILE,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config).eval()
    for name, weight in model.named_parameters():
        if weight.dim() >= 2:
            torch.nn.init.normal_(
                weight, std=(2.0 if "q_proj" in name or "k_proj" in name else 1.0) * weight[0].numel() ** -0.5
            )
        elif "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        elif "bias" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.generation_config.eos_token_id = EOS
    return model


def make_inputs(layout: str = "tttIttttt", *, seed: int = 0, image_id: int = IMAGE_ID) -> Inputs:
    """One request: each `t` is a random text token, each `I` the span of one tile."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for mark in layout:
        ids += (
            [image_id] * PER_TILE
            if mark == "I"
            else torch.randint(10, VOCAB, (1,), generator=generator).tolist()
        )
    pixels = torch.randn(layout.count("I"), 3, 56, 56, generator=generator)
    return {"input_ids": torch.tensor([ids]), "pixel_values": pixels}


def greedy(model: Any, inputs: Inputs, max_new_tokens: int, **settings: Any) -> list[int]:
    """The answer of transformers' own generate, end of sequence included."""
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **settings)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def attention_matrices(model: Any, inputs: Inputs, answer: list[int]) -> Tensor:
    """Eager attention (layers, heads, S, S) over the prompt and all answer tokens but the last."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    hidden = embed(model, inputs, answer[:-1])
    length = hidden.shape[1]
    out = model.model.language_model(
        inputs_embeds=hidden,
        attention_mask=torch.ones(1, length, dtype=torch.long),
        position_ids=torch.arange(length)[None],
        output_attentions=True,
    )
    model.set_attn_implementation(before)
    return torch.cat(out.attentions)


def masses(attention: Tensor, visual: Tensor, rows: Tensor) -> Tensor:
    """Mass per layer (layers, N) from attention matrices, for the given rows."""
    return attention[:, :, rows][..., visual].sum((1, 2))


@torch.no_grad()
def embed(model: Any, inputs: Inputs, answer: list[int]) -> Tensor:
    """Embeddings of the prompt, with image features at the prompt's image tokens only, and of the answer."""
    hidden = model.get_input_embeddings()(inputs["input_ids"])
    features = model.get_image_features(inputs["pixel_values"], vision_feature_layer=-1).pooler_output
    mask = (inputs["input_ids"] == model.config.image_token_id)[..., None]
    hidden = hidden.masked_scatter(mask, features.to(hidden.dtype))
    return torch.cat((hidden, model.get_input_embeddings()(torch.tensor([answer], dtype=torch.long))), 1)


def kept_positions(visual: list[int], length: int, ranking: list[float], num_keep: int) -> list[int]:
    """Text positions and the `num_keep` best visual ones; ties go to the lower position."""
    best = sorted(range(len(visual)), key=lambda j: (-ranking[j], visual[j]))[:num_keep]
    return sorted(set(range(length)) - set(visual) | {visual[j] for j in best})


@torch.no_grad()
def pruned_logits(model: Any, inputs: Inputs, answer: list[int], layer: int, kept: list[int]) -> Tensor:
    """Logits (rows, vocabulary) of the surviving rows: a plain loop over transformers' layers, no cache."""
    decoder = model.model.language_model
    hidden = embed(model, inputs, answer)
    prompt_length, length = inputs["input_ids"].shape[1], hidden.shape[1]
    positions = torch.arange(length)[None]
    for i, block in enumerate(decoder.layers):
        if i == layer:
            survivors = torch.tensor([*kept, *range(prompt_length, length)])
            hidden, positions = hidden[:, survivors], positions[:, survivors]
        rows = hidden.shape[1]
        mask = torch.full((rows, rows), torch.finfo(hidden.dtype).min).triu(1)[None, None]
        hidden = block(
            hidden,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=decoder.rotary_emb(hidden, positions),
        )
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return model.lm_head(decoder.norm(hidden))[0]


def pruned_greedy(
    model: Any, inputs: Inputs, layer: int, kept: list[int], max_new_tokens: int
) -> tuple[list[int], list[float]]:
    """Greedy answer and log-probabilities of a model pruned on entry to `layer`; no cache."""
    answer: list[int] = []
    logprobs: list[float] = []
    while len(answer) < max_new_tokens and EOS not in answer:
        scores = pruned_logits(model, inputs, answer, layer, kept)[-1].float().log_softmax(-1)
        answer.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
    return answer, logprobs
