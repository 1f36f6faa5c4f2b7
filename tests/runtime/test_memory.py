"""Static memory: buckets, ragged capacities, refusals, growth, and that nothing left in memory shows."""

from __future__ import annotations

import signal
from dataclasses import dataclass, fields, replace
from dataclasses import field as dataclass_field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from sgl_runtime import SGLConfig, SGLPipeline
from sgl_runtime.engine import VLM
from sgl_runtime.errors import MemoryLimitError
from sgl_runtime.memory import NEVER, Capacity, DecodeState, Memory, batch_bucket, bucket, draft_bucket
from sgl_runtime.requests import Prune, Request

from . import slow

CAPACITY = Capacity(batch=2, full=40, pruned=24, prune_layer=1, new_tokens=5, visual=32)
LENGTHS = st.integers(1, 40_000)
CAPACITIES = st.builds(Capacity, *[st.integers(1, 4)] * 6)


def make_memory(**changes: Any) -> Memory:
    settings = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 8, "dtype": torch.float32}
    return Memory("large", **{**settings, **changes}, device=torch.device("cpu"), eos_ids=frozenset({2}))


@pytest.fixture(scope="module")
def engine() -> VLM:
    return VLM(slow.make_model("qwen3", seed=1), "large")


def requests_of(engine: VLM, *layouts: str) -> list[Request]:
    return engine.encode(
        [engine.prompt(slow.make_inputs(layout, seed=i)) for i, layout in enumerate(layouts)]
    )


@given(LENGTHS)
def test_bucket(length: int) -> None:
    assert length <= bucket(length) <= bucket(length + 1)
    assert bucket(bucket(length)) == bucket(length)
    assert bucket(length) - length <= max(15, length / 16)


def test_buckets_are_few() -> None:
    assert len({bucket(length) for length in range(1, 4097)}) == 2 * 16 + 3 * 16


@given(st.integers(0, 5000))
def test_draft_bucket(length: int) -> None:
    assert draft_bucket(length) % 8 == 0
    assert max(8, length) <= draft_bucket(length) < max(9, length + 8)


def test_batch_bucket() -> None:
    assert [batch_bucket(batch) for batch in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, 16]


@given(CAPACITIES, CAPACITIES)
def test_what_is_joined_holds_both(one: Capacity, other: Capacity) -> None:
    joined = one.joined(other)
    assert one.holds(one)
    assert joined.holds(other)
    assert joined.holds(replace(one, prune_layer=other.prune_layer))
    assert one.holds(other) == (joined == one)


@pytest.mark.parametrize("name", [field.name for field in fields(Capacity)])
def test_every_extent_counts(name: str) -> None:
    more = replace(CAPACITY, **{name: getattr(CAPACITY, name) + 1})
    assert not CAPACITY.holds(more)
    assert more.holds(CAPACITY) == (name != "prune_layer")


