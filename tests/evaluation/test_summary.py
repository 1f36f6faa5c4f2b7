"""The numbers of a report, against the definitions computed once more."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from sgl_runtime.errors import ConfigError
from sgl_runtime.evaluation.data import DataSet
from sgl_runtime.evaluation.intervals import bootstrap_difference
from sgl_runtime.evaluation.results import Results
from sgl_runtime.evaluation.summary import summarize
from sgl_runtime.evaluation.table import table

from .made_results import COUNT, make_results, rows_of


def scores(results: Results, *key: object) -> np.ndarray:
    return np.array([row["score"] for row in rows_of(results, *key)])  # type: ignore[arg-type]


def test_methods_are_the_table_with_paired_differences() -> None:
    results, dataset = make_results()
    rows = summarize(results, dataset)["methods"]
    labels = ["small alone", "large unpruned"]
    labels += [f"{name} at {ratio} %" for name in ("guided", "random") for ratio in (64, 36, 5)]
    assert [row.pop("label") for row in rows] == labels
    plain = {(row["method"], row["token_ratio"]): row for row in table(results, dataset)}
    large = scores(results, "large")
    for row in rows:
        difference = row.pop("difference")
        assert row == plain[row["method"], row["token_ratio"]]
        if row["method"] == "large":
            assert difference is None
            continue
        mine = rows_of(results, row["method"], row["keep_ratio"], row["prune_layer"])
        expected = bootstrap_difference([r["score"] for r in mine], large, [r["group"] for r in mine])
        assert difference == expected._asdict()


def test_exits_are_what_a_threshold_gives() -> None:
    results, _ = make_results()
    marks = [0.5, 0.123]
    exits = summarize(results, thresholds=marks)["exits"]
    small, large = scores(results, "small"), scores(results, "guided", 0.2, 2)
    assert exits["routed_to"] == "guided at 36 %"
    assert (exits["small"], exits["large"]) == (small.mean(), large.mean())
    columns = {
        name: np.array([row[name] for row in rows_of(results, "small")])
        for name in ("confidence", "consistency", "decision_score")
    }
    columns["both"] = columns["decision_score"]
    assert set(exits["curves"]) == {"confidence", "consistency", "both"}
    for name, curve in exits["curves"].items():
        assert curve["threshold"] == [None, *sorted(set(columns[name]), reverse=True)]
        for share, accuracy, threshold in zip(
            *map(curve.get, ("share", "accuracy", "threshold")), strict=True
        ):
            exited = columns[name] >= (np.inf if threshold is None else threshold)
            assert share == pytest.approx(exited.mean())
            assert accuracy == pytest.approx(np.where(exited, small, large).mean())
    assert [point["threshold"] for point in exits["marks"]] == marks
    assert exits["points"][0]["threshold"] is None
    for point in (*exits["points"], *exits["marks"]):
        exited = columns["both"] >= (np.inf if point["threshold"] is None else point["threshold"])
        accuracy = np.where(exited, small, large).mean()
        chance = exited.mean() * small.mean() + (1 - exited.mean()) * large.mean()
        assert point["share"] == exited.mean()
        assert point["accuracy"]["mean"] == pytest.approx(accuracy)
        assert point["random"]["mean"] == pytest.approx(chance)
        assert point["gain"]["mean"] == pytest.approx(accuracy - chance)
        assert point["gain"]["low"] <= point["gain"]["mean"] <= point["gain"]["high"]
    shares = [point["share"] for point in exits["points"]]
    assert shares == sorted(set(shares))
    for wanted, share in zip(np.arange(1, 11) / 10, shares[1:], strict=False):
        assert share >= wanted - 1e-9


def test_equal_scores_exit_together() -> None:
    results, _ = make_results()
    for row in rows_of(results, "small"):
        row |= {"confidence": 0.9, "consistency": 0.5, "decision_score": 0.7}
    exits = summarize(results)["exits"]
    assert [point["share"] for point in exits["points"]] == [0.0, 1.0]
    assert exits["curves"]["both"]["share"] == [0.0, 1.0]


def test_without_consistency_the_confidence_decides() -> None:
    results, _ = make_results()
    for row in rows_of(results, "small"):
        row |= {"consistency": None, "decision_score": row["confidence"]}
    assert list(summarize(results)["exits"]["curves"]) == ["confidence"]


def test_long_curves_are_thinned() -> None:
    results, _ = make_results()
    rows = [
        {**row, "id": f"{row['id']}-{copy}"}
        | (
            {"decision_score": 0.0, "confidence": copy + int(row["id"]) / 60, "consistency": 0.0}
            if row["method"] == "small"
            else {}
        )
        for copy in range(5)
        for row in results.rows
    ]
    curve = summarize(Results(results.header, rows))["exits"]["curves"]["confidence"]
    assert len(curve["share"]) == 202
    assert (curve["share"][0], curve["share"][-1]) == (0.0, 1.0)
    assert curve["accuracy"][-1] == pytest.approx(scores(results, "small").mean())


def test_stages_are_those_that_a_request_goes_through() -> None:
    results, _ = make_results()
    stages = summarize(results)["stages"]
    small = {"small_prefill": 0.09375, "small_decode": 0.03125}
    guided = {**small, "guided_prefill": 0.1875, "guided_decode": 0.0625}
    assert stages == {
        "small alone": small,
        "large unpruned": {"large_prefill": 0.375, "large_decode": 0.125},
        **{f"guided at {ratio} %": guided for ratio in (64, 36, 5)},
    }


def test_settings_of_one_token_ratio_keep_names_of_their_own() -> None:
    results, _ = make_results()
    for row in results.rows:
        if row["keep_ratio"] == 0.4:  # 36 %, as 0.2 @ 2
            row |= {"keep_ratio": 0.36, "prune_layer": 0}
    found = summarize(results)
    guided = ["guided at 36 % (0.36 @ 0)", "guided at 36 % (0.2 @ 2)", "guided at 5 %"]
    assert [row["label"] for row in found["methods"]][2:5] == guided
    assert list(found["front"]["curves"]) == [*guided, "large unpruned"]
    assert list(found["stages"]) == ["small alone", "large unpruned", *guided]
    assert found["exits"]["routed_to"] == "guided at 36 % (0.2 @ 2)"


def test_front_is_what_nothing_beats() -> None:
    results, _ = make_results()
    generator = np.random.default_rng(0)
    for row in results.rows:
        row["seconds"] *= 1 + generator.random()
    found = summarize(results)["front"]
    decision = np.array([row["decision_score"] for row in rows_of(results, "small")])

    def seconds(*key: object) -> np.ndarray:
        return np.array([row["seconds"] for row in rows_of(results, *key)])  # type: ignore[arg-type]

    keys = {f"guided at {r} %": ("guided", *s) for r, s in ((64, (0.4, 4)), (36, (0.2, 2)), (5, (0.05, 0)))}
    keys["large unpruned"] = ("large",)
    assert list(found["curves"]) == list(keys)
    points = [(seconds(name).mean(), scores(results, name).mean()) for name in ("small", "large")]
    told = [(point["seconds"], point["accuracy"]) for point in found["points"].values()]
    np.testing.assert_allclose(told, points)
    for label, key in keys.items():
        curve = found["curves"][label]
        expected = []
        for threshold in (np.inf, *sorted(set(decision), reverse=True)):
            exited = decision >= threshold
            time = np.where(exited, 0, seconds(*key)) + seconds("small")
            score = np.where(exited, scores(results, "small"), scores(results, *key))
            expected.append((time.mean(), score.mean()))
        np.testing.assert_allclose(np.array([curve["seconds"], curve["accuracy"]]).T, expected)
        points += expected
    points = [(round(time, 9), round(score, 9)) for time, score in points]
    best = [
        (time, score)
        for time, score in points
        if not any(t <= time and s >= score and (t, s) != (time, score) for t, s in points)
    ]
    assert [(round(p["seconds"], 9), round(p["accuracy"], 9)) for p in found["best"]] == sorted(set(best))
    assert len(best) > 3


def test_what_guidance_lost() -> None:
    results, dataset = make_results()
    pruned, large = scores(results, "guided", 0.05, 0), scores(results, "large")
    lost = [str(i) for i in range(COUNT) if pruned[i] < large[i]]
    assert len(lost) > 3
    found = summarize(results, dataset, routed_to=("guided", 0.05, 0), worst=3)
    assert found["disagreement_count"] == len(lost)
    assert [row["id"] for row in found["disagreements"]] == lost[:3]
    first = found["disagreements"][0]
    assert first["question"] == f"question {lost[0]}"
    assert first["answers"] == [f"answer {lost[0]}"]
    assert (first["large"], first["pruned"], first["loss"]) == (f"answer {lost[0]}", "no", 1.0)
    assert summarize(results)["disagreements"][0]["question"] is None
    for row in rows_of(results, "large"):
        row["score"] = 0.5 if row["id"] == lost[0] else row["score"]
    worst = summarize(results, dataset, routed_to=("guided", 0.05, 0), worst=COUNT)["disagreements"]
    assert (worst[-1]["id"], worst[-1]["loss"]) == (lost[0], 0.5)


def test_what_is_missing_is_counted() -> None:
    results, dataset = make_results()
    rows = [
        row
        for row in results.rows
        if row["id"] not in ("0", "1") and not (row["id"] == "2" and row["method"] == "random")
    ]
    partial = Results(results.header, rows, {"1": "ImageError: it is torn"})
    found = summarize(partial, dataset)
    assert found["examples"] == {
        "count": 60,
        "answered": 57,
        "errors": 1,
        "skipped": 1,
        "missing": 2,
        "groups": 29,
    }
    assert found["skipped"] == [[7, "it has no image"]]
    assert {row["method"]: row["count"] for row in found["methods"]}["random"] == 57
    assert json.loads(json.dumps(found, allow_nan=False))["errors"] == partial.errors


def test_a_judge_s_data_has_no_scores() -> None:
    results, _ = make_results()
    header = {**results.header, "data set": {**results.header["data set"], "metric": "judge"}}
    rows = [{**row, "score": None} for row in results.rows]
    found = summarize(Results(header, rows))
    assert found["exits"] is None
    assert {row["mean"] for row in found["methods"]} == {None}
    assert {row["difference"] for row in found["methods"]} == {None}


@pytest.mark.parametrize("name", ["small", "large"])
def test_every_table_has_small_alone_and_large_unpruned(name: str) -> None:
    results, _ = make_results()
    rows = [row for row in results.rows if row["method"] != name]
    with pytest.raises(ConfigError, match=f"no answers of {name}, .*Run `sgl-vlm eval` again"):
        summarize(Results(results.header, rows))


def test_nothing_to_report() -> None:
    results, dataset = make_results()
    with pytest.raises(ConfigError, match="no answer and 1 errors, the first of 1: ImageError: it is torn"):
        summarize(Results(results.header, [], {"1": "ImageError: it is torn"}))
    with pytest.raises(ConfigError, match=r"no answers of \('guided', 0.3, 2\); there are"):
        summarize(results, routed_to=("guided", 0.3, 2))
    only = [row for row in results.rows if row["method"] in ("small", "large")]
    assert summarize(Results(results.header, only))["exits"] is None
    others: list[DataSet] = [
        replace(dataset, name="other"),
        replace(dataset, examples=(replace(dataset.examples[0], question="?"), *dataset.examples[1:])),
        replace(dataset, examples=dataset.examples[1:]),
        replace(dataset, examples=(replace(dataset.examples[0], id="x"), *dataset.examples[1:])),
    ]
    for other in others:
        with pytest.raises(ConfigError, match=r"The results are of other examples, 60 of made \(exact\)"):
            summarize(results, other)
