"""`sgl-vlm bench --pipeline`: the whole pipeline against the research code's way, same weights, same inputs.

Sides take turns, so that what else runs on the machine slows all of them. On CUDA a turn is several calls
after one that is not timed, since pruned and unpruned runs of a VLM lay its memory out anew. Peak memory is
what a side needs beyond the weights; on the CPU that is found in a process for each side.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import sgl_kernels
from sgl_kernels.bench.timing import ceilings
from sgl_runtime import bench_pairs, checkpoints, hf
from sgl_runtime.attention import attention_backend
from sgl_runtime.bench_cost import speedup_bounds
from sgl_runtime.bench_pairs import Pair
from sgl_runtime.bench_report import differences, targets, to_row
from sgl_runtime.clock import Clock
from sgl_runtime.config import SGLConfig, num_kept, token_ratio
from sgl_runtime.errors import ConfigError
from sgl_runtime.memory import bucket
from sgl_runtime.pipeline import SGLPipeline
from sgl_runtime.requests import Answer, Prefix, Prune
from sgl_runtime.research import ResearchPipeline, ResearchResult

SIDES = ("research", "unguided", "guided", "draft", "overlap", "large alone", "small alone")
TURNS = {"cpu": (5, 30), "cuda": (3, 10)}  # at least, at most
SECONDS = 20  # of turns, where those are enough of them
CALLS = {"cpu": 1, "cuda": 3}  # timed calls of a turn


@dataclasses.dataclass(frozen=True)
class Task:
    """What to measure. ``keep_ratio`` is the prune layer's share of the depth too: 0.2 is the paper's 35 %.

    ``turns`` None is as many as fit into 20 seconds, at least 5 on the CPU and 3 on CUDA.
    """

    pair: str
    device: str
    dtype: str
    batches: Sequence[int] = (1,)
    keep_ratio: float = 0.2
    compile: bool | str = "auto"
    turns: int | None = None
    sides: Sequence[str] = SIDES


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What a side said about each request, as far as it says it, and the seconds of its stages."""

    token_ids: list[list[int]]
    timings: dict[str, float]
    small_token_ids: list[list[int]] | None = None
    mass: list[Tensor] | None = None
    kept_visual: list[Tensor] | None = None
    accepted: list[int] | None = None


@dataclasses.dataclass
class Record:
    """What a side said; its calls: seconds of each and of its stages; its peak beyond the weights."""

    outcome: Outcome
    seconds: list[float] = dataclasses.field(default_factory=list)
    stages: list[dict[str, float]] = dataclasses.field(default_factory=list)
    peak_bytes: int | None = None


def make_task(pair: str, device: str, dtype: str, **options: Any) -> Task:
    """Check the words of the command line; "auto" is CUDA where there is one, and its usual dtype.

    Raises
    ------
    ConfigError
        A word is unknown, or there is no such device.
    """
    if pair not in bench_pairs.NAMES:
        raise ConfigError(f"--pair must be one of {', '.join(bench_pairs.NAMES)}, got {pair!r}.")
    place = checkpoints.resolve_device(device)
    compute = str(checkpoints.resolve_dtype(dtype, place)).removeprefix("torch.")
    return Task(pair, place.type, compute, **options)


def run(task: Task) -> dict[str, Any]:
    """Measure; return environment, ceilings, pair, bounds, a row per batch and side, and the targets."""
    *_, document = run_by_batch(task)
    return document


