"""What the tests of the LLaVA families share: a tokenizer, image settings, pictures, towers that see patches.

Settings are those on the hub of llava-hf/llava-1.5-7b-hf, llava-hf/llava-v1.6-mistral-7b-hf and
llava-hf/llava-onevision-qwen2-0.5b-ov-hf, at their own and at the tiny models' sizes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .models import IMAGE, VIDEO

PROMPT = "what <image> is <image> this"
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
# tall, wide, square, smaller than a crop, of one pixel's height or width, and one of both
SHAPES = [(90, 40), (35, 120), (64, 64), (3, 3), (1, 50), (70, 1), (1, 1), (1, 4000), (84, 42)]


def tokenizer() -> Any:
    """A tokenizer of a few words that knows the tiny models' visual tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "what", "is", "this", "a", "<image>", "<video>", "picture"]
    assert (words[IMAGE], words[VIDEO]) == ("<image>", "<video>")
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", additional_special_tokens=["<image>", "<video>"]
    )


def stub(config: Any) -> Any:
    """A family as its preprocessor sees it: a configuration, of any size."""
    return SimpleNamespace(config=config)


def common(size: Any, mean: list[float], std: list[float]) -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": mean,
        "image_std": std,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": size,
    }


def clip_settings(size: int, patch: int, **more: Any) -> dict[str, Any]:
    """Settings of LLaVA-1.5 and LLaVA-NeXT."""
    return {
        **common({"shortest_edge": size}, CLIP_MEAN, CLIP_STD),
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "image_processor_type": "CLIPImageProcessor",
        "image_token": "<image>",
        "patch_size": patch,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        **more,
    }


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def with_white(height: int, width: int, cell: Tensor) -> Image.Image:
    """A black picture that is white in the cell (3, 2) of one visual token."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    (top, bottom), (left, right) = (cell[1:] * torch.tensor([[height], [width]])).round().int().tolist()
    assert bottom > top
    assert right > left
    pixels[top:bottom, left:right] = 255
    return Image.fromarray(pixels)


@torch.no_grad()
def blinker(model: Any) -> Any:
    """Cut the attention of a model's vision tower: the feature of a patch tells of that patch alone."""
    for name, weight in model.model.vision_tower.named_parameters():
        if "out_proj" in name:
            weight.zero_()
    return model


@torch.no_grad()
def changes(family: Any, one: dict[str, Tensor], two: dict[str, Tensor], ids: Tensor) -> Tensor:
    """How much each visual token's feature (N,) differs between two requests."""
    features = []
    for tensors in (one, two):
        visuals = family.visuals({"input_ids": ids, **tensors})
        features.append(torch.cat([family.encode(visual).tokens for visual in visuals]))
    return (features[0] - features[1]).abs().amax(1)


def overlap(cells: Tensor, cell: Tensor, margin: float = 0.0) -> Tensor:
    """Which cells (N, 3, 2), each grown by ``margin``, share more than a border with ``cell`` (3, 2)."""
    begin = torch.maximum(cells[:, 1:, 0] - margin, cell[1:, 0])
    end = torch.minimum(cells[:, 1:, 1] + margin, cell[1:, 1])
    return (end - begin > 1e-5).all(1)


def area(cells: Tensor) -> Tensor:
    """Sum of the areas of cells."""
    return (cells[:, 1:, 1] - cells[:, 1:, 0]).prod(1).sum()
