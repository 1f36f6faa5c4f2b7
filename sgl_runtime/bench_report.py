"""What the times of `sgl_runtime.bench_pipeline` mean: rows, differences of sides, targets, the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from sgl_kernels.bench.timing import Ceilings
from sgl_runtime.bench_cost import decode_bytes
from sgl_runtime.bench_pairs import Pair

if TYPE_CHECKING:
    from sgl_runtime.bench_pipeline import Outcome, Record

Row = dict[str, Any]

STAGES = (
    "small_vision",
    "small_prefill",
    "small_decode",
    "consistency",
    "large_vision",
    "large_prefill_full",
    "large_prefill_pruned",
    "large_decode",
)
SMALL = ("small_vision", "small_prefill", "small_decode")
TITLES = {
    "research": "1 research code's way",
    "unguided": "2 ours without guidance",
    "guided": "3 guided",
    "draft": "4 guided + draft",
    "overlap": "5 guided + draft + overlap",
    "large alone": "6 large alone, unpruned",
    "small alone": "small alone",
}


def to_row(side: str, batch: int, record: Record, pair: Pair, limit: Ceilings) -> Row:
    """Medians of a side's times, in milliseconds, with what they come to per token and per second."""
    outcome = record.outcome
    row: Row = {
        "side": side,
        "batch": batch,
        "calls_ms": [1e3 * seconds for seconds in record.seconds],
        "calls_stage_ms": [{name: 1e3 * s for name, s in stages.items()} for stages in record.stages],
        "median_ms": 1e3 * statistics.median(record.seconds),
        "stage_ms": {
            name: 1e3 * statistics.median(stages.get(name, 0.0) for stages in record.stages)
            for name in STAGES
            if any(name in stages for stages in record.stages)
        },
        "token_ids": outcome.token_ids,
        "accepted_draft": outcome.accepted,
        "peak_bytes": record.peak_bytes,
    }
    row["tokens_per_s"] = 1e3 * sum(map(len, outcome.token_ids)) / row["median_ms"]
    small_ids = outcome.token_ids if side == "small alone" else outcome.small_token_ids
    if small_ids is not None:
        row["small_per_token"] = _decode(row, "small_decode", small_ids, pair.small, pair, limit)
    if side == "large alone":
        row["large_per_token"] = _decode(row, "large_decode", outcome.token_ids, pair.large, pair, limit)
    return row


def _decode(
    row: Row, stage: str, token_ids: list[list[int]], model: Any, pair: Pair, limit: Ceilings
) -> dict[str, float] | None:
    """Milliseconds of a decode step, and the bandwidth at which it reads weights, keys and values."""
    steps = max(map(len, token_ids)) - 1  # the last token is never fed
    if steps == 0 or not row["stage_ms"].get(stage):
        return None
    step_ms = row["stage_ms"][stage] / steps
    prompt = max(inputs["input_ids"].shape[1] for request in pair.requests for inputs in request)
    element = next(model.parameters()).element_size()
    read = decode_bytes(model.config, prompt + (steps + 1) / 2, element, batch=row["batch"])
    per_second = read / step_ms * 1e3
    share = per_second / limit.copy_bytes_per_s
    return {"ms": step_ms, "gb_per_s": per_second / 1e9, "share_of_copy": share}


def differences(batch: int, outcomes: Mapping[str, Outcome], first: dict[str, Outcome]) -> list[str]:
    """Say where sides disagree that must agree, and where a batch changes what a request gets.

    ``first`` remembers the outcomes of the first batch size.
    """
    found, guided = [], outcomes.get("guided")
    for name, outcome in outcomes.items():
        earlier = first.setdefault(name, outcome)
        pairs = [(f"{name} in a batch of {batch}", outcome, f"{name} alone", earlier)]
        if guided is not None and "alone" not in name:
            pairs.append((name, outcome, "guided", guided))
        found += [words for pair in pairs for words in _differences(*pair)]
    return found


def _differences(one_name: str, one: Outcome, other_name: str, other: Outcome) -> list[str]:
    found = []
    for what in ("token_ids", "small_token_ids", "kept_visual"):
        ours, theirs = getattr(one, what), getattr(other, what)
        for i, (a, b) in enumerate(zip(ours or [], theirs or [], strict=False)):
            same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            if not same:
                found.append(f"{what} of request {i}: {one_name} and {other_name} differ")
    return found


