"""The pipeline benchmark: what it counts, the pairs it makes, what it says of times, and one whole run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks import pipeline
from sgl_kernels.bench.timing import Ceilings
from sgl_runtime import SGLConfig, bench_cost, bench_pairs, bench_pipeline, bench_report, cli
from sgl_runtime.bench_pairs import PairShape, TextShape, VisionShape
from sgl_runtime.bench_pipeline import Outcome
from sgl_runtime.errors import ConfigError

CPU = torch.device("cpu")
VISION = VisionShape(2, 32, 64, 2, tile=56, patch=7)
NANO = PairShape(
    (TextShape("qwen2", 3, 64, 96, 4, 2, 16, 300), VISION),
    (TextShape("llama", 5, 96, 128, 6, 2, 16, 310), dataclasses.replace(VISION, rms=True)),
    tiles=2,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nano(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair of its own name, and no time spent on ceilings and processes."""
    monkeypatch.setitem(bench_pairs.SHAPES, "nano", NANO)
    monkeypatch.setattr(bench_pairs, "NAMES", (*bench_pairs.NAMES, "nano"))
    monkeypatch.setattr(bench_pipeline, "ceilings", lambda *_: Ceilings(1e9, 1e9))
    monkeypatch.setattr(bench_pipeline, "_peak_in_a_process_of_its_own", lambda *_: 1_000_000)


@pytest.mark.parametrize(
    ("name", "ratio", "series", "hidden"),
    [
        ("internvl2-2b-26b", 0.4, 1.10, 1.19),
        ("internvl2-2b-26b", 0.2, 1.28, 1.41),
        ("internvl2-2b-26b", 0.05, 1.50, 1.68),
        ("internvl3-1b-14b", 0.4, 1.26, 1.47),
        ("internvl3-1b-14b", 0.2, 1.83, 2.33),
        ("internvl3-1b-14b", 0.05, 3.12, 4.90),
    ],
)
def test_bounds_are_those_of_the_design(name: str, ratio: float, series: float, hidden: float) -> None:
    shape = bench_pairs.SHAPES[name]
    small, large = (bench_pairs._config(*part) for part in (shape.small, shape.large))
    settings = SGLConfig(keep_ratio=ratio, prune_layer=ratio)
    bounds = bench_cost.speedup_bounds(small, large, shape.tiles, 80, settings)
    assert bounds == pytest.approx({"series": series, "hidden": hidden}, rel=0.015)


@pytest.mark.parametrize("which", ["small", "large"])
def test_operations_are_those_that_torch_counts(which: str) -> None:
    model = bench_pairs.random_model(*getattr(NANO, which), CPU, torch.float32, seed=0)
    model.model.language_model.set_attn_implementation("eager")
    model.model.vision_tower.set_attn_implementation("eager")
    config, rows = model.config, 50
    with FlopCounterMode(display=False) as vision, torch.no_grad():
        model.get_image_features(torch.randn(3, 3, 56, 56))
    assert bench_cost.vision_flops(config, 3) == pytest.approx(vision.get_total_flops(), rel=1e-6)
    hidden = torch.randn(1, rows, config.text_config.hidden_size)
    with FlopCounterMode(display=False) as text, torch.no_grad():
        model.lm_head(model.model.language_model(inputs_embeds=hidden).last_hidden_state[:, -1])
    layers, heads = config.text_config.num_hidden_layers, config.text_config.num_attention_heads
    future = 2 * layers * heads * 16 * rows**2  # eager attention computes what causal attention leaves out
    counted = text.get_total_flops() - future
    assert bench_cost.prefill_flops(config, rows) == pytest.approx(counted, rel=1e-6)
    halved = bench_cost.prefill_flops(config, rows, prune_layer=1, kept_rows=20)
    expected = bench_cost.prefill_flops(config, rows) - (layers - 1) * (
        bench_cost.layer_flops(config, rows) - bench_cost.layer_flops(config, 20)
    )
    assert halved == pytest.approx(expected, rel=1e-12)


def test_a_decode_step_reads_every_weight_and_the_cache() -> None:
    model = bench_pairs.random_model(*NANO.large, CPU, torch.float32, seed=0)
    layers = model.model.language_model.layers
    weights = sum(p.nbytes for p in layers.parameters() if p.dim() == 2) + model.lm_head.weight.nbytes
    cache = 5 * 2 * 2 * 16 * 100 * 3 * 4  # layers, k and v, KV heads, head dim, slots, requests, bytes
    assert bench_cost.decode_bytes(model.config, 100, 4, batch=3) == weights + cache


