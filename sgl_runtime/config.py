"""The settings of the pipeline and their validation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from sgl_runtime.errors import ConfigError


@dataclass(frozen=True)
class SGLConfig:
    """Settings of small-VLM-guided pruning (SGP) and small-VLM early exit (SEE), arXiv 2412.03324.

    Parameters
    ----------
    keep_ratio
        Share of visual tokens that the large VLM keeps, in (0, 1];
        ``num_keep = max(1, int(N_v * keep_ratio))``. 1.0 turns pruning off.
    prune_layer
        Pruning happens on entry to this decoder layer of the large VLM: an int is the layer itself (0-based),
        a float in [0, 1) a share of the depth, ``int(num_layers * prune_layer)``.
    exit_threshold
        Exit with the small VLM's answer when the decision score reaches it, in [0, 1]. None never exits.
    keep_scope
        "request": the best of all images and videos together. "image": of each its own share.
    consistency_keep_ratio
        Share of visual tokens that the small VLM keeps, from layer 0 on, in the consistency pass; in (0, 1].
    max_new_tokens
        Longest answer, end-of-sequence token included, of either VLM.
    exit_score
        "both": ``(confidence + consistency) / 2``. "confidence": the confidence alone, without a consistency
        pass.
    draft
        Verify the small answer inside the large VLM's prefill: tokens that it agrees with cost no decode
        step. Where the two have different tokenizers, the answer's text is tokenised anew. Never changes an
        answer in float32; in half precision a near tie may fall otherwise.
    schedule
        "throughput": the large VLM starts when it is known to be needed. "latency": its vision tower and the
        layers before the prune layer run while the small VLM answers, for nothing when that exits. Never
        changes an answer.
    compile
        Whether steps go through torch.compile, which takes minutes the first time. "auto": on CUDA only.
    max_batch
        Most requests in one call of `SGLPipeline.batch`. Memory is set aside for as many.
    max_prompt_tokens, max_text_tokens
        Longest prompt, and how many of its tokens may not be visual. Memory is set aside for them.
    calibration
        Where the settings come from, see `from_file`; None as soon as one of them is changed.

    Raises
    ------
    ConfigError
        A value is out of range; the message names the field, what came and what is expected.
    """

    keep_ratio: float = 0.2
    prune_layer: int | float = 0.2
    exit_threshold: float | None = None
    consistency_keep_ratio: float = 0.05
    max_new_tokens: int = 128
    exit_score: str = "both"
    draft: bool = True
    schedule: str = "throughput"
    compile: str | bool = "auto"
    max_batch: int = 8
    max_prompt_tokens: int = 4096
    max_text_tokens: int = 1024
    keep_scope: str = "request"
    calibration: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def from_file(cls, path: str | Path, **others: Any) -> SGLConfig:
        """Return the settings that `sgl-vlm calibrate` wrote, and ``others``.

        `SGLPipeline.from_pretrained` warns when the pair is not the one that was calibrated.

        Raises
        ------
        ConfigError
            The file is not a calibration, or one of ``others`` is what it fixes.
        """
        from sgl_runtime.evaluation.calibration import read_calibration

        found = read_calibration(path)
        both = sorted(found.settings().keys() & others.keys())
        if both:
            raise ConfigError(
                f"{path} fixes {', '.join(both)}: its promise holds for those values only. Leave them out, "
                "or write an SGLConfig of your own."
            )
        return cls(**found.settings(), **others, calibration=found)

    def __post_init__(self) -> None:
        _check_ratio("keep_ratio", self.keep_ratio)
        _check_ratio("consistency_keep_ratio", self.consistency_keep_ratio)
        _check_prune_layer(self.prune_layer)
        if self.exit_threshold is not None:
            _check_threshold(self.exit_threshold)
        _check_count("max_new_tokens", self.max_new_tokens)
        _check_count("max_batch", self.max_batch)
        _check_count("max_prompt_tokens", self.max_prompt_tokens)
        _check_count("max_text_tokens", self.max_text_tokens)
        _check_choice("keep_scope", self.keep_scope, ("request", "image"))
        _check_choice("exit_score", self.exit_score, ("both", "confidence"))
        _check_choice("schedule", self.schedule, ("throughput", "latency"))
        _check_choice("draft", self.draft, (True, False))
        _check_choice("compile", self.compile, ("auto", True, False))
        if self.calibration is not None:
            fixed = self.calibration.settings()
            if {name: getattr(self, name) for name in fixed} != fixed:
                object.__setattr__(self, "calibration", None)

    def layer_of(self, num_layers: int) -> int:
        """Return the prune layer K, ``0 <= K < num_layers``, for a model of ``num_layers`` decoder layers.

        Raises
        ------
        ConfigError
            An int ``prune_layer`` lies outside the model.
        """
        if isinstance(self.prune_layer, float):
            return int(num_layers * self.prune_layer)
        if self.prune_layer >= num_layers:
            raise ConfigError(
                f"prune_layer={self.prune_layer} is outside the large model, whose layers are 0 to "
                f"{num_layers - 1}. Choose one of them; to prune nothing use keep_ratio=1.0."
            )
        return self.prune_layer


def num_kept(num_visual: int, keep_ratio: float) -> int:
    """Return ``max(1, int(num_visual * keep_ratio))``, the visual tokens kept."""
    return max(1, int(num_visual * keep_ratio))


def token_ratio(num_layers: int, prune_layer: int, keep_ratio: float) -> float:
    """Return the average share of visual tokens over the layers."""
    return (prune_layer + (num_layers - prune_layer) * keep_ratio) / num_layers


def read_prune_layer(text: str) -> int | float:
    """Return the prune layer in ``text``: "3" is a layer, "0.2" a share. ValueError when it is neither."""
    return float(text) if "." in text else int(text)


def _is_number(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the floats
        return False


def _percentage_hint(value: float) -> str:
    return f" {value:g} looks like a percentage, write {value / 100:g}." if 1 < value <= 100 else ""


def _check_ratio(name: str, value: Any) -> None:
    if not _is_number(value):
        raise ConfigError(f"{name} must be a number in (0, 1], got {value!r}.")
    if not 0 < value <= 1:
        hint = _percentage_hint(value) or " It is the share of visual tokens that is KEPT."
        raise ConfigError(f"{name} must be in (0, 1], got {value!r}.{hint}")


def _check_threshold(value: Any) -> None:
    if not _is_number(value):
        raise ConfigError(f"exit_threshold must be None or a number in [0, 1], got {value!r}.")
    if not 0 <= value <= 1:
        raise ConfigError(
            f"exit_threshold must be None or in [0, 1], got {value!r}.{_percentage_hint(value)}"
        )


def _check_prune_layer(value: Any) -> None:
    if not _is_number(value):
        raise ConfigError(
            f"prune_layer must be an int (a layer) or a float in [0, 1) (a share), got {value!r}."
        )
    if value < 0:
        raise ConfigError(f"prune_layer must not be negative, got {value!r}.")
    if isinstance(value, float) and value >= 1:
        raise ConfigError(
            f"prune_layer={value!r} is a float and must be a share of the depth in [0, 1). Write an int, "
            f"{int(value)}, for the layer itself; to prune nothing use keep_ratio=1.0."
        )


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} must be an int, got {value!r}.")
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value}.")


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