def run_by_batch(task: Task) -> Iterator[dict[str, Any]]:
    """Measure, and yield what `run` returns as far as it is known, after each batch size."""
    device, dtype = torch.device(task.device), getattr(torch, task.dtype)
    limit = ceilings(device, dtype)
    pair = bench_pairs.make_pair(task.pair, device, dtype, max(task.batches))
    text_tokens = _longest(pair) - _visual(pair)
    settings = SGLConfig(keep_ratio=task.keep_ratio, prune_layer=task.keep_ratio)
    layers = pair.large.config.text_config.num_hidden_layers
    document: dict[str, Any] = {
        "environment": {
            **sgl_kernels.collect_env(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if task.device == "cuda" else "CPU",
            "attention": attention_backend(device, dtype, hf.view(pair.small).head_dim),
        },
        "ceilings": dataclasses.asdict(limit),
        "task": dataclasses.asdict(task),
        "pair": _describe(pair),
        "token_ratio": token_ratio(layers, settings.layer_of(layers), settings.keep_ratio),
        "bounds": speedup_bounds(pair.small.config, pair.large.config, _tiles(pair), text_tokens, settings),
        "results": [],
        "differences": [],
    }
    base = SGLPipeline.from_models(pair.small, pair.large, settings)
    first: dict[str, Outcome] = {}
    for batch in sorted(task.batches):
        records = _measure(Sides(base, pair, task, batch))
        document["results"] += [to_row(name, batch, record, pair, limit) for name, record in records.items()]
        document["differences"] += differences(batch, {n: r.outcome for n, r in records.items()}, first)
        document["targets"] = targets(document)
        yield document


class Sides:
    """The sides for batches of one size. All share the pair's weights; ours share one runtime, ``base``."""

    def __init__(self, base: SGLPipeline, pair: Pair, task: Task, batch: int) -> None:
        config = SGLConfig(
            keep_ratio=task.keep_ratio,
            prune_layer=task.keep_ratio,
            max_new_tokens=pair.new_tokens,
            draft=False,
            compile=task.compile,
            max_batch=batch,
            max_prompt_tokens=bucket(_longest(pair)),
            max_text_tokens=bucket(_longest(pair) - _visual(pair)),
        )
        self.task, self.pair, self.batch, self.config = task, pair, batch, config
        self.requests = pair.requests[:batch]
        self.pipe = base.with_config(config)
        self.research = ResearchPipeline(pair.small, pair.large, config)
        self.draft = base.with_config(dataclasses.replace(config, draft=True))
        self.overlap = base.with_config(dataclasses.replace(config, draft=True, schedule="latency"))

    def calls(self) -> dict[str, Callable[[], Outcome]]:
        """Return the sides as functions; the research code takes one request at a time."""
        calls: dict[str, Callable[[], Outcome]] = {
            "research": lambda: _outcome([self.research.generate(*self.requests[0])]),
            "unguided": self._unguided,
            "guided": lambda: _outcome(self.pipe.generate_batch(self.requests)),
            "draft": lambda: _outcome(self.draft.generate_batch(self.requests)),
            "overlap": lambda: _outcome(self.overlap.generate_batch(self.requests)),
            "large alone": self._large_alone,
            "small alone": self._small_alone,
        }
        return {name: calls[name] for name in self.task.sides if name != "research" or self.batch == 1}

    def _small_alone(self) -> Outcome:
        clock = self._clock()
        _, token_ids = self._small(clock)
        return Outcome(token_ids, clock.seconds)

    def _large_alone(self) -> Outcome:
        """The large VLM, unpruned."""
        clock = self._clock()
        prefix = self._begin_large(clock, None, None)
        return Outcome(_token_ids(self.pipe.large.answer(prefix, clock=clock)), clock.seconds)

    def _unguided(self) -> Outcome:
        """What "guided" does, with the masses of an earlier run in place of its own."""
        clock, config = self._clock(), self.config
        prefix, small_ids = self._small(clock)
        with clock.stage("consistency"):
            prunes = self._prunes(0, config.consistency_keep_ratio)
            self.pipe.small.score(prefix, prunes, dict(enumerate(small_ids)))
        layer = config.layer_of(self.pipe.large.num_layers)
        prunes = self._prunes(layer, config.keep_ratio)
        prefix = self._begin_large(clock, layer, [prune.num_keep for prune in prunes.values()])
        answers = self.pipe.large.answer(prefix, prunes=prunes, clock=clock)
        return Outcome(_token_ids(answers), clock.seconds, small_ids)

    def _small(self, clock: Clock) -> tuple[Prefix, list[list[int]]]:
        small = self.pipe.small
        requests = small.encode([small.prompt(inputs) for inputs, _ in self.requests], clock)
        prefix = small.begin(requests, self.config.max_new_tokens, clock=clock)
        return prefix, _token_ids(small.answer(prefix, clock=clock))

    def _begin_large(self, clock: Clock, layer: int | None, num_keep: list[int] | None) -> Prefix:
        large = self.pipe.large
        requests = large.encode([large.prompt(inputs) for _, inputs in self.requests], clock)
        tokens = self.config.max_new_tokens
        return large.begin(requests, tokens, prune_layer=layer, num_keep=num_keep, clock=clock)

    def _prunes(self, layer: int, keep_ratio: float) -> dict[int, Prune]:
        return {
            i: Prune(layer, mass, num_kept(mass.shape[1], keep_ratio)) for i, mass in enumerate(self._masses)
        }

    @cached_property
    def _masses(self) -> list[Tensor]:
        results = self.pipe.generate_batch(self.requests)
        return [result.mass[None].to(self.pipe.large.model.device) for result in results]

    def _clock(self) -> Clock:
        return Clock(self.pipe.large.model.device)


def _measure(sides: Sides) -> dict[str, Record]:
    """Call the sides in turn, after calls of each that are not timed."""
    task = sides.task
    calls, on_gpu = sides.calls(), task.device == "cuda"
    records = {name: Record(call()) for name, call in calls.items()}
    turns = task.turns or _turns(task, calls)
    title = f"{task.pair}, batch {sides.batch}"
    for turn in tqdm(range(turns), desc=title, unit="turn", disable=None, leave=False):
        for name, call in calls.items():
            record = records[name]
            if on_gpu:
                call()
            for _ in range(CALLS[task.device]):
                began = time.perf_counter()
                outcome = call()
                record.seconds.append(time.perf_counter() - began)
                record.stages.append(outcome.timings)
            if turn == 0 and on_gpu:
                record.peak_bytes = _peak_on_gpu(sides, name, call)
    if not on_gpu:
        for name, record in records.items():
            record.peak_bytes = _peak_in_a_process_of_its_own(task, name, sides.batch)
    return records


def _turns(task: Task, calls: Mapping[str, Callable[[], Outcome]]) -> int:
    began = time.perf_counter()
    for call in calls.values():
        call()
    turn = (time.perf_counter() - began) * (CALLS[task.device] + (task.device == "cuda"))
    least, most = TURNS[task.device]
    return min(most, max(least, int(SECONDS / turn)))


def _peak_on_gpu(sides: Sides, name: str, call: Callable[[], Outcome]) -> int:
    """Bytes beyond the weights; the research code is not charged with what our runtime holds."""
    models = (sides.pair.small, sides.pair.large)
    weights = sum(tensor.nbytes for model in models for tensor in (*model.parameters(), *model.buffers()))
    start = torch.cuda.memory_allocated() if name == "research" else weights
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - start


def _peak_in_a_process_of_its_own(task: Task, side: str, batch: int) -> int | None:
    only = dataclasses.replace(task, sides=[side], batches=[batch])
    done = subprocess.run(
        [sys.executable, "-m", "sgl_runtime.bench_pipeline"],
        input=json.dumps(dataclasses.asdict(only)),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ConfigError(f"The process that measures the memory of {side!r} failed: {reason}")
    found: int | None = json.loads(done.stdout)
    return found


def _main() -> None:
    """Print how far one side raises this process's peak resident memory above what it had with the models."""
    task = Task(**json.load(sys.stdin))
    (batch,), (side,) = task.batches, task.sides
    pair = bench_pairs.make_pair(task.pair, torch.device("cpu"), getattr(torch, task.dtype), batch)
    base = SGLPipeline.from_models(pair.small, pair.large, SGLConfig())
    call = Sides(base, pair, task, batch).calls()[side]
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():  # only Linux tells
        print("null")
        return
    reset.write_text("5")  # sets the peak to what is resident now
    before = _resident(status, "VmRSS")
    for _ in range(2):
        call()
    print(_resident(status, "VmHWM") - before)


def _resident(status: Path, name: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _outcome(results: Sequence[Any]) -> Outcome:
    """What a pipeline's results say, ours or the research code's."""
    ours = not isinstance(results[0], ResearchResult)
    return Outcome(
        token_ids=[result.token_ids for result in results],
        timings=results[0].timings,
        small_token_ids=[result.small_token_ids for result in results],
        mass=[result.mass for result in results],
        kept_visual=[result.kept_visual for result in results],
        accepted=[result.accepted_draft for result in results] if ours else None,
    )


def _token_ids(answers: dict[int, Answer]) -> list[list[int]]:
    return [answers[i].token_ids for i in range(len(answers))]


def _describe(pair: Pair) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": pair.name,
        "note": pair.note,
        "tiles": _tiles(pair),
        "visual_tokens": _visual(pair),
        "prompt_tokens": _longest(pair),
        "new_tokens": pair.new_tokens,
    }
    for name, model in (("small", pair.small), ("large", pair.large)):
        text = model.config.text_config
        found[name] = {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "layers": text.num_hidden_layers,
            "hidden": text.hidden_size,
            "vocabulary": text.vocab_size,
        }
    return found


def _longest(pair: Pair) -> int:
    return max(inputs["input_ids"].shape[1] for request in pair.requests for inputs in request)


def _tiles(pair: Pair) -> int:
    return pair.requests[0][1]["pixel_values"].shape[0]


def _visual(pair: Pair) -> int:
    ids = pair.requests[0][1]["input_ids"]
    return int((ids == pair.large.config.image_token_id).sum())


if __name__ == "__main__":
    _main()