def targets(document: Mapping[str, Any]) -> list[Row]:
    """The targets of one request at a time and what was reached, where the sides that they compare ran."""
    rows = {row["side"]: row for row in document["results"] if row["batch"] == 1}
    on_gpu = document["task"]["device"] == "cuda"
    found: list[Row] = []

    def add(target: str, value: float | None, least: float | None = None, most: float | None = None) -> None:
        if value is not None:
            met = (least is None or value >= least) and (most is None or value <= most)
            found.append({"target": target, "value": value, "least": least, "most": most, "met": met})

    add("guided over research, whole pipeline", _faster(rows, "research", "guided"), least=1.0)
    if on_gpu:
        add("guided small VLM over research", _faster(rows, "research", "guided", SMALL), least=8.0)
        for name in ("guided", "small alone"):
            share = (rows.get(name, {}).get("small_per_token") or {}).get("share_of_copy")
            add(f"small decode, share of copy bandwidth, {name}", share, least=0.65)
    else:
        for stage, least in (("small_prefill", 1.3), ("small_decode", 2.0)):
            add(f"{stage} over research", _faster(rows, "research", "guided", (stage,)), least=least)
        add("peak memory beyond the weights, of research's", _memory(rows), most=0.5)
    slower = _faster(rows, "guided", "unguided")
    add("guidance, time over that without", slower, most=1.03 if on_gpu else 1.05)
    if "guided" in rows:
        stages = rows["guided"]["stage_ms"]
        add("consistency, of the small VLM's time", stages["consistency"] / _sum(stages, SMALL), most=0.1)
    bounds = document["bounds"]
    add(
        "draft over large alone, of the bound in series",
        _reached(rows, "draft", bounds["series"]),
        least=0.85,
    )
    if on_gpu:
        add(
            "overlap over large alone, of the bound hidden",
            _reached(rows, "overlap", bounds["hidden"]),
            least=0.7,
        )
    return found


def _faster(rows: Mapping[str, Row], slow: str, fast: str, stages: tuple[str, ...] = ()) -> float | None:
    """How many times longer ``slow`` took than ``fast``, as a whole or in stages: the median over turns."""
    if slow not in rows or fast not in rows:
        return None
    times = []
    for row in (rows[slow], rows[fast]):
        times.append([_sum(call, stages) for call in row["calls_stage_ms"]] if stages else row["calls_ms"])
    if not all(times[1]):
        return None  # no step was decoded
    return statistics.median(a / b for a, b in zip(*times, strict=True))


def _sum(stages: Mapping[str, float], names: tuple[str, ...]) -> float:
    return sum(stages.get(name, 0.0) for name in names)


def _reached(rows: Mapping[str, Row], side: str, bound: float) -> float | None:
    faster = _faster(rows, "large alone", side)
    return None if faster is None else faster / bound


def _memory(rows: Mapping[str, Row]) -> float | None:
    ours, theirs = (rows.get(name, {}).get("peak_bytes") for name in ("guided", "research"))
    return ours / theirs if ours and theirs else None


def table(document: Mapping[str, Any]) -> str:
    """What `bench_pipeline.run` returned, for people."""
    pair, task, limit = document["pair"], document["task"], document["ceilings"]
    sizes = ", ".join(f"{name} {pair[name]['parameters'] / 1e6:,.0f}M" for name in ("small", "large"))
    where, bounds = document["environment"], document["bounds"]
    lines = [
        f"{pair['name']}: {sizes}; {pair['visual_tokens']} visual of {pair['prompt_tokens']} prompt tokens, "
        f"up to {pair['new_tokens']} new{'; ' if pair['note'] else ''}{pair['note']}.",
        f"{where['device']}, {task['dtype']}, {where['threads']} threads, compile={task['compile']}, "
        f"attention {where['attention']}; a copy moves {limit['copy_bytes_per_s'] / 1e9:.1f} GB/s, a matrix "
        f"product does {limit['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s.",
        f"Token ratio {document['token_ratio']:.0%}; faster than the large VLM alone by at most "
        f"{bounds['series']:.2f}x in series, {bounds['hidden']:.2f}x hidden, at equal operations per second.",
    ]
    for batch in sorted({row["batch"] for row in document["results"]}):
        lines += ["", f"batch {batch}, ms", _HEADING]
        lines += [_line(row) for row in document["results"] if row["batch"] == batch]
    lines += ["", *map(_verdict, document["targets"])]
    found = document["differences"]
    lines += ["", *(found or ["Tokens and kept sets: equal wherever they must be."])]
    return "\n".join(lines)


_COLUMNS = ("s.vision", "s.prefill", "s.decode", "consist", "l.vision", "l.full", "l.pruned", "l.decode")
_HEADING = (
    f"{'side':<27} {'all':>9} "
    + " ".join(f"{name:>9}" for name in _COLUMNS)
    + f" {'tokens/s':>9} {'decode GB/s':>12} {'peak MB':>8} accepted"
)


def _line(row: Row) -> str:
    stages = " ".join(
        f"{row['stage_ms'][name]:>9.1f}" if name in row["stage_ms"] else f"{'':>9}" for name in STAGES
    )
    decode = row.get("large_per_token") or row.get("small_per_token")
    bandwidth = f"{decode['gb_per_s']:.1f} {decode['share_of_copy']:>4.0%}" if decode else ""
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
    accepted = ""
    if any(row["accepted_draft"] or []):
        accepted = f"{sum(row['accepted_draft'])} of {sum(map(len, row['token_ids']))}"
    return (
        f"{TITLES[row['side']]:<27} {row['median_ms']:>9.1f} {stages} {row['tokens_per_s']:>9.1f} "
        f"{bandwidth:>12} {peak:>8} {accepted}"
    ).rstrip()


def _verdict(target: Row) -> str:
    wanted = f"at least {target['least']:g}" if target["most"] is None else f"at most {target['most']:g}"
    met = "met   " if target["met"] else "MISSED"
    return f"{met} {target['target']}: {target['value']:.3f}, wanted {wanted}"
