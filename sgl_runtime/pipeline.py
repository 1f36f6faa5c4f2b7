"""The pipeline: the small VLM guides; its answer is final, or the pruned large VLM gives one.

A batch goes through the small VLM together; requests that exit leave, and the others go on through the large VLM
as one batch. A single request is a batch of one. A request that fails leaves, and the others go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgl_runtime import hf
from sgl_runtime.clock import Clock
from sgl_runtime.config import SGLConfig, num_kept
from sgl_runtime.engine import VLM
from sgl_runtime.errors import BatchError, MemoryLimitError, PromptError, SGLError
from sgl_runtime.guidance import Guidance, guide
from sgl_runtime.images import Image
from sgl_runtime.overlap import Task, Worker
from sgl_runtime.processing import Processor
from sgl_runtime.requests import Answer, Prefix, Prompt, Prune

Images = Image | Sequence[Image]
Inputs = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class SGLResult:
    """The answer to one request, and how it came about. Tensors are copies on the CPU.

    Attributes
    ----------
    text, small_text
        The final and the small VLM's answer as text; None when the pipeline was made without tokenizers.
    token_ids, small_token_ids
        The same as token ids, the end-of-sequence token included. ``token_ids`` are the large VLM's unless
        ``exited``.
    exited
        Whether the small answer is the final one; the large VLM was then never run.
    decision_score, confidence, consistency
        ``consistency`` is None with ``exit_score="confidence"``.
    mass
        (N_v,) fp32, attention received by each visual token in the small VLM, in prompt order.
    kept_index
        (S_kept,) int64, ascending positions in the large VLM's prompt (text and visual) that layers from the
        prune layer on saw; None when ``exited``.
    kept_visual
        (num_keep,) int64, which visual tokens (0 to N_v - 1, indices into ``mass``) are among them; None when
        ``exited``.
    accepted_draft
        Leading tokens of the small answer that the large VLM took over; 0 without a draft or when ``exited``.
    timings
        Seconds per stage: preprocess, small_vision, small_prefill, small_decode, consistency, large_vision,
        large_prefill_full (layers before the prune layer), large_prefill_pruned, large_decode. Stages that
        did not run are missing; those of a batch are the batch's.
    """

    text: str | None
    token_ids: list[int]
    exited: bool
    decision_score: float
    confidence: float
    consistency: float | None
    small_text: str | None
    small_token_ids: list[int]
    mass: Tensor
    kept_index: Tensor | None
    kept_visual: Tensor | None
    accepted_draft: int = 0
    timings: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain Python values, ready for JSON."""
        return {
            name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(self).items()
        }


