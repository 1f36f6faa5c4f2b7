"""All contact with Hugging Face internals: loading a checkpoint, and the views of a model that the loop runs.

Nothing else in this package reaches into a transformers model, so a new transformers release breaks one file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgl_runtime.errors import CheckpointError, ConfigError
from sgl_runtime.quantize import quantize_linears

TEXT_MODELS = ("llama", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True)
class Layer:
    """The modules of one pre-norm decoder layer, in the order in which they run."""

    input_norm: nn.Module
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    o_proj: nn.Module
    post_norm: nn.Module
    gate_proj: nn.Module
    up_proj: nn.Module
    activation: Callable[[Tensor], Tensor]
    down_proj: nn.Module


@dataclass(frozen=True)
class ModelView:
    """What the loop needs of an ``InternVLForConditionalGeneration``: its own modules and a few numbers."""

    image_features: Callable[[Tensor], Tensor]  # (tiles, 3, height, width) -> (tiles, tokens, hidden_size)
    embed: nn.Module
    layers: tuple[Layer, ...]
    norm: nn.Module
    lm_head: nn.Module
    rotary: nn.Module
    processes: int  # that share the language model
    num_heads: int  # in this process
    num_kv_heads: int
    head_dim: int
    softmax_scale: float
    context: int
    vocab_size: int
    image_token_id: int
    tokens_per_tile: int
    tile_size: tuple[int, int]
    eos_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype
    generation_config: Any


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device meant by ``device``; "auto" is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device={device!r} is not a torch device; write 'auto', 'cpu' or 'cuda'."
        ) from error
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={device!r} is not supported; write 'auto', 'cpu' or 'cuda'.")
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ConfigError(
            f"device={device!r}, but torch {torch.__version__} sees {count} CUDA devices here. "
            "Write 'auto' or 'cpu', or install a CUDA build of torch."
        )
    return found


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the compute dtype meant by ``dtype``; "auto" is bfloat16 on CUDA and float32 on the CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ConfigError(f"dtype={dtype!r} is not supported; write 'auto' or one of {', '.join(DTYPES)}.")
    return found  # type: ignore[return-value]


def checkpoint_directory(source: str | Path) -> Path:
    """Return the local directory of a checkpoint given as a directory or as a hub id.

    Of a hub repository only JSON, tokenizer and safetensors files are downloaded; no code and no pickle ever
    is.

    Raises
    ------
    CheckpointError
        There is no such directory, or the hub id cannot be resolved (unknown, or offline and not in the
        cache).
    """
    name = str(source)
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return path
    except (OSError, RuntimeError, ValueError) as error:  # an unknown ~user, a name with a NUL byte
        raise CheckpointError(f"{name!r} is not a checkpoint directory ({first_line(error)}).") from error
    if path.exists():
        raise CheckpointError(
            f"{name} is a file; give the directory that holds config.json and *.safetensors."
        )
    if isinstance(source, Path) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"There is no checkpoint directory {name}. Give a directory or a hub id 'owner/name'."
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{name} is neither a directory here nor a checkpoint that the hub could provide "
            f"({first_line(error)}). Check the name and the connection, or download it first and give its "
            "directory."
        ) from error


def load_model(
    source: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    processes: int = 1,
    quantize: str | None = None,
) -> nn.Module:
    """Load an InternVL checkpoint from safetensors, in ``dtype`` on ``device``.

    Parameters
    ----------
    processes
        How many share the language model (see `sgl_runtime.parallel`); its modules do the collectives.
    quantize
        What `sgl_runtime.quantize` does to the decoder layers, "int8" or "fp8".

    Raises
    ------
    CheckpointError
        Not a checkpoint, not safetensors, a model that is not supported, or tensors that do not fit the
        model.
    ConfigError
        The attention heads cannot be shared out evenly, or the scheme cannot run.
    """
    directory = checkpoint_directory(source)
    _check_config(directory)
    files = _safetensors(directory)
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    loader: Any = InternVLForConditionalGeneration
    try:
        config = InternVLConfig.from_pretrained(directory, local_files_only=True)
        sharding = {} if processes == 1 else _sharding(directory, config.text_config, processes)
        if _holds_lm_head(files):  # InternVLConfig ties by default, whatever the checkpoint holds
            config.tie_word_embeddings = False
        with _bar_for(files):
            model, info = loader.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **sharding,
            )
    except ConfigError:
        raise
    except Exception as error:  # transformers and safetensors raise many kinds; each means: cannot be loaded
        raise CheckpointError(f"{directory} could not be loaded: {first_line(error)}") from error
    _check_tensors(directory, info)
    if sharding:
        _use_local_weights(model)
    if quantize is not None:
        quantize_linears(model.model.language_model.layers, quantize, device)
    return model.to(device).eval()


def view(model: nn.Module) -> ModelView:
    """Return the parts of a loaded model that the loop runs.

    Raises
    ------
    CheckpointError
        The model is not an InternVL model, or its text model needs what the loop does not do (sliding
        windows, partial rotary dimensions, rotary types that depend on the length).
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "internvl" or not hasattr(model, "lm_head"):
        raise CheckpointError(
            f"Expected transformers' InternVLForConditionalGeneration, got {type(model).__name__} "
            f"of model type {getattr(config, 'model_type', None)!r}."
        )
    body, text = model.model, config.text_config
    decoder: Any = body.language_model  # type: ignore[union-attr]
    _check_text_model(text, decoder)
    attention = decoder.layers[0].self_attn
    num_heads = attention.q_proj.weight.shape[0] // attention.head_dim
    return ModelView(
        image_features=lambda pixels: _image_features(model, pixels),
        embed=decoder.embed_tokens,
        layers=tuple(_layer_view(layer) for layer in decoder.layers),
        norm=decoder.norm,
        lm_head=model.lm_head,  # type: ignore[arg-type]
        rotary=decoder.rotary_emb,
        processes=text.num_attention_heads // num_heads,
        num_heads=num_heads,
        num_kv_heads=attention.k_proj.weight.shape[0] // attention.head_dim,
        head_dim=attention.head_dim,
        softmax_scale=float(attention.scaling),
        context=text.max_position_embeddings,
        vocab_size=text.vocab_size,
        image_token_id=config.image_token_id,
        tokens_per_tile=_tokens_per_tile(config),
        tile_size=_pair(config.vision_config.image_size),
        eos_ids=_eos_ids(model),
        device=decoder.embed_tokens.weight.device,
        dtype=decoder.embed_tokens.weight.dtype,
        generation_config=getattr(model, "generation_config", None),
    )


