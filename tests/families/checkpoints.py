"""Checkpoints of every family as they lie on the hub: the models of `models.FAMILIES` at random, with a
tokenizer of single characters, a chat template in the family's style, and its image settings at tiny sizes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .llava import CLIP_MEAN, CLIP_STD, clip_settings, common
from .models import EOS, FAMILIES, IMAGE, VIDEO, VOCAB, Inputs

FIRST = 10  # id of the first character
_LATIN = "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÐÑÒÓÔÕÖØÙÚÛÜÝÞßàáâãäåæçèéêëìíî"
CHARACTERS = ("".join(map(chr, range(32, 127))) + "\n" + _LATIN)[: VOCAB - FIRST]
HALF = [0.5] * 3


@dataclass(frozen=True)
class Words:
    """The names of ids 0 to 9, and how a conversation is written.

    Attributes
    ----------
    opening, closing : around each message
    ask : begins the answer
    image, video : what stands for one
    bos : whether the tokenizer puts id 1 in front of what does not begin with it
    """

    special: tuple[str, ...]
    opening: str
    closing: str
    ask: str
    image: str
    video: str = ""
    bos: bool = False

    @property
    def template(self) -> str:
        return (
            f"{{% for m in messages %}}{self.opening}{{% for c in m['content'] %}}"
            f"{{% if c['type'] == 'image' %}}{self.image}"
            f"{{% elif c['type'] == 'video' %}}{self.video}"
            "{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
            f"{self.closing}{{% endfor %}}{{% if add_generation_prompt %}}{self.ask}{{% endif %}}"
        )


_CHATML = ("<|im_start|>{{ m['role'] }}\n", "<|im_end|>\n", "<|im_start|>assistant\n")
_CHATML_IDS = ("<|endoftext|>", "<|bos|>", "<|im_end|>", "<|im_start|>", "<tool>")
_QWEN = Words(
    (*_CHATML_IDS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|box|>"),
    *_CHATML,
    image="<|vision_start|><|image_pad|><|vision_end|>",
    video="<|vision_start|><|video_pad|><|vision_end|>",
)
_LLAVA_IDS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>", "<a>", "<b>", "<image>", "<video>", "<c>")
_IDEFICS = Words(
    (
        *("<pad>", "<|im_start|>", "<end_of_utterance>", "<unk>", "<mask>"),
        *("<fake_token_around_image>", "<a>", "<image>", "<video>", "<global-img>"),
    ),
    "{% if loop.first %}<|im_start|>{% endif %}{{ m['role'].capitalize() }}: ",
    "<end_of_utterance>\n",
    "Assistant:",
    image="<image>",
    video="<video>",
    bos=True,
)
WORDS = {
    "internvl": Words(
        (*_CHATML_IDS, "<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<box>"),
        *_CHATML,
        image="<IMG_CONTEXT>\n",
        video="<video>\n",
    ),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "llava": Words(_LLAVA_IDS, "{{ m['role'].upper() }}: ", " ", "ASSISTANT:", image="<image>\n", bos=True),
    "llava_next": Words(
        _LLAVA_IDS,
        "{% if m['role'] == 'user' %}[INST] {% endif %}",
        "{% if m['role'] == 'user' %} [/INST]{% else %}</s>{% endif %}",
        " ",
        image="<image>\n",
        bos=True,
    ),
    "llava_onevision": Words(
        (*_CHATML_IDS, "<a>", "<b>", "<image>", "<video>", "<c>"),
        *_CHATML,
        image="<image>\n",
        video="<video>\n",
    ),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
}


def save_family(
    name: str,
    directory: Path,
    seed: int = 0,
    *,
    characters: str = CHARACTERS,
    same_text: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of `models.FAMILIES[name]`; return its directory.

    Parameters
    ----------
    characters
        Those of ids 10, 11, ...; in another order they make another tokenizer.
    same_text
        The model says the same text as with `CHARACTERS` in their own order.
    settings
        Image settings that differ from `image_settings`.
    """
    case = FAMILIES[name]
    model = case.make_model(seed)
    if same_text:
        rows = torch.tensor([*range(FIRST), *(FIRST + CHARACTERS.index(letter) for letter in characters)])
        for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
            weight.data = weight.data[rows].clone()
    model.save_pretrained(directory)
    make_tokenizer(WORDS[case.model_type], characters).save_pretrained(directory)
    for file, contents in image_settings(case.model_type).items():
        if file == "preprocessor_config.json":
            contents = {**contents, **(settings or {})}
        (directory / file).write_text(json.dumps(contents))
    return directory


