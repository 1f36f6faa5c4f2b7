"""Configuration, image settings, chat template and generation settings of a chat-format checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sgl_runtime.checkpoints import first_line, read_json
from sgl_runtime.errors import CheckpointError

ARCHITECTURE = "InternVLForConditionalGeneration"
# llm_config's architecture: transformers' model type.
_TEXT_MODELS = {
    "InternLM2ForCausalLM": "llama",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Phi3ForCausalLM": "phi3",
}
# What the chat format's own configuration classes assume for what a file leaves out.
_INTERNLM2_DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bias": True,
}
_VISION_DEFAULTS = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 224,
    "qkv_bias": False,
    "qk_normalization": True,
    "norm_type": "rms_norm",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "initializer_factor": 0.1,
}
_CHAT_DEFAULTS = {
    "select_layer": -1,
    "downsample_ratio": 0.5,
    "ps_version": "v1",
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "pad2square": False,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
}
# Settings of a text model that mean the same in transformers today.
_TEXT_SETTINGS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range"),
    *("rms_norm_eps", "use_cache", "attention_bias", "mlp_bias", "attention_dropout"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "original_max_position_embeddings"),
    *("partial_rotary_factor", "use_sliding_window", "sliding_window", "max_window_layers"),
)
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def is_chat_format(directory: Path) -> bool:
    """Return whether a directory's config.json is that of an InternVLChatModel."""
    path = directory / "config.json"
    return path.is_file() and "llm_config" in read_json(path)


def read_chat_config(directory: Path) -> dict[str, Any]:
    """Return the chat format's configuration with its defaults filled in, checked.

    Raises
    ------
    CheckpointError
        It is not an InternVLChatModel, or one that transformers' InternVL cannot express.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a checkpoint directory: it holds no config.json.")
    chat = {**_CHAT_DEFAULTS, **read_json(path)}
    if chat.get("model_type") == "internvl":
        raise CheckpointError(f"{directory} is in transformers' own format already; use it as it is.")
    for part in ("llm_config", "vision_config"):
        if not isinstance(chat.get(part), dict):
            raise CheckpointError(
                f"{path} describes a model of type {chat.get('model_type')!r} without {part}; expected an "
                "InternVLChatModel."
            )
    chat["vision_config"] = {**_VISION_DEFAULTS, **chat["vision_config"]}
    chat["llm_config"] = _llm_config(path, chat["llm_config"])
    _check(path, chat)
    return chat


def native_config(chat: dict[str, Any], *, image_token_id: int, tied: bool, dtype: str) -> Any:
    """Return transformers' ``InternVLConfig`` for a configuration from `read_chat_config`.

    Parameters
    ----------
    tied
        Whether the checkpoint's output layer is its embedding.
    """
    from transformers import AutoConfig, InternVLConfig, InternVLVisionConfig

    vision, side = chat["vision_config"], chat["vision_config"]["image_size"] // _patch(chat)
    try:
        text_config = AutoConfig.for_model(**_text_settings(chat["llm_config"]), tie_word_embeddings=tied)
        vision_config = InternVLVisionConfig(
            **{name: vision[name] for name in _VISION_DEFAULTS if name in InternVLVisionConfig().to_dict()},
            attention_bias=vision["qkv_bias"],
            use_qk_norm=vision["qk_normalization"],
            layer_scale_init_value=vision["initializer_factor"],
        )
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"The checkpoint's config.json is wrong: {first_line(error)}") from error
    return InternVLConfig(
        architectures=[ARCHITECTURE],
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=image_token_id,
        image_seq_length=int(side * chat["downsample_ratio"]) ** 2,
        downsample_ratio=chat["downsample_ratio"],
        vision_feature_layer=-1,
        tie_word_embeddings=tied,
        dtype=dtype,
    )


def image_settings(chat: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of preprocessor_config.json."""
    size = chat["vision_config"]["image_size"]
    dynamic = bool(chat["dynamic_image_size"])
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "size": {"height": size, "width": size},
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "crop_to_patches": dynamic,
        "min_patches": chat["min_dynamic_patch"] if dynamic else 1,
        "max_patches": chat["max_dynamic_patch"] if dynamic else 1,
    }


