"""The pipeline: the small VLM guides; its answer is final, or the pruned large VLM gives one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgl_runtime import hf
from sgl_runtime.clock import Clock
from sgl_runtime.config import SGLConfig, num_kept
from sgl_runtime.engine import VLM, Prompt, Prune
from sgl_runtime.errors import PromptError, SGLError
from sgl_runtime.guidance import Guidance, guide
from sgl_runtime.images import Image
from sgl_runtime.processing import Processor

Images = Image | Sequence[Image]


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
        Tokens of the small answer that the large VLM took over unchanged; 0, verification is not available
        yet.
    timings
        Seconds per stage: preprocess, small_vision, small_prefill, small_decode, consistency, large_vision,
        large_prefill, large_decode; stages that did not run are missing.
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

    Make one with `from_pretrained` or `from_models`. Requests run one at a time; not thread-safe.

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
        self.small = small
        self.large = large
        self.config = config
        self.small_processor = small_processor
        self.large_processor = large_processor
        self.prune_layer = config.layer_of(large.num_layers)

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
        """Return a pipeline with other settings that shares the models, the KV memory and the processors."""
        return SGLPipeline(
            self.small,
            self.large,
            config,
            small_processor=self.small_processor,
            large_processor=self.large_processor,
        )

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
        clock = self._clock()
        with clock.stage("preprocess"):
            small_inputs = self.small_processor(images, prompt)
            large_inputs = self.large_processor(images, prompt)
        return self._run(small_inputs, large_inputs, clock)

    def batch(self, requests: Sequence[tuple[Images, str]]) -> list[SGLResult]:
        """Answer several ``(images, prompt)`` requests; each gets what it gets alone. They run one by one."""
        return [_numbered(i, self, request) for i, request in enumerate(requests)]

    def generate(self, small_inputs: Mapping[str, Any], large_inputs: Mapping[str, Any]) -> SGLResult:
        """Answer one request given as processor outputs.

        Parameters
        ----------
        small_inputs, large_inputs
            For each VLM ``input_ids`` (1, S) int64 and ``pixel_values`` (tiles, 3, height, width) floats.
            Both must have the same number of visual tokens: the i-th of one stands for the i-th of the other.
        """
        return self._run(small_inputs, large_inputs, self._clock())

    def generate_batch(
        self, requests: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
    ) -> list[SGLResult]:
        """Answer several ``(small_inputs, large_inputs)`` requests; each gets what it gets alone."""
        return [_numbered(i, self.generate, request) for i, request in enumerate(requests)]

    def _run(
        self, small_inputs: Mapping[str, Any], large_inputs: Mapping[str, Any], clock: Clock
    ) -> SGLResult:
        small_prompt, large_prompt = self.small.prompt(small_inputs), self.large.prompt(large_inputs)
        _check_match(small_prompt, large_prompt)
        self.small.check_room(small_prompt, self.config.max_new_tokens)
        self.large.check_room(large_prompt, self.config.max_new_tokens)
        guidance = guide(self.small, self.small.encode(small_prompt, clock), self.config, clock)
        threshold = self.config.exit_threshold
        if threshold is not None and guidance.decision_score >= threshold:
            return self._result(guidance, guidance.answer.token_ids, None, None, clock)
        prune = self._prune(guidance.mass, large_prompt)
        request = self.large.encode(large_prompt, clock)
        answer = self.large.generate(request, self.config.max_new_tokens, prune=prune, clock=clock)
        kept = torch.arange(large_prompt.length) if answer.kept_index is None else answer.kept_index[0]
        kept = kept.cpu().long()
        kept_visual = torch.isin(large_prompt.visual_index[0].cpu(), kept).nonzero()[:, 0]
        return self._result(guidance, answer.token_ids, kept, kept_visual, clock)

    def _prune(self, mass: Tensor, prompt: Prompt) -> Prune | None:
        num_keep = num_kept(prompt.num_visual, self.config.keep_ratio)
        if num_keep == prompt.num_visual:
            return None
        return Prune(self.prune_layer, mass.to(self.large.model.device), num_keep)

    def _result(
        self,
        guidance: Guidance,
        token_ids: list[int],
        kept_index: Tensor | None,
        kept_visual: Tensor | None,
        clock: Clock,
    ) -> SGLResult:
        exited = kept_index is None
        small_ids = guidance.answer.token_ids
        return SGLResult(
            text=_text(self.small_processor if exited else self.large_processor, token_ids),
            token_ids=list(token_ids),
            exited=exited,
            decision_score=guidance.decision_score,
            confidence=guidance.confidence,
            consistency=guidance.consistency,
            small_text=_text(self.small_processor, small_ids),
            small_token_ids=list(small_ids),
            mass=guidance.mass[0].cpu().clone(),
            kept_index=kept_index,
            kept_visual=kept_visual,
            timings=clock.seconds,
        )

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


def _numbered(number: int, answer: Any, request: Any) -> SGLResult:
    try:
        return answer(*request)
    except SGLError as error:
        raise type(error)(f"Request {number}: {error}") from error


def _text(processor: Processor | None, token_ids: list[int]) -> str | None:
    return None if processor is None else processor.decode(token_ids)
