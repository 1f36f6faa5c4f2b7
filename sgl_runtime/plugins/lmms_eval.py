"""The model ``sgl_vlm`` of lmms-eval: `python -m lmms_eval --model sgl_vlm --model_args small=...,large=...`

Written to the interface of lmms-eval 0.7.3 (https://github.com/EvolvingLMMs-Lab/lmms-eval): a chat model,
found through the entry point group ``lmms_eval.models``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from sgl_runtime.errors import ConfigError, SGLError
from sgl_runtime.pipeline import SGLResult
from sgl_runtime.plugins.guided import Guided, Part, Tally

# Generation settings that are honoured or, for greedy decoding, mean nothing.
_KNOWN = {"until", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams"}


class SGLVLM(lmms):
    """A small VLM guiding a large one, as a chat model of lmms-eval.

    Parameters
    ----------
    small, large
        Checkpoints: directories or hub ids.
    batch_size
        Requests answered together; lmms-eval's ``--batch_size``.
    num_frames
        Frames taken of a video.
    **options
        ``calibration``, ``device``, ``dtype``, ``quantize`` and the fields of `SGLConfig`.

    Raises
    ------
    ConfigError, CheckpointError
        As `Guided`; or lmms-eval was started as several processes.
    """

    is_simple = False

    def __init__(
        self, small: str, large: str, batch_size: int | str = 1, num_frames: int = 8, **options: Any
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("sgl_vlm runs in one process: start lmms-eval without accelerate or torchrun.")
        if "max_batch" in options:
            raise ConfigError("sgl_vlm takes max_batch from --batch_size: leave it out of --model_args.")
        if not str(batch_size).isdecimal():
            raise ConfigError(f"--batch_size must be a positive integer, got {batch_size!r}.")
        self.batch_size = int(batch_size)
        self.num_frames = num_frames
        self._guided = Guided(str(small), str(large), max_batch=self.batch_size, **options)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer greedily; log how many requests exited and how long each stage took.

        An answer ends before the first of ``until``. A request that fails gets the empty answer, which its
        task scores as it scores any wrong one, and a warning.

        Raises
        ------
        ConfigError
            A task asks for sampling or beam search; nothing has been answered then.
        SGLError
            Every request failed.
        """
        limits = self._limits(requests)
        self._guided.tally = Tally()
        answers: dict[int, SGLResult | SGLError] = {}
        with tqdm(total=len(requests), desc="sgl_vlm") as bar:
            for numbers in _batches(limits, self.batch_size):
                questions = [self._parts(requests[number]) for number in numbers]
                limit = limits[numbers[0]]
                found = self._guided(questions, num_frames=self.num_frames, max_new_tokens=limit)
                answers.update(zip(numbers, found, strict=True))
                bar.update(len(numbers))
        self._report()
        results = [_result(request, answers[number]) for number, request in enumerate(requests)]
        first = next(iter(answers.values()), None)
        if isinstance(first, SGLError) and self._guided.tally.failed == len(requests):
            raise SGLError(f"Every one of {len(requests)} requests failed. The first: {first}") from first
        return results

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Refuse: which VLM's likelihood would it be?"""
        raise NotImplementedError(
            "sgl_vlm scores no given answers: an early exit makes the small VLM's likelihood, anything else "
            "the pruned large one's, and the two cannot be compared. Use a task whose output_type is "
            "generate_until."
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        """Refuse tasks that go on asking."""
        raise NotImplementedError("sgl_vlm answers tasks of one round. Use one with generate_until.")

    def _parts(self, request: Instance) -> list[Part]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        return [_part(message["role"], content) for message in messages for content in message["content"]]

    def _limits(self, requests: Sequence[Instance]) -> list[int | None]:
        """Return each request's longest answer; refuse what is not greedy, tell what has no effect."""
        bound, limits = self._guided.pipe.config.max_new_tokens, []
        warnings = {}
        for request in requests:
            settings, task = request.args[2], request.args[4]
            _check_greedy(settings, task)
            limit = settings.get("max_new_tokens")
            limits.append(None if limit is None else int(limit))
            if limit is not None and limit > bound:
                warnings[task, "limit"] = (
                    f"Task {task} asks for answers of up to {limit} tokens; max_new_tokens={bound} bounds "
                    "them. Give max_new_tokens in --model_args."
                )
            if settings.keys() - _KNOWN:
                ignored = ", ".join(sorted(settings.keys() - _KNOWN))
                warnings[task, "ignored"] = f"Task {task}: sgl_vlm takes no account of {ignored}."
        for warning in warnings.values():
            logger.warning(warning)
        return limits

    def _report(self) -> None:
        tally = self._guided.tally
        logger.info(str(tally))
        counts = {"num_requests": tally.requests, "exited": tally.exited, "failed": tally.failed}
        log_metrics(
            total_elapsed_time=tally.seconds,
            total_gen_tokens=tally.tokens,
            avg_speed=tally.tokens / tally.seconds if tally.seconds else 0.0,
            additional_metrics={**counts, **{f"seconds_{name}": took for name, took in tally.stages.items()}},
        )


def _part(role: str, content: dict[str, Any]) -> Part:
    kind = content["type"]
    if any(content.get(key) is not None for key in ("start_time", "end_time")):
        kind = "video section"
    return Part(role, kind, content.get("text") if kind == "text" else content.get("url"))


def _check_greedy(settings: dict[str, Any], task: str) -> None:
    """Refuse sampling and beams. As in transformers, ``do_sample=False`` makes the temperature irrelevant."""
    samples = settings.get("do_sample")
    if samples is None:
        samples = bool(settings.get("temperature"))
    beams = settings.get("num_beams") or 1
    if samples or beams > 1:
        asked = {key: settings[key] for key in ("do_sample", "temperature", "num_beams") if key in settings}
        raise ConfigError(
            f"Task {task} asks for {asked}, but sgl_vlm decodes greedily. To run it greedily give "
            "--gen_kwargs do_sample=False,temperature=0,num_beams=1."
        )


def _batches(limits: Sequence[int | None], size: int) -> Iterator[list[int]]:
    """Yield the numbers of up to ``size`` requests with one limit, in order."""
    for limit in dict.fromkeys(limits):
        numbers = [number for number, one in enumerate(limits) if one == limit]
        for at in range(0, len(numbers), size):
            yield numbers[at : at + size]


def _result(request: Instance, answer: SGLResult | SGLError) -> GenerationResult:
    _, _, settings, doc_id, task, _ = request.args
    if isinstance(answer, SGLError):
        logger.warning(f"{task}, document {doc_id} failed and gets the empty answer: {answer}")
        return GenerationResult(text="")
    text, stops = answer.text or "", settings.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        if stop:
            text = text.split(stop)[0]
    return GenerationResult(text=text, token_counts=TokenCounts(output_tokens=len(answer.token_ids)))
