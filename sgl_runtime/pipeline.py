"""The pipeline: the small VLM guides; its answer is final, or the pruned large VLM gives one.

A batch goes through the small VLM together; requests that exit leave, and the others go on through the
large VLM as one batch. A single request is a batch of one. A request that fails leaves, and the others go on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgl_runtime import hf, parallel
from sgl_runtime.checkpoints import checkpoint_directory, resolve_device, resolve_dtype
from sgl_runtime.clock import Clock
from sgl_runtime.config import SGLConfig
from sgl_runtime.engine import VLM
from sgl_runtime.errors import BatchError, PromptError, SGLError
from sgl_runtime.overlap import Worker
from sgl_runtime.processing import Message, Processor, Visuals, open_visuals
from sgl_runtime.quantize import check_scheme
from sgl_runtime.requests import Prompt
from sgl_runtime.runner import Outcome, Runner

log = logging.getLogger(__name__)
Question = str | Sequence[Message]
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
        (num_keep,) int64, which of the large VLM's visual tokens (0 to N_v - 1, indices into ``mass`` when
        both VLMs see the same grid) are among them; None when ``exited``.
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
        worker: Worker | None = None,
        translate: Callable[[list[int]], list[int]] | None = None,
    ) -> None:
        self.config = config
        self._sources: tuple[str | Path, str | Path] | None = None  # where both VLMs came from
        self.small_processor = small_processor
        self.large_processor = large_processor
        self._worker = Worker(large.model.device) if worker is None else worker
        if translate is None:
            translate = _translator(small_processor, large_processor, large.model.eos_ids)
        self._translate = translate
        compiled = config.compile is True or (config.compile == "auto" and large.model.device.type == "cuda")
        self._runner = Runner(
            small.with_compiled(compiled),
            large.with_compiled(compiled),
            config,
            self._worker,
            translate,
        )
        self.prune_layer = self._runner.prune_layer

    @property
    def small(self) -> VLM:
        """The small VLM."""
        return self._runner.small

    @property
    def large(self) -> VLM:
        """The large VLM."""
        return self._runner.large

    @classmethod
    def from_pretrained(
        cls,
        small: str | Path,
        large: str | Path,
        *,
        config: SGLConfig | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        tensor_parallel: bool = False,
        quantize: str | None = None,
    ) -> SGLPipeline:
        """Load both VLMs, with tokenizers and image settings, from directories or hub ids.

        Parameters
        ----------
        small, large
            Checkpoints of supported families (README), safetensors only; no code is run.
        config
            Settings; default ``SGLConfig()``.
        device
            "auto" (CUDA where there is one), or a torch device.
        dtype
            Compute dtype: "auto" (bfloat16 on CUDA, float32 on the CPU), "float32", "bfloat16" or "float16".
        tensor_parallel
            Whether the processes that torchrun started share the large VLM. All must make the same calls.
        quantize
            Weights of the large VLM's decoder layers in 8 bits: "int8" or "fp8". None: as loaded.

        Raises
        ------
        CheckpointError, ConfigError
            A checkpoint cannot be used, or a setting does not fit it.
        """
        place, processes = resolve_device(device), 1
        if tensor_parallel:
            processes, place = parallel.join(place)
        compute = resolve_dtype(dtype, place)
        if quantize is not None:
            check_scheme(quantize, place, compute)
        options: dict[str, Any] = {"processes": processes, "quantize": quantize}
        parts = []
        for name, source, more in (("small", small, {}), ("large", large, options)):
            directory = checkpoint_directory(source)
            vlm = VLM(hf.load_model(directory, place, compute, **more), name)
            parts.append((vlm, Processor.from_directory(directory, vlm.model.family)))
        (small_vlm, small_processor), (large_vlm, large_processor) = parts
        pipe = cls(
            small_vlm,
            large_vlm,
            SGLConfig() if config is None else config,
            small_processor=small_processor,
            large_processor=large_processor,
        )
        pipe._sources = (small, large)
        pipe._check_calibration()
        return pipe

    @classmethod
    def from_models(
        cls, small_model: nn.Module, large_model: nn.Module, config: SGLConfig | None = None
    ) -> SGLPipeline:
        """Wrap two models of transformers in memory; use `generate` with processor outputs.

        The modules are used as they are, on their device and in their dtypes, and switched to eval mode. The
        weights of q, k and v, and of gate and up, become views of joint ones: change them in place, but do
        not move, cast or wrap a module afterwards.
        """
        small, large = VLM(small_model.eval(), "small"), VLM(large_model.eval(), "large")
        return cls(small, large, SGLConfig() if config is None else config)

    def with_config(self, config: SGLConfig) -> SGLPipeline:
        """Return a pipeline with other settings that shares the models, their memory and the processors.

        The two take turns, like two calls of one.
        """
        pipe = SGLPipeline(
            self.small,
            self.large,
            config,
            small_processor=self.small_processor,
            large_processor=self.large_processor,
            worker=self._worker,
            translate=self._translate,
        )
        pipe._sources = self._sources
        if config.calibration is not self.config.calibration:
            pipe._check_calibration()
        return pipe

    def warm_up(self) -> None:
        """Set memory aside, compile and capture now what requests will need, and show how far it is.

        Without this call it happens as it is needed; compiling, before the first answer.

        Raises
        ------
        MemoryLimitError
            What the configuration asks for does not fit.
        """
        self._runner.warm_up()

    def __call__(self, images: Visuals, prompt: Question) -> SGLResult:
        """Answer ``prompt`` about one image or video, or a list of them.

        Parameters
        ----------
        images
            Paths, ``PIL.Image`` objects, encoded bytes, or `Video`. URLs are never fetched.
        prompt
            The question, or a conversation: messages with "role" (system, user, assistant) and "content".
            ``<image>`` and ``<video>`` mark where each goes; without any mark they come first.

        Raises
        ------
        ImageError, PromptError, NumericalError
            Bad input, or weights that make NaN.
        """
        return _only_result(*self._batch([(images, prompt)]))

    def batch(self, requests: Sequence[tuple[Visuals, Question]]) -> list[SGLResult]:
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
            For each VLM ``input_ids`` (1, S) int64 and what its vision tower takes, ``pixel_values`` and
            more, as transformers' processor makes them. Both must have the same number of visual tokens: the
            i-th of one stands for the i-th of the other. Or both say which image each token belongs to and
            what it covers, in ``visual_image`` (N,) and ``visual_cells`` (N, 3, 2), as our processors do:
            masses are then resampled where the grids differ.
        """
        return _only_result(*self._run([(small_inputs, large_inputs)], {}, self._clock()))

    def generate_batch(self, requests: Sequence[tuple[Inputs, Inputs]]) -> list[SGLResult]:
        """Answer several ``(small_inputs, large_inputs)`` requests together; like `batch`."""
        self._runner.check_batch(len(requests))
        return _all_results(*self._run(list(requests), {}, self._clock()))

    def _batch(
        self, requests: Sequence[tuple[Visuals, Question]]
    ) -> tuple[list[SGLResult | None], dict[int, SGLError]]:
        if self.small_processor is None or self.large_processor is None:
            raise PromptError(
                "This pipeline was made from models without tokenizers: call generate() with processor "
                "outputs, or load it with SGLPipeline.from_pretrained()."
            )
        self._runner.check_batch(len(requests))
        clock, errors = self._clock(), dict[int, SGLError]()
        inputs: list[tuple[Inputs, Inputs]] = []
        with clock.stage("preprocess"):
            for number, (images, prompt) in enumerate(requests):
                try:
                    opened = open_visuals(images)  # once for both
                    inputs.append(
                        (self.small_processor(opened, prompt), self.large_processor(opened, prompt))
                    )
                except SGLError as error:
                    errors[number] = error
                    inputs.append(({}, {}))
        return self._run(inputs, errors, clock)

    def _run(
        self, inputs: list[tuple[Inputs, Inputs]], errors: dict[int, SGLError], clock: Clock
    ) -> tuple[list[SGLResult | None], dict[int, SGLError]]:
        """Answer what has no error yet; return a result per request, and the errors of those without one."""
        checked: dict[int, tuple[Prompt, Prompt]] = {}
        for number, (small_inputs, large_inputs) in enumerate(inputs):
            if number not in errors:
                try:
                    checked[number] = self._runner.prompts(small_inputs, large_inputs)
                except SGLError as error:
                    errors[number] = error
        results: list[SGLResult | None] = [None] * len(inputs)
        with self._runner.own_modes():
            outcomes, timings = self._runner.run(list(checked.values()), clock) if checked else ([], {})
            for (number, (_, prompt)), outcome in zip(checked.items(), outcomes, strict=True):
                if isinstance(outcome, SGLError):
                    errors[number] = outcome
                else:
                    results[number] = self._result(outcome, prompt, timings)
        return results, errors

    def _result(self, outcome: Outcome, prompt: Prompt, timings: dict[str, float]) -> SGLResult:
        """``prompt`` is the large VLM's."""
        guidance, answer = outcome.guidance, outcome.answer
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

    def _clock(self) -> Clock:
        return Clock(self.large.model.device)

    def _check_calibration(self) -> None:
        """Warn when the settings' promise is about another pair, or one that computes in another way."""
        if self.config.calibration is None or self._sources is None:
            return
        from sgl_runtime.evaluation.calibration import mismatches
        from sgl_runtime.fingerprint import checkpoint_fingerprint, compute_of

        vlms = (self.small, self.large)
        pair = {
            vlm.name: checkpoint_fingerprint(source) for vlm, source in zip(vlms, self._sources, strict=True)
        }
        for sentence in mismatches(
            self.config.calibration, pair, {vlm.name: compute_of(vlm) for vlm in vlms}
        ):
            log.warning(sentence)


