"""InternVL 2.5, 3 and 3.5: square tiles of one size, each a fixed number of visual tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    film_cells,
    grid_cells,
    need,
    tensor_of,
)

_SETTINGS = (
    "size",
    "do_resize",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "resample",
    "min_patches",
    "max_patches",
)


class InternVLPreprocessor(Preprocessor):
    """Images to tiles of one size and a thumbnail, as transformers' InternVLProcessor cuts them."""

    def __init__(self, settings: dict[str, Any], tokenizer: Any, family: Family) -> None:
        need(settings, "size", "image_mean", "image_std")
        # InternVLProcessor cuts images into tiles whatever the image settings beside it say.
        cut = settings.get("processor_class") == "InternVLProcessor"
        chosen = {name: settings[name] for name in _SETTINGS if settings.get(name) is not None}
        chosen["crop_to_patches"] = cut or bool(settings.get("crop_to_patches", False))
        self.processor = image_processor(**chosen)
        size: Any = self.processor.size
        self.tile = (int(size.height), int(size.width))
        self.start = getattr(tokenizer, "start_image_token", None) or "<img>"
        self.end = getattr(tokenizer, "end_image_token", None) or "</img>"
        self.context = getattr(tokenizer, "context_image_token", None) or "<IMG_CONTEXT>"
        self.image_mark, self.visual_tokens = self.context, (self.context,)
        self.video_mark = getattr(tokenizer, "video_token", None) or "<video>"
        assert isinstance(family, InternVL)
        self.side = family.side
        if self.tile != family.tile:
            raise CheckpointError(
                f"The image settings make tiles of {self.tile[0]} x {self.tile[1]}, the model takes "
                f"{family.tile[0]} x {family.tile[1]}."
            )

    def image(self, image: PILImage.Image) -> Prepared:
        found = self.processor(images=image)
        tiles, count = found["pixel_values"], int(found["num_patches"][0])
        columns, rows = self._canvas(image.size)
        boxes = [
            (row / rows, (row + 1) / rows, column / columns, (column + 1) / columns)
            for row in range(rows)
            for column in range(columns)
        ]
        boxes += [(0, 1, 0, 1)] * (count - len(boxes))  # the thumbnail
        return Prepared(
            {"pixel_values": torch.stack([torch.as_tensor(tile) for tile in tiles]).float()},
            f"{self.start}{self.context * (self._per_tile * count)}{self.end}",
            torch.cat([grid_cells(*self.side, box) for box in boxes]),
        )

    def video(self, frames: Sequence[PILImage.Image], seconds: Sequence[float]) -> Prepared:
        """One tile a frame, each announced by its number."""
        tiles = [self.processor(images=frame, crop_to_patches=False)["pixel_values"][0] for frame in frames]
        span = f"{self.start}{self.context * self._per_tile}{self.end}"
        return Prepared(
            {"pixel_values": torch.stack([torch.as_tensor(tile) for tile in tiles]).float()},
            "\n".join(f"Frame{i + 1}: {span}" for i in range(len(frames))),
            film_cells(grid_cells(*self.side), len(frames)),
        )

    @property
    def _per_tile(self) -> int:
        return self.side[0] * self.side[1]

    def _canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return (columns, rows) of the tiles that an image of ``size`` (width, height) is cut into."""
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        settings: Any = self.processor
        if not settings.crop_to_patches or settings.max_patches <= 1:
            return 1, 1
        return get_optimal_tiled_canvas(size[::-1], self.tile, settings.min_patches, settings.max_patches)


class InternVL(TiledFamily):
    """`InternVLForConditionalGeneration` with a Qwen2, Qwen3, Qwen3-MoE, Llama or Phi-3 text model."""

    model_types = ("internvl",)
    architecture = "InternVLForConditionalGeneration"
    text_models = ("llama", "qwen2", "qwen3", "qwen3_moe", "phi3")
    video = True
    preprocessor = InternVLPreprocessor

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        vision, ratio = self.config.vision_config, self.config.downsample_ratio
        self.tile = _pair(vision.image_size)
        patch = _pair(vision.patch_size)
        self.side = (int(self.tile[0] // patch[0] * ratio), int(self.tile[1] // patch[1] * ratio))

    def visuals(self, inputs: Mapping[str, Any]) -> list[Visual]:
        pixels = tensor_of(inputs, "pixel_values", 4)
        if tuple(pixels.shape[1:]) != (3, *self.tile):
            raise PromptError(f"Tiles must be {(3, *self.tile)}, got {tuple(pixels.shape[1:])}.")
        return [Visual({"pixel_values": tile}, self.side[0] * self.side[1]) for tile in pixels.split(1)]

    def encode_tiles(self, tiles: Tensor) -> list[Features]:
        output = self.model.get_image_features(
            pixel_values=tiles,
            vision_feature_layer=self.config.vision_feature_layer,
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
            return_dict=True,
        )
        return [Features(tokens) for tokens in output.pooler_output]

    def example(self) -> dict[str, Tensor]:
        image = int(self.config.image_token_id)
        text = 0 if image else 1
        ids = torch.tensor([*[image] * (self.side[0] * self.side[1]), text])
        return {"input_ids": ids[None], "pixel_values": torch.zeros(1, 3, *self.tile)}


def image_processor(**settings: Any) -> Any:
    """Return InternVL's image processor in its PIL form, the one that needs no torchvision."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    with as_checkpoint_error("The image settings do not work"):
        processor = GotOcr2ImageProcessorPil(**settings)
        processor(images=PILImage.new("RGB", (8, 8)))
    return processor


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, (list, tuple)) else (int(value), int(value))
