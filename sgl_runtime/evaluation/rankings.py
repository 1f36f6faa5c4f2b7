"""What the large VLM's visual tokens are ranked by: ours, other people's, and yours.

A ranking of your own is a class with a name and one method::

    class CentreFirst:
        name = "centre-first"

        def rank(self, context):
            count = context.large_request.prompt.num_visual
            return -(torch.arange(count) - count / 2).abs()[None]

and is named on the command line as ``my_module:CentreFirst``.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from sgl_runtime import matching
from sgl_runtime.checkpoints import first_line
from sgl_runtime.clock import Clock
from sgl_runtime.engine import VLM
from sgl_runtime.errors import ConfigError, SGLError
from sgl_runtime.guidance import Guidance, guide
from sgl_runtime.images import cut, reason
from sgl_runtime.pipeline import SGLPipeline
from sgl_runtime.requests import Answer, Prompt, Request

T = TypeVar("T")


class Batch:
    """Examples in both VLMs, and what was computed of them so far: each thing once, when first asked for.

    Parameters
    ----------
    pipe
        Whose VLMs and settings are used.
    prompts
        The small and the large VLM's prompt of each example.
    seeds
        Of each example's random numbers.
    ids
        Of the examples.
    """

    def __init__(
        self, pipe: SGLPipeline, prompts: list[tuple[Prompt, Prompt]], seeds: list[int], ids: list[str]
    ) -> None:
        self.small, self.large, self.config = pipe.small, pipe.large, pipe.config
        self.prompts = prompts
        self.seeds = seeds
        self.ids = ids
        self.small_clock, self.vision_clock, self.large_clock = (
            Clock(self.large.model.device) for _ in range(3)
        )

    @cached_property
    def small_requests(self) -> list[Request]:
        return self.small.encode([small for small, _ in self.prompts], self.small_clock)

    @cached_property
    def large_requests(self) -> list[Request]:
        return self.large.encode([large for _, large in self.prompts], self.vision_clock)

    @cached_property
    def guidance(self) -> list[Guidance | SGLError]:
        return guide(self.small, self.small_requests, self.config, self.small_clock)

    @cached_property
    def unpruned(self) -> list[Answer]:
        """The large VLM's own answers, with their mass."""
        requests, clock = self.large_requests, self.large_clock
        prefix = self.large.begin(requests, self.config.max_new_tokens, with_mass=True, clock=clock)
        return _in_order(self.large.answer(prefix, clock=clock))

    @cached_property
    def generated(self) -> list[Answer]:
        """The small VLM's answers, with the mass of the generated rows alone.

        A second run whose mass starts at zero when decoding starts: the difference of total and prompt mass
        would have the rounding error of the total.
        """
        prefix = self.small.begin(self.small_requests, self.config.max_new_tokens, with_mass=True)
        groups = [
            replace(g, mass=None if g.mass is None else torch.zeros_like(g.mass)) for g in prefix.groups
        ]
        return _in_order(self.small.answer(replace(prefix, groups=groups)))


class Context:
    """What a ranking may look at, of one example; nothing is computed before it is asked for.

    Attributes
    ----------
    small, large : the two VLMs
    prune_layer : layer K of the large VLM on whose entry tokens are pruned
    id : of the example
    """

    def __init__(self, batch: Batch, number: int, prune_layer: int) -> None:
        self.small: VLM = batch.small
        self.large: VLM = batch.large
        self.prune_layer = prune_layer
        self.id = batch.ids[number]
        self._batch = batch
        self._number = number

    @property
    def small_request(self) -> Request:
        """The encoded prompt of the small VLM, N_small visual tokens."""
        return self._batch.small_requests[self._number]

    @property
    def large_request(self) -> Request:
        """The encoded prompt of the large VLM, N visual tokens."""
        return self._batch.large_requests[self._number]

    @property
    def guidance(self) -> Guidance:
        """The small VLM's answer, scores and mass (1, N_small) of prompt and generated rows."""
        found = self._batch.guidance[self._number]
        if isinstance(found, SGLError):
            raise found
        return found

    @property
    def generated_mass(self) -> Tensor:
        """The part of the small VLM's mass (1, N_small) that comes from generated rows."""
        return _mass_of(self._batch.generated[self._number])

    @property
    def large_mass(self) -> Tensor:
        """The unpruned large VLM's own mass (1, N) of prompt and generated rows."""
        return _mass_of(self._batch.unpruned[self._number])

    @cached_property
    def generator(self) -> torch.Generator:
        """Random numbers of this example, on the CPU; at every prune layer the same."""
        return torch.Generator().manual_seed(self._batch.seeds[self._number])

    def to_large(self, mass: Tensor) -> Tensor:
        """Take what ranks the small VLM's tokens (1, N_small) to the large one's, (1, N): `matching.rank`."""
        small, large = self._batch.prompts[self._number]
        config = replace(self._batch.config, keep_scope="request")  # images' shares come after ranking
        return matching.rank(mass.to(self.large.model.device), small, large, config)


class Ranking(Protocol):
    """What ranks visual tokens.

    Attributes
    ----------
    name : how tables and results files call it
    """

    name: str

    def rank(self, context: Context) -> Tensor:
        """Return (1, N), real numbers that become fp32: the largest of the large VLM's N visual tokens stay.

        Of equal ones the earlier stays; NaN ranks below everything, and not all may be NaN.
        """


class Guided:
    """Ours (arXiv 2412.03324, section 3.2): the small VLM's mass of prompt and generated rows."""

    name = "guided"

    def rank(self, context: Context) -> Tensor:
        return context.to_large(context.guidance.mass)


