"""The pipeline: exits, pruning by the small VLM's mass, matching of the two prompts, batches, results."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import sgl_runtime
from sgl_runtime import SGLConfig, SGLPipeline
from sgl_runtime.errors import BatchError, ImageError, MemoryLimitError, PromptError

from . import slow
from .checkpoints import picture
from .compare import assert_same_result

CONFIG = SGLConfig(max_new_tokens=5, prune_layer=2, keep_ratio=0.3)


@pytest.fixture
def bare(small_model: torch.nn.Module, large_model: torch.nn.Module) -> SGLPipeline:
    return SGLPipeline.from_models(small_model, large_model, CONFIG)


@pytest.mark.parametrize("layout", ["tttIttttt", "tItttItIIt"])
@pytest.mark.parametrize(("prune_layer", "layer"), [(0, 0), (2, 2), (0.4, 2), (0.99, 5)])
def test_large_answer_is_the_slow_one(
    bare: SGLPipeline, large_model: torch.nn.Module, layout: str, prune_layer: int | float, layer: int
) -> None:
    inputs = slow.make_inputs(layout, seed=1)
    result = bare.with_config(replace(CONFIG, prune_layer=prune_layer)).generate(inputs, inputs)
    visual = (inputs["input_ids"][0] == slow.IMAGE_ID).nonzero()[:, 0].tolist()
    num_keep = int(len(visual) * 0.3)
    kept = slow.kept_positions(visual, inputs["input_ids"].shape[1], result.mass.tolist(), num_keep)
    assert result.kept_index.tolist() == kept
    assert [visual[j] for j in result.kept_visual] == sorted(set(kept) & set(visual))
    assert result.token_ids == slow.pruned_greedy(large_model, inputs, layer, kept, 5)[0]


def test_keep_ratio_one_is_the_unpruned_model(bare: SGLPipeline, large_model: torch.nn.Module) -> None:
    inputs = slow.make_inputs(seed=2)
    result = bare.with_config(replace(CONFIG, keep_ratio=1.0)).generate(inputs, inputs)
    assert result.token_ids == slow.greedy(large_model, inputs, 5)
    assert result.kept_index.tolist() == list(range(inputs["input_ids"].shape[1]))
    assert result.kept_visual.tolist() == list(range(slow.PER_TILE))


def test_memory_beyond_the_context_changes_no_rotary_table() -> None:
    """A "dynamic" rotary type turns every position differently once one lies beyond the context."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = slow.make_model("llama", seed=3, rope_parameters=rope)
    inputs = slow.make_inputs(seed=2)
    pipe = SGLPipeline.from_models(model, model, replace(CONFIG, keep_ratio=1.0, max_new_tokens=12))
    assert pipe.config.max_prompt_tokens > pipe.large.model.context
    assert pipe.generate(inputs, inputs).token_ids == slow.greedy(model, inputs, 12)


