"""All contact with Hugging Face internals that families share: loading, the decoder's modules, its settings.

Nothing outside this file and families/ reaches into a transformers model, so a new transformers release
breaks one file, or one family.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgl_runtime import convert
from sgl_runtime.checkpoints import checkpoint_directory, first_line, read_json, safetensors_of
from sgl_runtime.errors import CheckpointError, ConfigError, SGLError
from sgl_runtime.families import Family, family_of
from sgl_runtime.quantize import quantize_linears

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_TESTED = ((5, 17), (5, 23))  # oldest and newest transformers, by `make test-matrix`
_NOT_SHARED = {
    "phi3": "q, k and v are one matrix",
    "qwen3_vl_moe_text": "the checkpoint holds its experts transposed",
}
CPU = torch.device("cpu")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layer:
    """The modules of one pre-norm decoder layer, in the order in which they run.

    `qkv` and `gate_up` are one module or several whose outputs stand one after the other. A mixture of
    experts is `experts`, and has no gate_up, activation and down_proj.
    """

    input_norm: nn.Module
    qkv: list[nn.Module]
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    o_proj: nn.Module
    post_norm: nn.Module
    gate_up: list[nn.Module]
    activation: Callable[[Tensor], Tensor] | None
    down_proj: nn.Module | None
    experts: nn.Module | None


@dataclass(frozen=True)
class ModelView:
    """What the loop needs of a loaded model: its own modules and a few numbers."""

    family: Family
    embed: nn.Module
    layers: tuple[Layer, ...]
    norm: nn.Module
    lm_head: nn.Module
    rope: Callable[[Tensor], tuple[Tensor, Tensor]]  # positions (S,) or (3, S) -> cos, sin (S, head_dim)
    processes: int  # that share the language model
    num_heads: int  # in this process
    num_kv_heads: int
    head_dim: int
    softmax_scale: float
    capturable: bool  # whether a CUDA graph can hold a decode step
    context: int
    vocab_size: int
    eos_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype
    generation_config: Any


def load_model(
    source: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    processes: int = 1,
    quantize: str | None = None,
) -> nn.Module:
    """Load a checkpoint of a supported family from safetensors, in ``dtype`` on ``device``.

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
    if convert.is_chat_format(directory):
        return _load_chat_format(directory, device, dtype, processes, quantize)
    family = _checked_family(directory)
    files = safetensors_of(directory)
    import transformers

    loader: Any = getattr(transformers, family.architecture)
    try:
        config = loader.config_class.from_pretrained(directory, local_files_only=True)
        family.check_config(config)
        sharding = {} if processes == 1 else _sharding(directory, family, config, processes)
        if _holds_lm_head(files):  # some configurations tie by default, whatever the checkpoint holds
            config.tie_word_embeddings = False
        with _bar_for(files):
            model, info = loader.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                attn_implementation="sdpa",  # a checkpoint may name a kernel of the hub, which is code
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **sharding,
            )
    except SGLError:
        raise
    except Exception as error:  # transformers and safetensors raise many kinds; each means: cannot be loaded
        raise CheckpointError(f"{directory} could not be loaded: {first_line(error)}") from error
    _check_tensors(directory, info)
    layers = getattr(model.model, family.decoder).layers
    if sharding:
        _use_local_weights(layers)
    if quantize is not None:
        quantize_linears(layers, quantize, device)
    return model.to(device).eval()


def view(model: nn.Module) -> ModelView:
    """Return the parts of a loaded model that the loop runs.

    Raises
    ------
    CheckpointError
        The model is of no supported family, or its text model needs what the loop does not do (sliding
        windows, partial rotary dimensions, rotary types that depend on the length).
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        raise CheckpointError(
            f"Expected a vision-language model of transformers, got {type(model).__name__}."
        )
    kind = family_of(getattr(config, "model_type", None))
    if not hasattr(model, "lm_head"):
        raise CheckpointError(f"Expected transformers' {kind.architecture}, got {type(model).__name__}.")
    import transformers

    _check_version(transformers.__version__)
    kind.check_config(config)
    family, text = kind(model), config.text_config
    decoder: Any = getattr(model.model, kind.decoder)
    _check_text_model(kind, text, decoder)
    attention, weight = decoder.layers[0].self_attn, decoder.embed_tokens.weight
    num_heads, num_kv_heads = _num_heads(attention, text)
    like = torch.empty(0, dtype=weight.dtype, device=weight.device)
    return ModelView(
        family=family,
        embed=decoder.embed_tokens,
        layers=tuple(_layer_view(layer) for layer in decoder.layers),
        norm=decoder.norm,
        lm_head=model.lm_head,  # type: ignore[arg-type]
        rope=lambda positions: family.rope(decoder.rotary_emb, like, positions),
        processes=text.num_attention_heads // num_heads,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=attention.head_dim,
        softmax_scale=float(attention.scaling),
        capturable=_capturable(decoder, weight),
        context=_context(text),
        vocab_size=text.vocab_size,
        eos_ids=_eos_ids(model),
        device=weight.device,
        dtype=weight.dtype,
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

    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _checked_family(directory: Path) -> type[Family]:
    """Return the family of a checkpoint whose config.json is whole."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a checkpoint directory: it holds no config.json.")
    config = read_json(path)
    try:
        family = family_of(config.get("model_type"))
    except CheckpointError as error:
        code = " Its own code (auto_map in config.json) is never run." if "auto_map" in config else ""
        raise CheckpointError(f"{directory} cannot be used. {error}{code}") from error
    for part in family.parts:
        if not isinstance(config.get(part), dict):
            raise CheckpointError(f"{path} lacks {part}; it is not a whole configuration.")
    return family


