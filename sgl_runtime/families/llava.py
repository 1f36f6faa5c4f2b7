"""LLaVA-1.5: one crop per image. LLaVA-NeXT: the whole image and crops of it, with newlines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image as PILImage
from torch import Tensor

from sgl_runtime.checkpoints import as_checkpoint_error
from sgl_runtime.errors import CheckpointError, ImageError, PromptError
from sgl_runtime.families.anyres import Layout, Tower, cells_between, shares
from sgl_runtime.families.base import (
    Family,
    Features,
    Prepared,
    Preprocessor,
    Visual,
    describe,
    need,
    tensor_of,
)

_LONGEST = 200  # times the side of a crop: that much of an image is enlarged before its middle is cut out
_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
_PIXEL_SETTINGS = (
    "do_convert_rgb",
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_pad",
    "image_grid_pinpoints",
)


class LlavaPreprocessor(Preprocessor):
    """Images of LLaVA-1.5: resized, then the centre of them, or padded to a square, as the settings say."""

    def __init__(self, settings: dict[str, Any], tokenizer: Any, family: Family) -> None:
        kinds = ("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor")
        self.tower = tower_for(settings, family)
        self.processor = pil_processor(settings, kinds, self.tower)
        self.image_mark = mark_of(tokenizer, settings, "image_token", "<image>")
        self.visual_tokens = (self.image_mark,)

    def image(self, image: PILImage.Image) -> Prepared:
        """Prepare one upright RGB image. A class token that is kept looks at all the crop shows.

        Raises
        ------
        ImageError
            The image is so long that its shorter side cannot be enlarged to a crop's in reasonable memory.
        """
        if max(self._resized((image.height, image.width))) > _LONGEST * self.tower.size:
            raise ImageError(
                f"An image of {image.width} x {image.height} pixels is too long: LLaVA-1.5 looks at a square "
                f"of it; the longer side may be {_LONGEST} times the shorter one at most. Crop it."
            )
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"]
        cells = self._cells(image.height, image.width)
        return Prepared({"pixel_values": pixels}, self.image_mark * len(cells), cells)

    def _cells(self, *image: int) -> Tensor:
        """Return the cells of an image of height, width; what lies beyond its border is cut off."""
        side = self.tower.side
        pads = hasattr(self.processor, "pad_to_square") and self.processor.do_pad
        canvas = (max(image),) * 2 if pads else image
        edges = self.tower.edges(0, side, side)
        axes = []
        for own, padded, scaled in zip(image, canvas, self._resized(canvas), strict=True):
            cut = (scaled - self.tower.size) // 2  # negative where a border is put around
            axes.append(shares((edges + cut) * padded / scaled, (padded - own) // 2, own))
        cells = cells_between(*axes)
        shown = torch.stack([cells[..., 0].amin(0), cells[..., 1].amax(0)], dim=-1)
        return torch.cat([shown.expand(self.tower.extra, 3, 2), cells])

    def _resized(self, canvas: tuple[int, ...]) -> tuple[int, ...]:
        size = self.processor.size
        if not self.processor.do_resize:
            return canvas
        if size.shortest_edge is None:
            return size.height, size.width
        return tuple(int(size.shortest_edge * length / min(canvas)) for length in canvas)


class Llava(Family):
    """LLaVA-1.5 and what has its architecture: CLIP or SigLIP, every image one crop."""

    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    architecture = "LlavaForConditionalGeneration"
    text_models: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3")
    preprocessor: ClassVar[type[Preprocessor]] = LlavaPreprocessor

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.tower = tower_of(self.config)

    @classmethod
    def check_config(cls, config: Any) -> None:
        check_tower(config)

    def visuals(self, inputs: Mapping[str, Any]) -> list[Visual]:
        pixels = pixels_of(inputs, "pixel_values", 4, self.tower.size)
        return [Visual({"pixel_values": crop}, self.tower.tokens) for crop in pixels.split(1)]

    def encode(self, visual: Visual) -> Features:
        return Features(image_features(self.model, visual.tensors))

    def example(self) -> dict[str, Tensor]:
        return {
            "input_ids": example_ids(self.visual_ids, self.tower.tokens),
            "pixel_values": torch.zeros(1, 3, self.tower.size, self.tower.size),
        }


class LlavaNextPreprocessor(Preprocessor):
    """Images of LLaVA-NeXT: the whole image squeezed into one crop, then crops of a canvas."""

    def __init__(self, settings: dict[str, Any], tokenizer: Any, family: Family) -> None:
        need(settings, "image_grid_pinpoints")
        self.tower = tower_for(settings, family)
        self.processor = pil_processor(settings, ("LlavaNextImageProcessor",), self.tower)
        self.image_mark = mark_of(tokenizer, settings, "image_token", "<image>")
        self.visual_tokens = (self.image_mark,)

    def image(self, image: PILImage.Image) -> Prepared:
        """Prepare one upright RGB image. A newline token looks where the last patch of its row looks."""
        found = self.processor(images=image, return_tensors="pt")
        layout = Layout.of((image.height, image.width), self.processor.image_grid_pinpoints, self.tower)
        tensors = {name: found[name] for name in ("pixel_values", "image_sizes")}
        return Prepared(tensors, self.image_mark * layout.tokens, layout.cells())

    def merge(self, parts: Sequence[Prepared]) -> dict[str, Tensor]:
        """Join the tensors of a request's images; those with fewer crops are filled up with zeros."""
        return super().merge(fill_crops(parts))