class SGLPipeline:
    """Answers questions about images with a small VLM guiding a large one.

    Make one with `from_pretrained` or `from_models`. One call at a time; not thread-safe.

    Examples
    --------
    >>> pipe = SGLPipeline.from_pretrained("small/", "large/", config=SGLConfig(keep_ratio=0.2))
    >>> pipe("photo.jpg", "What does the sign say?").text
    """

    def __init__(
        self,
        small: VLM,
        large: VLM,
        config: SGLConfig,
        *,
        small_processor: Processor | None = None,
        large_processor: Processor | None = None,
    ) -> None:
        compiled = config.compile is True or (config.compile == "auto" and large.model.device.type == "cuda")
        self.small = small.with_compiled(compiled)
        self.large = large.with_compiled(compiled)
        self.config = config
        self.small_processor = small_processor
        self.large_processor = large_processor
        self.prune_layer = config.layer_of(large.num_layers)
        self._worker = Worker(large.model.device)
        self._shares_tokens = _same_tokens(small_processor, large_processor)

    @classmethod
    def from_pretrained(
        cls,
        small: str | Path,
        large: str | Path,
        *,
        config: SGLConfig | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
    ) -> SGLPipeline:
        """Load both VLMs, with tokenizers and image settings, from directories or hub ids.

        Parameters
        ----------
        small, large
            Checkpoints of transformers' ``InternVLForConditionalGeneration``, safetensors only; no code is
            run.
        config
            Settings; default ``SGLConfig()``.
        device
            "auto" (CUDA where there is one), or a torch device.
        dtype
            Compute dtype: "auto" (bfloat16 on CUDA, float32 on the CPU), "float32", "bfloat16" or "float16".

        Raises
        ------
        CheckpointError, ConfigError
            A checkpoint cannot be used, or a setting does not fit it.
        """
        place = hf.resolve_device(device)
        compute = hf.resolve_dtype(dtype, place)
        parts = []
        for name, source in (("small", small), ("large", large)):
            directory = hf.checkpoint_directory(source)
            vlm = VLM(hf.load_model(directory, place, compute), name)
            parts.append((vlm, Processor.from_directory(directory, vlm.model)))
        (small_vlm, small_processor), (large_vlm, large_processor) = parts
        return cls(
            small_vlm,
            large_vlm,
            SGLConfig() if config is None else config,
            small_processor=small_processor,
            large_processor=large_processor,
        )

    @classmethod
    def from_models(
        cls, small_model: nn.Module, large_model: nn.Module, config: SGLConfig | None = None
    ) -> SGLPipeline:
        """Wrap two ``InternVLForConditionalGeneration`` modules in memory; use `generate` with processor
        outputs.

        The modules are used as they are, on their devices and in their dtypes; they are switched to eval
        mode.
        """
        small, large = VLM(small_model.eval(), "small"), VLM(large_model.eval(), "large")
        return cls(small, large, SGLConfig() if config is None else config)

    def with_config(self, config: SGLConfig) -> SGLPipeline:
        """Return a pipeline with other settings that shares the models, their memory and the processors.

        The two take turns, like two calls of one.
        """
        other = SGLPipeline(
            self.small,
            self.large,
            config,
            small_processor=self.small_processor,
            large_processor=self.large_processor,
        )
        other._worker = self._worker
        return other

    def __call__(self, images: Images, prompt: str) -> SGLResult:
        """Answer ``prompt`` about one image or a list of them.

        Parameters
        ----------
        images
            Paths, ``PIL.Image`` objects or encoded bytes. URLs are never fetched.
        prompt
            The question. ``<image>`` marks where each image goes; without any mark the images come first.

        Raises
        ------
        ImageError, PromptError, NumericalError
            Bad input, or weights that make NaN.
        """
        if self.small_processor is None or self.large_processor is None:
            raise PromptError(
                "This pipeline was made from models without tokenizers: call generate() with processor "
                "outputs, or load it with SGLPipeline.from_pretrained()."
            )
        return _only_result(*self._batch([(images, prompt)]))

    def batch(self, requests: Sequence[tuple[Images, str]]) -> list[SGLResult]:
        """Answer several ``(images, prompt)`` requests together; each gets what it gets alone.

        Raises
        ------
        PromptError
            More requests than ``max_batch``.
        BatchError
            Some requests failed; it holds the results of the others.
        """
        return _all_results(*self._batch(requests))

    def generate(self, small_inputs: Inputs, large_inputs: Inputs) -> SGLResult:
        """Answer one request given as processor outputs.

        Parameters
        ----------
        small_inputs, large_inputs
            For each VLM ``input_ids`` (1, S) int64 and ``pixel_values`` (tiles, 3, height, width) floats.
            Both must have the same number of visual tokens: the i-th of one stands for the i-th of the other.
        """
        return _only_result(*self._run([(small_inputs, large_inputs)], {}, self._clock()))

    def generate_batch(self, requests: Sequence[tuple[Inputs, Inputs]]) -> list[SGLResult]:
        """Answer several ``(small_inputs, large_inputs)`` requests together; like `batch`."""
        self._check_batch(len(requests))
        return _all_results(*self._run(list(requests), {}, self._clock()))

    def _batch(
        self, requests: Sequence[tuple[Images, str]]
    ) -> tuple[list[SGLResult | None], dict[int, SGLError]]:
        if self.small_processor is None or self.large_processor is None:
            raise PromptError(
                "This pipeline was made from models without tokenizers: call generate() with processor "
                "outputs, or load it with SGLPipeline.from_pretrained()."
            )
        self._check_batch(len(requests))
        clock, errors = self._clock(), dict[int, SGLError]()
        inputs: list[tuple[Inputs, Inputs]] = []
        with clock.stage("preprocess"):
            for number, (images, prompt) in enumerate(requests):
                try:
                    inputs.append(
                        (self.small_processor(images, prompt), self.large_processor(images, prompt))
                    )
                except SGLError as error:
                    errors[number] = error
                    inputs.append(({}, {}))
        return self._run(inputs, errors, clock)

    def _run(
        self, inputs: list[tuple[Inputs, Inputs]], errors: dict[int, SGLError], clock: Clock
    ) -> tuple[list[SGLResult | None], dict[int, SGLError]]:
        """Answer what has no error yet; return one result per request, and the errors of those without one."""
        prompts: dict[int, tuple[Prompt, Prompt]] = {}
        for number, (small_inputs, large_inputs) in enumerate(inputs):
            if number not in errors:
                try:
                    prompts[number] = self._prompts(small_inputs, large_inputs)
                except SGLError as error:
                    errors[number] = error
        results: list[SGLResult | None] = [None] * len(inputs)
        if prompts:
            numbers = list(prompts)
            with self._memory_errors(len(numbers)):
                outcomes = self._answer([prompts[number] for number in numbers], clock)
            for number, outcome in zip(numbers, outcomes, strict=True):
                if isinstance(outcome, SGLError):
                    errors[number] = outcome
                else:
                    results[number] = outcome
        return results, errors

    def _answer(self, prompts: list[tuple[Prompt, Prompt]], clock: Clock) -> list[SGLResult | SGLError]:
        """Answer a batch of checked requests."""
        ahead = None
        try:
            if self.config.schedule == "latency":
                large_inputs = [
                    tensor for _, large in prompts for tensor in (large.input_ids, large.pixel_values)
                ]
                ahead = self._worker.start(
                    lambda task: self._begin_large([large for _, large in prompts], clock, task), large_inputs
                )
            self._reserve(self.small)
            requests = self.small.encode([small for small, _ in prompts], clock)
            guidance = guide(self.small, requests, self.config, clock)
            staying = {i: g for i, g in enumerate(guidance) if isinstance(g, Guidance) and not self._exits(g)}
            answers: dict[int, Answer] = {}
            if staying:
                started = list(range(len(prompts))) if ahead is not None else list(staying)
                large_prompts = [prompts[i][1] for i in started]
                if ahead is not None:
                    prefix = ahead.result()
                else:
                    self._worker.join()
                    prefix = self._begin_large(large_prompts, clock)
                asked = {at: staying[i] for at, i in enumerate(started) if i in staying}
                found = self._answer_large(prefix, large_prompts, asked, clock)
                answers = {started[at]: answer for at, answer in found.items()}
        finally:
            if ahead is not None:
                ahead.discard()
        timings = clock.seconds
        return [
            g if isinstance(g, SGLError) else self._result(g, answers.get(i), prompts[i][1], timings)
            for i, g in enumerate(guidance)
        ]

    def _exits(self, guidance: Guidance) -> bool:
        threshold = self.config.exit_threshold
        return threshold is not None and guidance.decision_score >= threshold

    def _begin_large(self, prompts: list[Prompt], clock: Clock, task: Task[Prefix] | None = None) -> Prefix:
        """Everything that the large VLM can do before it knows what the small one has to say."""
        self._reserve(self.large)
        requests = self.large.encode(prompts, clock)
        if task is not None:
            task.check()
        prunes = self.config.keep_ratio < 1
        return self.large.begin(
            requests,
            self.config.max_new_tokens,
            prune_layer=self.prune_layer if prunes else None,
            num_keep=[self._num_keep(prompt) for prompt in prompts] if prunes else None,
            with_draft=self._drafts,
            clock=clock,
        )

    def _answer_large(
        self, prefix: Prefix, prompts: list[Prompt], asked: dict[int, Guidance], clock: Clock
    ) -> dict[int, Answer]:
        """Answer the requests in ``asked``, numbered as in ``prefix`` and ``prompts``."""
        device, size = self.large.model.device, self.large.model.vocab_size
        prunes = {
            i: Prune(self.prune_layer, g.mass.to(device), self._num_keep(prompts[i]))
            for i, g in asked.items()
        }
        drafts = {i: _known(g.answer.token_ids, size) for i, g in asked.items()}
        return self.large.answer(
            prefix,
            members=asked,
            prunes=prunes if self.config.keep_ratio < 1 else None,
            drafts=drafts if self._drafts else None,
            clock=clock,
        )

    @property
    def _drafts(self) -> bool:
        return self.config.draft and self._shares_tokens

    def _num_keep(self, prompt: Prompt) -> int:
        return num_kept(prompt.num_visual, self.config.keep_ratio)

    def _result(
        self, guidance: Guidance, answer: Answer | None, prompt: Prompt, timings: dict[str, float]
    ) -> SGLResult | SGLError:
        """``answer`` is the large VLM's, None after an exit; ``prompt`` is the large VLM's too."""
        if answer is not None and answer.error is not None:
            return answer.error
        exited, final = answer is None, guidance.answer if answer is None else answer
        kept = kept_visual = None
        if answer is not None:
            kept = (
                torch.arange(prompt.length) if answer.kept_index is None else answer.kept_index.cpu().long()
            )
            kept_visual = torch.isin(prompt.visual_index[0].cpu(), kept).nonzero()[:, 0]
        small_ids = guidance.answer.token_ids
        return SGLResult(
            text=_text(self.small_processor if exited else self.large_processor, final.token_ids),
            token_ids=list(final.token_ids),
            exited=exited,
            decision_score=guidance.decision_score,
            confidence=guidance.confidence,
            consistency=guidance.consistency,
            small_text=_text(self.small_processor, small_ids),
            small_token_ids=list(small_ids),
            mass=guidance.mass[0].cpu().clone(),
            kept_index=kept,
            kept_visual=kept_visual,
            accepted_draft=0 if answer is None else answer.accepted,
            timings=dict(timings),
        )

    def _prompts(self, small_inputs: Inputs, large_inputs: Inputs) -> tuple[Prompt, Prompt]:
        small, large = self.small.prompt(small_inputs), self.large.prompt(large_inputs)
        _check_match(small, large)
        for vlm, prompt in ((self.small, small), (self.large, large)):
            vlm.check_room(prompt, self.config.max_new_tokens)
            self._check_limit(vlm.name, "tokens", prompt.length, "max_prompt_tokens")
            self._check_limit(vlm.name, "text tokens", prompt.length - prompt.num_visual, "max_text_tokens")
        return small, large

    def _check_limit(self, name: str, what: str, count: int, setting: str) -> None:
        limit = getattr(self.config, setting)
        if count > limit:
            raise PromptError(
                f"The {name} VLM's prompt has {count} {what}, but {setting} is {limit}. Raise it, which takes "
                "more memory, or shorten the prompt."
            )

    def _check_batch(self, count: int) -> None:
        if count > self.config.max_batch:
            raise PromptError(
                f"{count} requests came in one batch, but max_batch is {self.config.max_batch}. Split them, or "
                "raise max_batch, which takes more memory."
            )

    def _reserve(self, vlm: VLM) -> None:
        """Set memory aside for the largest run that the settings allow."""
        config = self.config
        prompt = min(config.max_prompt_tokens, max(1, vlm.model.context - config.max_new_tokens))
        pruned = vlm is self.large and config.keep_ratio < 1
        kept = min(prompt, min(prompt, config.max_text_tokens) + num_kept(prompt, config.keep_ratio))
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
            if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
                raise
            config = self.config
            raise MemoryLimitError(
                f"Memory ran out with {batch} requests (max_batch={config.max_batch}, "
                f"max_prompt_tokens={config.max_prompt_tokens}, max_new_tokens={config.max_new_tokens}; keys and "
                f"values take {self.small.memory.allocated / 2**20:.0f} MiB in the small VLM and "
                f"{self.large.memory.allocated / 2**20:.0f} MiB in the large one): {hf.first_line(error)} "
                "Lower max_batch, max_prompt_tokens or keep_ratio. The pipeline can go on."
            ) from error

    def _clock(self) -> Clock:
        return Clock(self.large.model.device)


