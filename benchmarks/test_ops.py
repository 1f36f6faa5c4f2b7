"""The cases of `cases.py` under pytest-benchmark, both sides in one run, with the ratios at the end.

python -m pytest benchmarks/test_ops.py -o addopts= --benchmark-only [-k cuda]

On `cuda` a call ends with a synchronisation, so small ops show their launch latency; `gpu_ops.py` replays
graphs instead. SGL_KERNELS_BACKEND chooses the kernels; the group of a result names what served it.
"""

from functools import lru_cache

import pytest
import torch

from benchmarks.cases import Case, recipes, side_names
from sgl_kernels import registry

RECIPES = recipes()
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@lru_cache(maxsize=1)
def built(number: int, device: str) -> Case:
    torch.manual_seed(0)
    return RECIPES[number][1](device)


@pytest.mark.parametrize(
    ("number", "side"), [(number, side) for number, (op, _) in enumerate(RECIPES) for side in side_names(op)]
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
def test_op(benchmark, device, number, side):
    case = built(number, device)
    call = case.sides[side]

    def synchronised(*inputs: torch.Tensor) -> None:
        call(*inputs)
        torch.cuda.synchronize()

    benchmark.group = f"{case.name} on {device} by {registry.serving_backend(case.op, device.upper())}"
    benchmark.extra_info["side"] = side
    # The targets are those of a CPU; a GPU's are in gpu_cases.py.
    targets = case.targets if device == "cpu" else []
    benchmark.extra_info["targets"] = [(t.baseline, str(t), t.factor, t.slack_us) for t in targets]
    timed = call if device == "cpu" else synchronised
    with torch.inference_mode():
        benchmark.pedantic(timed, case.inputs, rounds=case.rounds, warmup_rounds=1)