def test_exit(bare: SGLPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = slow.make_inputs(seed=3)
    free = bare.generate(inputs, inputs)
    at, above = (
        bare.with_config(replace(CONFIG, exit_threshold=free.decision_score + extra)) for extra in (0.0, 1e-9)
    )
    staying = above.generate(inputs, inputs)
    assert not staying.exited
    assert staying.token_ids == free.token_ids
    assert free.token_ids != free.small_token_ids

    for name in ("encode", "begin", "answer", "generate", "reserve"):
        monkeypatch.setattr(bare.large, name, lambda *_, **__: pytest.fail("the large VLM ran"))
    leaving = at.generate(inputs, inputs)
    assert leaving.exited
    assert leaving.token_ids == leaving.small_token_ids == free.small_token_ids
    assert leaving.kept_index is None
    assert leaving.kept_visual is None
    assert not any(stage.startswith("large") for stage in leaving.timings)


def test_exit_allocates_no_memory_for_the_large_model(
    small_model: torch.nn.Module, large_model: torch.nn.Module
) -> None:
    config = replace(CONFIG, exit_threshold=0.0, max_new_tokens=2)
    pipe = SGLPipeline.from_models(small_model, large_model, config)
    inputs = slow.make_inputs()
    calls: list[str] = []
    hooks = [m.register_forward_hook(lambda *_: calls.append("x")) for m in large_model.modules()]
    try:
        assert pipe.generate(inputs, inputs).exited
    finally:
        for hook in hooks:
            hook.remove()
    assert pipe.large.memory.allocated == 0
    assert not calls


def test_exit_by_confidence(bare: SGLPipeline) -> None:
    inputs = slow.make_inputs(seed=3)
    both = bare.generate(inputs, inputs)
    config = replace(CONFIG, exit_score="confidence", exit_threshold=both.confidence)
    result = bare.with_config(config).generate(inputs, inputs)
    assert result.exited
    assert result.consistency is None
    assert result.decision_score == both.confidence > both.decision_score


def test_different_image_tokens(small_model: torch.nn.Module) -> None:
    large = slow.make_model("llama", seed=5, image_id=9)
    pipe = SGLPipeline.from_models(small_model, large, CONFIG)
    small_inputs = slow.make_inputs("ttIttItt", seed=6)
    large_inputs = slow.make_inputs("tItIttttt", seed=7, image_id=9)
    result = pipe.generate(small_inputs, large_inputs)
    visual = (large_inputs["input_ids"][0] == 9).nonzero()[:, 0].tolist()
    kept = slow.kept_positions(visual, large_inputs["input_ids"].shape[1], result.mass.tolist(), 9)
    assert result.kept_index.tolist() == kept
    assert result.token_ids == slow.pruned_greedy(large, large_inputs, 2, kept, 5)[0]


def test_counts_must_match(bare: SGLPipeline) -> None:
    one, two = slow.make_inputs("tIt"), slow.make_inputs("tItIt")
    with pytest.raises(PromptError, match=r"small VLM has 16 visual tokens and the large VLM 32"):
        bare.generate(one, two)
    first, second = slow.make_inputs("tItIIt"), slow.make_inputs("tIItIt")
    with pytest.raises(PromptError, match=r"\[16, 32\].*\[32, 16\]"):
        bare.generate(first, second)


@pytest.mark.parametrize("image", [torch.full((16,), -1), torch.full((16,), 10**12), torch.zeros(16) + 0.5])
def test_images_must_be_numbered(bare: SGLPipeline, image: torch.Tensor) -> None:
    one = {**slow.make_inputs(), "visual_image": image, "visual_cells": torch.zeros(16, 3, 2)}
    pipe = bare.with_config(replace(CONFIG, keep_scope="image"))
    with pytest.raises(PromptError, match="visual_image must number images"):
        pipe.generate(one, one)


def test_no_run_starts_when_the_large_prompt_is_bad(
    bare: SGLPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bare.small, "encode", lambda *_, **__: pytest.fail("the small VLM ran"))
    good = slow.make_inputs()
    with pytest.raises(PromptError, match="large VLM's inputs: pixel_values"):
        bare.generate(good, {**good, "pixel_values": None})
    for vlm in (bare.small, bare.large):
        with monkeypatch.context() as patch:
            patch.setattr(vlm, "model", replace(vlm.model, context=20))
            with pytest.raises(PromptError, match=f"{vlm.name} VLM's context holds 20"):
                bare.generate(good, good)


@pytest.mark.parametrize(
    "changes", [{"draft": False}, {"schedule": "latency"}, {"compile": False}, {"max_batch": 1}], ids=str
)
def test_settings_that_change_nothing(bare: SGLPipeline, changes: dict[str, Any]) -> None:
    inputs = slow.make_inputs(seed=8)
    first = bare.generate(inputs, inputs)
    second = bare.with_config(replace(CONFIG, **changes)).generate(inputs, inputs)
    assert first.timings.keys() == second.timings.keys()
    if changes == {"draft": False}:
        assert second.accepted_draft == 0
        second = replace(second, accepted_draft=first.accepted_draft)
    assert_same_result(first, second)


def test_accepted_draft_is_the_common_prefix(bare: SGLPipeline, small_model: torch.nn.Module) -> None:
    """Of a pair of the same model, unpruned, all of it; of this one, what both say from the start."""
    inputs = slow.make_inputs(seed=8)
    same = SGLPipeline.from_models(small_model, small_model, replace(CONFIG, keep_ratio=1.0))
    result = same.generate(inputs, inputs)
    assert result.accepted_draft == len(result.small_token_ids) == len(result.token_ids)
    result = bare.generate(inputs, inputs)
    pairs = list(zip(result.token_ids, result.small_token_ids, strict=False))
    assert result.accepted_draft == next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def test_batch_is_each_alone(pipe: SGLPipeline) -> None:
    requests = [
        (picture(seed=i), prompt) for i, prompt in enumerate(["What?", "A longer question, it is.", "Why?"])
    ]
    for together, request in zip(pipe.batch(requests), requests, strict=True):
        assert_same_result(together, pipe(*request))
    assert pipe.batch([]) == []
    with pytest.raises(BatchError, match="Request 1: There is no image file") as caught:
        pipe.batch([requests[0], ("missing.png", "What?")])
    assert isinstance(caught.value.errors[1], ImageError)
    assert caught.value.results[1] is None
    assert_same_result(caught.value.results[0], pipe(*requests[0]))


def test_generate_batch(bare: SGLPipeline) -> None:
    inputs = [slow.make_inputs(seed=seed) for seed in range(2)]
    results = bare.generate_batch([(one, one) for one in inputs])
    for result, one in zip(results, inputs, strict=True):
        assert_same_result(result, bare.generate(one, one))


def test_from_disk_equals_from_memory(pipe: SGLPipeline) -> None:
    result = pipe([picture(), picture(seed=1)], "Is <image> like <image>?")
    inputs = pipe.small_processor([picture(), picture(seed=1)], "Is <image> like <image>?")
    assert result.token_ids == pipe.generate(inputs, inputs).token_ids
    assert (
        result.text
        == pipe.large_processor.tokenizer.decode(result.token_ids, skip_special_tokens=True).strip()
    )
    assert len(result.mass) == 2 * slow.PER_TILE


def test_models_alone_take_no_text(bare: SGLPipeline) -> None:
    with pytest.raises(PromptError, match="from_pretrained"):
        bare(picture(), "What?")
    assert bare.generate(slow.make_inputs(), slow.make_inputs()).text is None


def test_result(pipe: SGLPipeline) -> None:
    result = pipe(picture(), "What?")
    assert set(result.timings) == {
        "preprocess",
        *("small_vision", "small_prefill", "small_decode", "consistency"),
        *("large_vision", "large_prefill_full", "large_prefill_pruned", "large_decode"),
    }
    assert all(seconds > 0 for seconds in result.timings.values())
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert record["token_ids"] == result.token_ids
    assert record["mass"] == pytest.approx(result.mass.tolist())
    result.mass.div_(result.mass.max())  # an ordinary tensor of the caller's own
    assert json.loads(json.dumps(pipe(picture(), "What?").to_dict()))["mass"] == record["mass"]


def test_a_large_run_leaves_the_small_mass_alone(small_model: torch.nn.Module) -> None:
    pipe = SGLPipeline.from_models(small_model, small_model, CONFIG)
    inputs = slow.make_inputs(seed=9)
    first = pipe.generate(inputs, inputs)
    assert torch.equal(first.mass, pipe.generate(inputs, inputs).mass)


def test_import_is_cheap() -> None:
    heavy = "{'torch', 'transformers', 'PIL', 'numpy'}"
    code = f"import sys, sgl_runtime; print(sorted({heavy} & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    assert set(sgl_runtime.__all__) <= set(dir(sgl_runtime))
    for name in sgl_runtime.__all__:
        assert getattr(sgl_runtime, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'SGLNothing'"):
        sgl_runtime.SGLNothing  # noqa: B018


def test_typing_marker_ships() -> None:
    assert (Path(sgl_runtime.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, partial(torch.autocast, "cpu", torch.bfloat16), torch.enable_grad], ids=str
)
def test_the_callers_modes_change_nothing(bare: SGLPipeline, mode: Any) -> None:
    with mode():
        inputs = slow.make_inputs(seed=4)
        first = bare.generate(inputs, inputs)
    after = bare.generate(inputs, inputs)
    assert after.token_ids == first.token_ids
    assert torch.equal(after.mass, first.mass)
    assert not first.mass.is_inference()


def test_a_request_that_is_no_mapping_fails_alone(bare: SGLPipeline) -> None:
    one = slow.make_inputs(seed=1)
    with pytest.raises(BatchError, match="large VLM's inputs must be a mapping") as caught:
        bare.generate_batch([(one, one), (one, None)])
    assert caught.value.results[0].token_ids == bare.generate(one, one).token_ids
    assert caught.value.results[1] is None


@pytest.mark.parametrize(
    "text",
    ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling", "can't allocate memory: 8"],
)
def test_out_of_memory_has_many_names(bare: SGLPipeline, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = slow.make_inputs(seed=1)
    expected = bare.generate(one, one).token_ids
    with monkeypatch.context() as patch:
        patch.setattr(bare.small, "encode", Mock(side_effect=RuntimeError(text)))
        with pytest.raises(MemoryLimitError, match="Lower max_batch"):
            bare.generate(one, one)
    assert bare.generate(one, one).token_ids == expected


def test_weights_are_joined_once(small_model: torch.nn.Module) -> None:
    first, second = (SGLPipeline.from_models(small_model, small_model, CONFIG) for _ in range(2))
    for one, other in zip(first.small.decoder.layers, second.large.decoder.layers, strict=True):
        assert one.qkv.weight.data_ptr() == other.qkv.weight.data_ptr()
        assert one.mlp.gate_up.weight.data_ptr() == other.mlp.gate_up.weight.data_ptr()
