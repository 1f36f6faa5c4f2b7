import os

import pytest
import torch

from sgl_kernels import backend

_extension = backend.extension("_C")
ISAS = _extension.build_info()["isas"] if _extension else ["reference"]


def require_extension():
    """In CI, kernels that did not compile are a failure, not a reason to test less."""
    if _extension is not None:
        return
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail("sgl_kernels._C is not loaded, and CI is set", pytrace=False)
    pytest.skip("sgl_kernels._C is not loaded")


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test once per vector width that this build and this CPU have."""
    if _extension is None:
        yield request.param
        return
    before = _extension.build_info()["isa"]
    _extension.set_isa(request.param)
    yield request.param
    _extension.set_isa(before)


@pytest.fixture
def compiled():
    """Skips what only the compiled kernels promise: the same bits however work is divided or batched."""
    require_extension()


@pytest.fixture
def threads():
    """Sets the number of threads; restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
