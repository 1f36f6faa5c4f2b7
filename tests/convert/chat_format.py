"""Tiny random checkpoints in the InternVLChatModel format, made from transformers' models.

The mapping is written the other way round than in `sgl_runtime.convert`, layer by layer, sharing nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

LAYERS, BLOCKS, HEADS, KV_HEADS, HEAD_DIM = 3, 2, 4, 2, 8
VOCAB, IMAGE = 512, 5
HIDDEN = HEADS * HEAD_DIM
PHI3_ROPE = {
    "short_factor": [1.0 + i / 10 for i in range(HEAD_DIM // 2)],
    "long_factor": [2.0 + i for i in range(HEAD_DIM // 2)],
}
# kind: (transformers' configuration, its settings, llm_config's architecture, its settings)
TEXT: dict[str, tuple[Any, dict[str, Any], str, dict[str, Any]]] = {
    "internlm2": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}},
        "InternLM2ForCausalLM",
        {"bias": False, "rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ),
    "internlm2-bias": (
        LlamaConfig,
        {
            "attention_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        },
        "InternLM2ForCausalLM",
        {"rope_scaling": {"type": "linear", "factor": 4.0}},  # bias and theta by default
    ),
    "llama": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        "LlamaForCausalLM",
        {"rope_theta": 500000.0, "attention_bias": False},
    ),
    "qwen2": (
        Qwen2Config,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "max_window_layers": 24},
        "Qwen2ForCausalLM",
        {
            "rope_theta": 1000000.0,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 24,
        },
    ),
    "qwen3": (
        Qwen3Config,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "head_dim": HEAD_DIM},
        "Qwen3ForCausalLM",
        {"rope_theta": 1000000.0, "head_dim": HEAD_DIM, "use_sliding_window": False},
    ),
    "phi3": (
        Phi3Config,
        {
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **PHI3_ROPE},
            "original_max_position_embeddings": 64,
        },
        "Phi3ForCausalLM",
        {
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "su", **PHI3_ROPE},
            "original_max_position_embeddings": 64,
            "sliding_window": 262144,
        },
    ),
}
VISION = {
    "300M": {"attention_bias": True, "use_qk_norm": False, "norm_type": "layer_norm"},
    "6B": {"attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm"},
}


def make_native(kind: str = "internlm2", vision: str = "300M", *, tied: bool = False, seed: int = 0) -> Any:
    """A random model whose every tensor, norms and biases too, is random."""
    config_class, settings, _, _ = TEXT[kind]
    text = config_class(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
        **settings,
    )
    tower = InternVLVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=BLOCKS,
        num_attention_heads=3,
        image_size=28,
        patch_size=7,
        **VISION[vision],
    )
    config = InternVLConfig(
        text_config=text,
        vision_config=tower,
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.1)
    return model.eval()


def chat_config(kind: str = "internlm2", vision: str = "300M", *, tied: bool = False) -> dict[str, Any]:
    _, _, architecture, settings = TEXT[kind]
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "model_type": "internvl_chat",
        "select_layer": -1,
        "force_image_size": 28,
        "downsample_ratio": 0.5,
        "template": {"phi3": "phi3-chat", "llama": "Hermes-2", "qwen3": "internvl2_5"}.get(
            kind, "internlm2-chat"
        ),
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "ps_version": "v2",
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": True,  # says nothing of the text model
        "llm_config": {
            "architectures": [architecture],
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "temperature": 1.0,
            "attn_implementation": "flash_attention_2",
            "tie_word_embeddings": tied,
            **settings,
        },
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 3,
            "image_size": 28,
            "patch_size": 7,
            "qkv_bias": VISION[vision]["attention_bias"],
            "qk_normalization": VISION[vision]["use_qk_norm"],
            "norm_type": VISION[vision]["norm_type"],
            "drop_path_rate": 0.1,
        },
    }


def chat_tensors(native: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Rename and fuse the tensors of a native checkpoint file to those of the chat format."""
    given, chat = dict(native), {}

    def move(source: str, target: str) -> None:
        for end in (".weight", ".bias", ""):
            if source + end in given:
                chat[target + end] = given.pop(source + end)

    move("vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding")
    move("vision_tower.embeddings.position_embeddings", "vision_model.embeddings.position_embedding")
    move("vision_tower.embeddings.patch_embeddings.projection", "vision_model.embeddings.patch_embedding")
    for i in range(BLOCKS):
        block, to = f"vision_tower.encoder.layer.{i}.", f"vision_model.encoder.layers.{i}."
        for end in ("weight", "bias"):
            parts = [given.pop(f"{block}attention.{x}_proj.{end}", None) for x in "qkv"]
            if parts[0] is not None:
                chat[f"{to}attn.qkv.{end}"] = torch.cat(parts)
        for source, target in (
            ("attention.projection_layer", "attn.proj"),
            ("attention.q_norm", "attn.q_norm"),
            ("attention.k_norm", "attn.k_norm"),
            ("lambda_1", "ls1"),
            ("lambda_2", "ls2"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            move(block + source, to + target)
    for source, target in (("layer_norm", "0"), ("linear_1", "1"), ("linear_2", "3")):
        move(f"multi_modal_projector.{source}", f"mlp1.{target}")
    if kind.startswith("internlm2"):
        _fuse_internlm2(given, chat, move)
    assert all(name.startswith("language_model.") for name in given)
    return {**chat, **given}


def _fuse_internlm2(given: dict[str, Tensor], chat: dict[str, Tensor], move: Any) -> None:
    move("language_model.model.embed_tokens", "language_model.model.tok_embeddings")
    move("language_model.lm_head", "language_model.output")
    for i in range(LAYERS):
        layer = f"language_model.model.layers.{i}."
        for end in ("weight", "bias"):
            if f"{layer}self_attn.q_proj.{end}" not in given:
                continue
            query, key, value = (given.pop(f"{layer}self_attn.{x}_proj.{end}") for x in "qkv")
            rows = []
            for group in range(KV_HEADS):
                for head in range(group * HEADS // KV_HEADS, (group + 1) * HEADS // KV_HEADS):
                    rows.append(query[head * HEAD_DIM : (head + 1) * HEAD_DIM])
                rows.append(key[group * HEAD_DIM : (group + 1) * HEAD_DIM])
                rows.append(value[group * HEAD_DIM : (group + 1) * HEAD_DIM])
            chat[f"{layer}attention.wqkv.{end}"] = torch.cat(rows)
        for source, target in (
            ("self_attn.o_proj", "attention.wo"),
            ("mlp.gate_proj", "feed_forward.w1"),
            ("mlp.up_proj", "feed_forward.w3"),
            ("mlp.down_proj", "feed_forward.w2"),
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ):
            move(layer + source, layer + target)


def save_chat(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any], *, files: int = 1) -> Path:
    """Write a chat-format checkpoint of several files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    for number in range(files):
        name = f"model-{number + 1:05}-of-{files:05}.safetensors" if files > 1 else "model.safetensors"
        part = {key: tensors[key].contiguous().clone() for key in names[number::files]}
        save_file(part, directory / name, metadata={"format": "pt"})
    return directory
