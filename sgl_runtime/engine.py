"""One VLM, and how a batch of requests goes through it, as the host sees it.

`prompt` checks a request, `encode` runs the vision tower, `begin` the decoder layers before the prune layer,
`answer` the rest of the prefill and the decode loop; `score` grades given answers in one pass. What runs
on the device is in decoder.py and memory.py; how it is compiled and captured, in steps.py.

Requests whose prompts are padded to the same length share a prefill; all of a batch share every decode step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import sgl_kernels
from sgl_runtime import hf
from sgl_runtime.clock import Clock
from sgl_runtime.decoder import Decoder, MassRows, Rows, Selection
from sgl_runtime.errors import NumericalError, PromptError
from sgl_runtime.families import Features
from sgl_runtime.graphs import FinishedFlag
from sgl_runtime.memory import NEVER, Capacity, KVCache, Memory, batch_bucket, bucket, draft_bucket
from sgl_runtime.requests import Answer, Group, Prefix, Prompt, Prune, Request, make_groups, make_prompt
from sgl_runtime.steps import Steps

Method = TypeVar("Method", bound=Callable[..., Any])
_STAGES = {"large": ("large_prefill_full", "large_prefill_pruned")}  # layers < K, layers >= K


@dataclass(frozen=True, eq=False)
class _Started:
    """What a group's prefill said, for `VLM._collect`: kept_index (B, S_kept), kept_lens, accepted (B,)."""

    group: Group
    kept_index: Tensor | None
    kept_lens: Tensor
    accepted: Tensor


def _at_home(method: Method) -> Method:
    """Run a method of VLM without gradients, and on CUDA with its own device as the current one."""

    @wraps(method)
    def run(self: VLM, *args: Any, **options: Any) -> Any:
        device = self.model.device
        with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return method(self, *args, **options)

    return cast(Method, run)