def shuffled(seed: int) -> str:
    """`CHARACTERS` in another order."""
    letters = list(CHARACTERS)
    random.Random(seed).shuffle(letters)
    return "".join(letters)


def make_tokenizer(words: Words, characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """Return a tokenizer of which every id is a special token or one character."""
    from tokenizers import Tokenizer, decoders, models, processors

    assert sorted(characters) == sorted(CHARACTERS)
    core = Tokenizer(models.BPE({token: i for i, token in enumerate([*words.special, *characters])}, []))
    core.decoder = decoders.Fuse()
    bos = words.special[1]
    if words.bos:
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=words.special[0],
        bos_token=bos if words.bos else None,
        eos_token=words.special[EOS],
        additional_special_tokens=list(words.special),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = words.template
    return tokenizer


def image_settings(model_type: str) -> dict[str, dict[str, Any]]:
    """Return the JSON files beside a checkpoint that say how images and videos are prepared, by name."""
    config = next(case for case in FAMILIES.values() if case.model_type == model_type).config()
    if model_type == "internvl":
        size = {"height": 56, "width": 56}
        pixels = {
            **common(size, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            "crop_to_patches": False,
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "max_patches": 4,
            "min_patches": 1,
            "processor_class": "InternVLProcessor",
        }
        processor = {"image_seq_length": 16, "processor_class": "InternVLProcessor"}
        return {"preprocessor_config.json": pixels, "processor_config.json": processor}
    if model_type.startswith("qwen"):
        pixels = {
            "do_convert_rgb": True,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "merge_size": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
        }
        if model_type.startswith("qwen2"):
            pixels |= {"min_pixels": 256, "max_pixels": 2560}
        else:
            pixels |= {"size": {"shortest_edge": 256, "longest_edge": 2560}}
        film = {**pixels, "size": {"shortest_edge": 1024, "longest_edge": 4096}}
        return {"preprocessor_config.json": pixels, "video_preprocessor_config.json": film}
    if model_type in ("idefics3", "smolvlm"):
        pixels = {
            **common({"longest_edge": 112}, HALF, HALF),
            "do_image_splitting": True,
            "do_pad": True,
            "image_processor_type": "Idefics3ImageProcessor",
            "max_image_size": {"longest_edge": 56},
            "resample": 1,
        }
        return {"preprocessor_config.json": pixels, "processor_config.json": {"image_seq_len": 16}}
    if model_type == "llava_onevision":
        pixels = {
            **common({"height": 28, "width": 28}, HALF, HALF),
            "do_pad": True,
            "image_grid_pinpoints": config.image_grid_pinpoints,
            "image_processor_type": "LlavaOnevisionImageProcessor",
        }
        processor = {
            "image_token": "<image>",
            "num_image_tokens": 16,
            "processor_class": "LlavaOnevisionProcessor",
            "video_token": "<video>",
            "vision_feature_select_strategy": "full",
        }
        return {"preprocessor_config.json": pixels, "processor_config.json": processor}
    more: dict[str, Any] = {}
    if model_type == "llava_next":
        more = {
            "do_pad": True,
            "image_grid_pinpoints": config.image_grid_pinpoints,
            "image_processor_type": "LlavaNextImageProcessor",
        }
    return {"preprocessor_config.json": clip_settings(28, 7, **more)}


def for_transformers(model: Any, inputs: Mapping[str, Tensor]) -> Inputs:
    """Return what our processor made of a request as transformers' generate takes it."""
    import inspect

    known = inspect.signature(type(model).forward).parameters
    found = {name: tensor for name, tensor in inputs.items() if name in known}
    if "mm_token_type_ids" in known:
        ids = inputs["input_ids"]
        found["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return found


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of coarse noise, so that its parts still differ when it is made smaller."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def film(frames: int, width: int, height: int, seed: int = 0) -> Sequence[Image.Image]:
    """The frames of a video."""
    return [picture(width, height, 100 * seed + number) for number in range(frames)]