def _load_chat_format(
    directory: Path, device: torch.device, dtype: torch.dtype, processes: int, quantize: str | None
) -> nn.Module:
    if processes > 1:
        raise ConfigError(
            f"{directory} is in the InternVLChatModel format, which cannot be shared out among processes as "
            f"it is. Convert it first: sgl-vlm convert {directory} OUT"
        )
    model: Any = convert.load_chat_format(directory, device if quantize is None else CPU, dtype)
    if quantize is not None:
        quantize_linears(model.model.language_model.layers, quantize, device)
    return model.to(device)


@cache
def _check_version(version: str) -> None:
    """Warn of a transformers release that nobody has tried; it may well work."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not _TESTED[0] <= found <= _TESTED[1]:
        oldest, newest = (".".join(map(str, tested)) for tested in _TESTED)
        log.warning(
            "transformers %s is not among the releases that were tested, %s to %s. If a model misbehaves, "
            "install one of those.",
            *(version, oldest, newest),
        )


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


def _sharding(directory: Path, family: type[Family], config: Any, processes: int) -> dict[str, Any]:
    """Return what makes ``from_pretrained`` share a decoder out to ``processes`` processes."""
    from transformers import Qwen3Config
    from transformers.distributed import DistributedConfig

    text, decoder = config.text_config, f"model.{family.decoder}"
    if text.model_type in _NOT_SHARED:
        raise ConfigError(
            f"{directory} has a text model of type {text.model_type!r}, which transformers cannot share out: "
            f"{_NOT_SHARED[text.model_type]}. Run it in one process."
        )
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    if heads % processes or kv_heads % processes:
        raise ConfigError(
            f"{directory} has {heads} attention heads and {kv_heads} KV heads, which {processes} processes "
            f"cannot share evenly. Start torchrun with --nproc-per-node set to a divisor of both, at most "
            f"{math.gcd(heads, kv_heads)}."
        )
    styles = text.base_model_tp_plan or Qwen3Config.base_model_tp_plan  # Qwen3-VL has none, and these modules
    plan = {f"{decoder}.{name}": style for name, style in styles.items()}
    if text.vocab_size % processes == 0:  # transformers 5.17 leaves these two to us and cannot split unevenly
        plan[f"{decoder}.embed_tokens"] = "embedding_rowwise"
        plan["lm_head"] = "colwise_gather_output"
    return {"distributed_config": DistributedConfig(tp_size=processes, tp_plan=plan)}


def _use_local_weights(layers: nn.Module) -> None:
    """Unwrap the decoder layers' DTensors, as each call would: plain tensors can be joined and quantised."""
    from torch.distributed.tensor import DTensor

    for path, module in layers.named_modules():
        if path.endswith(".experts"):  # transformers 5.17 then forgets to add up their outputs
            continue
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


def _check_text_model(family: type[Family], text: Any, decoder: Any) -> None:
    if text.model_type not in family.text_models:
        raise CheckpointError(
            f"The text model is of type {text.model_type!r}; {family.architecture} is supported with "
            f"{', '.join(family.text_models)}."
        )
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in decoder.layers]
    if text.model_type in ("mistral", "phi3"):  # these keep it in the configuration, for every layer
        windows = [text.sliding_window]
    if any(window is not None and window < _context(text) for window in windows):
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


def _context(text: Any) -> int:
    """Return how many tokens the text model takes with one set of rotary frequencies."""
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond it every position, also of cached keys, turns otherwise
        known = rope.get("original_max_position_embeddings", None)
        return int(known or text.original_max_position_embeddings)
    return int(text.max_position_embeddings)


def _num_heads(attention: Any, text: Any) -> tuple[int, int]:
    """Return the query and KV heads of this process."""
    if hasattr(attention, "qkv_proj"):
        return text.num_attention_heads, text.num_key_value_heads
    return tuple(p.weight.shape[0] // attention.head_dim for p in (attention.q_proj, attention.k_proj))


def _capturable(decoder: Any, weight: Tensor) -> bool:
    """Whether decoding never reads the device: torch's grouped products do where they have no own kernel."""
    if all(hasattr(layer.mlp, "down_proj") for layer in decoder.layers) or weight.device.type != "cuda":
        return True
    return weight.dtype == torch.bfloat16 and torch.cuda.get_device_capability(weight.device)[0] in (9, 10)


def _layer_view(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(attention, "qkv_proj"):
        qkv = [attention.qkv_proj]
    else:
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    gate_up: list[nn.Module] = []
    is_dense = hasattr(mlp, "down_proj")
    if is_dense:
        gate_up = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
    return Layer(
        input_norm=layer.input_layernorm,
        qkv=qkv,
        q_norm=getattr(attention, "q_norm", None),
        k_norm=getattr(attention, "k_norm", None),
        o_proj=attention.o_proj,
        post_norm=layer.post_attention_layernorm,
        gate_up=gate_up,
        activation=getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None) if is_dense else None,
        down_proj=mlp.down_proj if is_dense else None,
        experts=None if is_dense else mlp,
    )


def _eos_ids(model: Any) -> frozenset[int]:
    for config in (getattr(model, "generation_config", None), model.config, model.config.text_config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, (list, tuple)) else [ids])
    return frozenset()