class VLM:
    """A vision-language model with its memory. `name` ("small", "large") prefixes stages and errors.

    One batch at a time: the memory belongs to the run that began last.
    """

    def __init__(self, model: nn.Module, name: str, *, compiled: bool = False) -> None:
        self.name = name
        self.model = view = hf.view(model)
        found = hf.logits_processors(view.generation_config, 1, view.eos_ids)
        self._has_processors = found is not None
        self.decoder = Decoder(view)
        shape = (len(view.layers), view.num_kv_heads, view.head_dim)
        self.memory = Memory(name, *shape, view.dtype, view.device, view.eos_ids)
        self.steps = Steps(self.decoder, self.memory, compiled=compiled)
        self._variants = {compiled: self}
        self._flag = FinishedFlag(view.device)
        self._stages = _STAGES.get(name, (f"{name}_prefill",) * 2)

    @property
    def num_layers(self) -> int:
        return len(self.model.layers)

    def with_compiled(self, compiled: bool) -> VLM:
        """Return this VLM with its steps compiled or not; both share model and memory and take turns."""
        if compiled not in self._variants:
            other = self._variants[compiled] = copy.copy(self)
            other.steps = Steps(self.decoder, self.memory, compiled=compiled)
        return self._variants[compiled]

    def prompt(self, inputs: Mapping[str, Any]) -> Prompt:
        """Check a processor's output for one request; see `requests.make_prompt`."""
        return make_prompt(self.model, self.name, inputs)

    def check_room(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Raise PromptError unless the prompt and the answer fit into the model's context."""
        if prompt.length + max_new_tokens > self.model.context:
            raise PromptError(
                f"The prompt has {prompt.length} tokens ({prompt.num_visual} of them visual) and "
                f"max_new_tokens is {max_new_tokens}, but the {self.name} VLM's context holds "
                f"{self.model.context}. Shorten the prompt, use fewer or smaller images, or lower "
                "max_new_tokens."
            )

    @_at_home
    def encode(
        self,
        prompts: Sequence[Prompt],
        clock: Clock | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> list[Request]:
        """Run the vision tower over all prompts' images; put the features among the text embeddings.

        ``check`` is called before every image or few tiles and may raise, to end work that nobody waits for.
        """
        with self._clock(clock).stage(f"{self.name}_vision"):
            visuals = [visual for prompt in prompts for visual in prompt.visuals]
            found = iter(self.model.family.features(visuals, check))
            return [self._embed(prompt, [next(found) for _ in prompt.visuals]) for prompt in prompts]

    @_at_home
    def begin(
        self,
        requests: Sequence[Request],
        max_new_tokens: int,
        *,
        prune_layer: int | None = None,
        num_keep: Sequence[int] | None = None,
        with_draft: bool = False,
        with_mass: bool = False,
        clock: Clock | None = None,
    ) -> Prefix:
        """Start a batch: run the prompts through the layers that see every token.

        Parameters
        ----------
        requests
            From `encode`; at least one.
        max_new_tokens
            Longest answer.
        prune_layer, num_keep
            Where `answer` will prune, and what each request keeps. None: it will not.
        with_draft
            Whether `answer` will get drafts.
        with_mass
            Whether to accumulate mass: of an unpruned run without drafts.
        """
        if with_mass and (prune_layer is not None or with_draft):
            raise ValueError("Mass is that of a plain run: ask for it without pruning and without drafts.")
        stop = prune_layer if prune_layer is not None else 0 if with_draft else self.num_layers
        prompts = [request.prompt for request in requests]
        kept = [prompt.length for prompt in prompts]
        if num_keep is not None:
            kept = [p.length - p.num_visual + n for p, n in zip(prompts, num_keep, strict=True)]
        self.reserve(len(prompts), max(p.length for p in prompts), max(kept), prune_layer, max_new_tokens)
        self.prepare(len(requests), with_mass)
        groups = []
        with self._clock(clock).stage(self._stages[0]):
            for group in make_groups(requests):
                groups.append(self._lower(group, stop, with_mass) if stop else group)
        return Prefix(groups, len(requests), stop, max_new_tokens)

    @_at_home
    def answer(
        self,
        prefix: Prefix,
        *,
        members: Iterable[int] | None = None,
        prunes: Mapping[int, Prune] | None = None,
        drafts: Mapping[int, list[int]] | None = None,
        clock: Clock | None = None,
    ) -> dict[int, Answer]:
        """Finish the prefill of a batch and answer greedily, until an end-of-sequence token or the limit.

        Parameters
        ----------
        prefix
            From `begin`, of this VLM's last run.
        members
            Numbers of the requests to answer; the others are dropped. None: all.
        prunes
            What each request keeps, by its number. None: no pruning.
        drafts
            A proposed answer per request, of at least one token, verified in the prefill; never changes what
            is answered.

        Returns
        -------
        dict
            The answer of each request, by its number. A NumericalError is in `Answer.error`, not raised.
        """
        clock, state = self._clock(clock), self.memory.state
        state.clear()
        groups = prefix.groups if members is None else prefix.only(members)
        with clock.stage(self._stages[1]):
            started = [self._upper(group, prefix, prunes, drafts) for group in groups]
        failed_early = state.failed.clone()
        with clock.stage(f"{self.name}_decode"):
            self._decode(prefix, groups)
        return self._collect(started, failed_early)

    def generate(
        self,
        request: Request,
        max_new_tokens: int,
        *,
        prune: Prune | None = None,
        draft: list[int] | None = None,
        with_mass: bool = False,
        clock: Clock | None = None,
    ) -> Answer:
        """`begin` and `answer` for one request.

        Raises
        ------
        PromptError
            Prompt and answer do not fit into the model's context.
        NumericalError
            Logits are NaN or infinite; the message names the stage.
        """
        self.check_room(request.prompt, max_new_tokens)
        prefix = self.begin(
            [request],
            max_new_tokens,
            prune_layer=None if prune is None else prune.layer,
            num_keep=None if prune is None else [prune.num_keep],
            with_draft=draft is not None,
            with_mass=with_mass,
            clock=clock,
        )
        prunes = None if prune is None else {0: prune}
        drafts = None if draft is None else {0: draft}
        answer = self.answer(prefix, prunes=prunes, drafts=drafts, clock=clock)[0]
        if answer.error is not None:
            raise answer.error
        return answer

    @_at_home
    def score(
        self, prefix: Prefix, prunes: Mapping[int, Prune], answers: Mapping[int, list[int]]
    ) -> dict[int, float]:
        """Return the log-probability of given answers when visual tokens are pruned before layer 0.

        Each answer is teacher-forced in one parallel pass over the embeddings in ``prefix``; its tokens'
        log-probabilities, before logits processors, are summed. NaN where the pass made NaN.
        """
        found: dict[int, float] = {}
        for group in prefix.only(prunes):
            draft = group.padded_draft(answers)
            logits, _, _ = self._run_upper(group, group.rows, None, 0, prunes, draft)
            totals = sgl_kernels.token_logprobs(logits, draft).double().sum(1).tolist()
            found |= dict(zip(group.members, totals, strict=True))
        return found

    @_at_home
    def layer_mass(self, request: Request, query_index: Tensor | None = None) -> Tensor:
        """Return the prompt's mass per layer, (layers, 1, N) fp32.

        Parameters
        ----------
        query_index : (1, R) int32, optional
            The rows that count; default: the prompt's text rows.
        """
        prompt, device = request.prompt, self.model.device
        mass = torch.zeros(self.num_layers, 1, prompt.num_visual, dtype=torch.float32, device=device)
        text_rows = prompt.text_rows if query_index is None else query_index
        at = torch.zeros(1, dtype=torch.int64, device=device)
        into = MassRows(text_rows, prompt.visual_index, list(mass))
        self.decoder.lower(request.rows, None, at, self.num_layers, into)
        return mass

    @_at_home
    def prepare(self, batch: int, with_mass: bool) -> None:
        """Compile and capture the decode step of ``batch`` requests, outside of any run."""
        self.steps.prepare(self._decode_rows(batch), with_mass, choose=not self._has_processors)

    @_at_home
    def reserve(
        self, batch: int, prompt_tokens: int, kept_tokens: int, prune_layer: int | None, new_tokens: int
    ) -> None:
        """Make room for runs of these sizes; a run that needs more makes it itself.

        Parameters
        ----------
        batch, prompt_tokens, new_tokens
            Requests in a batch, tokens of the longest prompt, tokens of the longest answer.
        kept_tokens
            Tokens of a prompt that layers from ``prune_layer`` on see. None: there are no such layers.

        Raises
        ------
        MemoryLimitError
            It does not fit.
        """
        fed = draft_bucket(new_tokens)
        capacity = Capacity(
            batch=batch,
            # One slot to spare: a slice that is all of a cache would be a case of its own to the compiler.
            full=max(bucket(prompt_tokens + fed), bucket(prompt_tokens) + fed) + 1,
            pruned=max(bucket(kept_tokens + fed), bucket(kept_tokens) + fed) + 1,
            prune_layer=NEVER if prune_layer is None else prune_layer,
            new_tokens=new_tokens,
            visual=bucket(prompt_tokens),
        )
        self.decoder.reserve_positions(capacity.full)
        self.memory.reserve(capacity)

    def _embed(self, prompt: Prompt, features: list[Features]) -> Request:
        hidden = self.model.embed(prompt.input_ids)  # (1, S, C)
        index = prompt.visual_index[0].long()
        tokens = torch.cat([each.tokens for each in features])[None].to(hidden.dtype)
        planes = [
            torch.cat(parts)[None].to(hidden.dtype)
            for parts in zip(*(each.planes for each in features), strict=True)
        ]
        cos, sin = self.decoder.prompt_rope(prompt.length, prompt.positions)
        rows = Rows(
            hidden.index_copy(1, index, tokens),
            cos[None],
            sin[None],
            tuple(torch.zeros_like(hidden).index_copy(1, index, plane) for plane in planes),
        )
        return Request(prompt, rows, tokens.isfinite().all())

    def _lower(self, group: Group, stop: int, with_mass: bool) -> Group:
        cache, rows, at = self.memory.cache, group.rows, group.at
        if with_mass:
            hidden, mass = self.steps.guided(rows, cache, at, group.padded_rows(), group.visual_index)
            return replace(group, hidden=hidden, mass=mass)
        return replace(group, hidden=self.steps.lower(rows, cache, at, stop, None))

    def _upper(
        self,
        group: Group,
        prefix: Prefix,
        prunes: Mapping[int, Prune] | None,
        drafts: Mapping[int, list[int]] | None,
    ) -> _Started:
        """Finish a group's prefill and enter its first tokens into the state."""
        limit, draft = prefix.new_tokens, None
        if drafts is not None:
            draft = group.padded_draft({member: drafts[member][:limit] for member in group.members})
        cache = self.memory.cache
        logits, kept_index, kept_lens = self._run_upper(group, group.begun, cache, prefix.stop, prunes, draft)
        if draft is None:
            draft = torch.full((len(group.members), 1), -1, device=logits.device)
        accepted = self.memory.state.begin(
            group.at,
            self._processed(group, logits, draft),
            draft,
            limit,
            group.seq_lens,
            kept_lens,
            group.next_angle,
        )
        if group.mass is not None:
            self.memory.state.enter_mass(group.at, group.visual_index, group.mass)
        return _Started(group, None if prunes is None else kept_index, kept_lens, accepted)

    def _run_upper(
        self,
        group: Group,
        rows: Rows,
        cache: KVCache | None,
        start: int,
        prunes: Mapping[int, Prune] | None,
        draft: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`Decoder.upper` for a group; ``draft`` (B, T + 1) as `Group.padded_draft` makes it."""
        longest, selection, drafted, device = group.longest, None, None, group.at.device
        if prunes is not None:
            chosen = [prunes[member] for member in group.members]
            prompts = [request.prompt for request in group.requests]
            longest = max(p.length - p.num_visual + c.num_keep for p, c in zip(prompts, chosen, strict=True))
            width = group.visual_index.shape[1]
            ranking = torch.cat([pad(c.ranking, (0, width - c.ranking.shape[1])) for c in chosen])
            num_keep = torch.tensor([c.num_keep for c in chosen], dtype=torch.int32, device=device)
            selection = Selection(ranking, group.visual_index, num_keep)
        if draft is not None:
            fed = draft[:, :-1]  # (B, T)
            longest += fed.shape[1]
            if start and cache is not None:
                columns = self._columns(rows.hidden.shape[1] + fed.shape[1])
                drafted = self.steps.draft_rows(
                    fed, group.seq_lens, group.next_angle, cache, group.at, start, columns
                )
            else:
                drafted = self.decoder.embed(fed.clamp_min(0))
        columns = self._columns(bucket(longest))
        return self.steps.upper(
            rows, group.seq_lens, group.next_angle, cache, group.at, start, selection, drafted, columns
        )

    def _decode_rows(self, batch: int) -> int:
        """Rows that ``batch`` requests are decoded with: a power of two, or all that there is memory for."""
        assert self.memory.capacity is not None
        return min(batch_bucket(batch), self.memory.capacity.batch)

    def _columns(self, count: int) -> Tensor:
        return torch.arange(count, dtype=torch.int32, device=self.model.device)

    def _decode(self, prefix: Prefix, groups: list[Group]) -> None:
        batch = self._decode_rows(prefix.batch)
        with_mass = any(group.mass is not None for group in groups)
        finished = self.memory.state.finished[:batch]
        histories = self._histories(groups)
        self._flag.reset()
        for step in range(prefix.new_tokens - 1):
            if self._flag.seen(finished):
                break
            if histories:
                logits = self.steps.decode(batch, with_mass).float()
                for member, (processors, ids, count) in histories.items():
                    chosen = self.memory.state.tokens[member : member + 1, : count + step]
                    row = slice(member, member + 1)
                    logits[row] = processors(torch.cat((ids, chosen), 1), logits[row])
                self.memory.state.first(batch).choose(logits)
            else:
                self.steps.step(batch, with_mass)
            self._flag.record(finished)

    def _histories(self, groups: list[Group]) -> dict[int, tuple[Any, Tensor, int]]:
        """Return each request's logits processors, prompt and number of tokens; empty without processors."""
        if not self._has_processors:
            return {}
        counts = self.memory.state.count.tolist()
        return {
            member: (self._processors(request), request.prompt.input_ids, counts[member])
            for group in groups
            for member, request in zip(group.members, group.requests, strict=True)
        }

    def _processed(self, group: Group, logits: Tensor, draft: Tensor) -> Tensor:
        """Apply logits processors to the rows of a prefill: row t follows the prompt and t draft tokens."""
        if not self._has_processors:
            return logits
        logits = logits.float()
        for i, request in enumerate(group.requests):
            processors = self._processors(request)
            for t in range(int((draft[i] >= 0).sum().clamp_min(1))):
                ids = torch.cat((request.prompt.input_ids, draft[i : i + 1, :t]), 1)
                logits[i, t : t + 1] = processors(ids, logits[i, t : t + 1])
        return logits

    def _processors(self, request: Request) -> Any:
        return hf.logits_processors(self.model.generation_config, request.prompt.length, self.model.eos_ids)

    def _collect(self, started: list[_Started], failed_early: Tensor) -> dict[int, Answer]:
        """Bring the answers to the host: the one place that waits for the device."""
        state = self.memory.state
        counts, tokens, logprobs = state.count.tolist(), state.tokens.tolist(), state.logprobs.tolist()
        failed, early = state.failed.tolist(), failed_early.tolist()
        answers = {}
        for begun in started:
            lens, accepted = begun.kept_lens.tolist(), begun.accepted.tolist()
            for i, (member, request) in enumerate(
                zip(begun.group.members, begun.group.requests, strict=True)
            ):
                error = None
                if failed[member]:
                    error = self._not_finite(request, "prefill" if early[member] else "decode")
                with_mass = begun.group.mass is not None
                answers[member] = Answer(
                    token_ids=tokens[member][: counts[member]],
                    logprobs=logprobs[member][: counts[member]],
                    kept_index=None if begun.kept_index is None else begun.kept_index[i, : lens[i]],
                    accepted=accepted[i],
                    mass=state.mass[member, None, : request.prompt.num_visual].clone() if with_mass else None,
                    error=error,
                )
        return answers

    def _clock(self, clock: Clock | None) -> Clock:
        return Clock(self.model.device) if clock is None else clock

    def _not_finite(self, request: Request, stage: str) -> NumericalError:
        what = "logits"
        if not request.finite:
            stage, what = "vision", "image features"
        return NumericalError(
            f"Stage {self.name}_{stage} made {what} that are NaN or infinite (compute dtype "
            f"{self.model.dtype}). Check the weights and the image, or load the model in float32 or bfloat16."
        )
