"""What is compared side by side: small alone, large unpruned, and rankings at several settings.

Of a batch of examples each thing is computed once: either VLM's vision tower, the small VLM's run, the large
VLM's unpruned run, its layers before each prune layer. Rankings come first, since the large VLM's memory
belongs to the run that began last; then the prefix of each prune layer is answered once per ranking and keep
ratio. Answers are without drafts, which never change one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from sgl_runtime import mapping, matching
from sgl_runtime.clock import Clock
from sgl_runtime.config import SGLConfig
from sgl_runtime.errors import ConfigError, ImageError, MemoryLimitError, SGLError
from sgl_runtime.evaluation.data import Example, open_source
from sgl_runtime.evaluation.rankings import (
    RANKINGS,
    Batch,
    Context,
    Ranking,
    is_built_in,
    rank,
)
from sgl_runtime.pipeline import SGLPipeline
from sgl_runtime.processing import open_visuals
from sgl_runtime.requests import Answer, Prompt, Prune

Key = tuple[str, float | None, int | None]


@dataclass(frozen=True)
class Method:
    """One way to answer.

    Attributes
    ----------
    name : "small", "large", or the ranking's
    keep_ratio, prune_layer : of the large VLM with a ranking; the layer as an int
    ranking : None for "small" and "large"
    """

    name: str
    keep_ratio: float | None = None
    prune_layer: int | None = None
    ranking: Ranking | None = field(default=None, compare=False)

    @property
    def key(self) -> Key:
        """What tells it from others."""
        return self.name, self.keep_ratio, self.prune_layer


@dataclass(frozen=True)
class Answered:
    """How one method answered one example.

    Attributes
    ----------
    prediction : the answer as text
    stages
        Seconds by stage that the answering VLM took for the batch, over the number of examples in it. Neither
        preparing images nor what the ranking took is in it: guidance costs what "small" took, the oracle what
        "large" did, which was timed while its mass was measured. It compares settings; drafts and overlap,
        which the pipeline has besides, are measured by `sgl-vlm bench`.
    scores : of "small": confidence, consistency, decision_score
    """

    method: Method
    prediction: str
    stages: dict[str, float]
    scores: dict[str, float | None] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(self.stages.values())


def make_methods(
    rankings: Iterable[Ranking],
    settings: Iterable[tuple[float, int | float]],
    num_layers: int,
    *,
    small: bool = True,
    large: bool = True,
) -> list[Method]:
    """Return the methods to compare: every ranking at every setting, after small alone and large unpruned.

    Parameters
    ----------
    settings
        Keep ratio and prune layer, as `SGLConfig` takes them. Two that mean the same layer are one.
    num_layers
        Decoder layers of the large VLM.

    Raises
    ------
    ConfigError
        A setting is out of range, two rankings share a name, or nothing is left to compare.
    """
    names: set[str] = set()
    methods = [Method(name) for name, wanted in (("small", small), ("large", large)) if wanted]
    layers = {
        (keep_ratio, SGLConfig(keep_ratio=keep_ratio, prune_layer=layer).layer_of(num_layers)): None
        for keep_ratio, layer in settings
    }
    for ranking in rankings:
        taken = {"small", "large", *names, *(() if is_built_in(ranking) else RANKINGS)}
        if ranking.name in taken:
            raise ConfigError(f"Two methods are called {ranking.name!r}. Give each ranking its own `name`.")
        names.add(ranking.name)
        methods += [Method(ranking.name, keep_ratio, layer, ranking) for keep_ratio, layer in layers]
    if not methods:
        raise ConfigError("There is nothing to compare: name a ranking and a setting, or small, or large.")
    return methods


def answer_batch(
    pipe: SGLPipeline,
    examples: Sequence[Example],
    methods: Sequence[Method],
    *,
    suffix: str = "",
    seed: int = 0,
) -> list[list[Answered] | SGLError]:
    """Answer each example by every method; one that any of them fails on is answered by none.

    Parameters
    ----------
    pipe
        From `SGLPipeline.from_pretrained`. Its settings of pruning, exits, drafts and schedule mean nothing
        here; the others hold.
    suffix
        What stands behind every question, `metrics.Metric.suffix`.
    seed
        Of random numbers, which depend on it and on an example's id only.

    Returns
    -------
    list
        Of each example the answers, in the order of ``methods``, or why there are none.

    Raises
    ------
    ConfigError
        A user's ranking failed, or did not return what it should.
    MemoryLimitError
        The batch does not fit.
    """
    if pipe.small_processor is None or pipe.large_processor is None:
        raise ConfigError(
            "Evaluation needs a pipeline with tokenizers: load it with SGLPipeline.from_pretrained()."
        )
    prompts: dict[int, tuple[Prompt, Prompt]] = {}
    found: list[list[Answered] | SGLError] = [[] for _ in examples]
    for i, example in enumerate(examples):
        try:
            prompts[i] = _prompts(pipe, example, suffix)
        except SGLError as error:
            found[i] = error
    if prompts:
        ids = [examples[i].id for i in prompts]
        batch = Batch(pipe, list(prompts.values()), [_seed(seed, each) for each in ids], ids)
        answered = _Comparison(pipe, batch).run(methods)
        for i, outcome in zip(prompts, answered, strict=True):
            found[i] = outcome
    return found


class _Comparison:
    """A batch on its way through the methods; who fails leaves."""

    def __init__(self, pipe: SGLPipeline, batch: Batch) -> None:
        self.pipe = pipe
        self.batch = batch
        self.count = len(batch.prompts)
        self.errors: dict[int, SGLError] = {}
        self.answers: list[dict[Key, Answered]] = [{} for _ in range(self.count)]

    @property
    def staying(self) -> list[int]:
        return [i for i in range(self.count) if i not in self.errors]

    def run(self, methods: Sequence[Method]) -> list[list[Answered] | SGLError]:
        layers = dict.fromkeys(m.prune_layer for m in methods if m.prune_layer is not None)
        by_layer = {layer: [m for m in methods if m.prune_layer == layer] for layer in layers}
        rankings = {layer: self._rank(layer, ranked) for layer, ranked in by_layer.items()}
        for method in methods:
            if method.name == "small":
                self._small(method)
            elif method.ranking is None:
                self._large(method)
        for layer, ranked in by_layer.items():
            self._pruned(layer, ranked, rankings[layer])
        return [
            self.errors.get(i) or [self.answers[i][method.key] for method in methods]
            for i in range(self.count)
        ]

    def _rank(self, layer: int, methods: list[Method]) -> dict[tuple[str, int], Tensor]:
        """Return what each ranking says of each example, by its name and the example's number."""
        found = {}
        for ranking in {m.name: m.ranking for m in methods if m.ranking is not None}.values():
            for i in self.staying:
                try:
                    found[ranking.name, i] = rank(ranking, Context(self.batch, i, layer))
                except (ConfigError, MemoryLimitError):
                    raise
                except SGLError as error:
                    self.errors[i] = error
        return found

    def _small(self, method: Method) -> None:
        assert self.pipe.small_processor is not None
        guidance = self.batch.guidance
        stages = self._stages([self.batch.small_clock])
        for i in self.staying:
            guided = guidance[i]
            if isinstance(guided, SGLError):
                self.errors[i] = guided
                continue
            scores = {name: getattr(guided, name) for name in ("confidence", "consistency", "decision_score")}
            text = self.pipe.small_processor.decode(guided.answer.token_ids)
            self.answers[i][method.key] = Answered(method, text, stages, scores)

    def _large(self, method: Method) -> None:
        answers = dict(enumerate(self.batch.unpruned))
        self._enter(method, answers, [self.batch.vision_clock, self.batch.large_clock])

    def _pruned(self, layer: int, methods: list[Method], rankings: dict[tuple[str, int], Tensor]) -> None:
        if not self.staying:
            return
        large, prompts = self.batch.large, [prompt for _, prompt in self.batch.prompts]
        configs = [replace(self.pipe.config, keep_ratio=m.keep_ratio or 1.0) for m in methods]
        kept = [[matching.num_keep(prompt, config) for prompt in prompts] for config in configs]
        begun = Clock(large.model.device)
        prefix = large.begin(
            self.batch.large_requests,
            self.pipe.config.max_new_tokens,
            prune_layer=layer,
            num_keep=[max(counts) for counts in zip(*kept, strict=True)],
            clock=begun,
        )
        for method, config, counts in zip(methods, configs, kept, strict=True):
            prunes = {
                i: Prune(layer, _scoped(rankings[method.name, i], prompts[i], config), counts[i])
                for i in self.staying
            }
            if prunes:
                clock = Clock(large.model.device)
                answers = large.answer(prefix, members=prunes, prunes=prunes, clock=clock)
                self._enter(method, answers, [self.batch.vision_clock, begun, clock])

    def _enter(self, method: Method, answers: dict[int, Answer], clocks: list[Clock]) -> None:
        assert self.pipe.large_processor is not None
        stages = self._stages(clocks)
        for i in self.staying:
            answer = answers[i]
            if answer.error is not None:
                self.errors[i] = answer.error
                continue
            text = self.pipe.large_processor.decode(answer.token_ids)
            self.answers[i][method.key] = Answered(method, text, stages)

    def _stages(self, clocks: list[Clock]) -> dict[str, float]:
        total: Counter[str] = Counter()
        for clock in clocks:
            total.update(clock.seconds)
        return {name: seconds / self.count for name, seconds in total.items()}


def _prompts(pipe: SGLPipeline, example: Example, suffix: str) -> tuple[Prompt, Prompt]:
    """Check one example, all of it, before any work, as the pipeline does."""
    assert pipe.small_processor is not None
    assert pipe.large_processor is not None
    try:
        opened = open_visuals([open_source(image) for image in example.images])
    except OSError as error:
        raise ImageError(f"An image of example {example.id} cannot be read: {error}.") from error
    question = example.question + suffix
    small = pipe.small.prompt(pipe.small_processor(opened, question))
    large = pipe.large.prompt(pipe.large_processor(opened, question))
    matching.check_match(small, large)
    for vlm, prompt in ((pipe.small, small), (pipe.large, large)):
        vlm.check_room(prompt, pipe.config.max_new_tokens)
    return small, large


def _scoped(ranking: Tensor, prompt: Prompt, config: SGLConfig) -> Tensor:
    """Return a ranking (1, N) as ``keep_scope`` has it."""
    if config.keep_scope == "request":
        return ranking
    return mapping.per_image_ranking(ranking, prompt.image_of, config.keep_ratio)[0]


def _seed(seed: int, example: str) -> int:
    digest = hashlib.sha256(f"{seed} {example}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
