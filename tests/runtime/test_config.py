from __future__ import annotations

import math
from typing import Any

import pytest

from sgl_runtime.config import SGLConfig, num_kept
from sgl_runtime.errors import ConfigError, SGLError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"keep_ratio": 20},
            r"keep_ratio must be in \(0, 1\], got 20. 20 looks like a percentage, write 0.2",
        ),
        ({"keep_ratio": 35.5}, "write 0.355"),
        ({"keep_ratio": 0}, "share of visual tokens that is KEPT"),
        ({"keep_ratio": -0.1}, "KEPT"),
        ({"keep_ratio": 1.0001}, "must be in"),
        ({"keep_ratio": math.nan}, "must be a number"),
        ({"keep_ratio": "0.2"}, "must be a number"),
        ({"keep_ratio": True}, "must be a number"),
        ({"consistency_keep_ratio": 5}, "consistency_keep_ratio.*write 0.05"),
        ({"prune_layer": -1}, "negative"),
        ({"prune_layer": 1.0}, "Write an int, 1"),
        ({"prune_layer": 9.5}, "Write an int, 9"),
        ({"prune_layer": None}, "must be an int"),
        ({"prune_layer": True}, "must be an int"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 2.0}, "must be an int"),
        ({"max_new_tokens": True}, "must be an int"),
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"exit_threshold": 70}, "write 0.7"),
        ({"exit_threshold": -0.1}, "None or in"),
        ({"exit_threshold": math.inf}, "None or a number"),
        ({"exit_score": "consistency"}, "'both', 'confidence'"),
        ({"schedule": "fast"}, "'throughput', 'latency'"),
        ({"draft": 1}, "draft must be one of"),
        ({"compile": 1}, "compile must be one of"),
        ({"compile": "always"}, "compile must be one of 'auto', True, False, got 'always'"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be at least 1"),
        ({"max_text_tokens": 1.5}, "max_text_tokens must be an int"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SGLConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"keep_ratio": 1},
        {"keep_ratio": 1e-9},
        {"exit_threshold": 0},
        {"exit_threshold": 1.0},
        {"prune_layer": 0},
        {"prune_layer": 0.0},
        {"compile": False},
        {"compile": True},
        {"max_prompt_tokens": 1},
        {"max_text_tokens": 1},
    ],
    ids=str,
)
def test_taken(changes: dict[str, Any]) -> None:
    (name, value), *_ = changes.items()
    assert getattr(SGLConfig(**changes), name) == value


@pytest.mark.parametrize(
    ("prune_layer", "num_layers", "layer"),
    [(0, 4, 0), (3, 4, 3), (0.0, 10, 0), (0.4, 10, 4), (0.2, 24, 4), (0.9, 10, 9), (0.999, 5, 4)],
)
def test_layer(prune_layer: int | float, num_layers: int, layer: int) -> None:
    assert SGLConfig(prune_layer=prune_layer).layer_of(num_layers) == layer


def test_layer_outside() -> None:
    with pytest.raises(ConfigError, match="layers are 0 to 3"):
        SGLConfig(prune_layer=4).layer_of(4)


@pytest.mark.parametrize(
    ("total", "ratio", "kept"), [(80, 0.2, 16), (80, 0.09, 7), (256, 0.001, 1), (3, 1.0, 3)]
)
def test_num_kept(total: int, ratio: float, kept: int) -> None:
    assert num_kept(total, ratio) == kept


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        SGLConfig().keep_ratio = 0.5  # type: ignore[misc]


def test_errors_are_value_errors() -> None:
    assert issubclass(ConfigError, SGLError)
    assert issubclass(SGLError, ValueError)
