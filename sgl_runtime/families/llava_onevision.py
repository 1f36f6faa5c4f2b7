"""LLaVA-OneVision: one image is cut into crops, several are not, a video's frames are pooled."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor

from sgl_runtime.errors import CheckpointError, PromptError
from sgl_runtime.families.anyres import Layout, Tower, cells_between, shares
from sgl_runtime.families.base import (
    Family,
    Features,
    Prepared,
    Preprocessor,
    Visual,
    describe,
    film_cells,
    need,
)
from sgl_runtime.families.llava import (
    Llava,
    anyres_example,
    check_anyres,
    cut_visual,
    fill_crops,
    image_features,
    mark_of,
    pil_processor,
    pixels_of,
    sizes_of,
    smallest_canvas,
    tower_for,
)

_CROP_SETTINGS = ("image_processor_type", "image_grid_pinpoints", "do_pad", "do_center_crop", "crop_size")


class LlavaOnevisionPreprocessor(Preprocessor):
    """Images and videos of LLaVA-OneVision.

    A request's only image is cut into crops like LLaVA-NeXT's. Several images are padded to squares and see
    the vision tower whole; a video's frames are squeezed into squares.
    """

    def __init__(self, settings: dict[str, Any], tokenizer: Any, family: Family) -> None:
        need(settings, "image_grid_pinpoints")
        self.tower = tower_for(settings, family)
        self.most = most_crops(family.config)
        self.processor = pil_processor(settings, ("LlavaOnevisionImageProcessor",), self.tower)
        simple = {name: value for name, value in settings.items() if name not in _CROP_SETTINGS}
        self.frame_processor = pil_processor(simple, ("SiglipImageProcessor",), self.tower)
        self.image_mark = mark_of(tokenizer, settings, "image_token", "<image>")
        self.video_mark: str = mark_of(tokenizer, settings, "video_token", "<video>")
        self.visual_tokens = (self.image_mark, self.video_mark)

    def image(self, image: PILImage.Image) -> Prepared:
        """Prepare a request's only image. A newline token looks where the last patch of its row looks."""
        found = self.processor(images=image, return_tensors="pt")
        pinpoints = self.processor.image_grid_pinpoints
        layout = Layout.of((image.height, image.width), pinpoints, self.tower, self.most)
        tensors = {name: found[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
        return Prepared(tensors, self.image_mark * layout.tokens, layout.cells())

    def images(self, images: Sequence[PILImage.Image]) -> list[Prepared]:
        """Prepare all images of a request.

        The newline at the end of each looks where its last patch looks.
        """
        if len(images) == 1:
            return [self.image(images[0])]
        found = self.processor(images=[list(images)], return_tensors="pt")
        prepared = []
        for number, image in enumerate(images):
            tensors = {name: found[name][number : number + 1] for name in ("pixel_values", "image_sizes")}
            cells = self._square_cells(image.height, image.width)
            prepared.append(Prepared(tensors, self.image_mark * len(cells), cells))
        return prepared

    def video(self, frames: Sequence[PILImage.Image], seconds: Sequence[float]) -> Prepared:
        """Prepare a video; each frame is an equal share of the time, the newline looks at the last patch."""
        if not frames:
            raise PromptError("The video has no frames.")
        pixels = self.frame_processor(images=list(frames), return_tensors="pt")["pixel_values"]
        side = self.tower.side
        edges = self.tower.edges(0, side, pooled(self.tower)) / self.tower.size
        cells = film_cells(cells_between(edges, edges), len(frames))
        cells = torch.cat([cells, cells[-1:]])
        return Prepared({"pixel_values_videos": pixels[None]}, self.video_mark * len(cells), cells)

    def merge(self, parts: Sequence[Prepared]) -> dict[str, Tensor]:
        """Join the tensors of a request's images and videos.

        Raises
        ------
        PromptError
            Videos of different numbers of frames, which transformers cannot take either.
        """
        videos = [p.tensors["pixel_values_videos"] for p in parts if "pixel_values_videos" in p.tensors]
        if len({video.shape[1] for video in videos}) > 1:
            raise PromptError(
                "The videos of a request must have equally many frames, got "
                f"{', '.join(str(video.shape[1]) for video in videos)}. Sample as many frames of each."
            )
        tensors = super().merge(fill_crops(parts))
        if "pixel_values" in tensors and "batch_num_images" not in tensors:  # prepared together by `images`
            tensors["batch_num_images"] = torch.tensor([len(tensors["pixel_values"])])
        return tensors

    def _square_cells(self, *image: int) -> Tensor:
        """Return the cells of an image of height, width that was padded to a square."""
        side, canvas = self.tower.side, max(image)
        edges = self.tower.edges(0, side, side) * canvas / self.tower.size
        cells = cells_between(*(shares(edges, (canvas - own) // 2, own) for own in image))
        return torch.cat([cells, cells[-1:]])


class LlavaOnevision(Llava):
    """`LlavaOnevisionForConditionalGeneration`: newlines, crops that are shrunk when many, videos."""

    model_types = ("llava_onevision",)
    architecture = "LlavaOnevisionForConditionalGeneration"
    video = True
    preprocessor = LlavaOnevisionPreprocessor

    @classmethod
    def check_config(cls, config: Any) -> None:
        super().check_config(config)
        check_anyres(config)
        most_crops(config)

    @property
    def visual_ids(self) -> tuple[int, ...]:
        """Token ids of images and of videos."""
        return int(self.config.image_token_id), int(self.config.video_token_id)

    def visuals(self, inputs: Mapping[str, Any]) -> list[Visual]:
        given = [name for name in ("pixel_values", "pixel_values_videos") if inputs.get(name) is not None]
        if not given:
            raise PromptError("The request holds neither pixel_values nor pixel_values_videos.")
        images = self._images(inputs) if "pixel_values" in given else []
        videos = self._videos(inputs) if "pixel_values_videos" in given else []
        return self._in_order(inputs["input_ids"].flatten(), images, videos)

    def encode(self, visual: Visual) -> Features:
        tensors = visual.tensors
        if "pixel_values" in tensors:
            # Only the images of a sample that has several are taken whole.
            several = [2] if tensors["pixel_values"].shape[1] == 1 else [1]
            ratio = self.config.vision_aspect_ratio
            return Features(
                image_features(self.model, tensors, batch_num_images=several, vision_aspect_ratio=ratio)
            )
        found = self.model.model.get_video_features(
            tensors["pixel_values_videos"],
            vision_feature_layer=self.config.vision_feature_layer,
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
            return_dict=True,
        ).pooler_output[0]
        if len(found) < visual.tokens:  # older transformers append the newline in forward
            found = torch.cat([found, self.model.model.image_newline[None].to(found)])
        return Features(found)

    def example(self) -> dict[str, Tensor]:
        return anyres_example(self.visual_ids, self.layout(smallest_canvas(self.config)))

    def layout(self, image: tuple[int, int]) -> Layout:
        """Return how a request's only image, of (height, width), becomes visual tokens."""
        return Layout.of(image, self.config.image_grid_pinpoints, self.tower, most_crops(self.config))

    def _images(self, inputs: Mapping[str, Any]) -> list[Visual]:
        pixels = pixels_of(inputs, "pixel_values", 5, self.tower.size)
        sizes = sizes_of(inputs, len(pixels))
        found = []
        for image, size, cut in zip(pixels.split(1), sizes, _is_cut(inputs, len(pixels)), strict=True):
            if cut:
                found.append(cut_visual(image, self.layout(size)))
            else:
                tensors = {"pixel_values": image[:, :1], "image_sizes": torch.tensor([size])}
                found.append(Visual(tensors, self.tower.tokens + 1))
        return found

    def _videos(self, inputs: Mapping[str, Any]) -> list[Visual]:
        pixels = pixels_of(inputs, "pixel_values_videos", 5, self.tower.size)
        tokens = pixels.shape[1] * pooled(self.tower) ** 2 + 1
        return [Visual({"pixel_values_videos": video}, tokens) for video in pixels.split(1)]

    def _in_order(self, ids: Tensor, images: list[Visual], videos: list[Visual]) -> list[Visual]:
        """Return images and videos in the order in which their tokens stand in the prompt ``ids`` (S,)."""
        image_id, video_id = self.visual_ids
        visual = ids[(ids == image_id) | (ids == video_id)]
        waiting = {image_id: images[::-1], video_id: videos[::-1]}
        found: list[Visual] = []
        at = 0
        while any(waiting.values()):
            kind = int(visual[at]) if at < len(visual) else -1
            if not waiting.get(kind):
                break
            found.append(waiting[kind].pop())
            span = visual[at : at + found[-1].tokens]
            if len(span) < found[-1].tokens or bool((span != kind).any()):
                break
            at += len(span)
        if at < len(visual) or any(waiting.values()):
            raise PromptError(
                f"The prompt's image tokens ({int((visual == image_id).sum())}) and video tokens "
                f"({int((visual == video_id).sum())}) do not stand for images of "
                f"{[each.tokens for each in images]} and videos of {[each.tokens for each in videos]} "
                "tokens, each in one piece."
            )
        return found


def most_crops(config: Any) -> int:
    """Return N of ``vision_aspect_ratio`` anyres_max_N: a canvas of more crops is shrunk.

    Raises
    ------
    CheckpointError
        It is of another kind.
    """
    match = re.fullmatch(r"anyres_max_([1-9]\d*)", str(config.vision_aspect_ratio))
    if match is None:
        raise CheckpointError(
            f"vision_aspect_ratio must be anyres_max_N with a number N, got {config.vision_aspect_ratio!r}."
        )
    return int(match[1])


def pooled(tower: Tower) -> int:
    """Return the tokens along a side of a video's frame."""
    return math.ceil(tower.side / 2)


def _is_cut(inputs: Mapping[str, Any], images: int) -> list[bool]:
    """Return for each image whether it came as crops: those alone in their sample did."""
    counts = inputs.get("batch_num_images")
    if counts is None:
        return [True] * images
    whole = isinstance(counts, Tensor) and counts.dim() == 1 and not counts.is_floating_point()
    if not whole or int(counts.sum()) != images or bool((counts < 0).any()):
        told = f"{describe(counts)}{f': {counts.tolist()}' if isinstance(counts, Tensor) else ''}"
        raise PromptError(f"batch_num_images must be integers (samples,) that sum to {images}, got {told}.")
    return [int(count) == 1 for count in counts for _ in range(int(count))]