@pytest.mark.parametrize("prune_layer", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capacity_is_ragged_and_the_estimate_its_bytes(prune_layer: int, dtype: torch.dtype) -> None:
    memory = make_memory(dtype=dtype)
    capacity = replace(CAPACITY, prune_layer=prune_layer)
    assert memory.allocated == 0
    assert memory.reserve(capacity)
    cache = memory.cache
    slots = [40] * prune_layer + [24] * (3 - prune_layer)
    views = [*cache.keys, *cache.values]
    assert [tuple(view.shape) for view in views] == [(2, 2, count, 8) for count in slots * 2]
    assert all(view.is_contiguous() and view.dtype == dtype for view in views)
    assert memory.estimate(capacity) == memory.allocated == sum(view.nbytes for view in views)
    starts = sorted(view.data_ptr() for view in views)
    assert len(set(starts)) == len(views)
    for number, view in enumerate(views):
        view.fill_(number)
    assert [view.unique().tolist() for view in views] == [[number] for number in range(len(views))]


def test_room_is_made_once() -> None:
    memory = make_memory()
    assert memory.reserve(CAPACITY)
    state, cache = memory.state, memory.cache
    assert not memory.reserve(CAPACITY)
    assert not memory.reserve(replace(CAPACITY, batch=1, full=20))
    assert memory.state is state
    assert memory.cache is cache
    assert memory.reserve(replace(CAPACITY, full=41))
    assert memory.state is not state
    assert memory.reserve(replace(CAPACITY, prune_layer=2, full=7))  # the same room, laid out in another way
    assert [keys.shape[2] for keys in memory.cache.keys] == [41, 41, 24]
    assert memory.state.tokens.shape == (2, 6)


def test_what_does_not_fit_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make_memory()
    large = replace(CAPACITY, batch=64, full=8192, pruned=4096)
    need = memory.estimate(large)
    monkeypatch.setattr("sgl_runtime.memory.free_memory", lambda _: need - 1)
    with pytest.raises(
        MemoryLimitError,
        match=r"The large VLM's keys and values need 0.12 GiB for 64 requests of up to 8192 tokens \(4096 in "
        r"layers from 1 on, of 3\), but cpu has 0.12 GiB free. Lower max_batch, max_prompt_tokens, "
        r"max_text_tokens or max_new_tokens.",
    ):
        memory.reserve(large)
    assert memory.allocated == 0
    assert memory.reserve(CAPACITY)
    monkeypatch.setattr("sgl_runtime.memory.free_memory", lambda _: need)
    assert memory.reserve(large)
    assert memory.allocated == need


def test_a_refusal_leaves_the_engine_usable(engine: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = requests_of(engine, "tItt", "tIIIIIIIt")
    before = engine.generate(short, 6)
    with monkeypatch.context() as patch:
        patch.setattr("sgl_runtime.memory.free_memory", lambda _: 1000)
        with pytest.raises(MemoryLimitError, match=r"0.00 GiB free"):
            engine.generate(long, 6)
        with pytest.raises(MemoryLimitError):  # the room is gone, and there is still none
            engine.generate(short, 6)
    after = engine.generate(short, 6)
    assert (after.token_ids, after.logprobs) == (before.token_ids, before.logprobs)
    assert engine.generate(long, 6).token_ids


def slots(prompt: int) -> int:
    """Of a layer that sees ``prompt`` tokens and short answers."""
    return max(bucket(prompt + 8), bucket(prompt) + 8) + 1


def test_layers_behind_the_pruning_get_room_for_what_is_kept() -> None:
    engine = VLM(slow.make_model("qwen2", seed=1), "large")
    [request] = requests_of(engine, "tIIIIIIt")
    engine.generate(request, 5, prune=Prune(1, torch.zeros(1, 96), 4))
    full, pruned = slots(98), slots(2 + 4)
    assert [keys.shape[2] for keys in engine.memory.cache.keys] == [full, pruned, pruned, pruned]


def test_growth_changes_no_answer(engine: VLM) -> None:
    fresh = VLM(slow.make_model("qwen3", seed=1), "large")
    short, long = requests_of(fresh, "tItt", "tIIIIIIIt")
    first = fresh.generate(short, 6)
    small = fresh.memory.allocated
    grown = fresh.generate(long, 12)
    assert fresh.memory.allocated > small
    again = fresh.generate(short, 6)
    assert (again.token_ids, again.logprobs) == (first.token_ids, first.logprobs)
    alone = engine.generate(requests_of(engine, "tItt", "tIIIIIIIt")[1], 12)
    assert grown.token_ids == alone.token_ids


def test_what_shares_memory_does_not_starve_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many short requests and one long fit, but not as many long ones: each is laid out alone then."""
    memory = make_memory()
    many, long = replace(CAPACITY, batch=16), replace(CAPACITY, batch=1, full=4096, pruned=4096)
    limit = max(memory.estimate(many), memory.estimate(long))
    monkeypatch.setattr("sgl_runtime.memory.free_memory", lambda _: limit - memory.allocated)
    for capacity in (many, long, many, long):
        assert memory.reserve(capacity)
        assert memory.capacity == capacity


def test_an_unpruned_run_uses_a_pruned_layout_that_has_room() -> None:
    memory = make_memory()
    assert memory.reserve(CAPACITY)
    unpruned = replace(CAPACITY, prune_layer=NEVER, pruned=CAPACITY.full)
    assert memory.reserve(unpruned)
    for capacity in (CAPACITY, unpruned, CAPACITY):
        assert not memory.reserve(capacity)
    assert memory.cache.prune_layer == CAPACITY.prune_layer


def test_the_old_room_goes_before_the_new_one_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VLM(slow.make_model("qwen2", seed=1), "large")
    short, long = requests_of(engine, "tItt", "tIIIIIIIt")
    engine.generate(short, 3)
    old = StorageWeakRef(engine.memory._storage.untyped_storage())
    gone = []

    def free(_: torch.device) -> int:
        gone.append(old.expired())
        return 1 << 40

    monkeypatch.setattr("sgl_runtime.memory.free_memory", free)
    engine.generate(long, 3)
    assert gone == [False, True]  # asked what would fit, then told that there is room


def test_pipelines_set_aside_what_their_settings_allow() -> None:
    """One allocation for each VLM, whatever the requests are."""
    config = SGLConfig(max_new_tokens=5, prune_layer=2, keep_ratio=0.25, max_batch=3, max_prompt_tokens=200)
    model = slow.make_model("qwen2", seed=1)
    pipe = SGLPipeline.from_models(model, model, replace(config, max_text_tokens=50))
    sizes = set()
    for layout in ("tItt", "tIIIIIIt", "Itt"):
        inputs = slow.make_inputs(layout)
        pipe.generate_batch([(inputs, inputs)] * 3)
        sizes.add((pipe.small.memory.allocated, pipe.large.memory.allocated))
    [(small, large)] = sizes
    full, pruned = slots(200), slots(50 + 50)
    per_slot = 2 * 3 * 2 * 16 * 4  # keys and values, rows, KV heads, head dim, bytes
    assert small == 4 * full * per_slot
    assert large == (2 * full + 2 * pruned) * per_slot


def spoil(engine: VLM) -> None:
    """Overwrite everything that a run leaves behind."""
    engine.memory._storage.fill_(torch.nan)
    spoil_state(engine.memory.state)


def spoil_state(state: DecodeState) -> None:
    for name, value in (("tokens", 77), ("logprobs", torch.nan), ("mass", torch.nan), ("visual_index", 3)):
        getattr(state, name).fill_(value)
    for name, value in (("token", 5), ("position", 9), ("dropped", 2), ("count", 1), ("limit", 50)):
        getattr(state, name).fill_(value)
    state.failed.fill_(True)
    state.finished.fill_(False)


@pytest.mark.parametrize("layer", [None, 0, 2])
@pytest.mark.parametrize("draft", [None, "right", "wrong"])
def test_stale_memory_never_shows(engine: VLM, layer: int | None, draft: str | None) -> None:
    requests = requests_of(engine, "tIttt", "tItIttt", "tttIt")
    ranking = [
        torch.rand(1, r.prompt.num_visual, generator=torch.Generator().manual_seed(0)) for r in requests
    ]
    prunes = None if layer is None else {i: Prune(layer, ranking[i], 5) for i in range(3)}
    with_mass = layer is None and draft is None

    def run(drafts: dict[int, list[int]] | None) -> list[Any]:
        num_keep = None if layer is None else [5] * 3
        prefix = engine.begin(
            requests,
            6,
            prune_layer=layer,
            num_keep=num_keep,
            with_draft=drafts is not None,
            with_mass=with_mass,
        )
        answers = engine.answer(prefix, prunes=prunes, drafts=drafts)
        return [
            (a.token_ids, a.logprobs, a.accepted, None if a.mass is None else a.mass.tolist())
            for a in answers.values()
        ]

    drafts = None
    if draft is not None:
        free = [ids for ids, *_ in run(None)]
        drafts = {i: ids if draft == "right" else [*ids[:2], 99, 98] for i, ids in enumerate(free)}
    before = run(drafts)
    spoil(engine)
    assert run(drafts) == before


def test_what_was_interrupted_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three requests are decoded in four rows, and the fourth is still in the midst of a long answer."""
    model = slow.make_model("qwen3", seed=1)
    model.generation_config.eos_token_id = [*range(0, slow.VOCAB, 5)]
    engine = VLM(model, "large")
    requests = requests_of(engine, *["tIttt", "tItIttt", "tttIt"] * 4)
    length = {request: len(engine.generate(request, 40).token_ids) for request in requests}
    *short, long = sorted((r for r in requests if length[r] > 2), key=length.__getitem__)
    short = short[:3]
    assert length[short[-1]] < length[long] - 2
    steps, step = [], engine.steps.step
    with monkeypatch.context() as patch:
        patch.setattr(engine.steps, "step", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            engine.answer(engine.begin([*short, long], 40))
    monkeypatch.setattr(engine.steps, "step", lambda *args: steps.append(step(*args)))
    engine.answer(engine.begin(short, 40))
    assert len(steps) == length[short[-1]] - 1


def test_nothing_is_allocated_per_token(engine: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step allocates is gone when it ends, and what it writes to stays where it was."""
    [request] = requests_of(engine, "tItttt")
    engine.generate(request, 12, with_mass=True)
    memory = engine.memory

    def places() -> list[int]:
        state = [getattr(memory.state, field.name) for field in fields(memory.state)]
        return [tensor.data_ptr() for tensor in (*state, *memory.cache.keys, *memory.cache.values)]

    before, state, cache = places(), memory.state, memory.cache
    left, step = [], engine.steps.step

    def measured(*args: Any) -> None:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiler:
            step(*args)
        events = profiler.profiler.kineto_results.events()
        left.append([event.nbytes() for event in events if event.name() == "[memory]"])

    monkeypatch.setattr(engine.steps, "step", measured)
    engine.generate(request, 6, with_mass=True)
    assert len(left) == 5
    assert all(len(changes) > 10 for changes in left)  # or the profiler sees nothing
    assert [sum(changes) for changes in left] == [0] * 5
    assert (memory.state, memory.cache) == (state, cache)
    assert places() == before


VOCAB, EOS_IDS, NEW, WIDTH = 12, [2, 5], 7, 9


def logits_of(choices: list[int | None]) -> torch.Tensor:
    """Rows (., VOCAB) with their largest entry at the given token, each by a margin of its own; None: NaN."""
    logits = torch.zeros(len(choices), VOCAB)
    for row, token in enumerate(choices):
        logits[row, token or 3] = 2.0 + row / 8
        if token is None:
            logits[row, 7] = torch.nan
    return logits


@dataclass
class Books:
    """What a request's state must say, in plain Python."""

    draft: list[int]
    limit: int
    seq_len: int
    answer: list[int] = dataclass_field(default_factory=list)
    logprobs: list[float] = dataclass_field(default_factory=list)
    accepted: int = 0
    failed: bool = False

    @property
    def finished(self) -> bool:
        return self.failed or len(self.answer) >= self.limit or bool({*self.answer} & {*EOS_IDS})

    def choose(self, token: int | None, logprob: float) -> None:
        self.answer.append(3 if token is None else token)
        self.logprobs.append(logprob)
        self.failed |= token is None

    def begin(self, choices: list[int | None], logprobs: list[float]) -> None:
        """Row t of a prefill speaks when the t draft tokens before it were what the model says."""
        for t in range(max(1, len(self.draft))):
            self.choose(choices[t], logprobs[t])
            right = t < len(self.draft) and self.answer[t] == self.draft[t]
            self.accepted += right
            if self.finished or not right:
                return


TOKENS = st.one_of(st.integers(1, VOCAB - 1), st.sampled_from([None, 2]))


@st.composite
def prefills(draw: st.DrawFn) -> tuple[list[int | None], list[int]]:
    """What the model says in each row, and a draft that agrees with it for a while."""
    choices = draw(st.lists(st.one_of(st.integers(3, VOCAB - 1), TOKENS), min_size=WIDTH, max_size=WIDTH))
    draft = [token or 3 for token in choices[: draw(st.integers(0, NEW))]]
    for at in draw(st.lists(st.integers(0, NEW), max_size=2)):
        if at < len(draft):
            draft[at] = draw(st.integers(0, VOCAB - 1))
    return choices, draft


@settings(deadline=None, max_examples=200)
@given(
    requests=st.lists(prefills(), min_size=1, max_size=4),
    steps=st.lists(st.lists(TOKENS, min_size=4, max_size=4), max_size=8),
    limit=st.integers(1, NEW),
    data=st.data(),
)
def test_state_keeps_the_books(
    requests: list[tuple[list[int | None], list[int]]],
    steps: list[list[int | None]],
    limit: int,
    data: st.DataObject,
) -> None:
    state = DecodeState.empty(replace(CAPACITY, batch=4, new_tokens=NEW), EOS_IDS, torch.device("cpu"))
    spoil_state(state)
    state.clear()
    rows = data.draw(st.permutations(range(4)))[: len(requests)]
    books = [Books(draft[:limit], limit, 20 + row) for row, (_, draft) in zip(rows, requests, strict=True)]
    logits = torch.stack([logits_of(choices) for choices, _ in requests])
    for book, (choices, _), own in zip(books, requests, logits, strict=True):
        book.begin(choices, own.log_softmax(-1).max(-1).values.tolist())
    draft = torch.tensor([book.draft + [-1] * (WIDTH - len(book.draft)) for book in books])
    seq_lens = torch.tensor([book.seq_len for book in books], dtype=torch.int32)
    accepted = state.begin(torch.tensor(rows), logits, draft, limit, seq_lens, seq_lens - 6, seq_lens - 3)
    check(state, rows, books)
    assert all(a == b.accepted for a, b in zip(accepted.tolist(), books, strict=True) if not b.failed)

    for step in steps:
        logits = logits_of(step)
        logprobs = logits.log_softmax(-1).max(-1).values.tolist()
        done = all(book.finished for book in books)
        before = {field.name: getattr(state, field.name).clone() for field in fields(state)}
        for row, book in zip(rows, books, strict=True):
            if not book.finished:
                book.choose(step[row], logprobs[row])
        state.choose(logits)
        check(state, rows, books)
        moved = {
            name
            for name, value in before.items()
            if not value.equal(getattr(state, name)) and name != "mass"  # it is NaN
        }
        assert not done or moved <= {"tokens", "logprobs"}  # of which `check` has looked at what counts


def check(state: DecodeState, rows: list[int], books: list[Books]) -> None:
    for row in {*range(4)} - {*rows}:
        assert (state.finished[row], state.count[row], state.position[row]) == (True, 0, 0)
    for row, book in zip(rows, books, strict=True):
        assert (state.failed[row], state.finished[row]) == (book.failed, book.finished)
        if not book.failed:
            count = len(book.answer)
            assert state.count[row] == count
            assert state.limit[row] == book.limit
            assert state.tokens[row, :count].tolist() == book.answer
            assert state.logprobs[row, :count].tolist() == pytest.approx(book.logprobs, rel=1e-5)
            assert state.token[row] == book.answer[-1]
            assert state.position[row] == book.seq_len + count - 1
            assert state.dropped[row] == 6
            assert state.turned[row] == -3
