"""The pairs that `sgl-vlm bench --pipeline` runs: the shipped one, and random weights at families' sizes.

Random weights are made so that a run is like one of a trained pair: attention is far from uniform, no answer
ends early, and both heads favour the same next token for most tokens, so that the large VLM takes over part
of the small one's draft, as in a family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgl_runtime import hf, tiny
from sgl_runtime.bench_cost import visual_tokens
from sgl_runtime.errors import ConfigError

EOS, IMAGE, FIRST_WORD = 2, 7, 10
TEXT_BEFORE, TEXT_AFTER = 16, 64  # 80 text tokens, as in the bounds of the design's section 6
NEW_TOKENS = 10
FAVOUR = 3.0  # standard deviations by which the favoured word leads the largest of all others
SHARPNESS = 2.5  # standard deviation of the logits: makes the favoured word nearly sure

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class TextShape:
    """Decoder of transformers' ``kind``; the numbers are those of the design's section 7."""

    kind: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


@dataclass(frozen=True)
class VisionShape:
    """Vision tower; ``rms`` is the 6B tower's norm, with q and k normed too."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    rms: bool = False
    tile: int = 448
    patch: int = 14


@dataclass(frozen=True)
class PairShape:
    """Two VLMs with random weights, and how many tiles their requests have."""

    small: tuple[TextShape, VisionShape]
    large: tuple[TextShape, VisionShape]
    tiles: int
    note: str = ""


@dataclass(frozen=True, eq=False)
class Pair:
    """Models on their device, and requests ``(small_inputs, large_inputs)``, all different."""

    name: str
    small: Any
    large: Any
    requests: Sequence[tuple[Inputs, Inputs]]
    new_tokens: int
    note: str


_VIT_300M = VisionShape(24, 1024, 4096, 16)
_VIT_6B = VisionShape(45, 3200, 12800, 25, rms=True)
_VIT_MID = VisionShape(12, 320, 1280, 5)
_ON_300M = "the text models of Qwen2.5-VL in InternVL's frame, with its 300M vision tower and without M-RoPE"
SHAPES = {
    "mid": PairShape(
        (TextShape("qwen2", 12, 512, 2560, 8, 2, 64, 32000), _VIT_MID),
        (TextShape("qwen2", 24, 1024, 3328, 16, 4, 64, 32000), _VIT_MID),
        tiles=5,
        note="InternVL3's proportions, scaled down",
    ),
    "internvl3-1b-14b": PairShape(
        (TextShape("qwen2", 24, 896, 4864, 14, 2, 64, 151674), _VIT_300M),
        (TextShape("qwen2", 48, 5120, 13824, 40, 8, 128, 151674), _VIT_300M),
        tiles=7,
    ),
    "internvl2-2b-26b": PairShape(
        (TextShape("llama", 24, 2048, 8192, 16, 8, 128, 92553), _VIT_300M),
        (TextShape("llama", 48, 6144, 16384, 48, 8, 128, 92553), _VIT_6B),
        tiles=7,
    ),
    "qwen2.5-vl-3b-32b": PairShape(
        (TextShape("qwen2", 36, 2048, 11008, 16, 2, 128, 151936), _VIT_300M),
        (TextShape("qwen2", 64, 5120, 27648, 40, 8, 128, 152064), _VIT_300M),
        tiles=16,
        note=_ON_300M,
    ),
}
NAMES = ("tiny", *SHAPES)


def make_pair(name: str, device: torch.device, dtype: torch.dtype, requests: int = 1) -> Pair:
    """Load or make the pair of that name, with so many requests.

    Raises
    ------
    ConfigError
        There is no such pair.
    """
    if name == "tiny":
        return _tiny_pair(device, dtype, requests)
    if name not in SHAPES:
        raise ConfigError(f"--pair must be one of {', '.join(NAMES)}, got {name!r}.")
    return random_pair(name, SHAPES[name], device, dtype, requests)


def random_pair(
    name: str, shape: PairShape, device: torch.device, dtype: torch.dtype, requests: int = 1
) -> Pair:
    """Make a pair of random weights, the same for the same shape, dtype and device type."""
    small, large = (
        random_model(text, vision, device, dtype, seed=seed)
        for seed, (text, vision) in enumerate((shape.small, shape.large))
    )
    words = min(shape.small[0].vocab, shape.large[0].vocab)
    for model in (small, large):
        _favour(model, words)
    inputs = [_random_inputs(small.config, shape.tiles, words, seed) for seed in range(requests)]
    return Pair(name, small, large, [(one, one) for one in inputs], NEW_TOKENS, shape.note)


