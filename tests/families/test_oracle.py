"""The oracle against itself: two ways through transformers agree before the runtime is held to either."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import oracle
from .models import EOS, FAMILIES, HEADS, IMAGE

NEW = 6
LAYOUTS = [((1, 2), (2, 1)), ((2, 2),), ((1, 1), (1, 3), (1, 1))]


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def model(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, FAMILIES[request.param].make_model(seed=1)


@pytest.mark.parametrize("images", LAYOUTS, ids=str)
def test_the_slow_loop_is_generate(model: tuple[str, Any], images: Any) -> None:
    name, network = model
    case = FAMILIES[name]
    inputs = case.make_inputs(seed=2, images=images)
    prompt = oracle.embed(case, network, inputs)
    answer, _ = oracle.pruned_greedy(case, network, prompt, 99, [], NEW)
    assert answer == oracle.greedy(network, inputs, NEW)
    assert len(answer) == NEW or answer[-1] == EOS


def test_attention_is_causal_conserved_and_far_from_uniform(model: tuple[str, Any]) -> None:
    name, network = model
    case = FAMILIES[name]
    inputs = case.make_inputs(seed=3)
    prompt = oracle.embed(case, network, inputs)
    attention = oracle.attention_matrices(case, network, prompt, oracle.greedy(network, inputs, NEW))
    length = attention.shape[-1]
    assert attention.shape[1:3] == (HEADS, length)
    assert not attention.triu(1).any()
    rows = oracle.text_rows(prompt, length)
    everything = oracle.masses(attention, torch.arange(length), rows).sum(1)
    torch.testing.assert_close(everything, torch.full_like(everything, HEADS * len(rows)), rtol=1e-6, atol=0)
    mass = oracle.masses(attention, prompt.visual, rows).sum(0)
    assert mass.max() > 3 * mass.min()


def test_seeds_and_images_tell(model: tuple[str, Any]) -> None:
    """Whatever would not change an answer could be dropped unseen."""
    name, network = model
    case = FAMILIES[name]
    one, two = (case.make_inputs(seed=seed) for seed in (4, 5))
    assert (one["input_ids"][0] == IMAGE).sum() >= 2 * 12
    with_pixels_of_two = {**one, "pixel_values": two["pixel_values"]}
    logits = [network(**inputs).logits[0, -1] for inputs in (one, with_pixels_of_two)]
    assert (logits[0] - logits[1]).abs().max() > 0.1
