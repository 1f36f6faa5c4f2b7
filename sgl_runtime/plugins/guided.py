"""What the plugins share: a pipeline from a framework's arguments, its questions as requests, and a tally."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from sgl_runtime.config import SGLConfig
from sgl_runtime.errors import BatchError, ConfigError, PromptError, SGLError
from sgl_runtime.pipeline import SGLPipeline, SGLResult
from sgl_runtime.processing import MARKS, Message
from sgl_runtime.videos import Video


class Part(NamedTuple):
    """A piece of a framework's message.

    Attributes
    ----------
    role : system, user or assistant
    kind : text, image or video; anything else is refused
    value : the text, or what `open_image` or `Video` takes
    """

    role: str
    kind: str
    value: Any


@dataclass
class Tally:
    """What became of the requests of a run, and where the time went.

    Attributes
    ----------
    seconds : from a batch's images to its answers, summed over batches
    stages : seconds per stage, likewise; see `SGLResult`
    """

    requests: int = 0
    exited: int = 0
    failed: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stages: Counter[str] = field(default_factory=Counter)

    def add(self, answers: Sequence[SGLResult | SGLError], seconds: float) -> None:
        """Count a batch."""
        results = [answer for answer in answers if isinstance(answer, SGLResult)]
        self.requests += len(answers)
        self.failed += len(answers) - len(results)
        self.exited += sum(result.exited for result in results)
        self.tokens += sum(len(result.token_ids) for result in results)
        self.seconds += seconds
        if results:
            self.stages.update(results[0].timings)  # the batch's, the same in each

    def __str__(self) -> str:
        stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in self.stages.items())
        return (
            f"sgl_vlm: requests {self.requests}, exited with the small answer {self.exited}, failed "
            f"{self.failed}; {self.seconds:.2f} s; seconds per stage: {stages or 'none'}"
        )


class Guided:
    """A pipeline that answers a framework's questions and counts how; a question that fails, fails alone.

    Parameters
    ----------
    small, large, device, dtype, quantize
        As in `SGLPipeline.from_pretrained`.
    calibration
        File of `sgl-vlm calibrate` that fixes some settings.
    **settings
        Fields of `SGLConfig`.

    Raises
    ------
    ConfigError
        A setting is unknown, out of range, or fixed by the calibration.
    CheckpointError
        A checkpoint cannot be used.
    """

    def __init__(
        self,
        small: str,
        large: str,
        *,
        calibration: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str | None = None,
        **settings: Any,
    ) -> None:
        self.pipe = SGLPipeline.from_pretrained(
            small, large, config=_config(calibration, settings), device=device, dtype=dtype, quantize=quantize
        )
        self.tally = Tally()
        self._shorter: dict[int, SGLPipeline] = {}

    def __call__(
        self, questions: Sequence[Iterable[Part]], *, num_frames: int, max_new_tokens: int | None = None
    ) -> list[SGLResult | SGLError]:
        """Return for each question its result, or the error with which it failed.

        Parameters
        ----------
        questions
            At most ``max_batch``, each the parts of a conversation in order.
        num_frames
            Frames taken of a video.
        max_new_tokens
            Longest answer; the configuration's ``max_new_tokens`` bounds it.

        Raises
        ------
        MemoryLimitError
            Memory ran out: ask fewer at once.
        """
        answers: dict[int, SGLResult | SGLError] = {}
        requests = {}
        started = time.perf_counter()
        for number, parts in enumerate(questions):
            try:
                requests[number] = to_request(parts, num_frames)
            except SGLError as error:
                answers[number] = error
        try:
            found = self._pipe(max_new_tokens).batch(list(requests.values()))
        except BatchError as error:
            found = [error.errors.get(i, result) for i, result in enumerate(error.results)]
        answers.update(zip(requests, found, strict=True))
        in_order = [answers[number] for number in range(len(questions))]
        self.tally.add(in_order, time.perf_counter() - started)
        return in_order

    def _pipe(self, max_new_tokens: int | None) -> SGLPipeline:
        if max_new_tokens is None or max_new_tokens >= self.pipe.config.max_new_tokens:
            return self.pipe
        if max_new_tokens not in self._shorter:
            config = replace(self.pipe.config, max_new_tokens=max_new_tokens)
            self._shorter[max_new_tokens] = self.pipe.with_config(config)
        return self._shorter[max_new_tokens]


def to_request(parts: Iterable[Part], num_frames: int) -> tuple[list[Any], list[Message]]:
    """Return the images and videos of a conversation, and its messages with their places.

    The framework says where images go, so a literal ``<image>`` or ``<video>`` in its text is not a mark: a
    blank makes it ``< image>``.

    Raises
    ------
    PromptError
        A part is neither text nor image nor video.
    """
    visuals: list[Any] = []
    messages: list[Message] = []
    for role, kind, value in parts:
        if kind == "text":
            content = {"type": "text", "text": _without_marks(value)}
        elif kind in ("image", "video"):
            visuals.append(Video(value, num_frames) if kind == "video" else value)
            content = {"type": kind}
        else:
            raise PromptError(f"A part of a question must be text, an image or a video, got {kind!r}.")
        if not messages or messages[-1]["role"] != role:
            messages.append({"role": role, "content": []})
        messages[-1]["content"].append(content)
    return visuals, messages


def _without_marks(text: str) -> str:
    for mark in MARKS:
        text = text.replace(mark, f"< {mark[1:]}")
    return text


def _config(calibration: str | None, settings: dict[str, Any]) -> SGLConfig:
    known = {one.name for one in fields(SGLConfig)} - {"calibration"}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)}: there is no such setting. There are {', '.join(sorted(known))}, and "
            "those of docs/frameworks.md."
        )
    return SGLConfig(**settings) if calibration is None else SGLConfig.from_file(calibration, **settings)
