"""How the two VLMs take turns on a batch: small first, or side by side; who exits; what the large one gets.

`schedule="throughput"` begins the large VLM's work when it is known to be needed, for those requests alone.
`schedule="latency"` begins it for all of them in a worker, as far as it goes without guidance, and drops
it when nobody needs it. What is computed is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from sgl_runtime import parallel
from sgl_runtime.checkpoints import first_line
from sgl_runtime.clock import Clock
from sgl_runtime.config import SGLConfig, num_kept
from sgl_runtime.engine import VLM
from sgl_runtime.errors import ConfigError, MemoryLimitError, PromptError, SGLError
from sgl_runtime.guidance import Guidance, agree_on, guide
from sgl_runtime.matching import check_match, num_keep, rank
from sgl_runtime.memory import batch_bucket
from sgl_runtime.overlap import Worker
from sgl_runtime.requests import Answer, Prefix, Prompt, Prune

Pair = tuple[Prompt, Prompt]  # of the small and the large VLM


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one request; ``answer`` is the large VLM's, None after an exit."""

    guidance: Guidance
    answer: Answer | None


class Runner:
    """Runs batches under one configuration. The VLMs, their memory and the worker may be shared with others.

    Parameters
    ----------
    translate
        Token ids of the small VLM to ids that say the same to the large one: its draft.
    """

    def __init__(
        self,
        small: VLM,
        large: VLM,
        config: SGLConfig,
        worker: Worker,
        translate: Callable[[list[int]], list[int]] = list,
    ) -> None:
        self.small = small
        self.large = large
        self.config = config
        self.prune_layer = config.layer_of(large.num_layers)
        self._worker = worker
        self._prunes = config.keep_ratio < 1
        self._drafts = config.draft
        self._translate = translate
        self._shared = large.model.processes > 1
        if small.model.device != large.model.device:
            raise ConfigError(
                f"The small VLM is on {small.model.device} and the large one on {large.model.device}; they "
                "take turns on one device. Move one of them."
            )

    def prompts(self, small_inputs: Mapping[str, Any], large_inputs: Mapping[str, Any]) -> Pair:
        """Check one request, all of it, before any work.

        Raises
        ------
        PromptError
            An input is wrong, the two do not match, or a limit is exceeded.
        """
        small, large = self.small.prompt(small_inputs), self.large.prompt(large_inputs)
        check_match(small, large)
        for vlm, prompt in ((self.small, small), (self.large, large)):
            vlm.check_room(prompt, self.config.max_new_tokens)
            text = prompt.length - prompt.num_visual
            for what, count, setting in (
                ("tokens", prompt.length, "max_prompt_tokens"),
                ("text tokens", text, "max_text_tokens"),
            ):
                limit = getattr(self.config, setting)
                if count > limit:
                    raise PromptError(
                        f"The {vlm.name} VLM's prompt has {count} {what}, but {setting} is {limit}. Raise "
                        "it, which takes more memory, or shorten the prompt."
                    )
        return small, large

    def check_batch(self, count: int) -> None:
        """Raise PromptError when a batch is larger than the memory set aside."""
        if count > self.config.max_batch:
            raise PromptError(
                f"{count} requests came in one batch, but max_batch is {self.config.max_batch}. Split them, "
                "or raise max_batch, which takes more memory."
            )

    def run(self, batch: list[Pair], clock: Clock) -> tuple[list[Outcome | SGLError], dict[str, float]]:
        """Answer checked requests; one can fail alone. Return what became of each, and seconds per stage.

        Raises
        ------
        MemoryLimitError
            Memory ran out. The next call starts afresh.
        """
        if self.small.steps.compiled and self._kind not in self.large.steps.warm:
            self.warm_up()
        with self._memory_errors(len(batch)):
            return self._run(batch, clock)

    def warm_up(self) -> None:
        """Set all memory aside, compile and capture what any request can need, and show how far it is."""
        with self.own_modes(), self._memory_errors(self.config.max_batch):
            self._worker.join()
            self._reserve(self.small)
            self._reserve(self.large)
            kind = "compiling" if self.small.steps.compiled else "warming up"
            bar = tqdm(self._warm_up_jobs(), kind, leave=False, disable=not parallel.is_first())
            for name, job in bar:
                bar.set_postfix_str(name)
                with torch.no_grad():
                    job()
        self.large.steps.warm.add(self._kind)

    def _warm_up_jobs(self) -> list[tuple[str, Callable[[], Any]]]:
        most = self.config.max_batch
        sizes = sorted({min(1 << i, most) for i in range(batch_bucket(most).bit_length())}, reverse=True)
        jobs: list[tuple[str, Callable[[], Any]]] = [
            # The largest graph first: the others fit into its pool.
            (f"{vlm.name} decode x{size}", partial(vlm.prepare, size, vlm is self.small))
            for vlm in (self.small, self.large)
            for size in sizes
        ]
        config = replace(self.config, exit_threshold=None)
        patient = Runner(self.small, self.large, config, self._worker)
        # More than two requests are compiled like two.
        return jobs + [(f"prefill x{n}", partial(patient._try_out, n)) for n in (1, 2)[:most]]

    @property
    def _kind(self) -> tuple[Any, ...]:
        """What tells one warm-up from another."""
        c = self.config
        sizes = c.max_batch, c.max_prompt_tokens, c.max_text_tokens, c.max_new_tokens
        return self.prune_layer, c.keep_ratio, c.keep_scope, self._drafts, c.exit_score, *sizes

    @contextmanager
    def own_modes(self) -> Iterator[None]:
        """Leave the caller's inference mode, autocast and CUDA device; code is compiled for one of each."""
        device = self.large.model.device
        with (
            torch.inference_mode(False),
            torch.autocast(device.type, enabled=False),
            torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
        ):
            yield

    def _try_out(self, count: int) -> None:
        """Answer a made-up request, ``count`` times in one batch."""
        small, large = (vlm.prompt(_example(vlm)) for vlm in (self.small, self.large))
        self._run([(small, large)] * count, Clock(self.large.model.device))

    def _run(self, batch: list[Pair], clock: Clock) -> tuple[list[Outcome | SGLError], dict[str, float]]:
        large_prompts = [large for _, large in batch]
        # Reading a clock waits for the stages it timed: after an exit nobody shall wait for the large VLM.
        large_clock, ahead = Clock(self.large.model.device), None
        # Processes that share the large VLM must launch the same collectives, whoever exits.
        if self.config.schedule == "latency" and not self._shared:
            read = [tensor for prompt in large_prompts for tensor in prompt.tensors]
            ahead = self._worker.start(
                lambda task: self._begin_large(large_prompts, large_clock, task.check), read
            )
        try:
            guidance = self._guide([small for small, _ in batch], clock)
            staying = {i: g for i, g in enumerate(guidance) if isinstance(g, Guidance) and not self._exits(g)}
            answers: dict[int, Answer] = {}
            if staying and ahead is not None:
                answers = self._answer_large(ahead.result(), batch, staying, large_clock)
                self._worker.join()  # and forget what it left, gigabytes of hidden states among it
            elif staying:
                self._worker.join()
                left = [batch[i] for i in staying]
                asked = dict(enumerate(staying.values()))
                prefix = self._begin_large([large for _, large in left], large_clock)
                found = self._answer_large(prefix, left, asked, large_clock)
                answers = {number: found[at] for at, number in enumerate(staying)}
        finally:
            if ahead is not None:
                ahead.discard()
        outcomes = [
            g if isinstance(g, SGLError) else _outcome(g, answers.get(i)) for i, g in enumerate(guidance)
        ]
        return outcomes, clock.seconds | (large_clock.seconds if answers else {})

    def _guide(self, prompts: list[Prompt], clock: Clock) -> list[Guidance | SGLError]:
        self._reserve(self.small)
        guidance = guide(self.small, self.small.encode(prompts, clock), self.config, clock)
        return agree_on(guidance, self.large.model.device) if self._shared else guidance

    def _exits(self, guidance: Guidance) -> bool:
        threshold = self.config.exit_threshold
        return threshold is not None and guidance.decision_score >= threshold

    def _begin_large(
        self, prompts: list[Prompt], clock: Clock, check: Callable[[], None] = lambda: None
    ) -> Prefix:
        """Everything that the large VLM can do before it knows what the small one has to say.

        ``check`` is called between stages and may raise, to end work that nobody waits for.
        """
        self._reserve(self.large)
        requests = self.large.encode(prompts, clock, check)
        check()
        return self.large.begin(
            requests,
            self.config.max_new_tokens,
            prune_layer=self.prune_layer if self._prunes else None,
            num_keep=[self._num_keep(prompt) for prompt in prompts] if self._prunes else None,
            with_draft=self._drafts,
            clock=clock,
        )

    def _answer_large(
        self, prefix: Prefix, batch: list[Pair], asked: dict[int, Guidance], clock: Clock
    ) -> dict[int, Answer]:
        """Answer the requests in ``asked``, numbered as in ``prefix`` and ``batch``."""
        size = self.large.model.vocab_size
        prunes, drafts = {}, {}
        for i, guidance in asked.items():
            ranking = rank(guidance.mass.to(self.large.model.device), *batch[i], self.config)
            prunes[i] = Prune(self.prune_layer, ranking, self._num_keep(batch[i][1]))
            drafts[i] = _known(self._translate(guidance.answer.token_ids), size)
        return self.large.answer(
            prefix,
            members=asked,
            prunes=prunes if self._prunes else None,
            drafts=drafts if self._drafts else None,
            clock=clock,
        )

    def _num_keep(self, prompt: Prompt) -> int:
        return num_keep(prompt, self.config)

    def _reserve(self, vlm: VLM) -> None:
        """Set memory aside for the largest run that the settings allow."""
        config = self.config
        prompt = min(config.max_prompt_tokens, max(1, vlm.model.context - config.max_new_tokens))
        pruned = vlm is self.large and self._prunes
        kept = min(prompt, config.max_text_tokens) + num_kept(prompt, config.keep_ratio)
        if config.keep_scope == "image":
            kept += prompt // 16  # each image keeps one token at least, and has sixteen or more
        kept = min(prompt, kept)
        vlm.reserve(
            config.max_batch,
            prompt,
            kept if pruned else prompt,
            self.prune_layer if pruned else None,
            config.max_new_tokens,
        )

    @contextmanager
    def _memory_errors(self, batch: int) -> Iterator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            config = self.config
            for vlm in (self.small, self.large):
                vlm.steps.release()
            raise MemoryLimitError(
                f"Memory ran out with {batch} requests (max_batch={config.max_batch}, "
                f"max_prompt_tokens={config.max_prompt_tokens}, max_new_tokens={config.max_new_tokens}; keys "
                f"and values take {self.small.memory.allocated / 2**20:.0f} MiB in the small VLM and "
                f"{self.large.memory.allocated / 2**20:.0f} MiB in the large one): {first_line(error)} "
                "Lower max_batch, max_prompt_tokens or keep_ratio. The pipeline can go on."
            ) from error


def _outcome(guidance: Guidance, answer: Answer | None) -> Outcome | SGLError:
    return Outcome(guidance, answer) if answer is None or answer.error is None else answer.error


def _known(token_ids: list[int], vocab_size: int) -> list[int]:
    """The draft as far as the large VLM has embeddings for it, and at least one token."""
    known = next((i for i, token in enumerate(token_ids) if token >= vocab_size), len(token_ids))
    return token_ids[:known] or [0]


def _is_out_of_memory(error: BaseException) -> bool:
    signs = ("out of memory", "allocate memory", "alloc_failed")  # of CUDA and its graphs, the CPU, cuBLAS
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(sign in str(error).lower() for sign in signs)


def _example(vlm: VLM) -> dict[str, torch.Tensor]:
    """Return a made-up request in which every visual token sees all of one image."""
    family = vlm.model.family
    inputs = family.example()
    count = int(torch.isin(inputs["input_ids"], torch.tensor(family.visual_ids)).sum())
    cells = torch.tensor([0.0, 1.0]).expand(count, 3, 2)
    return {**inputs, "visual_image": torch.zeros(count, dtype=torch.int64), "visual_cells": cells}
