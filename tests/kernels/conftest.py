"""Which implementation the suite runs against; kernel_helpers names the device and the sizes.

SGL_TEST_LIBRARY=path.so   load this with torch.ops.load_library first: kernels that register themselves for
                           the test device, as an emulated CUDA build does (SGL_KERNELS_BACKEND=reference)
"""

import os

import pytest
import torch
from kernel_helpers import DEVICE, missing_kernel

from sgl_kernels import backend, registry

LIBRARY = os.environ.get("SGL_TEST_LIBRARY")
if LIBRARY:
    torch.ops.load_library(LIBRARY)

_extension = backend.extension("_C")
_key = torch.device(DEVICE).type.upper()
_serving = os.path.basename(LIBRARY) if LIBRARY else registry.serving_backend("decode_attention", _key)
_cpu_extension_serves = _serving == "cpu"
ISAS = _extension.build_info()["isas"] if _cpu_extension_serves else [_serving]


def pytest_configure(config):
    if torch.device(DEVICE).type == "cuda" and not torch.cuda.is_available():
        pytest.exit(f"SGL_TEST_DEVICE is {DEVICE!r}, but torch {torch.__version__} sees no CUDA device", 2)


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test once per vector width of the CPU extension; once where something else serves the ops."""
    if not _cpu_extension_serves:
        yield request.param
        return
    before = _extension.build_info()["isa"]
    _extension.set_isa(request.param)
    yield request.param
    _extension.set_isa(before)


@pytest.fixture
def compiled(request):
    """Skips what only compiled kernels promise: the same bits however work is divided or batched.

    A module names the ops it is about in `OPS`; one that names none is about the CPU extension itself.
    """
    for op in getattr(request.module, "OPS", ()):
        if not registry.has_kernel(op, _key):
            missing_kernel(f"{op} is served by the reference on {DEVICE}")
    if not hasattr(request.module, "OPS") and _extension is None:
        missing_kernel("sgl_kernels._C is not loaded")


@pytest.fixture
def threads():
    """Thread counts, each in force while it is looked at; where another backend serves the ops, two runs."""
    before = torch.get_num_threads()

    def each(*counts):
        for count in counts if _cpu_extension_serves else (before, before):
            torch.set_num_threads(count)
            yield count

    yield each
    torch.set_num_threads(before)
