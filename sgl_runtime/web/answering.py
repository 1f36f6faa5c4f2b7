"""What the page asks, answered by the pipeline; knows nothing of servers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from PIL import Image

from sgl_runtime.config import SGLConfig, token_ratio
from sgl_runtime.errors import ConfigError, PromptError
from sgl_runtime.images import open_image
from sgl_runtime.pictures import Panel, guidance_panels
from sgl_runtime.pipeline import SGLPipeline, SGLResult

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # not EPS, for which Pillow would start Ghostscript


@dataclass(frozen=True, eq=False)
class Reply:
    """What the page shows of one answer.

    Attributes
    ----------
    config : what it was answered with; ``prune_layer`` is a layer
    panels : heat maps over the image, then what the large VLM sees of it
    token_ratio : average share of visual tokens over the large VLM's layers
    unpruned : the large VLM's answer without guidance, where that was asked for
    runs : seconds per stage of this answer, and of the unpruned one
    """

    config: SGLConfig
    result: SGLResult
    panels: list[Panel]
    token_ratio: float
    unpruned: str | None
    runs: dict[str, dict[str, float]]


class Answering:
    """Answers what came from the page, one request at a time.

    Parameters
    ----------
    pipe
        From `SGLPipeline.from_pretrained`; its settings are those that the page starts with.
    """

    def __init__(self, pipe: SGLPipeline) -> None:
        self.pipe = pipe

    def __call__(self, data: bytes, fields: Mapping[str, str]) -> Reply:
        """Return the answer to a question about an image.

        Parameters
        ----------
        data
            The image, in one of `FORMATS`.
        fields
            ``prompt``, ``keep_ratio`` and ``prune_layer`` as text; ``exit_threshold``, never to exit without
            it; ``unpruned`` to run the unpruned large VLM too.

        Raises
        ------
        SGLError
            In words for the page: the image, the question or a setting cannot be used.
        """
        prompt = fields.get("prompt", "").replace("\r\n", "\n")  # which a browser sends for a new line
        if not prompt.strip():
            raise PromptError("There is no question: write one, or press one of the examples.")
        if not data:
            raise PromptError("There is no picture: choose one, or press one of the examples.")
        config = self._config(fields)
        pipe = self.pipe.with_config(config)
        image = open_image(data, formats=FORMATS)
        result = pipe(image, prompt)
        unpruned, runs = None, {"this answer": result.timings}
        if "unpruned" in fields:
            unpruned, runs["unpruned large VLM alone"] = self._unpruned(config, image, prompt)
        return Reply(
            config=config,
            result=result,
            panels=guidance_panels(pipe, image, prompt, result)[1:],
            token_ratio=token_ratio(pipe.large.num_layers, pipe.prune_layer, config.keep_ratio),
            unpruned=unpruned,
            runs=runs,
        )

    def _config(self, fields: Mapping[str, str]) -> SGLConfig:
        exits = "exit_threshold" in fields
        return replace(
            self.pipe.config,
            keep_ratio=_number(fields, "keep_ratio"),
            prune_layer=_layer(fields),
            exit_threshold=_number(fields, "exit_threshold") if exits else None,
        )

    def _unpruned(
        self, config: SGLConfig, image: Image.Image, prompt: str
    ) -> tuple[str | None, dict[str, float]]:
        """Return the large VLM's own answer, and its seconds per stage as if there were no small one."""
        assert self.pipe.large_processor is not None
        began = time.perf_counter()
        self.pipe.large_processor(image, prompt)
        stages = {"preprocess": time.perf_counter() - began}
        alone = replace(config, keep_ratio=1.0, exit_threshold=None, exit_score="confidence", draft=False)
        result = self.pipe.with_config(alone)(image, prompt)
        for stage, took in result.timings.items():
            if stage.startswith("large"):  # at the keep ratio 1 the "pruned" layers see everything too
                name = "large_prefill_full" if stage == "large_prefill_pruned" else stage
                stages[name] = stages.get(name, 0.0) + took
        return result.text, stages


def _number(fields: Mapping[str, str], name: str) -> float:
    text = fields.get(name, "")
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name} must be a number, got {text[:40]!r}.") from None


def _layer(fields: Mapping[str, str]) -> int:
    text = fields.get("prune_layer", "")
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"prune_layer must be a whole number, got {text[:40]!r}.") from None
