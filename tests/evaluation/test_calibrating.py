"""From results to a calibration: arrays in their places, delta shared, the file read back by SGLConfig."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgl_runtime import SGLConfig, SGLPipeline, tiny
from sgl_runtime.errors import ConfigError, SGLError
from sgl_runtime.evaluation.calibrating import calibrate, check
from sgl_runtime.evaluation.calibration import choose_calls, choose_threshold
from sgl_runtime.evaluation.results import Results
from sgl_runtime.fingerprint import checkpoint_fingerprint

COUNT = 600


def make_results(
    fingerprints: tuple[str, str] = ("a" * 64, "b" * 64), seed: int = 0, count: int = COUNT
) -> Results:
    """A small VLM that is right where it is sure, a large one that is right more often, and pruning."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        sure = rng.random()
        scores = {
            ("small", None, None): float(rng.random() < sure**0.2),
            ("large", None, None): float(rng.random() < 0.95),
            ("guided", 0.5, 4): float(rng.random() < 0.95),
            ("guided", 0.2, 2): float(rng.random() < 0.6),
        }
        for (method, keep_ratio, layer), score in scores.items():
            row = {"id": str(i), "group": f"image{i // 2}", "method": method, "keep_ratio": keep_ratio}
            row |= {"prune_layer": layer, "prediction": f"{score:g}", "score": score}
            row |= {"seconds": keep_ratio or 1.0}
            rows.append(row | ({"decision_score": sure} if method == "small" else {}))
    header = {
        "pair": {
            "small": {"fingerprint": fingerprints[0], "layers": 8, "compute": "float32"},
            "large": {"fingerprint": fingerprints[1], "layers": 10, "compute": "float32"},
        },
        "data set": {
            "name": "made up",
            "metric": "exact",
            "suffix": "",
            "sha256": "c" * 64,
            "count": count,
        },
        "settings": {
            "exit_score": "both",
            "consistency_keep_ratio": 0.05,
            "keep_scope": "request",
            "max_new_tokens": 8,
        },
        "versions": {"sgl-vlm": "0"},
    }
    return Results(header, rows)


def arrays(results: Results, key: tuple[Any, ...], what: str = "score") -> np.ndarray:
    rows = [r for r in results.rows if (r["method"], r["keep_ratio"], r["prune_layer"]) == key]
    return np.array([row[what] for row in sorted(rows, key=lambda row: row["id"])])


def search(results: Results, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "alpha": 0.1,
        "delta": 0.1,
        "reference": "labels",
        "calls": None,
        "setting": None,
    }
    return calibrate(results, today="2026-01-01", **{**given, **changes})


def run(results: Results, **changes: Any) -> Any:
    found = search(results, **changes)
    return found.calibration, found.note


