"""`sgl-vlm bench`: a table, one JSON object, or one line that says what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from sgl_kernels import compositions
from sgl_kernels.bench.timing import Ceilings
from sgl_runtime import bench, cli
from sgl_runtime.errors import ConfigError

TINY = ["--shape", "B=1,Hq=2,Hkv=1,D=16,S=40,N=20", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ceilings", lambda *_: Ceilings(1e9, 1e9))


def test_json_has_a_row_for_each_side() -> None:
    shapes = [*TINY, "--shape", "B=2,S=64,N=9"]
    done = CliRunner().invoke(
        cli.app, ["bench", "--op", "decode_attention", *shapes, "--backend", "reference,torch", "--json"]
    )
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    rows = document["results"]
    assert {(row["backend"], row["side"]) for row in rows} == {
        ("reference", ""),
        ("reference", "no mass"),
        ("torch", "eager"),
        ("torch", "grouped matmul"),
        ("torch", "SDPA, no mass"),
        ("torch", "SDPA over groups, no mass"),
        ("torch", "flash SDPA, no mass"),
    }
    assert [row["shape"]["B"] for row in rows] == [1] * 7 + [2] * 7
    for row in rows:
        assert 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_us"] / 1e3)
    assert document["environment"]["torch"]
    assert document["ceilings"] == {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": 1e9}


def test_table_names_what_was_timed() -> None:
    tiny = [part.replace("N=20", "N=20,R=5") for part in TINY]
    done = CliRunner().invoke(cli.app, ["bench", "--op", "prefill_mass", *tiny])
    assert done.exit_code == 0, done.output
    assert "prefill_mass B=1 Hq=2 Hkv=1 D=16 S=40 N=20 R=5 float32" in done.output
    assert "torch      eager full attention" in done.output
    assert "share of roofline" in done.output
    assert "a copy moves 1.0 GB/s" in done.output


def test_roofline_names_the_nearer_ceiling() -> None:
    row = {"median_us": 100.0, "bytes": 50_000, "flops": 20_000}
    seen = bench.with_roofline(row, Ceilings(copy_bytes_per_s=1e9, matmul_flops_per_s=1e9))
    assert seen["gb_per_s"] == pytest.approx(0.5)
    assert seen["share_of_copy"] == pytest.approx(0.5)
    assert (seen["bound"], seen["share_of_bound"]) == ("memory", pytest.approx(0.5))
    seen = bench.with_roofline({**row, "flops": 80_000}, Ceilings(1e9, 1e9))
    assert (seen["bound"], seen["share_of_bound"]) == ("compute", pytest.approx(0.8))


def test_a_side_that_refuses_the_shape_is_said_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("No available kernel. Aborting execution.\nAnd more")

    monkeypatch.setattr(compositions, "log_softmax_greedy", refuse)
    document = bench.run(bench.make_task("greedy_token", ["V=50"], "torch,reference", "float32", "cpu"))
    refused, ran = document["results"]
    assert refused["cannot_run"] == "RuntimeError: No available kernel. Aborting execution."
    assert ran["median_us"] > 0
    text = bench.table(document)
    assert "torch      log_softmax, max               RuntimeError: No available kernel" in text
    assert "reference  greedy_token" in text


def test_another_backend_is_measured_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this process has loaded; results come back in the order that was asked for."""
    monkeypatch.setattr(bench, "_serving", lambda op, device: "cuda")
    task = bench.make_task("greedy_token", ["B=1,V=50"], "torch,cpu", "float32", "cpu")
    rows = bench.run(task)["results"]
    assert [row["backend"] for row in rows] == ["torch", "cpu"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--op", "softmax"], "op is 'softmax', expected one of decode_attention"),
        (["--op", "decode_attention", "--shape", "Q=3"], "has no 'Q=3'"),
        (["--op", "decode_attention", "--shape", "Hq=7"], "a multiple of Hkv"),
        (["--op", "greedy_token", "--backend", "fast"], "got 'fast'"),
        (["--op", "greedy_token", "--dtype", "int8"], "got 'int8'"),
        (["--op", "greedy_token", "--device", "tpu"], "got 'tpu'"),
        (["--op", "greedy_token", "--backend", "cpu", "--shape", "B=1000000000"], "cannot be set up"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["sgl-vlm", "bench", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("sgl-vlm: error: ")
    assert says in err


def test_a_backend_that_is_not_there_says_why() -> None:
    task = bench.make_task("greedy_token", ["V=50"], "cuda", "float32", "cpu")
    with pytest.raises(ConfigError, match=r"--backend cuda cannot run greedy_token on cpu: .+"):
        bench.run(task)


def test_a_worker_refuses_to_measure_something_else() -> None:
    task = {"op": "greedy_token", "shapes": [], "backends": ["cuda"], "dtype": "float32", "device": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "sgl_runtime.bench"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        env={**os.environ, "SGL_KERNELS_BACKEND": "reference"},
    )
    assert done.returncode != 0
    assert "reference serves the op there" in done.stderr
