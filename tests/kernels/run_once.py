"""Every op once at many small shapes, with no pytest around it: what compute-sanitizer watches.

SGL_TEST_DEVICE=cuda compute-sanitizer --tool memcheck --error-exitcode 9 python tests/kernels/run_once.py

Results are compared with the reference as well, so that a run that computes nothing cannot pass.
"""

import itertools
import os
import sys

# An allocation of its own for every tensor: memcheck cannot see past the end of one inside torch's pool.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch
from kernel_helpers import DEVICE, DTYPES, GEOMETRIES, combinations
from op_calls import CALLS, Sizes, assert_equals_reference, public_calls

from sgl_kernels import registry

# Sizes at which something is left over: of a split, a tile of rows, a 16-byte vector, a block of tokens.
LENGTHS = [(300, 33, 4099), (1100, 64, 151), (77, 8, 9000), (520, 7, 70001)]  # positions, hidden, vocabulary
SHAPES = [
    Sizes(3, *geometry, length, visual=length - 40, rows=19, hidden=hidden, vocabulary=vocabulary)
    for geometry, (length, hidden, vocabulary) in zip(GEOMETRIES, itertools.cycle(LENGTHS), strict=False)
]


def main() -> int:
    calls = [(name, sizes, dtype) for sizes, dtype in combinations(SHAPES, DTYPES) for name in CALLS]
    for name, sizes, dtype in calls:
        _, values = public_calls(sizes, dtype)[name]
        assert_equals_reference(name, sizes, dtype, values(1), truth_on="cpu")  # only our kernels are watched
    key = torch.device(DEVICE).type.upper()
    served = sorted({registry.serving_backend(op, key) for op in registry.SCHEMAS})
    print(f"{len(calls)} calls on {DEVICE}, served by {', '.join(served)}: all equal the reference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
