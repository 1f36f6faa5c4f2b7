"""The CUDA kernels with no GPU: compiled and linked by nvcc, and run on the CPU by this folder's emulator."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import nvcc  # noqa: E402

OP_TESTS = ["decode_attention", "prefill_mass", "selection", "vocabulary"]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler, so the CUDA kernels cannot be emulated")
    library = tmp_path_factory.mktemp("emulated") / "sgl_emulated.so"
    subprocess.run([sys.executable, FOLDER / "build_emulated.py", library], check=True)
    return library


def run_suite(library, files, **environment):
    settings = {
        "SGL_KERNELS_BACKEND": "reference",  # the library registers itself for the CPU
        "SGL_TEST_LIBRARY": str(library),
        "SGL_TEST_SMALL": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        env=os.environ | settings | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


@pytest.mark.slow
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_op_suite_on_emulated_threads(emulated, order):
    """Threads run one after another between barriers: two orders differ where a barrier is missing."""
    files = [f"tests/kernels/test_{op}.py" for op in OP_TESTS]
    assert run_suite(emulated, files, SGL_EMULATOR_ORDER=order) > 100


@pytest.mark.slow
def test_shapes_that_choose_other_kernels(emulated):
    assert run_suite(emulated, ["tests/cuda/emulated_cases.py"]) > 10


@pytest.mark.slow
def test_nvcc_compiles_and_links_without_spills():
    if nvcc.path() is None:
        pytest.skip("NO NVCC: the CUDA kernels were not compiled for any GPU")
    check = [sys.executable, "csrc/cuda/nvcc.py", "--archs", "80;90"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in (
        "decode_split<bf16",
        "decode_combine<",
        "prefill_received<bf16",
        "select_kernel<",
        "gather_kernel",
    ):
        assert kernel in done.stdout


def test_resource_table_is_of_these_kernels():
    """docs/cuda_resources.md is written by `make cuda-check`; a kernel that came or went must show there."""
    listed = set(re.findall(r"^\| `([a-z_0-9]+)", (ROOT / "docs" / "cuda_resources.md").read_text(), re.M))
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    assert listed == set(
        re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\)+ )?([a-z_0-9]+)\(", sources)
    )


@pytest.mark.parametrize(
    ("text", "archs"), [("9.0", ["90"]), ("8.0;9.0+PTX", ["80", "90+PTX"]), ("90 100f", ["90", "100f"])]
)
def test_architecture_lists(text, archs):
    assert nvcc.parse_archs(text) == archs


@pytest.mark.parametrize("text", ["hopper", "9", "90+SASS"])
def test_bad_architecture_lists(text):
    with pytest.raises(ValueError, match="expected for example"):
        nvcc.parse_archs(text)