def logits_processors(generation_config: Any, prompt_length: int, eos_ids: frozenset[int]) -> Any | None:
    """Return the checkpoint's deterministic logits processors as a ``LogitsProcessorList``, or None without
    any.

    Supported: repetition_penalty, min_length, no_repeat_ngram_size, bad_words_ids, min_new_tokens,
    suppress_tokens, begin_suppress_tokens. Decoding is greedy, so sampling settings (temperature, top_p, ...)
    and beams are ignored.

    Raises
    ------
    CheckpointError
        A setting has a value that makes no sense.
    """
    try:
        found = _processors(generation_config, prompt_length, eos_ids)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint's generation settings are wrong: {first_line(error)}"
        ) from error
    if not found:
        return None
    from transformers import LogitsProcessorList

    return LogitsProcessorList(found)


def _processors(generation_config: Any, prompt_length: int, eos_ids: frozenset[int]) -> list[Any]:
    from transformers.generation import logits_process as lp

    def setting(name: str) -> Any:
        return getattr(generation_config, name, None)

    found: list[Any] = []
    if setting("repetition_penalty") not in (None, 1.0):
        found.append(lp.RepetitionPenaltyLogitsProcessor(float(setting("repetition_penalty"))))
    if setting("min_length") and eos_ids:
        found.append(lp.MinLengthLogitsProcessor(setting("min_length"), sorted(eos_ids)))
    if setting("no_repeat_ngram_size"):
        found.append(lp.NoRepeatNGramLogitsProcessor(setting("no_repeat_ngram_size")))
    if setting("bad_words_ids"):
        found.append(lp.NoBadWordsLogitsProcessor(setting("bad_words_ids"), sorted(eos_ids) or None))
    if setting("min_new_tokens") and eos_ids:
        found.append(
            lp.MinNewTokensLengthLogitsProcessor(prompt_length, setting("min_new_tokens"), sorted(eos_ids))
        )
    if setting("suppress_tokens"):
        found.append(lp.SuppressTokensLogitsProcessor(setting("suppress_tokens")))
    if setting("begin_suppress_tokens"):
        found.append(lp.SuppressTokensAtBeginLogitsProcessor(setting("begin_suppress_tokens"), prompt_length))
    return found


def load_tokenizer(directory: Path) -> Any:
    """Return the tokenizer beside a checkpoint; raises whatever transformers raises."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def image_processor(**settings: Any) -> Any:
    """Return InternVL's image processor in its PIL form, the one that needs no torchvision."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    return GotOcr2ImageProcessorPil(**settings)


