"""Scenes, what the pipeline itself answers, and stand-ins for frameworks that are not installed.

`make test-plugins` runs these tests beside the real frameworks. Elsewhere the stand-ins here take their
places: only what our plugins touch, written to the sources of lmms-eval 0.7.3 and of ms-vlmeval 0.0.20.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sgl_runtime import SGLConfig, SGLPipeline, tiny
from sgl_runtime.tiny.export import export

HAS_LMMS_EVAL = importlib.util.find_spec("lmms_eval") is not None
HAS_VLMEVALKIT = importlib.util.find_spec("vlmeval") is not None
SETTINGS: dict[str, Any] = {"exit_threshold": 0.95, "max_new_tokens": 12, "compile": False, "device": "cpu"}


@dataclass
class Scenes:
    """Twelve questions about three scenes; ``image`` of a row is a file in ``folder``."""

    folder: Path
    rows: list[dict[str, Any]]

    def image(self, number: int) -> str:
        return str(self.folder / self.rows[number]["image"])


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    file = export("test", 3, tmp_path_factory.mktemp("scenes"))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return Scenes(file.parent, rows)


@pytest.fixture(scope="session")
def pipe() -> SGLPipeline:
    settings = {name: value for name, value in SETTINGS.items() if name != "device"}
    return SGLPipeline.from_pretrained(tiny.SMALL, tiny.LARGE, config=SGLConfig(**settings), device="cpu")


@pytest.fixture(scope="session")
def expected(scenes: Scenes, pipe: SGLPipeline) -> list[Any]:
    """The pipeline's own results, one question at a time."""
    results = [pipe(scenes.image(i), row["question"]) for i, row in enumerate(scenes.rows)]
    assert 0 < sum(result.exited for result in results) < len(results)
    return results


@pytest.fixture(scope="session")
def lmms_eval_plugin() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_LMMS_EVAL:
            for module in _lmms_eval():
                patch.setitem(sys.modules, module.__name__, module)
        yield importlib.import_module("sgl_runtime.plugins.lmms_eval")


@pytest.fixture(scope="session")
def vlmevalkit_plugin() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_VLMEVALKIT:
            for module in _vlmevalkit():
                patch.setitem(sys.modules, module.__name__, module)
        yield importlib.import_module("sgl_runtime.plugins.vlmevalkit")


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module


def _lmms_eval() -> list[ModuleType]:
    @dataclass
    class TokenCounts:
        output_tokens: int | None = None

    @dataclass
    class GenerationResult:
        text: str
        token_counts: TokenCounts | None = None

    @dataclass
    class Instance:
        request_type: str
        arguments: tuple[Any, ...]
        idx: int
        metadata: dict[str, Any]

        @property
        def args(self) -> tuple[Any, ...]:
            return self.arguments

    @dataclass
    class ModelManifest:
        model_id: str
        chat_class_path: str

    class lmms:
        def __init__(self) -> None:
            self.task_dict: dict[str, Any] = {}

    return [
        _module("loguru", logger=logging.getLogger("stand-in for loguru")),
        _module("lmms_eval"),
        _module("lmms_eval.api"),
        _module(
            "lmms_eval.api.instance",
            TokenCounts=TokenCounts,
            GenerationResult=GenerationResult,
            Instance=Instance,
        ),
        _module("lmms_eval.api.model", lmms=lmms),
        _module("lmms_eval.models"),
        _module("lmms_eval.models.registry_v2", ModelManifest=ModelManifest),
        _module("lmms_eval.models.model_utils"),
        _module("lmms_eval.models.model_utils.gen_metrics", log_metrics=lambda **metrics: None),
    ]


def _vlmevalkit() -> list[ModuleType]:
    class BaseModel:
        allowed_types = ("text", "image", "video")

        def generate(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
            assert all(part["type"] in self.allowed_types for part in message)
            return self.generate_inner(message, dataset)

    base = _module("vlmeval.vlm.base", BaseModel=BaseModel)
    vlm = _module("vlmeval.vlm", base=base)
    return [_module("vlmeval", vlm=vlm), vlm, base]
