"""What a family of VLMs has to say for itself; everything else about a model is the same for all of them.

A family is one file with two classes. `Family` wraps a loaded model: what its vision tower takes and makes,
and where its tokens stand. `Preprocessor` turns one image or video into tensors and prompt text. Both know
transformers' names; nothing above them does. docs/families.md shows how to add one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image as PILImage
from torch import Tensor

from sgl_runtime.errors import CheckpointError, PromptError

# Tiles in one pass of the vision tower. A CPU is no faster with more, and needs memory for each.
_TILES_TOGETHER = {"cpu": 1, "cuda": 16}


@dataclass(frozen=True, eq=False)
class Visual:
    """What goes through the vision tower on its own: a tile, an image with all its crops, or a video.

    Attributes
    ----------
    tensors : what the family's `Family.features` needs of it
    tokens : visual tokens it makes
    """

    tensors: dict[str, Tensor]
    tokens: int


@dataclass(frozen=True, eq=False)
class Features:
    """What the vision tower makes of one `Visual`.

    Attributes
    ----------
    tokens : (N, C), these take the place of the visual tokens' embeddings
    planes : (N, C) each; plane i is added to the visual tokens behind decoder layer i (DeepStack)
    """

    tokens: Tensor
    planes: tuple[Tensor, ...] = ()


class Family(ABC):
    """A loaded model, seen as one of its family.

    Class attributes
    ----------------
    model_types : ``model_type`` of the configurations it reads
    architecture : the transformers class that loads it
    text_models : ``model_type`` of the text models that are supported
    decoder : name of the text model inside ``model.model``
    video : whether it takes videos
    preprocessor : the class that prepares images for it
    parts : sub-configurations that config.json must hold; transformers would fill in defaults of gigabytes
    """

    model_types: ClassVar[tuple[str, ...]]
    architecture: ClassVar[str]
    text_models: ClassVar[tuple[str, ...]]
    decoder: ClassVar[str] = "language_model"
    video: ClassVar[bool] = False
    preprocessor: ClassVar[type[Preprocessor]]
    parts: ClassVar[tuple[str, ...]] = ("text_config", "vision_config")

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config: Any = model.config

    @classmethod  # noqa: B027 - most have nothing to refuse
    def check_config(cls, config: Any) -> None:
        """Raise CheckpointError for a configuration that asks for what the runtime does not do."""

    @property
    def visual_ids(self) -> tuple[int, ...]:
        """Token ids that stand for visual tokens in a prompt."""
        return (int(self.config.image_token_id),)

    @abstractmethod
    def visuals(self, inputs: Mapping[str, Any]) -> list[Visual]:
        """Check a processor's tensors for one request and split them, in the order of the prompt.

        Parameters
        ----------
        inputs
            As transformers' own processor of this family makes them for one request, ``input_ids`` (1, S)
            among them.

        Raises
        ------
        PromptError
            Something is missing, or of a wrong type or shape.
        """

    @abstractmethod
    def encode(self, visual: Visual) -> Features:
        """Run the vision tower and the projector on one visual, on the model's device and in its dtype."""

    def features(self, visuals: Sequence[Visual], check: Callable[[], None]) -> list[Features]:
        """`encode` for each of ``visuals``; ``check`` is called in between and may raise, to end the work.

        A family overrides it when several together are faster.
        """
        found = []
        for visual in visuals:
            check()
            found.append(self.encode(visual))
        return found

    def positions(self, input_ids: Tensor, visuals: Sequence[Visual]) -> Tensor | None:
        """Return the rotary positions (3, S) int64 of a prompt (S,); None: 0, 1, ... in every component.

        Text goes on one behind the last token, and no text stands further back than it would by counting
        tokens.
        """
        return None

    def rope(self, rotary: Any, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin (S, D) of positions (S,) or (3, S), from the text model's rotary module."""
        cos, sin = rotary(like, positions[None])
        return cos[0], sin[0]

    @abstractmethod
    def example(self) -> dict[str, Tensor]:
        """Return inputs of a short made-up prompt with one small black image, to warm up with."""


class TiledFamily(Family):
    """A family whose vision tower takes tiles of one size, ``pixel_values`` (1, 3, H, W) in each visual."""

    @abstractmethod
    def encode_tiles(self, tiles: Tensor) -> list[Features]:
        """Run the vision tower and the projector on tiles (n, 3, H, W) in one pass."""

    def encode(self, visual: Visual) -> Features:
        return self.encode_tiles(visual.tensors["pixel_values"])[0]

    def features(self, visuals: Sequence[Visual], check: Callable[[], None]) -> list[Features]:
        found: list[Features] = []
        tiles = torch.cat([visual.tensors["pixel_values"] for visual in visuals])
        for some in tiles.split(_TILES_TOGETHER[tiles.device.type]):
            check()
            found += self.encode_tiles(some)
        return found


@dataclass(frozen=True, eq=False)
class Prepared:
    """One image or video, made ready for a prompt.

    Attributes
    ----------
    tensors : joined along dim 0 with those of the request's other images by `Preprocessor.merge`
    text : what the prompt gets in place of the placeholder, its visual tokens included
    cells : (N, 3, 2) fp32, where each visual token looks: begin and end in time, height and width, each as a
        share of the whole in [0, 1]
    """

    tensors: dict[str, Tensor]
    text: str
    cells: Tensor


class Preprocessor(ABC):
    """Images and videos of one checkpoint's kind to tensors and text. Needs no torchvision.

    Attributes
    ----------
    image_mark : what the chat template writes for an image, replaced by `Prepared.text`
    video_mark : likewise for a video; None when the family takes none
    video_template : chat template that takes the place of the checkpoint's where there is a video; None: none
    visual_tokens : the tokenizer's names of the family's visual tokens, in the order of `Family.visual_ids`
    """

    image_mark: str
    video_mark: str | None = None
    video_template: str | None = None
    visual_tokens: tuple[str, ...]

    @abstractmethod
    def __init__(self, settings: dict[str, Any], tokenizer: Any, family: Family) -> None:
        """Build from a checkpoint's image settings.

        Parameters
        ----------
        settings
            The contents of preprocessor_config.json, or of image_processor in processor_config.json, with
            those of processor_config.json's other keys that it lacks; ``video_processor`` holds the settings
            of videos, where the checkpoint has any.
        tokenizer
            The checkpoint's tokenizer.
        family
            Its loaded model, for the numbers that only that knows.

        Raises
        ------
        CheckpointError
            A setting is missing or does not fit the model.
        """

    @abstractmethod
    def image(self, image: PILImage.Image) -> Prepared:
        """Prepare one upright RGB image."""

    def images(self, images: Sequence[PILImage.Image]) -> list[Prepared]:
        """Prepare all images of a request; overridden where it matters to an image how many there are."""
        return [self.image(image) for image in images]

    def video(self, frames: Sequence[PILImage.Image], seconds: Sequence[float]) -> Prepared:
        """Prepare a video of RGB frames of one size, shown at ``seconds`` after its start."""
        raise PromptError(f"{type(self).__name__} takes images only, got a video.")

    def merge(self, parts: Sequence[Prepared]) -> dict[str, Tensor]:
        """Join the tensors of a request's images and videos, in the order of the prompt."""
        names = list(dict.fromkeys(name for part in parts for name in part.tensors))
        return {name: torch.cat([p.tensors[name] for p in parts if name in p.tensors]) for name in names}


def need(settings: Mapping[str, Any], *names: str) -> None:
    """Raise CheckpointError when image settings lack one of ``names``."""
    missing = [name for name in names if settings.get(name) is None]
    if missing:
        raise CheckpointError(f"The checkpoint's preprocessor_config.json lacks {', '.join(missing)}.")


def film_cells(still: Tensor, steps: int) -> Tensor:
    """Return the cells (steps * N, 3, 2) of a video: those of a still (N, 3, 2) in equal steps of time."""
    edges = torch.linspace(0, 1, steps + 1)
    cells = still.repeat(steps, 1, 1)
    cells[:, 0] = torch.stack((edges[:-1], edges[1:]), 1).repeat_interleave(len(still), 0)
    return cells


def grid_cells(rows: int, columns: int, box: tuple[float, float, float, float] = (0, 1, 0, 1)) -> Tensor:
    """Return the cells (rows * columns, 3, 2) of a grid, row by row, over a box of the image.

    Parameters
    ----------
    box
        Top, bottom, left, right, as shares of the image.
    """
    top, bottom, left, right = box
    down = torch.linspace(top, bottom, rows + 1)
    across = torch.linspace(left, right, columns + 1)
    cells = torch.empty(rows, columns, 3, 2)
    cells[..., 0, 0], cells[..., 0, 1] = 0, 1
    cells[..., 1, 0], cells[..., 1, 1] = down[:-1, None], down[1:, None]
    cells[..., 2, 0], cells[..., 2, 1] = across[:-1], across[1:]
    return cells.flatten(0, 1)


def tensor_of(inputs: Mapping[str, Any], name: str, dims: int) -> Tensor:
    """Return the tensor ``inputs[name]`` of ``dims`` dimensions; PromptError when it is anything else."""
    value = inputs.get(name)
    if not isinstance(value, Tensor) or value.dim() != dims or not value.numel():
        raise PromptError(f"{name} must be a tensor of {dims} dimensions, got {describe(value)}.")
    return value


def describe(value: Any) -> str:
    """Return a tensor's dtype and shape, or the kind of anything else, for messages."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
