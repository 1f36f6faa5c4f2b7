"""The cases of `cases.py` under pytest-benchmark, both sides in one run, with the ratios at the end.

python -m pytest benchmarks/test_ops.py -o addopts= --benchmark-only
"""

from functools import lru_cache

import pytest
import torch

from benchmarks.cases import Case, recipes, side_names

RECIPES = recipes()


@lru_cache(maxsize=1)
def built(number: int) -> Case:
    torch.manual_seed(0)
    return RECIPES[number][1]()


@pytest.mark.parametrize(
    ("number", "side"), [(number, side) for number, (op, _) in enumerate(RECIPES) for side in side_names(op)]
)
def test_op(benchmark, number, side):
    case = built(number)
    benchmark.group = case.name
    benchmark.extra_info["side"] = side
    benchmark.extra_info["targets"] = [(t.baseline, str(t), t.factor, t.slack_us) for t in case.targets]
    with torch.inference_mode():
        benchmark.pedantic(case.sides[side], case.inputs, rounds=case.rounds, warmup_rounds=1)
