"""Idefics3 and SmolVLM: square tiles, s x s patches shuffled into one token, the whole image as last tile.

SmolVLM differs from Idefics3 in its names, and in that it takes videos: one tile and a time per frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor

from sgl_runtime.checkpoints import as_checkpoint_error
from sgl_runtime.errors import CheckpointError, PromptError
from sgl_runtime.families.base import (
    Family,
    Features,
    Prepared,
    Preprocessor,
    TiledFamily,
    Visual,
    describe,
    film_cells,
    grid_cells,
    need,
    tensor_of,
)

_PIXEL_SETTINGS = (
    "do_image_splitting",
    "do_normalize",
    "do_pad",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "max_image_size",
    "resample",
    "rescale_factor",
    "size",
)
_LONGEST_EDGE = 4096  # transformers scales no frame above it
_UNITS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


class Idefics3Preprocessor(Preprocessor):
    """Images as ``Idefics3Processor`` and ``SmolVLMProcessor`` prepare them.

    An image is scaled to whole rows and columns of square tiles; a smaller copy of all of it is the last
    tile. Without ``do_image_splitting``, or when one tile is enough, there is just that.
    """

    image_mark = "<image>"

    def __init__(self, settings: dict[str, Any], tokenizer: Any, family: Family) -> None:
        need(settings, "size", "max_image_size", "image_mean", "image_std")
        self.tile_size = _longest_edge(settings, "max_image_size")
        _longest_edge(settings, "size")
        assert isinstance(family, Idefics3)
        _check_fit(settings, self.tile_size, family)
        self.side, self.tokens_per_tile = family.side, family.tokens_per_tile
        # Patches need not fill a tile: 27 of 14 pixels leave 6 of 384 unseen.
        self.seen = self.side * family.token_size / self.tile_size
        self.image_token, self.fake_token, self.global_token = (
            getattr(tokenizer, name, None) or default
            for name, default in (
                ("image_token", "<image>"),
                ("fake_image_token", "<fake_token_around_image>"),
                ("global_image_token", "<global-img>"),
            )
        )
        self.visual_tokens = (self.image_token,)
        chosen = {name: settings[name] for name in _PIXEL_SETTINGS if settings.get(name) is not None}
        self.processor = _image_processor(**chosen)

    def image(self, image: PILImage.Image) -> Prepared:
        """Prepare one upright RGB image: ``pixel_values`` (tiles, 3, H, W), ``pixel_attention_mask``."""
        found = self.processor(images=[[image]], return_tensors="pt", return_row_col_info=True)
        rows, columns = int(found["rows"][0][0]), int(found["cols"][0][0])
        names = [name for name in ("pixel_values", "pixel_attention_mask") if name in found]
        cells = [self._cells(r, c, rows, columns) for r in range(rows) for c in range(columns)]
        return Prepared(
            tensors={name: found[name][0] for name in names},
            text=self._text(rows, columns),
            cells=torch.cat([*cells, self._cells(0, 0, 1, 1)]),
        )

    def merge(self, parts: Sequence[Prepared]) -> dict[str, Tensor]:
        """Join the tiles of all images and videos, as those of a batch of one request."""
        return {name: tiles[None] for name, tiles in super().merge(parts).items()}

    def _text(self, rows: int, columns: int) -> str:
        """Return the visual tokens of an image of rows x columns tiles, 0 x 0 of the whole alone."""
        tokens = self.image_token * self.tokens_per_tile
        text = ""
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                text += f"{self.fake_token}<row_{row}_col_{column}>{tokens}"
            text += "\n"
        if rows:
            text += "\n"
        return f"{text}{self.fake_token}{self.global_token}{tokens}{self.fake_token}"

    def _cells(self, row: int, column: int, rows: int, columns: int) -> Tensor:
        """Return the cells (tokens_per_tile, 3, 2) of one tile of rows x columns."""
        top, left = row / rows, column / columns
        box = (top, top + self.seen / rows, left, left + self.seen / columns)
        return grid_cells(self.side, self.side, box)


class SmolVLMPreprocessor(Idefics3Preprocessor):
    """Images as in Idefics3, and videos as ``SmolVLMProcessor`` prepares them.

    A frame is one tile. What a video lasts is not known here: as in transformers then, the prompt calls the
    time of its last frame the video's.
    """

    video_mark = "<video>"

    def __init__(self, settings: dict[str, Any], tokenizer: Any, family: Family) -> None:
        """Build from settings; ``video_processor`` among them holds those of frames, if they differ."""
        super().__init__(settings, tokenizer, family)
        from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

        self.video_template = DEFAULT_CHAT_TEMPLATE  # which SmolVLMProcessor takes wherever there is a video
        own = settings.get("video_processor") or settings
        self.frame_edge = min(_longest_edge(own, "size"), _LONGEST_EDGE)

    def video(self, frames: Sequence[PILImage.Image], seconds: Sequence[float]) -> Prepared:
        """Prepare RGB frames of one size: ``pixel_values`` (frames, 3, H, W), ``pixel_attention_mask``."""
        if not frames or len(frames) != len(seconds):
            raise PromptError(
                f"A video needs frames with a time each, got {len(frames)} frames, {len(seconds)} times."
            )
        found = [self._frame(frame) for frame in frames]
        last = timedelta(seconds=int(seconds[-1]))
        text = (
            f"You are provided the following series of {_in_words(len(frames))} frames from a {last} "
            "[H:MM:SS] video.\n"
        )
        for second in seconds:
            text += f"\nFrame from {int(second // 60):02d}:{int(second % 60):02d}:{self._text(0, 0)}"
        cells = film_cells(self._cells(0, 0, 1, 1), len(frames))
        tensors = {name: torch.cat([each[name] for each in found]) for name in found[0]}
        return Prepared(tensors=tensors, text=text + "\n\n", cells=cells)

    def _frame(self, frame: PILImage.Image) -> dict[str, Tensor]:
        """Return one tile: a frame is scaled to its longest edge first, then squared."""
        found = self.processor(
            images=[[frame]],
            return_tensors="pt",
            do_image_splitting=False,
            size={"longest_edge": self.frame_edge},
        )
        return {name: found[name][0] for name in ("pixel_values", "pixel_attention_mask") if name in found}


class Idefics3(TiledFamily):
    """``Idefics3ForConditionalGeneration``: Idefics3, and the first SmolVLM."""

    model_types = ("idefics3",)
    architecture = "Idefics3ForConditionalGeneration"
    text_models = ("llama",)
    decoder = "text_model"
    preprocessor = Idefics3Preprocessor

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        vision, scale = self.config.vision_config, self.config.scale_factor
        self.tile_size: int = vision.image_size
        self.side: int = self.tile_size // vision.patch_size // scale
        self.token_size: int = vision.patch_size * scale

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Refuse patches that do not fill whole tokens."""
        vision = config.vision_config
        patches = vision.image_size // vision.patch_size
        if patches < 1 or patches % config.scale_factor:
            raise CheckpointError(
                f"Tiles of {vision.image_size} pixels have {patches} patches of {vision.patch_size} pixels a "
                f"side, which scale_factor {config.scale_factor} does not divide."
            )

    @property
    def tokens_per_tile(self) -> int:
        return self.side**2

    def visuals(self, inputs: Mapping[str, Any]) -> list[Visual]:
        """Split ``pixel_values`` (1, tiles, 3, H, W) or (tiles, 3, H, W) into its tiles."""
        tiles, mask = inputs.get("pixel_values"), inputs.get("pixel_attention_mask")
        batched = isinstance(tiles, Tensor) and tiles.dim() == 5
        tiles = tensor_of(inputs, "pixel_values", 5 if batched else 4)
        if batched and len(tiles) != 1:
            raise PromptError(f"pixel_values must be of one request, got {describe(tiles)}.")
        tiles = tiles[0] if batched else tiles
        size = self.tile_size
        if tuple(tiles.shape[1:]) != (3, size, size) or not tiles.is_floating_point():
            raise PromptError(
                f"pixel_values must be tiles (tiles, 3, {size}, {size}) of floats, got {describe(tiles)}."
            )
        if mask is not None:
            _check_mask(mask, batched, tiles)
        return [Visual({"pixel_values": tile[None]}, self.tokens_per_tile) for tile in tiles]

    def encode_tiles(self, tiles: Tensor) -> list[Features]:
        # Not get_image_features: that drops a tile whose values are all 0, which may be a plain grey image.
        model = self.model.model
        hidden = model.vision_model(pixel_values=tiles.to(self.model.device, self.model.dtype))
        return [Features(tokens) for tokens in model.connector(hidden.last_hidden_state)]

    def example(self) -> dict[str, Tensor]:
        """Return inputs of a prompt of one black tile and one text token."""
        image = self.visual_ids[0]
        ids = [image] * self.tokens_per_tile + [0 if image else 1]
        shape = (1, 1, 3, self.tile_size, self.tile_size)
        return {"input_ids": torch.tensor([ids]), "pixel_values": torch.full(shape, -1.0)}