def test_a_given_setting_gets_all_of_delta() -> None:
    results = make_results()
    for setting in ((0.5, 4), (0.5, 0.4)):
        made, note = run(results, setting=setting)
        choice = choose_threshold(
            arrays(results, ("small", None, None), "decision_score"),
            arrays(results, ("small", None, None)),
            arrays(results, ("guided", 0.5, 4)),
            alpha=0.1,
            delta=0.1,
            groups=arrays(results, ("small", None, None), "group"),
            reference_score=arrays(results, ("large", None, None)),
        )
        assert (made.exit_threshold, made.keep_ratio, made.prune_layer) == (choice.threshold, 0.5, 4)
        assert made.exit_threshold is not None
        assert 0 < made.measured["exit_share"] == choice.exit_share < 1
        assert made.measured["loss"] == choice.loss
        assert (note, made.examples, made.groups, made.promise) == ("", COUNT, COUNT // 2, "accuracy")


def threshold_at(results: Results, setting: tuple[Any, ...] | None, delta: float) -> Any:
    large = arrays(results, ("large", None, None))
    return choose_threshold(
        arrays(results, ("small", None, None), "decision_score"),
        arrays(results, ("small", None, None)),
        large if setting is None else arrays(results, ("guided", *setting)),
        alpha=0.1,
        delta=delta,
        groups=arrays(results, ("small", None, None), "group"),
        reference_score=None if setting is None else large,
    )


def test_a_chosen_setting_shares_delta() -> None:
    results = make_results()
    found = search(results)
    shared = {setting: threshold_at(results, setting, 0.1 / 3) for setting in (None, (0.5, 4), (0.2, 2))}
    assert not shared[0.2, 2].holds  # it loses a third of the answers
    times = {None: 1.0, (0.5, 4): 0.5}
    expected = {
        setting or (1.0, 0): (shared[setting].threshold, 1.0 + (1 - shared[setting].exit_share) * seconds)
        for setting, seconds in times.items()
    }
    told = {
        (one.setting.keep_ratio, one.setting.prune_layer): (one.exits.threshold, one.seconds)
        for one in found.candidates
    }
    assert {key: value[0] for key, value in told.items()} == {
        key: value[0] for key, value in expected.items()
    }
    for key, (_, seconds) in expected.items():
        assert told[key][1] == pytest.approx(seconds)  # each image has two questions
    assert [one.seconds for one in found.candidates] == sorted(one.seconds for one in found.candidates)
    made = found.calibration
    assert (made.keep_ratio, made.prune_layer, made.exit_threshold) == (0.5, 4, shared[0.5, 4].threshold)
    assert made.measured["seconds"] == found.candidates[0].seconds
    assert made.measured["seconds_large_unpruned"] == 1.0
    whole, _ = run(results, setting=(0.5, 4))
    assert whole.exit_threshold < made.exit_threshold


def test_the_fastest_is_measured_with_its_exits() -> None:
    """The faster pruning loses all that is tolerated, so that nothing can exit: it is not the faster way."""
    results = make_results()
    for row in results.rows:
        key = (row["method"], row["keep_ratio"])
        if key in (("large", None), ("guided", 0.5)):
            row["score"] = 1.0
        elif key == ("guided", 0.2):
            row["score"] = float(int(row["id"]) % 25 > 0)
            row["seconds"] = 0.45
    found = search(results)
    by_setting = {one.setting.keep_ratio: one for one in found.candidates}
    assert by_setting[0.2].exits.exit_share < by_setting[0.5].exits.exit_share
    assert found.calibration.keep_ratio == 0.5


def test_times_are_of_the_examples_that_stay() -> None:
    """Where hard questions are slow, exits save less than their share."""
    results = make_results()
    sure = {row["id"]: row["decision_score"] for row in results.rows if row["method"] == "small"}
    for row in results.rows:
        if row["method"] == "guided":
            row["seconds"] = 1 - sure[row["id"]]
    made = search(results, setting=(0.5, 4))
    decision = arrays(results, ("small", None, None), "decision_score")
    expected = 1.0 + np.mean((decision < made.calibration.exit_threshold) * (1 - decision))
    assert made.candidates[0].seconds == pytest.approx(expected)


def test_doubtful_results_are_told() -> None:
    results = make_results()
    few = replace(results, rows=[row for row in results.rows if row["id"] != "7"])
    assert f"Only {COUNT - 1} of {COUNT} examples were answered by all" in search(few).note
    runs = [{"started": "2026-01-01T00:00:00+00:00", "machine": f"abacus, batches of {n}"} for n in (1, 8)]
    assert "several sizes" in search(replace(results, runs=runs)).note
    assert search(replace(results, runs=runs[:1])).note == ""


def test_a_promise_without_pruning_needs_no_guided_answers() -> None:
    results = make_results()
    made = replace(run(results)[0], keep_ratio=1.0, prune_layer=0)
    unguided = replace(results, rows=[row for row in results.rows if row["method"] in ("small", "large")])
    assert check(unguided, made)["mean"] == check(results, made)["mean"]


def test_no_pruning_is_a_candidate() -> None:
    results = make_results()
    for row in results.rows:
        if row["method"] == "guided":
            row["score"] = 0.0
    found = search(results)
    assert [one.setting.keep_ratio for one in found.candidates] == [1.0]
    assert SGLConfig(**found.calibration.settings()).keep_ratio == 1.0


def test_without_labels_the_large_answers_are_the_reference() -> None:
    results = make_results()
    unlabelled = replace(results, rows=[{**row, "score": None} for row in results.rows])
    with pytest.raises(ConfigError, match="--reference large"):
        run(unlabelled)
    made, _ = run(unlabelled, reference="large", setting=(0.5, 4), alpha=0.3)
    large = arrays(results, ("large", None, None))
    choice = choose_threshold(
        arrays(results, ("small", None, None), "decision_score"),
        arrays(results, ("small", None, None)) == large,
        arrays(results, ("guided", 0.5, 4)) == large,
        alpha=0.3,
        delta=0.1,
        groups=arrays(results, ("small", None, None), "group"),
        reference_score=np.ones(COUNT),
    )
    assert made.exit_threshold == choice.threshold is not None
    assert made.promise == "agreement"


def test_a_budget_of_calls() -> None:
    results = make_results()
    made, _ = run(results, calls=0.5, setting=(0.5, 4))
    decision = arrays(results, ("small", None, None), "decision_score")
    groups = arrays(results, ("small", None, None), "group")
    assert made.exit_threshold == choose_calls(decision, calls=0.5, groups=groups).threshold
    assert (made.promise, made.alpha) == ("calls", 0.5)
    chosen, _ = run(results, calls=0.5)  # half of delta for the choice of pruning
    assert (chosen.keep_ratio, chosen.prune_layer) == (0.5, 4)
    slow = make_results()
    for row in slow.rows:
        row["seconds"] *= 3 if row["method"] == "guided" else 1
    assert run(slow, calls=0.5)[0].keep_ratio == 1.0  # which is the fastest then
    assert chosen.exit_threshold == choose_calls(decision, calls=0.5, delta=0.05, groups=groups).threshold


@pytest.mark.parametrize("changes", [{}, {"reference": "large", "alpha": 0.3}, {"calls": 0.4}])
def test_a_promise_is_checked_on_other_examples(changes: dict[str, Any]) -> None:
    results = make_results()
    made, _ = run(results, setting=(0.5, 4), **changes)
    others = make_results(seed=1)
    others.header["data set"]["sha256"] = "d" * 64
    small, large, guided = (
        arrays(others, key, "prediction" if "reference" in changes else "score")
        for key in (("small", None, None), ("large", None, None), ("guided", 0.5, 4))
    )
    exited = arrays(others, ("small", None, None), "decision_score") >= made.exit_threshold
    answers = np.where(exited, small, guided)
    promised = {"accuracy": lambda: large - answers, "agreement": lambda: (large != answers).astype(float)}
    expected = promised.get(made.promise, lambda: 1.0 - exited)()
    found = check(others, made)
    assert found["mean"] == pytest.approx(expected.mean())  # images have two questions each
    assert found["low"] < found["mean"] < found["high"]
    assert found["exit_share"] == pytest.approx(exited.mean())
    assert found["kept"] == (expected.mean() <= made.alpha)
    assert (found["routed_to"], found["groups"]) == (("guided", 0.5, 4), COUNT // 2)
    assert (found["differences"], found["same_data"]) == ([], False)
    assert check(results, made)["same_data"]
    other = make_results(("a" * 64, "x" * 64))
    other.header["pair"]["small"]["compute"] = "bfloat16"
    other.header["settings"]["max_new_tokens"] = 1
    other.header["data set"]["metric"] = "relaxed"
    told = check(other, made)["differences"]
    expected = [
        "large VLM is not",
        "small VLM computes in bfloat16",
        "max_new_tokens was 8",
        "metric was 'exact'",
    ]
    assert len(told) == 4
    assert all(part in sentence for part, sentence in zip(expected, told, strict=True))


def test_a_promise_is_kept_for_whatever_is_chosen() -> None:
    """Over draws from one distribution, whose true losses are known: broken at most delta of the time."""
    generator, alpha, delta, broken = np.random.default_rng(5), 0.1, 0.2, 0
    draws = 200
    for _ in range(draws):
        results = make_results(seed=int(generator.integers(1 << 30)), count=300)
        made = search(results, alpha=alpha, delta=delta).calibration
        kept = 0.95 if made.keep_ratio in (0.5, 1.0) else 0.6
        threshold = 1.0 if made.exit_threshold is None else made.exit_threshold
        exits = (1 - threshold**1.2) / 1.2  # the integral of sure ** 0.2 over those that exit
        broken += 0.95 - (exits + threshold * kept) > alpha
    assert broken <= delta * draws


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "nobody"}, "'labels' or 'large', got 'nobody'"),
        ({"setting": (0.3, 1)}, "no results of 0.3@1, but of 0.5@4, 0.2@2"),
        ({"alpha": 0.0}, "alpha"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(make_results(), **changes)


def test_a_setting_that_breaks_the_promise_is_not_written() -> None:
    with pytest.raises(SGLError, match=r"0\.2@2 .*more than 0\.1"):
        run(make_results(), setting=(0.2, 2))


@pytest.mark.parametrize("method", ["small", "large", "guided"])
def test_missing_methods_are_named(method: str) -> None:
    results = make_results()
    left = replace(results, rows=[row for row in results.rows if row["method"] != method])
    with pytest.raises(ConfigError, match=f"lack {method}"):
        run(left)


def test_the_file_becomes_a_config_that_knows_its_pair(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prints = checkpoint_fingerprint(tiny.SMALL), checkpoint_fingerprint(tiny.LARGE)
    made, _ = run(make_results(prints), setting=(0.5, 4))
    file = tmp_path / "calibration.json"
    made.write(file)
    config = SGLConfig.from_file(file, max_batch=4)
    assert (config.keep_ratio, config.prune_layer) == (0.5, 4)
    assert config.exit_threshold == made.exit_threshold
    assert config == SGLConfig(
        keep_ratio=0.5, prune_layer=4, exit_threshold=made.exit_threshold, max_new_tokens=8, max_batch=4
    )
    with pytest.raises(ConfigError, match="fixes keep_ratio"):
        SGLConfig.from_file(file, keep_ratio=0.1)
    with caplog.at_level(logging.WARNING):
        SGLPipeline.from_pretrained(tiny.SMALL, tiny.LARGE, config=config)
    assert "calibrated" not in caplog.text
    with caplog.at_level(logging.WARNING):
        SGLPipeline.from_pretrained(tiny.SMALL, tiny.SMALL, config=config)
    assert "The large VLM is not the one that was calibrated" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        SGLPipeline.from_pretrained(tiny.SMALL, tiny.LARGE, config=config, dtype="bfloat16")
    assert "The large VLM computes in bfloat16, it was calibrated in float32" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        plain = SGLPipeline.from_pretrained(tiny.SMALL, tiny.SMALL)
        assert not caplog.text
        changed = plain.with_config(config)
        assert "The large VLM is not the one that was calibrated" in caplog.text
        caplog.clear()
        changed.with_config(replace(config, max_batch=2))
    assert not caplog.text  # it has been said
    assert replace(config, max_batch=2).calibration is config.calibration
    assert replace(config, keep_ratio=0.4).calibration is None