def generation_settings(directory: Path, chat: dict[str, Any], stop_id: int | None) -> dict[str, Any]:
    """Return the contents of generation_config.json.

    Parameters
    ----------
    stop_id
        The token that ends a turn of the chat template; the end tokens that the checkpoint itself names stop
        as well.
    """
    path, llm = directory / "generation_config.json", chat["llm_config"]
    named = read_json(path).get("eos_token_id") if path.is_file() else None
    ids: list[int | None] = [stop_id]
    for more in (named, llm.get("eos_token_id")):
        ids += more if isinstance(more, list) else [more]
    if not all(number is None or isinstance(number, int) for number in ids):
        raise CheckpointError(f"{directory}: the end-of-sequence ids must be integers, got {ids}.")
    ids = [number for number in dict.fromkeys(ids) if number is not None]
    found = {"bos_token_id": llm.get("bos_token_id"), "pad_token_id": llm.get("pad_token_id")}
    found["eos_token_id"] = ids if len(ids) > 1 else next(iter(ids), None)
    return {name: value for name, value in sorted(found.items()) if value is not None}


def _llm_config(path: Path, llm: dict[str, Any]) -> dict[str, Any]:
    name = next(iter(llm.get("architectures") or []), None)
    if name not in _TEXT_MODELS:
        raise CheckpointError(f"{path}: the text model is a {name}; supported: {', '.join(_TEXT_MODELS)}.")
    if name == "InternLM2ForCausalLM":
        llm = {**_INTERNLM2_DEFAULTS, **llm, "model_type": "internlm2"}
        llm["attention_bias"] = llm["bias"]
        if llm.get("rope_pos_id_version", "default") != "default":
            raise CheckpointError(
                f"{path}: positions of kind {llm['rope_pos_id_version']!r} are not supported, only 'default'."
            )
    else:
        llm = {**llm, "model_type": _TEXT_MODELS[name]}
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in needed if not isinstance(llm.get(name), int)]
    if missing:
        raise CheckpointError(f"{path}: llm_config lacks {', '.join(missing)}.")
    rope = _rope_type(llm)
    if rope not in _ROPE_TYPES:
        raise CheckpointError(f"{path}: rope_scaling of type {rope!r}; known are {', '.join(_ROPE_TYPES)}.")
    if llm.get("num_key_value_heads") is None:
        llm["num_key_value_heads"] = llm["num_attention_heads"]
    return llm


def _text_settings(llm: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``AutoConfig.for_model``."""
    kind = _TEXT_MODELS[llm["architectures"][0]]
    found = {name: llm[name] for name in _TEXT_SETTINGS if llm.get(name) is not None}
    if kind == "phi3" and found.get("sliding_window", 0) >= found.get("max_position_embeddings", 0):
        found.pop("sliding_window", None)  # reaches every token, so it is no window
    rope = {**(llm.get("rope_scaling") or {}), "rope_type": _rope_type(llm)}
    rope.pop("type", None)
    if "rope_theta" in llm:
        rope["rope_theta"] = float(llm["rope_theta"])
    return {**found, "model_type": kind, "rope_parameters": rope}


def _rope_type(llm: dict[str, Any]) -> Any:
    rope = llm.get("rope_scaling") or {"type": "default"}
    found = rope.get("type") or rope.get("rope_type")
    return "longrope" if found == "su" else found  # what Phi-3 called it at first


def _patch(chat: dict[str, Any]) -> int:
    return int(chat["vision_config"]["patch_size"])


def _check(path: Path, chat: dict[str, Any]) -> None:
    """Refuse what transformers' InternVL would compute differently."""
    vision, size = chat["vision_config"], chat.get("force_image_size")
    eps = vision["layer_norm_eps"]
    for bad, what in (
        (chat["ps_version"] != "v2", f"ps_version {chat['ps_version']!r}, only 'v2' is supported"),
        (chat["select_layer"] != -1, f"select_layer {chat['select_layer']}, only -1 is supported"),
        (chat["pad2square"], "pad2square, which transformers' image processor does not do"),
        (
            size not in (None, vision["image_size"]),
            f"force_image_size {size}, but a vision tower of {vision['image_size']}",
        ),
        (
            chat["dynamic_image_size"] and chat["max_dynamic_patch"] > 1 and not chat["use_thumbnail"],
            "tiles without a thumbnail, which transformers' image processor always adds",
        ),
        (
            vision["qk_normalization"] and eps != 1e-6,
            f"qk_normalization with layer_norm_eps {eps}, transformers' is 1e-6",
        ),
    ):
        if bad:
            raise CheckpointError(f"{path} asks for {what}. This checkpoint cannot be converted.")
