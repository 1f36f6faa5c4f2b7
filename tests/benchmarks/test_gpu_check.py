"""The GPU script as far as a machine without a GPU goes: each benchmark case is built, timed and reported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"

# Stands in for the pip package: column means over heads and the last rows, in plain torch.
FLASH_COLSUM = """
import torch

def flash_colsum(query, key, scale=None, is_causal=False, cls_len=None):
    rows, keys = query.shape[2], key.shape[2]
    logits = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
    future = torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1)
    return logits.masked_fill(future, -torch.inf).softmax(-1).mean((1, 2))
"""
AGREES = """
import torch
from benchmarks import gpu_cases
import sgl_kernels

case = next(c for c in map(gpu_cases.shrunk, gpu_cases.cases()) if c.op == "prefill_mass")
workload = gpu_cases.build(case, torch.device("cpu"))
means = workload.stock["flash-colsum"](*workload.inputs)
workload.sides(sgl_kernels)[""](*workload.inputs)
visual, mass = workload.inputs[4:6]
heads, rows = workload.shape["Hq"], workload.shape["R"]
torch.testing.assert_close(means.gather(1, visual.long()) * heads * rows, mass, rtol=1e-4, atol=1e-5)
"""


def run(command, **environment):
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "SGL_COMMIT": "made-up", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_dry_run(tmp_path):
    (tmp_path / "flash_colsum.py").write_text(FLASH_COLSUM)
    done = run([SCRIPT, "--dry-run"], OUT=str(tmp_path / "out"), PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines if "python" in line] == ["ok"] * 3
    assert done.stdout.count("would run: env SGL_KERNELS_BACKEND=triton SGL_TEST_DEVICE=cuda") == 2
    document = json.loads((tmp_path / "out" / "gpu_ops.cuda.json").read_text())
    assert document["environment"]["commit"] == "made-up"
    cases = document["results"]
    assert {case["op"] for case in cases} == {
        "decode_attention",
        "prefill_mass",
        "prune_gather",
        "greedy_token",
        "token_logprobs",
    }
    for case in cases:
        assert "error" not in case
        assert case["cannot_run"] == {}
        assert case["targets"]
        for side in case["sides"].values():
            assert side["bytes"] > 0
            assert 0 < side["p10_us"] <= side["median_us"] <= side["p90_us"]
        for target in case["targets"]:
            assert target["met"] == (target["us"] <= target["limit_us"])
    table = (tmp_path / "out" / "gpu_ops.md").read_text()
    assert table.count("\n| cpu | ") == sum(len(case["targets"]) for case in cases)
    measured = json.loads((tmp_path / "out" / "pipeline_cpu.json").read_text())
    assert measured["environment"]["commit"] == "made-up"
    assert measured["failed"] == []
    (pair,) = measured["pairs"]
    assert pair["pair"]["name"] == "tiny"
    assert pair["differences"] == []
    assert all(row["peak_bytes"] is None or row["peak_bytes"] > 0 for row in pair["results"])
    assert len(list((tmp_path / "out").iterdir())) <= 8  # what a lent machine hands back


def test_flash_colsum_is_given_the_rows_that_we_count(tmp_path):
    (tmp_path / "flash_colsum.py").write_text(FLASH_COLSUM)
    done = run([sys.executable, "-c", AGREES], PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 0, done.stderr


def test_a_step_that_fails_does_not_stop_the_next(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 3 calls on nothing\nexit 3\n")
    python.chmod(0o755)
    done = run([SCRIPT, "--dry-run"], OUT=str(tmp_path / "out"), PYTHON=str(python))
    assert done.returncode == 3  # the sanitizer's driver, the benchmarks of the ops and of the pipeline
    assert done.stdout.count("FAILED (3)") == 3
    assert done.stdout.count("    3 calls on nothing") == 3
    assert "== 3 failed" in done.stdout


@pytest.mark.parametrize("word", ["benhc", "--dryrun"])
def test_unknown_words(word, tmp_path):
    done = run([SCRIPT, word], OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert f"unknown word '{word}', expected --dry-run or some of: build correctness" in done.stderr
    assert not (tmp_path / "out").exists()
