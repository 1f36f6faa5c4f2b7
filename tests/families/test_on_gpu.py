"""Every family on a GPU: graphs captured and replayed, the same answers and masses as on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sgl_runtime import SGLConfig, SGLPipeline
from sgl_runtime.engine import VLM

from .models import FAMILIES
from .test_parity import LAYOUTS, NEW, some_prune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def answers(engine: VLM, inputs: Any) -> list[Any]:
    """A plain answer with mass, and pruned ones without and with a draft."""
    [request] = engine.encode([engine.prompt(inputs)])
    plain = engine.generate(request, NEW, with_mass=True)
    prune = some_prune(2, request.prompt.num_visual, 0.3)
    prune = type(prune)(prune.layer, prune.ranking.to(engine.model.device), prune.num_keep)
    pruned = engine.generate(request, NEW, prune=prune)
    drafted = engine.generate(request, NEW, prune=prune, draft=[*pruned.token_ids[:3], 11])
    return [plain, pruned, drafted]


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_the_cpu(name: str) -> None:
    case = FAMILIES[name]
    cpu, gpu = VLM(case.make_model(seed=1), "large"), VLM(case.make_model(seed=1).to("cuda"), "large")
    for seed, images in enumerate(LAYOUTS * 2):  # the second time graphs are replayed
        inputs = case.make_inputs(seed=seed % len(LAYOUTS), images=images)
        for one, other in zip(answers(gpu, inputs), answers(cpu, inputs), strict=True):
            assert one.token_ids == other.token_ids
            assert one.accepted == other.accepted
            assert (one.kept_index is None) == (other.kept_index is None)
            if one.kept_index is not None:
                assert torch.equal(one.kept_index.cpu(), other.kept_index)
            if one.mass is not None:
                torch.testing.assert_close(one.mass.cpu(), other.mass, rtol=1e-3, atol=0)


def test_other_grids_on_the_device() -> None:
    """What maps masses from grid to grid lies where the large VLM does."""
    case = FAMILIES["internvl-qwen2"]
    pipes = [
        SGLPipeline.from_models(case.make_model(1).to(device), case.make_model(2).to(device))
        for device in ("cpu", "cuda")
    ]
    inputs = case.make_inputs(images=((1, 2), (1, 1)))
    count = int((inputs["input_ids"] == 7).sum())
    cells = torch.rand(2, count, 3, 2, generator=torch.Generator().manual_seed(0)).sort(-1).values
    image = torch.arange(count) // (count // 2)
    small, large = ({**inputs, "visual_image": image, "visual_cells": own} for own in cells)
    for scope in ("request", "image"):
        config = SGLConfig(max_new_tokens=4, keep_scope=scope, compile=False)
        kept = [pipe.with_config(config).generate(small, large).kept_visual for pipe in pipes]
        assert kept[0] is not None
        assert torch.equal(kept[0], kept[1])