def random_model(
    text: TextShape, vision: VisionShape, device: torch.device, dtype: torch.dtype, *, seed: int
) -> Any:
    """Make an ``InternVLForConditionalGeneration`` whose hidden states neither grow nor fade."""
    from transformers import AutoModelForImageTextToText

    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(_config(text, vision), dtype=dtype).eval()
    model.generation_config.eos_token_id = EOS
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if weight.dim() >= 2:
                std = _gain(weight_name, text.layers) * weight[0].numel() ** -0.5
                weight.normal_(std=1.0 if "embed_tokens" in weight_name else std, generator=generator)
    return model


def _gain(name: str, layers: int) -> float:
    """Attention far from uniform; what adds to the residual stream is shared out over the layers."""
    if "language_model" not in name:
        return 1.0
    if "q_proj" in name or "k_proj" in name:
        return 2.0
    return (2 * layers) ** -0.5 if "o_proj" in name or "down_proj" in name else 1.0


def _config(text: TextShape, vision: VisionShape) -> Any:
    from transformers import AutoConfig, InternVLConfig, InternVLVisionConfig

    patches = (vision.tile // vision.patch) ** 2
    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=vision.hidden,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            intermediate_size=vision.ffn,
            image_size=vision.tile,
            patch_size=vision.patch,
            norm_type="rms_norm" if vision.rms else "layer_norm",
            use_qk_norm=vision.rms,
        ),
        text_config=AutoConfig.for_model(
            text.kind,
            vocab_size=text.vocab,
            hidden_size=text.hidden,
            intermediate_size=text.ffn,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            num_key_value_heads=text.kv_heads,
            head_dim=text.head_dim,
            max_position_embeddings=8192,
            eos_token_id=EOS,
            tie_word_embeddings=False,
        ),
        image_token_id=IMAGE,
        image_seq_length=patches // 4,
        tie_word_embeddings=False,
    )


@torch.no_grad()
def _favour(model: Any, words: int) -> None:
    """Let the head prefer, after each word, one other word: the same in every model of as many words.

    The rest of the logits is about standard normal, and the last token's embedding is most of the final
    hidden state, so its direction, added to the preferred word's row, lifts that word above all others.
    """
    embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
    tokens = torch.arange(FIRST_WORD, words, device=head.device)
    following = FIRST_WORD + (tokens - FIRST_WORD) * 7919 % (words - FIRST_WORD)
    direction = embedding[tokens].float()
    lead = FAVOUR + math.sqrt(2 * math.log(words))
    head[following] += (lead / direction.shape[1] * direction).to(head.dtype)
    head *= SHARPNESS
    head[EOS] = 0  # never the largest of so many: no answer ends early


def _random_inputs(config: Any, tiles: int, words: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    visual = visual_tokens(config, tiles)
    ids = torch.randint(FIRST_WORD, words, (1, TEXT_BEFORE + visual + TEXT_AFTER), generator=generator)
    ids[:, TEXT_BEFORE : TEXT_BEFORE + visual] = IMAGE
    side = config.vision_config.image_size
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return {"input_ids": ids, "pixel_values": torch.randn(tiles, 3, height, width, generator=generator)}


def _tiny_pair(device: torch.device, dtype: torch.dtype, requests: int) -> Pair:
    from sgl_runtime.processing import Processor

    small, large = (hf.load_model(path, device, dtype) for path in (tiny.SMALL, tiny.LARGE))
    processors = [
        Processor.from_directory(path, hf.view(model).family)
        for path, model in ((tiny.SMALL, small), (tiny.LARGE, large))
    ]
    samples = tiny.samples()
    inputs = []
    for number in range(requests):
        sample = samples[number % len(samples)]
        small_inputs, large_inputs = (make(sample["image"], sample["prompt"]) for make in processors)
        inputs.append((small_inputs, large_inputs))
    return Pair("tiny", small, large, inputs, 8, "the shipped pair on its samples")