def _only_result(results: list[SGLResult | None], errors: dict[int, SGLError]) -> SGLResult:
    if errors:
        raise errors[0]
    assert results[0] is not None
    return results[0]


def _all_results(results: list[SGLResult | None], errors: dict[int, SGLError]) -> list[SGLResult]:
    if errors:
        raise BatchError(results, errors)
    return [result for result in results if result is not None]


def _translator(
    small: Processor | None, large: Processor | None, eos_ids: frozenset[int]
) -> Callable[[list[int]], list[int]]:
    """Return what turns the small VLM's answers into drafts.

    Ids mean the same to both where the vocabularies are equal, whatever their padded sizes, and without
    tokenizers they are taken to. Else the text is tokenised anew.
    """
    if small is None or large is None or small.tokenizer.get_vocab() == large.tokenizer.get_vocab():
        return list
    from_small, to_large = small.tokenizer, large.tokenizer

    def translate(token_ids: list[int]) -> list[int]:
        text = from_small.decode(token_ids, skip_special_tokens=True)
        return [*to_large(text, add_special_tokens=False)["input_ids"], *sorted(eos_ids)[:1]]

    return translate


def _text(processor: Processor | None, token_ids: list[int]) -> str | None:
    return None if processor is None else processor.decode(token_ids)
