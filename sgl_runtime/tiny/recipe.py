"""What the tiny pair is made of: tokenizer, image processing, the two architectures. No training here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from sgl_runtime.families.internvl import image_processor

from .scenes import COLORS, DIGITS, LETTERS, SHAPES, SIZE

PATCH = 16
VISUAL_TOKENS = (SIZE // PATCH) ** 2
MEAN, STD = 0.5, 0.25  # of every channel
SPECIAL = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
PAD, UNK, START, END, IMAGE_START, IMAGE_END, IMAGE = range(len(SPECIAL))
WORDS = ("user", "assistant", "read", "the", "and", "describe", "shape", "shapes", "with", "how", "many")

# Every content part is {"type": "image"} or {"type": "text", "text": ...}; a plain string is text.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}"
    "{% if m['content'] is string %} {{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<IMG_CONTEXT>{% elif c['type'] == 'text' %} {{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """The numbers that differ between the two VLMs. Heads are even and keys are shared by pairs of them."""

    vision_width: int
    vision_layers: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int  # padded, so that the two sizes differ as they do in real pairs


SIZES = {
    "small": Size(64, 3, 128, 6, 4, 2, 96),
    "large": Size(144, 5, 128, 10, 4, 2, 128),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words are tokens; a label such as "K7" is two. A leading "▁" carries the space before a token."""
    words = [*WORDS, *COLORS, *SHAPES, *LETTERS, *(str(n) for n in range(1, 10))]
    vocab = [*SPECIAL, *("▁" + word for word in words), *DIGITS]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocab)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"[?.!,]"), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
            pre_tokenizers.Split(Regex("▁?(?:[a-z]+|[A-Z]|[0-9])"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
        },
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_model(size: Size) -> InternVLForConditionalGeneration:
    """A randomly initialised VLM: fan-in and mimetic initialisation, sin-cos positions. Seed torch first."""
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=size.vision_width,
            num_hidden_layers=size.vision_layers,
            num_attention_heads=4,
            intermediate_size=4 * size.vision_width,
            image_size=[SIZE, SIZE],
            patch_size=[PATCH, PATCH],
            layer_scale_init_value=1.0,
            use_absolute_position_embeddings=True,
            use_mean_pooling=False,
        ).to_dict(),
        text_config=Qwen2Config(
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            intermediate_size=3 * size.width,
            vocab_size=size.vocab,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PAD,
            tie_word_embeddings=False,
        ).to_dict(),
        image_token_id=IMAGE,
        image_seq_length=VISUAL_TOKENS,
        downsample_ratio=1.0,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, torch.nn.Embedding):
            # As large as image features: words a hundred times smaller drown in the first layer's output.
            torch.nn.init.normal_(module.weight, std=1.0)
    _start_by_content(model, size)
    embeddings = model.model.vision_tower.embeddings.position_embeddings
    with torch.no_grad():
        embeddings[0, 1:] = _sincos_grid(SIZE // PATCH, size.vision_width)
    return model


@torch.no_grad()
def _start_by_content(model: InternVLForConditionalGeneration, size: Size) -> None:
    """Let attention start by looking for its like and copying it: mimetic initialisation, arXiv 2305.09828.

    Keys are the projection of the first query head of their group, outputs the transpose of values, and
    logits the likeness to each word. Plain fan-in initialisation leaves the models on a long plateau before
    they look anything up.
    """
    group = size.heads // size.kv_heads
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        q = attention.q_proj.weight.unflatten(
            0, (size.kv_heads, group, -1)
        )  # (kv_heads, group, head_dim, width)
        attention.k_proj.weight.copy_(q[:, 0].flatten(0, 1))
        v = attention.v_proj.weight.unflatten(0, (size.kv_heads, 1, -1)).expand(-1, group, -1, -1)
        attention.o_proj.weight.copy_(v.flatten(0, 2).T)
    model.lm_head.weight.copy_(model.model.language_model.embed_tokens.weight * 2 * size.width**-0.5)


def _sincos_grid(side: int, width: int) -> torch.Tensor:
    """Two-dimensional sine-cosine position embeddings, (side * side, width)."""
    frequency = 1.0 / 100 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequency  # (side, width / 4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=2).reshape(side * side, width)


def save_processing(path: Path) -> None:
    """Tokenizer, chat template and image settings, as they stand beside any checkpoint of the hub."""
    build_tokenizer().save_pretrained(path)
    image_processor(
        size={"height": SIZE, "width": SIZE},
        crop_to_patches=False,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    ).save_pretrained(path)