class LlavaNext(Llava):
    """LLaVA-NeXT (1.6): the whole image, then crops of it; padding is cut off the crops' features."""

    model_types = ("llava_next",)
    architecture = "LlavaNextForConditionalGeneration"
    preprocessor = LlavaNextPreprocessor

    @classmethod
    def check_config(cls, config: Any) -> None:
        super().check_config(config)
        check_anyres(config)

    def visuals(self, inputs: Mapping[str, Any]) -> list[Visual]:
        pixels = pixels_of(inputs, "pixel_values", 5, self.tower.size)
        layouts = [self.layout(size) for size in sizes_of(inputs, len(pixels))]
        return [cut_visual(crops, layout) for crops, layout in zip(pixels.split(1), layouts, strict=True)]

    def example(self) -> dict[str, Tensor]:
        return anyres_example(self.visual_ids, self.layout(smallest_canvas(self.config)))

    def layout(self, image: tuple[int, int]) -> Layout:
        """Return how an image of (height, width) becomes visual tokens."""
        return Layout.of(image, self.config.image_grid_pinpoints, self.tower)


def tower_of(config: Any) -> Tower:
    """Return how the model of this configuration sees a crop."""
    vision = config.vision_config
    extra = _CLASS_TOKENS[vision.model_type] - (config.vision_feature_select_strategy == "default")
    return Tower(vision.image_size, vision.patch_size, extra)


def check_tower(config: Any) -> None:
    """Raise CheckpointError for a vision tower that none of the LLaVA families take."""
    vision = config.vision_config
    if vision.model_type not in _CLASS_TOKENS:
        raise CheckpointError(
            f"The vision tower is of type {vision.model_type!r}; supported are {', '.join(_CLASS_TOKENS)}, "
            "which see square crops of one size."
        )
    if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
        raise CheckpointError(
            f"The vision tower takes images of {vision.image_size} in patches of {vision.patch_size}; only "
            "squares, each given as one number, are supported."
        )
    if tower_of(config).extra < 0:
        raise CheckpointError(
            f"vision_feature_select_strategy 'default' drops a class token, but {vision.model_type} has "
            "none: the first patch would be lost. Set it to 'full'."
        )


def check_anyres(config: Any) -> None:
    """Raise CheckpointError when images cannot be cut into crops that the vision tower takes."""
    size, pinpoints = config.vision_config.image_size, config.image_grid_pinpoints
    if not pinpoints or any(height % size or width % size for height, width in pinpoints):
        raise CheckpointError(
            f"image_grid_pinpoints must name canvases made of whole crops of {size} pixels, got {pinpoints}."
        )
    if tower_of(config).extra:
        raise CheckpointError(
            "vision_feature_select_strategy 'full' keeps the class token of every crop, which then does not "
            "fit into the grid of patches. Set it to 'default'."
        )


def pixels_of(inputs: Mapping[str, Any], name: str, dims: int, size: int) -> Tensor:
    """Return the crops ``inputs[name]`` (..., 3, size, size); PromptError when it is anything else."""
    pixels = tensor_of(inputs, name, dims)
    if not pixels.is_floating_point() or tuple(pixels.shape[-3:]) != (3, size, size):
        raise PromptError(
            f"{name} must be floating point, each crop of shape (3, {size}, {size}), got {describe(pixels)}."
        )
    return pixels


def sizes_of(inputs: Mapping[str, Any], images: int) -> list[tuple[int, int]]:
    """Return ``inputs["image_sizes"]`` (images, 2) as (height, width) each; PromptError when it is wrong."""
    sizes = tensor_of(inputs, "image_sizes", 2)
    whole = not sizes.is_floating_point() and not sizes.is_complex()
    if not whole or tuple(sizes.shape) != (images, 2) or int(sizes.min()) < 1:
        raise PromptError(
            f"image_sizes must be positive integers of shape ({images}, 2), the height and width of each "
            f"image, got {describe(sizes)}: {sizes.flatten()[:8].tolist()}."
        )
    return [(int(height), int(width)) for height, width in sizes.tolist()]