class SmolVLM(Idefics3):
    """``SmolVLMForConditionalGeneration``: SmolVLM2."""

    model_types = ("smolvlm",)
    architecture = "SmolVLMForConditionalGeneration"
    video = True
    preprocessor = SmolVLMPreprocessor


def _image_processor(**settings: Any) -> Any:
    """Return Idefics3's image processor in its PIL form: it needs no torchvision. SmolVLM's is the same."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    with as_checkpoint_error("The image settings do not work"):
        processor: Any = Idefics3ImageProcessorPil(**settings)
        processor(images=[[PILImage.new("RGB", (8, 8))]])
    return processor


def _check_mask(mask: Any, batched: bool, tiles: Tensor) -> None:
    """Raise PromptError unless a mask says that all of every tile is image."""
    wanted = ((1,) if batched else ()) + (len(tiles), *tiles.shape[2:])
    if not isinstance(mask, Tensor) or tuple(mask.shape) != wanted:
        raise PromptError(f"pixel_attention_mask must be {wanted} as pixel_values, got {describe(mask)}.")
    full = mask.bool().flatten(0, -3).flatten(1).all(1)
    if not full.all():
        raise PromptError(
            f"pixel_attention_mask says that tile {int(full.int().argmin())} is padded, which the tiles of "
            "one request never are. Run the processor on each request alone."
        )


def _check_fit(settings: Mapping[str, Any], tile_size: int, family: Idefics3) -> None:
    """Raise CheckpointError for settings that make other tiles or tokens than the model takes."""
    if tile_size != family.tile_size:
        raise CheckpointError(
            f"The image settings make tiles of {tile_size} pixels (max_image_size), the model takes "
            f"{family.tile_size}."
        )
    declared = settings.get("image_seq_len")
    if declared is not None and declared != family.tokens_per_tile:
        raise CheckpointError(
            f"The processor's image_seq_len is {declared}, the model makes {family.tokens_per_tile} tokens "
            "of a tile."
        )


def _longest_edge(settings: Mapping[str, Any], name: str) -> int:
    """Return ``settings[name]["longest_edge"]``; CheckpointError when there is no such number."""
    value = settings.get(name)
    edge = value.get("longest_edge") if isinstance(value, Mapping) else None
    if not isinstance(edge, int) or edge < 1:
        raise CheckpointError(f'{name} must be {{"longest_edge": pixels}}, the checkpoint has {value!r}.')
    return edge


def _in_words(number: int) -> str:
    """Return a number below 1000 in English, as num2words writes it."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_UNITS[ones]}" if ones else "")
    if number > 999:
        raise PromptError(f"A video has at most 999 frames, got {number}.")
    hundreds, rest = divmod(number, 100)
    return f"{_UNITS[hundreds]} hundred" + (f" and {_in_words(rest)}" if rest else "")
