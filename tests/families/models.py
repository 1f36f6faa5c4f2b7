"""Tiny random models of every family, truly built, and inputs of one request as transformers takes them.

Nothing here knows the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as tf
from torch import Tensor

VOCAB, EOS, CONTEXT = 150, 2, 512
VISION_START, VISION_END, IMAGE, VIDEO, NEWLINE = 5, 6, 7, 8, 9
HEADS, HEAD_DIM = 4, 16
HIDDEN = HEADS * HEAD_DIM

Inputs = dict[str, Tensor]
Size = tuple[int, int]
SIZES: tuple[Size, ...] = ((1, 2), (2, 1))


@dataclass(frozen=True)
class Case:
    """One family, or one family with one kind of text model.

    Attributes
    ----------
    model_type : of the whole model's configuration
    config : makes the configuration
    visual : pixel tensors of images, and for each image the ids that stand for it in the prompt
    decoder : name of the text model inside ``model.model``
    planes : DeepStack planes
    """

    model_type: str
    config: Callable[[], Any]
    visual: Callable[[Sequence[Size], torch.Generator], tuple[Inputs, list[list[int]]]]
    decoder: str = "language_model"
    planes: int = 0

    def make_model(self, seed: int = 0) -> Any:
        """Return a random fp32 model on the CPU, ready for inference."""
        torch.manual_seed(seed)
        model = tf.AutoModelForImageTextToText.from_config(self.config()).eval()
        draw_weights(model)
        model.generation_config = tf.GenerationConfig(bos_token_id=1, eos_token_id=EOS, pad_token_id=0)
        return model

    def make_inputs(
        self, seed: int = 0, images: Sequence[Size] = SIZES, text: Sequence[int] | None = None
    ) -> Inputs:
        """Return one request: random text before, between and after the images.

        Parameters
        ----------
        images
            Rows and columns of each image, in what the family divides an image into; what that makes no
            difference to ignores it.
        text
            Text tokens before the first, behind the first, ... behind the last image. Default: 3, 4, 5, ...
        """
        generator = torch.Generator().manual_seed(seed)
        tensors, marks = self.visual(images, generator)
        counts = [3 + i for i in range(len(images) + 1)] if text is None else text
        ids: list[int] = []
        for count, mark in zip(counts, [*marks, []], strict=True):
            ids += torch.randint(10, VOCAB, (count,), generator=generator).tolist() + mark
        tensors = {"input_ids": torch.tensor([ids]), **tensors}
        if "image_grid_thw" in tensors:
            tensors["mm_token_type_ids"] = (tensors["input_ids"] == IMAGE).int()
        return tensors


@torch.no_grad()
def draw_weights(model: torch.nn.Module) -> None:
    """Draw weights that keep activations near 1 in every layer and attention far from uniform."""
    for name, weight in model.named_parameters():
        if weight.dim() >= 2:
            fan_in = weight.shape[-1] if "experts" in name else weight[0].numel()
            torch.nn.init.normal_(weight, std=fan_in**-0.5)
            if "q_proj" in name or "k_proj" in name:
                weight *= 1.5
            elif "self_attn.qkv_proj" in name:
                weight[: -HIDDEN // 2] *= 1.5  # queries and keys; the values are as wide as half the queries
        elif "q_norm" in name or "k_norm" in name:
            torch.nn.init.uniform_(weight, 1.0, 2.0)
        elif "bias" in name:
            torch.nn.init.normal_(weight, std=0.1)
        elif "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)


def _text(kind: type, *, layers: int = 4, rope: dict[str, Any] | None = None, **changes: Any) -> Any:
    return kind(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, **(rope or {})},
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
        tie_word_embeddings=False,
        **changes,
    )


_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_SMALL_VISION = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


# InternVL: 56 x 56 tiles of 16 tokens; an image of several tiles has a thumbnail too.


def _internvl(text: Any) -> tf.InternVLConfig:
    return tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(
            **_SMALL_VISION, num_hidden_layers=2, image_size=56, patch_size=7, layer_scale_init_value=1.0
        ),
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )


def _tiles(rows: int, columns: int) -> int:
    return rows * columns + (rows * columns > 1)


def _internvl_visual(images: Sequence[Size], generator: torch.Generator) -> tuple[Inputs, list[list[int]]]:
    tiles = [_tiles(*size) for size in images]
    pixels = torch.randn(sum(tiles), 3, 56, 56, generator=generator)
    marks = [[VISION_START, *[IMAGE] * (16 * n), VISION_END] for n in tiles]
    return {"pixel_values": pixels}, marks


# Qwen-VL: patches of 4 x 4, merged 2 x 2; an image of size (1, 2) is 3 x 8 visual tokens.

_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "tie_word_embeddings": False,
}


def _qwen2_vl() -> tf.Qwen2VLConfig:
    return tf.Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": HIDDEN,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
        },
        text_config=_text(tf.Qwen2VLTextConfig, rope={"mrope_section": [2, 3, 3]}).to_dict(),
        **_QWEN_IDS,
    )


def _qwen2_5_vl() -> tf.Qwen2_5_VLConfig:
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,  # 2 x 2 merged patches
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [1],
    }
    text = _text(tf.Qwen2_5_VLTextConfig, rope={"mrope_section": [2, 3, 3]})
    return tf.Qwen2_5_VLConfig(vision_config=vision, text_config=text.to_dict(), **_QWEN_IDS)


def _qwen3_vl(moe: bool) -> Any:
    whole, part = (
        (tf.Qwen3VLMoeConfig, tf.Qwen3VLMoeTextConfig) if moe else (tf.Qwen3VLConfig, tf.Qwen3VLTextConfig)
    )
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    rope = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = _text(part, layers=5, rope=rope, head_dim=HEAD_DIM, **(_EXPERTS if moe else {}))
    return whole(vision_config=vision, text_config=text.to_dict(), **_QWEN_IDS)


def _qwen_visual(images: Sequence[Size], generator: torch.Generator) -> tuple[Inputs, list[list[int]]]:
    grids = [(3 * rows, 4 * columns) for rows, columns in images]  # merged
    marks = [[VISION_START, *[IMAGE] * (rows * columns), VISION_END] for rows, columns in grids]
    patches = 4 * sum(rows * columns for rows, columns in grids)
    return {
        "pixel_values": torch.randn(patches, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids]),
    }, marks


# LLaVA: 28 x 28 crops of 16 tokens.

_CLIP = {**_SMALL_VISION, "num_hidden_layers": 3, "image_size": 28, "patch_size": 7}
_PINPOINTS = [[28 * rows, 28 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3) if rows * columns > 1]


def _llava() -> tf.LlavaConfig:
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**_CLIP),
        text_config=_text(tf.LlamaConfig, head_dim=HEAD_DIM),
        image_token_index=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )


def _llava_next(text: Any) -> tf.LlavaNextConfig:
    return tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**_CLIP),
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=16,
        image_grid_pinpoints=_PINPOINTS,
        tie_word_embeddings=False,
    )


def _llava_onevision() -> tf.LlavaOnevisionConfig:
    return tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**_CLIP, vision_use_head=False),
        text_config=_text(tf.Qwen2Config),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=_PINPOINTS,
        vision_aspect_ratio="anyres_max_2",  # so that four crops are already scaled down
        tie_word_embeddings=False,
    )


def _llava_visual(images: Sequence[Size], generator: torch.Generator) -> tuple[Inputs, list[list[int]]]:
    return {"pixel_values": torch.randn(len(images), 3, 28, 28, generator=generator)}, [
        [IMAGE] * 16 for _ in images
    ]


def _llava_next_visual(images: Sequence[Size], generator: torch.Generator) -> tuple[Inputs, list[list[int]]]:
    return _anyres(_counting_model("llava_next"), images, generator)


def _llava_onevision_visual(
    images: Sequence[Size], generator: torch.Generator
) -> tuple[Inputs, list[list[int]]]:
    """Only a request's single image is cut into crops."""
    together = {"batch_num_images": torch.tensor([len(images)])}
    return _anyres(_counting_model("llava_onevision"), images, generator, **together)