def tiled_canvas(size: tuple[int, int], tile: tuple[int, int], fewest: int, most: int) -> tuple[int, int]:
    """Return (columns, rows) of the tiles that an image of ``size`` (height, width) is cut into."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    return get_optimal_tiled_canvas(size, tile, fewest, most)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``; CheckpointError when it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} could not be read as JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected a JSON object.")
    return value


def _check_config(directory: Path) -> None:
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a checkpoint directory: it holds no config.json.")
    config = read_json(path)
    kind = config.get("model_type")
    if kind == "internvl_chat" or "llm_config" in config:
        raise CheckpointError(
            f"{directory} is in the InternVLChatModel format, which is not supported yet. Use the checkpoint "
            "converted to transformers' own format (on the hub its name ends in '-hf')."
        )
    if kind != "internvl":
        raise CheckpointError(f"{directory} holds a model of type {kind!r}; supported is 'internvl'.")
    for part in ("text_config", "vision_config"):  # transformers would build its default, of many gigabytes
        if not isinstance(config.get(part), dict):
            raise CheckpointError(f"{path} lacks {part}; it is not a whole InternVL configuration.")


def _safetensors(directory: Path) -> list[Path]:
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} holds its weights only as pickles ({', '.join(pickles[:3])}), which can run code "
            "when loaded and are refused. Convert the checkpoint to safetensors on a machine that trusts it."
        )
    raise CheckpointError(f"{directory} holds no weights: expected model.safetensors or its shards.")


@contextmanager
def _bar_for(files: list[Path]) -> Iterator[None]:
    """Show transformers' loading bar only where loading takes seconds, and in the first process."""
    from transformers.utils import logging

    wanted = sum(path.stat().st_size for path in files) > 1 << 30 and os.environ.get("RANK", "0") == "0"
    if wanted or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _sharding(directory: Path, text: Any, processes: int) -> dict[str, Any]:
    """Return what makes ``from_pretrained`` share a decoder out to ``processes`` processes."""
    from transformers.distributed import DistributedConfig

    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    if heads % processes or kv_heads % processes:
        raise ConfigError(
            f"{directory} has {heads} attention heads and {kv_heads} KV heads, which {processes} processes "
            f"cannot share evenly. Start torchrun with --nproc-per-node set to a divisor of both, at most "
            f"{math.gcd(heads, kv_heads)}."
        )
    plan = {f"model.language_model.{name}": style for name, style in text.base_model_tp_plan.items()}
    if text.vocab_size % processes == 0:  # transformers 5.17 leaves these two to us and cannot split unevenly
        plan["model.language_model.embed_tokens"] = "embedding_rowwise"
        plan["lm_head"] = "colwise_gather_output"
    return {"distributed_config": DistributedConfig(tp_size=processes, tp_plan=plan)}


def _use_local_weights(model: Any) -> None:
    """Unwrap the decoder layers' DTensors, as each call would: plain tensors can be joined and quantised."""
    from torch.distributed.tensor import DTensor

    for module in model.model.language_model.layers.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if isinstance(weight, DTensor):
                setattr(module, name, nn.Parameter(weight.to_local(), requires_grad=False))
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape


def _holds_lm_head(files: list[Path]) -> bool:
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt") as tensors:
            if any(name.endswith("lm_head.weight") for name in tensors.keys()):  # noqa: SIM118
                return True
    return False


def _check_tensors(directory: Path, info: dict[str, Any]) -> None:
    mismatched = [f"{name} {tuple(came)} for {tuple(want)}" for name, came, want in info["mismatched_keys"]]
    for what, names in (
        ("lacks", sorted(info["missing_keys"])),
        ("holds unknown", sorted(info["unexpected_keys"])),
        ("holds wrongly shaped", sorted(mismatched)),
    ):
        if names:
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            raise CheckpointError(f"{directory} {what} tensors: {', '.join(names[:10])}{more}.")


def _check_text_model(text: Any, decoder: Any) -> None:
    if text.model_type not in TEXT_MODELS:
        raise CheckpointError(
            f"The text model is of type {text.model_type!r}; supported are {', '.join(TEXT_MODELS)}."
        )
    if any(getattr(layer.self_attn, "sliding_window", None) for layer in decoder.layers):
        raise CheckpointError("The text model has sliding-window layers, which are not supported.")
    rope_type = getattr(decoder.rotary_emb, "rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise CheckpointError(
            f"The rotary type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}."
        )
    head_dim = decoder.layers[0].self_attn.head_dim
    if 2 * decoder.rotary_emb.inv_freq.numel() != head_dim:
        raise CheckpointError(
            f"The rotary embedding turns {2 * decoder.rotary_emb.inv_freq.numel()} of {head_dim} head "
            "dimensions; only full rotary embeddings are supported."
        )


def _layer_view(layer: Any) -> Layer:
    attention = layer.self_attn
    return Layer(
        input_norm=layer.input_layernorm,
        q_proj=attention.q_proj,
        k_proj=attention.k_proj,
        v_proj=attention.v_proj,
        q_norm=getattr(attention, "q_norm", None),
        k_norm=getattr(attention, "k_norm", None),
        o_proj=attention.o_proj,
        post_norm=layer.post_attention_layernorm,
        gate_proj=layer.mlp.gate_proj,
        up_proj=layer.mlp.up_proj,
        activation=layer.mlp.act_fn,
        down_proj=layer.mlp.down_proj,
    )


def _image_features(model: Any, pixel_values: Tensor) -> Tensor:
    output = model.get_image_features(
        pixel_values=pixel_values,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        return_dict=True,
    )
    return output.pooler_output  # (tiles, tokens, hidden_size)


def _tokens_per_tile(config: Any) -> int:
    height, width = _pair(config.vision_config.image_size)
    patch_height, patch_width = _pair(config.vision_config.patch_size)
    ratio = config.downsample_ratio
    return int(height // patch_height * ratio) * int(width // patch_width * ratio)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, (list, tuple)) else (int(value), int(value))


def _eos_ids(model: Any) -> frozenset[int]:
    for config in (getattr(model, "generation_config", None), model.config, model.config.text_config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, (list, tuple)) else [ids])
    return frozenset()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its kind."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