class Oracle:
    """The large VLM's own mass of prompt and generated rows, which costs a whole unpruned run."""

    name = "oracle"

    def rank(self, context: Context) -> Tensor:
        return context.large_mass


class FastV:
    """Attention that the last prompt token pays in layer ``max(K - 1, 0)`` (FastV, arXiv 2403.06764)."""

    name = "fastv"

    def rank(self, context: Context) -> Tensor:
        return fastv_ranking(context.large, context.large_request, context.prune_layer)


class Random:
    """Uniform noise, drawn from the seed and the example's id: what any ranking must beat."""

    name = "random"

    def rank(self, context: Context) -> Tensor:
        return torch.rand(1, context.large_request.prompt.num_visual, generator=context.generator)


class LastPromptToken:
    """The last prompt token's row only, over all layers and heads of the small VLM."""

    name = "last-prompt-token"

    def rank(self, context: Context) -> Tensor:
        request = context.small_request
        return context.to_large(context.small.layer_mass(request, _last_row(request)).sum(0))


class PromptRows:
    """The prompt's text rows only, over all layers and heads of the small VLM."""

    name = "prompt-rows"

    def rank(self, context: Context) -> Tensor:
        return context.to_large(context.small.layer_mass(context.small_request).sum(0))


class GeneratedRows:
    """The generated rows only, over all layers and heads of the small VLM.

    The last token of an answer is never fed and has no row: after an answer of one token all rank equal.
    """

    name = "generated-rows"

    def rank(self, context: Context) -> Tensor:
        return context.to_large(context.generated_mass)


RANKINGS: dict[str, Ranking] = {
    ranking.name: ranking
    for ranking in (
        Guided(),
        Oracle(),
        FastV(),
        Random(),
        LastPromptToken(),
        PromptRows(),
        GeneratedRows(),
    )
}


def find_ranking(name: str) -> Ranking:
    """Return a ranking by its name in `RANKINGS`, or your own as "module:name".

    The module is imported from the Python path or the working directory: it is your own code, and runs.
    ``name`` in it is a ranking, or a class that makes one without arguments.

    Raises
    ------
    ConfigError
        There is no such ranking, or what is there is none.
    """
    if name in RANKINGS:
        return RANKINGS[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"There is no ranking {name!r}. Choose from {', '.join(RANKINGS)}, or name your own as "
            "'module:name'."
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"The ranking {name!r} could not be loaded ({first_line(error)}). Write 'module:name'; the "
            "module must be in the working directory or on the Python path."
        ) from error
    ranking: Any = found() if inspect.isclass(found) else found
    if not isinstance(getattr(ranking, "name", None), str) or not callable(getattr(ranking, "rank", None)):
        raise ConfigError(
            f"{name!r} is no ranking: it needs a `name`, a string, and a method `rank(context)`."
        )
    return ranking


def rank(ranking: Ranking, context: Context) -> Tensor:
    """Return what a ranking says, (1, N) fp32 on the large VLM's device.

    Raises
    ------
    ConfigError
        A user's ranking raised something else than `SGLError` or that memory ran out, or it returned anything
        else than a tensor of that shape of real numbers, not all NaN.
    """
    device = context.large.model.device
    if is_built_in(ranking):
        return ranking.rank(context).to(device, torch.float32)
    try:
        found: object = ranking.rank(context)
    except (SGLError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # anything may go wrong in a user's code
        raise ConfigError(
            f"The ranking {ranking.name!r} failed on example {cut(context.id)}: {reason(error)}. "
            "Mend its `rank`."
        ) from error
    count = context.large_request.prompt.num_visual
    if not isinstance(found, Tensor) or found.shape != (1, count):
        told = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(
            f"The ranking {ranking.name!r} must return a tensor (1, {count}), one number per visual token of "
            f"the large VLM, got {told}. What ranks the small VLM's tokens goes through context.to_large()."
        )
    if found.dtype == torch.bool or found.is_complex():
        raise ConfigError(
            f"The ranking {ranking.name!r} must return real numbers, got {found.dtype}. Return fp32, the "
            "largest for the tokens that are to stay."
        )
    if found.isnan().all():
        raise ConfigError(
            f"The ranking {ranking.name!r} is NaN for all {count} visual tokens of example "
            f"{cut(context.id)}, which ranks none of them. Mend its `rank`."
        )
    return found.to(device, torch.float32)


def is_built_in(ranking: Ranking) -> bool:
    """Whether a ranking is one of this file's."""
    return type(ranking).__module__ == __name__


def code_of(ranking: Ranking) -> str | None:
    """Return the start of the SHA-256 of the file that a ranking of the user's is written in.

    None for the built-in ones, and where there is no file.
    """
    if is_built_in(ranking):
        return None
    try:
        file = inspect.getsourcefile(type(ranking))
        return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    except (OSError, TypeError):
        return None


def fastv_ranking(large: VLM, request: Request, layer: int) -> Tensor:
    """Return what `FastV` ranks by when pruning at ``layer``, (1, N) fp32."""
    return large.layer_mass(request, _last_row(request))[max(layer - 1, 0)]


def _last_row(request: Request) -> Tensor:
    prompt = request.prompt
    return torch.tensor([[prompt.length - 1]], dtype=torch.int32, device=prompt.input_ids.device)


def _mass_of(answer: Answer) -> Tensor:
    if answer.error is not None:
        raise answer.error
    assert answer.mass is not None
    return answer.mass


def _in_order(answers: dict[int, T]) -> list[T]:
    return [answers[number] for number in range(len(answers))]
