"""torch.compile: whole graphs, no recompile after warm-up, the same answers, a cache for the next process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from sgl_runtime import SGLConfig, SGLPipeline

from . import slow

pytestmark = pytest.mark.slow

CONFIG = SGLConfig(
    max_new_tokens=6,
    prune_layer=1,
    keep_ratio=0.3,
    compile=True,
    max_batch=2,
    max_prompt_tokens=160,
    max_text_tokens=64,
)
LAYOUTS = [
    "t" * before + "I" * tiles + "t" * after
    for before, tiles, after in [
        (1, 1, 2),
        (3, 2, 9),
        (0, 3, 20),
        (9, 4, 1),
        (2, 5, 30),
        (1, 6, 17),
        (5, 1, 40),
    ]
] + ["tItttItIIt", "ItItItItt", "t" * 7 + "I" * 9 + "t" * 8]  # the last one: all but as long as allowed


@pytest.fixture(scope="module")
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("inductor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(directory))
        yield directory


@pytest.fixture(scope="module")
def pipes(cache_directory: Path) -> tuple[SGLPipeline, SGLPipeline]:
    """One pair, compiled and warm, and as it is."""
    torch.compiler.reset()
    models = slow.make_model("qwen2", seed=1, layers=2), slow.make_model("qwen3", seed=2, layers=2)
    compiled = SGLPipeline.from_models(*models, CONFIG)
    compiled.warm_up()
    return compiled, compiled.with_config(replace(CONFIG, compile=False))


def _inputs(number: int) -> slow.Inputs:
    return slow.make_inputs(LAYOUTS[number % len(LAYOUTS)], seed=number)


def test_no_recompile_over_a_hundred_requests(pipes: tuple[SGLPipeline, SGLPipeline]) -> None:
    compiled, plain = pipes
    frames = counters["frames"]["ok"], counters["stats"]["unique_graphs"]
    assert frames[1] > 0
    numbers = list(range(100))
    batches = [[number] for number in numbers[:40]] + [numbers[at : at + 2] for at in range(40, 100, 2)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        answered = [
            result
            for batch in batches
            for result in compiled.generate_batch([(_inputs(n), _inputs(n)) for n in batch])
        ]
    assert (counters["frames"]["ok"], counters["stats"]["unique_graphs"]) == frames
    assert len(answered) == 100
    for number, result in enumerate(answered[:60:3]):
        expected = plain.generate(_inputs(3 * number), _inputs(3 * number))
        assert result.token_ids == expected.token_ids
        assert result.small_token_ids == expected.small_token_ids
        assert torch.equal(result.kept_index, expected.kept_index)
        assert result.accepted_draft == expected.accepted_draft
        assert result.decision_score == pytest.approx(expected.decision_score, rel=1e-4)
        torch.testing.assert_close(result.mass, expected.mass, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{"draft": False}, {"keep_ratio": 1.0}, {"prune_layer": 0}, {"exit_score": "confidence"}],
    ids=str,
)
def test_every_setting_traces_whole(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only traced, not generated: that takes inductor seconds a graph, and its numbers are compared above."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    models = slow.make_model("llama", seed=3, layers=2), slow.make_model("qwen3", seed=4, layers=2)
    compiled = SGLPipeline.from_models(*models, replace(CONFIG, **changes))
    plain = compiled.with_config(replace(CONFIG, **changes, compile=False))
    compiled.warm_up()
    late = compiled.with_config(replace(CONFIG, **changes, schedule="latency"))
    late.warm_up()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(12):
            pipe = late if number % 2 else compiled
            result, expected = (one.generate(_inputs(number), _inputs(number)) for one in (pipe, plain))
            assert result.token_ids == expected.token_ids
            assert torch.equal(result.kept_index, expected.kept_index)
            assert result.accepted_draft == expected.accepted_draft
            assert result.confidence == pytest.approx(expected.confidence, rel=1e-5)


def test_another_thread_compiles_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    models = slow.make_model("llama", seed=5, layers=1), slow.make_model("qwen3", seed=6, layers=2)
    pipe = SGLPipeline.from_models(*models, replace(CONFIG, max_batch=1))
    one = _inputs(3)
    expected = pipe.generate(one, one).token_ids
    with ThreadPoolExecutor(1) as pool, torch._dynamo.config.patch(error_on_recompile=True):
        assert pool.submit(pipe.generate, one, one).result().token_ids == expected
    with torch.device("cpu"):  # a default device is a case of its own to torch, but one that traces
        assert pipe.generate(one, one).token_ids == expected


def test_many_configurations_compile_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own limit is eight versions of a function, and each thread has its own settings."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = slow.make_model("llama", seed=7, layers=3)
    base = SGLPipeline.from_models(model, model, replace(CONFIG, max_batch=1, max_new_tokens=2))
    one = _inputs(3)
    torch.compiler.reset()
    with ThreadPoolExecutor(1) as pool:
        for layer, keep, draft in product(range(3), (0.3, 1.0), (True, False)):
            config = replace(base.config, prune_layer=layer, keep_ratio=keep, draft=draft)
            assert pool.submit(base.with_config(config).generate, one, one).result().token_ids


_SECOND = """
import json, sys
import torch
from torch._dynamo.utils import counters
sys.path.insert(0, {root!r})
from sgl_runtime import SGLPipeline
from tests.runtime import slow
from tests.runtime.test_compiled import CONFIG
torch.set_num_threads(1)
models = slow.make_model("qwen2", seed=1, layers=2), slow.make_model("qwen3", seed=2, layers=2)
SGLPipeline.from_models(*models, CONFIG).warm_up()
print(json.dumps(dict(counters["inductor"]) | dict(counters["aot_autograd"])))
"""


def test_the_second_process_finds_everything_compiled(
    pipes: tuple[SGLPipeline, SGLPipeline], cache_directory: Path
) -> None:
    root = str(Path(__file__).parents[2])
    out = subprocess.run(
        [sys.executable, "-c", _SECOND.format(root=root)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache_directory)},
    )
    counted = json.loads(out.stdout.splitlines()[-1])
    assert counted["autograd_cache_hit"] > 0
    assert counted.get("autograd_cache_miss", 0) == 0
    assert "compil" in out.stderr  # progress