def cut_visual(crops: Tensor, layout: Layout) -> Visual:
    """Return an image (1, crops, 3, H, W) as a visual, without the crops that only fill it up."""
    if crops.shape[1] < layout.num_crops:
        raise PromptError(
            f"An image of {layout.image[0]} x {layout.image[1]} pixels takes {layout.num_crops} crops, "
            f"but pixel_values holds {crops.shape[1]} per image."
        )
    tensors = {"pixel_values": crops[:, : layout.num_crops], "image_sizes": torch.tensor([layout.image])}
    return Visual(tensors, layout.tokens)


def image_features(model: Any, tensors: Mapping[str, Tensor], **more: Any) -> Tensor:
    """Return what transformers puts in the place of one image's tokens (tokens, hidden_size)."""
    found = model.model.get_image_features(
        **tensors,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        return_dict=True,
        **more,
    )
    return found.pooler_output[0]


def example_ids(visual_ids: Sequence[int], tokens: int) -> Tensor:
    """Return ids (1, S) of a prompt with text before and after one image of ``tokens`` tokens."""
    text = next(number for number in range(len(visual_ids) + 1) if number not in visual_ids)
    return torch.tensor([[text, *[visual_ids[0]] * tokens, text]])


def smallest_canvas(config: Any) -> tuple[int, int]:
    """Return (height, width) of an image that makes the fewest crops."""
    height, width = min(config.image_grid_pinpoints, key=math.prod)
    return height, width


def anyres_example(visual_ids: Sequence[int], layout: Layout) -> dict[str, Tensor]:
    """Return `Family.example` for one black image of this layout."""
    size = layout.tower.size
    return {
        "input_ids": example_ids(visual_ids, layout.tokens),
        "pixel_values": torch.zeros(1, layout.num_crops, 3, size, size),
        "image_sizes": torch.tensor([layout.image]),
    }


def pil_processor(settings: Mapping[str, Any], kinds: Sequence[str], tower: Tower) -> Any:
    """Return transformers' image processor for these settings in its PIL form, which needs no torchvision.

    Raises
    ------
    CheckpointError
        A setting is missing or wrong, the settings belong to an image processor other than ``kinds`` (the
        first when they name none), or the crops are not those that the vision tower takes.
    """
    need(settings, "size", "image_mean", "image_std")
    kind = str(settings.get("image_processor_type") or kinds[0]).removesuffix("Fast").removesuffix("Pil")
    if kind not in kinds:
        raise CheckpointError(f"The image settings are for {kind}; supported here: {', '.join(kinds)}.")
    import transformers

    chosen = {name: settings[name] for name in _PIXEL_SETTINGS if settings.get(name) is not None}
    with as_checkpoint_error("The image settings do not work"):
        processor = getattr(transformers, f"{kind}Pil")(**chosen)
        made = processor(images=PILImage.new("RGB", (16, 8)), return_tensors="pt")["pixel_values"]
    if tuple(made.shape[-2:]) != (tower.size, tower.size):
        raise CheckpointError(
            f"The image settings make crops of {made.shape[-2]} x {made.shape[-1]} pixels, the model takes "
            f"{tower.size} x {tower.size}."
        )
    return processor


def mark_of(tokenizer: Any, settings: Mapping[str, Any], name: str, default: str) -> str:
    """Return the name of a visual token: the tokenizer's, else the settings', else the family's."""
    return getattr(tokenizer, name, None) or settings.get(name) or default


def tower_for(settings: Mapping[str, Any], family: Family) -> Tower:
    """Return how the model sees a crop; CheckpointError when the settings beside it say otherwise."""
    config = family.config
    tower = tower_of(config)
    wanted = {
        "patch_size": tower.patch,
        "num_image_tokens": tower.tokens,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "image_grid_pinpoints": [list(canvas) for canvas in getattr(config, "image_grid_pinpoints", [])]
        or None,
        "vision_aspect_ratio": getattr(config, "vision_aspect_ratio", None),
    }
    for name, value in wanted.items():
        if value is not None and settings.get(name) not in (None, value):
            raise CheckpointError(
                f"The image settings say {name} = {settings[name]}, the model's configuration {value}. They "
                "do not belong together."
            )
    return tower


def fill_crops(parts: Sequence[Prepared]) -> list[Prepared]:
    """Return the parts with ``pixel_values`` (1, crops, 3, H, W) of equally many crops, filled with zeros."""
    most = max(
        (part.tensors["pixel_values"].shape[1] for part in parts if "pixel_values" in part.tensors), default=0
    )
    filled = []
    for part in parts:
        tensors = dict(part.tensors)
        if "pixel_values" in tensors:
            pixels = tensors["pixel_values"]
            padding = (0, 0, 0, 0, 0, 0, 0, most - pixels.shape[1])
            tensors["pixel_values"] = torch.nn.functional.pad(pixels, padding)
        filled.append(Prepared(tensors, part.text, part.cells))
    return filled
