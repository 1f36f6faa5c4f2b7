"""Checkpoint directories as they lie on the hub, with random weights and a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .slow import make_model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
VOCAB = 270
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRING_TEMPLATE = "Q: {{ messages[0]['content'] }} A:"
IMAGE_SETTINGS: dict[str, Any] = {
    "image_processor_type": "GotOcr2ImageProcessor",
    "size": {"height": 56, "width": 56},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "crop_to_patches": False,
    "min_patches": 1,
    "max_patches": 4,
}


def make_tokenizer(template: str | None = TEMPLATE, *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if adds_bos:
        bos = SPECIAL[0]
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=SPECIAL[0] if adds_bos else None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    tokenizer.chat_template = template
    return tokenizer


def save_checkpoint(
    directory: Path,
    *,
    settings: dict[str, Any] | None = None,
    template: str | None = TEMPLATE,
    **changes: Any,
) -> Path:
    tokenizer = make_tokenizer(template)
    model = make_model(
        **{
            "vocab": VOCAB,
            "image_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            "context": 512,
            **changes,
        }
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps({**IMAGE_SETTINGS, **(settings or {})}))
    return directory


def picture(width: int = 70, height: int = 50, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
