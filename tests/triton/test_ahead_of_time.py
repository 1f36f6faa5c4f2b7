"""Every Triton kernel compiled for GPUs that are not here, in the configurations that a call would use."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="TRITON KERNELS ARE NOT COMPILED: triton is not installed (pip install -e '.[dev]')",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "options"),
    [("sm_90", []), ("sm_80", ["--common"]), ("sm_100", ["--common"]), ("gfx942", ["--common"])],
)
def test_kernels_compile_within_the_limits_of_the_chip(target, options, tmp_path):
    found = tmp_path / "usage.json"
    command = [sys.executable, "-m", "benchmarks.triton_aot", "--targets", target, "--json", str(found)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "SGL_"))}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    result = subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert result.returncode == 0, result.stdout + result.stderr
    usage = json.loads(found.read_text())
    assert {u["kernel"] for u in usage} == {
        "split_kernel",
        "combine_kernel",
        "denominator_kernel",
        "received_kernel",
        "fold_kernel",
        "select_kernel",
        "gather_kernel",
        "block_kernel",
        "finish_kernel",
    }
    assert all(u["registers"] > 0 for u in usage)


def test_complaints():
    """What would fail the check above."""
    from benchmarks.triton_aot import Usage, complaints

    fits = Usage("call", "kernel", "sm_90", 4, 227 << 10, 255, 0)
    spills_elsewhere = Usage("call", "kernel", "sm_80", 4, 0, 255, 8)
    assert complaints([fits, spills_elsewhere]) == []
    too_much = Usage("call", "kernel", "sm_80", 4, (163 << 10) + 1, 255, 0)
    spills = Usage("call", "kernel", "sm_90", 4, 0, 255, 8)
    too_wide = Usage("call", "kernel", "gfx942", 32, 0, 64, 0)
    found = complaints([too_much, spills, too_wide])
    assert "166913 bytes of shared memory, sm_80 has 166912" in found[0]
    assert "spills 8 bytes on sm_90" in found[1]
    assert "2048 threads, gfx942 has at most 1024" in found[2]