def test_random_pairs_behave_like_trained_ones() -> None:
    pair = bench_pairs.random_pair("nano", NANO, CPU, torch.float32, requests=6)
    again = bench_pairs.random_pair("nano", NANO, CPU, torch.float32)
    for one, other in ((pair.small, again.small), (pair.large, again.large)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    config = SGLConfig(max_new_tokens=pair.new_tokens)
    results = bench_pipeline.SGLPipeline.from_models(pair.small, pair.large, config).generate_batch(
        pair.requests
    )
    assert all(len(r.token_ids) == len(r.small_token_ids) == pair.new_tokens for r in results)
    accepted = sum(result.accepted_draft for result in results)
    assert 0.2 < accepted / (6 * pair.new_tokens) < 1
    assert len({tuple(result.token_ids) for result in results}) == 6
    for result in results:
        assert result.mass.std() > 0.25 * result.mass.mean()  # far from uniform
        assert result.mass.min() > 0


def test_every_named_shape_makes_a_configuration() -> None:
    for shape in bench_pairs.SHAPES.values():
        for text, vision in (shape.small, shape.large):
            config = bench_pairs._config(text, vision)
            assert config.text_config.head_dim == text.head_dim
            assert bench_cost.visual_tokens(config, 1) == 256 == config.image_seq_length


def test_a_whole_run(nano: None) -> None:
    task = bench_pipeline.make_task("nano", "cpu", "float32", batches=[3, 1], turns=2)
    document = json.loads(json.dumps(bench_pipeline.run(task), default=str))
    rows = {(row["batch"], row["side"]): row for row in document["results"]}
    assert {side for batch, side in rows if batch == 1} == set(bench_pipeline.SIDES)
    assert {side for batch, side in rows if batch == 3} == set(bench_pipeline.SIDES) - {"research"}
    assert document["differences"] == []
    for (batch, side), row in rows.items():
        assert len(row["calls_ms"]) == len(row["calls_stage_ms"]) == 2
        assert len(row["token_ids"]) == batch
        assert row["tokens_per_s"] == pytest.approx(1e4 * batch / row["median_ms"])
        if side != "overlap":
            for call, stages in zip(row["calls_ms"], row["calls_stage_ms"], strict=True):
                assert 0 < sum(stages.values()) <= call
        assert set(row["stage_ms"]) <= set(bench_report.STAGES)
    assert set(rows[1, "guided"]["stage_ms"]) == set(bench_report.STAGES)
    assert set(rows[1, "research"]["stage_ms"]) == set(bench_report.STAGES)
    assert set(rows[1, "small alone"]["stage_ms"]) == set(bench_report.SMALL)
    assert sum(rows[3, "draft"]["accepted_draft"]) > 0
    steps = rows[1, "guided"]["small_per_token"]
    assert steps["ms"] == pytest.approx(rows[1, "guided"]["stage_ms"]["small_decode"] / 9)
    assert steps["gb_per_s"] == pytest.approx(steps["share_of_copy"])  # a copy moves 1 GB/s here
    targets = {target["target"] for target in document["targets"]}
    assert "draft over large alone, of the bound in series" in targets
    assert len(targets) == 7
    text = bench_report.table(document)
    assert text.count("\n3 guided ") == 2
    assert text.endswith("Tokens and kept sets: equal wherever they must be.")


def test_the_command_line(nano: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_pipeline.TURNS, "cpu", (1, 1))
    arguments = ["bench", "--pipeline", "--pair", "nano", "--device", "cpu"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "1 research code's way" in done.output
    done = CliRunner().invoke(cli.app, [*arguments, "--batch", "2", "--json"])
    assert done.exit_code == 0, done.output
    assert {row["batch"] for row in json.loads(done.stdout)["results"]} == {2}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give one"),
        (["--op", "greedy_token", "--pipeline"], "give one"),
        (["--pipeline", "--pair", "huge"], "--pair must be one of tiny, mid, .*, got 'huge'"),
        (["--pipeline", "--dtype", "int8"], "dtype='int8' is not supported"),
    ],
)
def test_bad_words(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(cli.app, ["bench", *arguments])
    assert isinstance(done.exception, ConfigError)
    with pytest.raises(ConfigError, match=says):
        raise done.exception


def test_memory_is_that_of_one_side() -> None:
    task = bench_pipeline.make_task("tiny", "cpu", "float32")
    found = bench_pipeline._peak_in_a_process_of_its_own(task, "guided", 1)
    if found is None:
        pytest.skip("only Linux tells the peak of a process")
    assert 1 << 20 < found < 1 << 30


def test_a_process_that_fails_says_why() -> None:
    task = dataclasses.replace(bench_pipeline.make_task("tiny", "cpu", "float32"), dtype="float8")
    with pytest.raises(ConfigError, match=r"memory of 'guided' failed: .*float8"):
        bench_pipeline._peak_in_a_process_of_its_own(task, "guided", 1)


def test_differences_are_told() -> None:
    def outcome(tokens: list[list[int]], kept: list[int]) -> Outcome:
        return Outcome(tokens, {}, tokens, None, [torch.tensor(kept)] * len(tokens))

    right = outcome([[1, 2], [3]], [4, 5])
    first: dict[str, Outcome] = {}
    assert bench_report.differences(1, {"guided": right, "draft": right, "large alone": right}, first) == []
    wrong = outcome([[1, 2], [4]], [4, 6])
    assert bench_report.differences(1, {"guided": right, "draft": wrong}, {}) == [
        "token_ids of request 1: draft and guided differ",
        "small_token_ids of request 1: draft and guided differ",
        "kept_visual of request 0: draft and guided differ",
        "kept_visual of request 1: draft and guided differ",
    ]
    found = bench_report.differences(2, {"guided": outcome([[1, 9], [3]], [4, 5])}, first)
    assert found == [
        "token_ids of request 0: guided in a batch of 2 and guided alone differ",
        "small_token_ids of request 0: guided in a batch of 2 and guided alone differ",
    ]


def test_targets_compare_within_turns() -> None:
    def row(side: str, calls: list[float], **stages: float) -> dict[str, Any]:
        stages = {"small_vision": 10, "small_prefill": 20, "small_decode": 30, "consistency": 5, **stages}
        return {
            "side": side,
            "batch": 1,
            "calls_ms": calls,
            "calls_stage_ms": [stages] * 3,
            "stage_ms": stages,
            "peak_bytes": 100,
            "small_per_token": {"share_of_copy": 0.7},
        }

    document: dict[str, Any] = {
        "task": {"device": "cpu"},
        "bounds": {"series": 2.0, "hidden": 3.0},
        "results": [
            row("guided", [100, 300, 100]),
            row("unguided", [98, 200, 99]),
            row("draft", [50, 50, 50]),
            row("large alone", [90, 80, 90]),
            {**row("research", [200, 330, 250], small_prefill=25), "peak_bytes": 300},
        ],
    }
    found = {target["target"]: target for target in bench_report.targets(document)}
    assert {name: (round(t["value"], 3), t["met"]) for name, t in found.items()} == {
        "guided over research, whole pipeline": (2.0, True),
        "small_prefill over research": (1.25, False),
        "small_decode over research": (1.0, False),
        "peak memory beyond the weights, of research's": (0.333, True),
        "guidance, time over that without": (1.02, True),
        "consistency, of the small VLM's time": (0.083, True),
        "draft over large alone, of the bound in series": (0.9, True),
    }
    document["task"]["device"] = "cuda"
    document["results"].append(row("overlap", [45, 45, 45]))
    found = {target["target"]: target for target in bench_report.targets(document)}
    assert found["guided small VLM over research"]["met"] is False
    assert found["small decode, share of copy bandwidth, guided"]["met"] is True
    assert found["overlap over large alone, of the bound hidden"]["value"] == pytest.approx(2 / 3)
    assert found["overlap over large alone, of the bound hidden"]["met"] is False


def test_a_pair_that_fails_leaves_the_others(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def measure(task: bench_pipeline.Task, seconds: float) -> Any:
        if task.pair == "mid":
            return None, "mid: out of luck"
        return {"differences": [], "task": {"dtype": "float32"}}, ""

    monkeypatch.setattr(pipeline, "measure", measure)
    monkeypatch.setattr(pipeline, "table", lambda document: "a table")
    monkeypatch.setattr("sys.argv", ["pipeline", "--device", "cpu", "--out", str(tmp_path)])
    assert pipeline.main() == 1
    assert "mid: out of luck" in capsys.readouterr().err
    document = json.loads((tmp_path / "pipeline_cpu.json").read_text())
    assert document["failed"] == ["mid: out of luck"]
    assert len(document["pairs"]) == 1
    assert "a table" in (tmp_path / "pipeline_cpu.md").read_text()


def test_a_pair_that_runs_out_of_time_shows_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    task = bench_pipeline.make_task("tiny", "cpu", "float32")
    half = "import sys, time; print('{\"half\": 1}', flush=True); print('{\"cut', end='', flush=True); "
    popen = pipeline.subprocess.Popen

    def child(ending: str) -> None:
        command = [pipeline.sys.executable, "-c", half + ending]
        monkeypatch.setattr(pipeline.subprocess, "Popen", lambda _, **options: popen(command, **options))

    child("time.sleep(60)")
    found, failure = pipeline.measure(task, 3.0)
    assert found == {"half": 1}
    assert failure == "tiny at ratio 0.2, compile=auto: out of time"
    child("sys.exit(3)")
    found, failure = pipeline.measure(task, 30.0)
    assert found == {"half": 1}
    assert failure == "tiny at ratio 0.2, compile=auto: failed, see above"
