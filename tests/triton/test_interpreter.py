"""The op tests of tests/kernels, and the golden masses and answers, run by Triton's interpreter on the CPU.

Each file needs a process of its own: Triton decides at import whether it interprets.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# File of tests, and which of them where not all: what is left out, and why.
SUITES = {
    "kernels/test_decode_attention.py": "",
    "kernels/test_prefill_mass.py": "not test_memory_has_no_square_matrix",  # it would measure NumPy's memory
    "kernels/test_selection.py": "",
    "kernels/test_vocabulary.py": "",
    # Errors of arguments are raised before any backend is reached; inductor compiles nothing of an op.
    "kernels/test_op_contract.py": "opcheck or (one_graph and not inductor) or direct_calls or stride",
    "runtime/test_golden.py": "",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None,
        reason="TRITON KERNELS ARE NOT TESTED: triton is not installed (pip install -e '.[dev]')",
    ),
]


@pytest.mark.parametrize("name", SUITES)
def test_passes_interpreted(name):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "SGL_KERNELS_BACKEND": "triton",
        "SGL_TEST_SMALL": "1",
        "SGL_TEST_DEVICE": "cpu",
        "CI": "1",  # so that a test which finds no kernel fails
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["-k", SUITES[name], name]
    result = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    summary = result.stdout.splitlines()[-1]
    assert re.search(r"\b\d+ passed", summary), summary
    assert "skipped" not in summary, summary