def _anyres(
    model: Any, images: Sequence[Size], generator: torch.Generator, **also: Tensor
) -> tuple[Inputs, list[list[int]]]:
    """Crops of images whose shapes are near, not at, those of the grids: some features are cut off again."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    sizes = torch.tensor([[28 * rows, 28 * columns - 14] for rows, columns in images])
    crops = [image_size_to_num_patches(size.tolist(), _PINPOINTS, 28) for size in sizes]
    if also and len(images) > 1:
        crops = [1] * len(images)
    pixels = torch.zeros(len(images), max(crops), 3, 28, 28)
    for own, count in zip(pixels, crops, strict=True):
        own[:count] = torch.randn(count, 3, 28, 28, generator=generator)
    tensors = {"pixel_values": pixels, "image_sizes": sizes, **also}
    with torch.no_grad():
        found = model.model.get_image_features(**tensors).pooler_output
    return tensors, [[IMAGE] * len(features) for features in found]


@cache
def _counting_model(name: str) -> Any:
    """A model to ask how many visual tokens images make."""
    return FAMILIES[name].make_model()


# Idefics3 and SmolVLM: 56 x 56 tiles of 16 tokens, each a span of its own; several come with the whole image.


def _idefics3(kind: str) -> Any:
    whole, part = (
        (tf.Idefics3Config, tf.models.idefics3.Idefics3VisionConfig)
        if kind == "idefics3"
        else (tf.SmolVLMConfig, tf.models.smolvlm.SmolVLMVisionConfig)
    )
    return whole(
        vision_config=part(**_SMALL_VISION, num_hidden_layers=2, image_size=56, patch_size=7),
        text_config=_text(tf.LlamaConfig, head_dim=HEAD_DIM),
        image_token_id=IMAGE,
        scale_factor=2,
        tie_word_embeddings=False,
    )


def _idefics3_visual(images: Sequence[Size], generator: torch.Generator) -> tuple[Inputs, list[list[int]]]:
    marks = []
    for rows, columns in images:
        tile = [VISION_START, *[IMAGE] * 16]
        ids: list[int] = []
        if rows * columns > 1:
            for row in range(rows):
                for column in range(columns):
                    ids += [VISION_START, 10 + row * columns + column, *[IMAGE] * 16]
                ids += [NEWLINE]
        marks.append([*ids, *tile, VISION_END])
    pixels = torch.randn(1, sum(_tiles(*size) for size in images), 3, 56, 56, generator=generator)
    return {
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones(*pixels.shape[:2], 56, 56, dtype=torch.long),
    }, marks


def _with_internvl(kind: type, **changes: Any) -> Case:
    return Case("internvl", lambda: _internvl(_text(kind, **changes)), _internvl_visual)


FAMILIES: dict[str, Case] = {
    "internvl-qwen2": _with_internvl(tf.Qwen2Config),
    "internvl-qwen3": _with_internvl(tf.Qwen3Config, head_dim=HEAD_DIM, layers=6),
    "internvl-llama": _with_internvl(tf.LlamaConfig, head_dim=HEAD_DIM),
    "internvl-phi3": _with_internvl(tf.Phi3Config, original_max_position_embeddings=CONTEXT),
    "internvl-qwen3_moe": _with_internvl(tf.Qwen3MoeConfig, head_dim=HEAD_DIM, **_EXPERTS),
    "qwen2_vl": Case("qwen2_vl", _qwen2_vl, _qwen_visual),
    "qwen2_5_vl": Case("qwen2_5_vl", _qwen2_5_vl, _qwen_visual),
    "qwen3_vl": Case("qwen3_vl", lambda: _qwen3_vl(moe=False), _qwen_visual, planes=3),
    "qwen3_vl_moe": Case("qwen3_vl_moe", lambda: _qwen3_vl(moe=True), _qwen_visual, planes=3),
    "llava": Case("llava", _llava, _llava_visual),
    "llava_next": Case(
        "llava_next", lambda: _llava_next(_text(tf.LlamaConfig, head_dim=HEAD_DIM)), _llava_next_visual
    ),
    "llava_next-mistral": Case(
        "llava_next",
        lambda: _llava_next(_text(tf.MistralConfig, head_dim=HEAD_DIM, sliding_window=None)),
        _llava_next_visual,
    ),
    "llava_onevision": Case("llava_onevision", _llava_onevision, _llava_onevision_visual),
    "idefics3": Case("idefics3", lambda: _idefics3("idefics3"), _idefics3_visual, decoder="text_model"),
    "smolvlm": Case("smolvlm", lambda: _idefics3("smolvlm"), _idefics3_visual, decoder="text_model"),
}