def _check_match(small: Prompt, large: Prompt) -> None:
    """Raise PromptError unless the i-th visual token of one prompt can stand for the i-th of the other."""
    if small.num_visual != large.num_visual:
        raise PromptError(
            f"The small VLM has {small.num_visual} visual tokens and the large VLM {large.num_visual}; "
            "guidance needs equal counts. Use two VLMs of one family, with the same tile settings."
        )
    if len(small.spans) == len(large.spans) and small.spans != large.spans:
        raise PromptError(
            f"The images' visual tokens differ: {list(small.spans)} in the small VLM and {list(large.spans)} "
            "in the large VLM. Use two VLMs of one family, with the same tile settings."
        )


def _only_result(results: list[SGLResult | None], errors: dict[int, SGLError]) -> SGLResult:
    if errors:
        raise errors[0]
    assert results[0] is not None
    return results[0]


def _all_results(results: list[SGLResult | None], errors: dict[int, SGLError]) -> list[SGLResult]:
    if errors:
        raise BatchError(results, errors)
    return [result for result in results if result is not None]


def _same_tokens(small: Processor | None, large: Processor | None) -> bool:
    """Whether an id means the same to both VLMs; without tokenizers it is taken to."""
    if small is None or large is None:
        return True
    return small.tokenizer.get_vocab() == large.tokenizer.get_vocab()


def _known(token_ids: list[int], vocab_size: int) -> list[int]:
    """The draft as far as the large VLM has embeddings for it, and at least one token."""
    known = next((i for i, token in enumerate(token_ids) if token >= vocab_size), len(token_ids))
    return token_ids[:known] or [0]


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def _text(processor: Processor | None, token_ids: list[int]) -> str | None:
    return None if processor is None else processor.decode(token_ids)
