"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3-VL-MoE: images of any size, M-RoPE; from Qwen3 on DeepStack too.

An image of (H, W) patches makes H W / merge² visual tokens. Text before and after it counts positions as
usual; inside, time, height and width have one each, so the text behind goes on at the longest side and not
at the number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image as PILImage
from torch import Tensor

from sgl_runtime.checkpoints import as_checkpoint_error, first_line
from sgl_runtime.errors import CheckpointError, ImageError, PromptError
from sgl_runtime.families.base import (
    Family,
    Features,
    Prepared,
    Preprocessor,
    Visual,
    describe,
    film_cells,
    grid_cells,
    need,
    tensor_of,
)

_SETTINGS = (
    "size",
    "min_pixels",
    "max_pixels",
    "do_resize",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "resample",
    "patch_size",
    "temporal_patch_size",
    "merge_size",
)
_IMAGE, _VIDEO = 1, 2  # transformers' token types


class QwenVLPreprocessor(Preprocessor):
    """Images to patches of a size near their own; frames of a video two by two."""

    image_mark = "<|image_pad|>"
    video_mark = "<|video_pad|>"
    visual_tokens: tuple[str, ...] = ("<|image_pad|>", "<|video_pad|>")

    def __init__(self, settings: dict[str, Any], tokenizer: Any, family: Family) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        need(settings, "patch_size", "merge_size", "temporal_patch_size")
        assert isinstance(family, QwenVL)
        chosen = {name: settings[name] for name in _SETTINGS if settings.get(name) is not None}
        with as_checkpoint_error("The image settings do not work"):
            self.processor: Any = Qwen2VLImageProcessorPil(**chosen)
            self.processor(images=PILImage.new("RGB", (64, 64)))
        vision = family.config.vision_config
        for name, ours in (
            ("patch_size", vision.patch_size),
            ("merge_size", vision.spatial_merge_size),
            ("temporal_patch_size", vision.temporal_patch_size),
        ):
            if settings[name] != ours:
                raise CheckpointError(
                    f"The image settings have a {name} of {settings[name]}, the model has {ours}."
                )
        self.side, self.patch = int(vision.spatial_merge_size), int(vision.patch_size)
        self.together = int(vision.temporal_patch_size)
        # Without settings of its own transformers' video processor reads those of images.
        self.video_limits = _limits(settings.get("video_processor") or settings, self.side * self.patch)

    def image(self, image: PILImage.Image) -> Prepared:
        patches, (_, rows, columns) = self._patches(image)
        tokens = rows * columns // self.side**2
        return Prepared(
            {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, rows, columns]])},
            self.image_mark * tokens,
            grid_cells(rows // self.side, columns // self.side),
        )

    def video(self, frames: Sequence[PILImage.Image], seconds: Sequence[float]) -> Prepared:
        """Prepare a video; an odd last frame is shown twice."""
        between = (seconds[-1] - seconds[0]) / max(1, len(seconds) - 1) or 1.0
        more = -len(frames) % self.together
        frames, seconds = [*frames, *[frames[-1]] * more], [*seconds, *[seconds[-1]] * more]
        pixels, grid = self._film(frames)
        still = grid_cells(grid[1] // self.side, grid[2] // self.side)
        tensors = {
            "pixel_values_videos": pixels,
            "video_grid_thw": torch.tensor([grid]),
            "second_per_grid_ts": torch.tensor([self.together * between]),
        }
        starts, ends = seconds[:: self.together], seconds[self.together - 1 :: self.together]
        middles = [(a + b) / 2 for a, b in zip(starts, ends, strict=True)]
        return Prepared(tensors, self._video_text(len(still), middles), film_cells(still, grid[0]))

    def _video_text(self, tokens: int, seconds: Sequence[float]) -> str:
        """Return what a video of ``tokens`` visual tokens a step says in the prompt."""
        return self.visual_tokens[1] * (tokens * len(seconds))

    def _video_size(self, count: int, width: int, height: int) -> tuple[int, int]:
        """Return (height, width) of ``count`` frames; the limits hold for each."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        return smart_resize(height, width, factor=self.patch * self.side, **self.video_limits)

    def _film(self, frames: Sequence[PILImage.Image]) -> tuple[Tensor, list[int]]:
        """Return the patches of all frames, and how many there are in time, height and width."""
        try:
            height, width = self._video_size(len(frames), *frames[0].size)
        except ValueError as error:
            raise ImageError(f"The video cannot be used: {first_line(error)}.") from error
        resample = PILImage.Resampling(self.processor.resample)
        stills = [self._patches(frame.resize((width, height), resample), do_resize=False) for frame in frames]
        grid = stills[0][1]
        # A still has its one picture in every step of a patch; a film has one frame in each.
        apart = torch.stack([patches.unflatten(1, (3, self.together, -1))[:, :, 0] for patches, _ in stills])
        film = apart.unflatten(0, (-1, self.together))  # (steps, together, patches, 3, p²)
        film = film.permute(0, 2, 3, 1, 4)  # (steps, patches, 3, together, p²)
        return film.reshape(-1, stills[0][0].shape[1]), [film.shape[0], *grid[1:]]

    def _patches(self, image: PILImage.Image, **changes: Any) -> tuple[Tensor, list[int]]:
        try:
            found = self.processor(images=image, **changes)
        except ValueError as error:  # the aspect ratio is beyond what the model takes
            raise ImageError(
                f"An image of {image.width} x {image.height} pixels cannot be used: {first_line(error)}."
            ) from error
        return torch.as_tensor(found["pixel_values"]).float(), [int(x) for x in found["image_grid_thw"][0]]


class Qwen3VLPreprocessor(QwenVLPreprocessor):
    """Videos step by step, each step behind its time; the limits hold for all frames together."""

    video_mark = "<|vision_start|><|video_pad|><|vision_end|>"

    def _video_text(self, tokens: int, seconds: Sequence[float]) -> str:
        step = f"<|vision_start|>{self.visual_tokens[1] * tokens}<|vision_end|>"
        return "".join(f"<{second:.1f} seconds>{step}" for second in seconds)

    def _video_size(self, count: int, width: int, height: int) -> tuple[int, int]:
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

        factor = self.patch * self.side
        return smart_resize(count, height, width, self.together, factor, **self.video_limits)


def _limits(settings: Mapping[str, Any], factor: int) -> dict[str, int]:
    """Return the fewest and most pixels of a frame, or with Qwen3 of a video, that settings allow."""
    size = settings.get("size") or {}
    least = settings.get("min_pixels") or size.get("shortest_edge") or 128 * factor**2
    most = settings.get("max_pixels") or size.get("longest_edge") or 768 * factor**2
    return {"min_pixels": int(least), "max_pixels": int(most)}


class QwenVL(Family):
    """`Qwen2VLForConditionalGeneration`."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    architecture = "Qwen2VLForConditionalGeneration"
    text_models: ClassVar[tuple[str, ...]] = ("qwen2_vl_text",)
    video = True
    preprocessor = QwenVLPreprocessor
    parts: ClassVar[tuple[str, ...]] = (
        "vision_config",
    )  # older checkpoints keep the text model's settings at the top

    @property
    def visual_ids(self) -> tuple[int, ...]:
        return int(self.config.image_token_id), int(self.config.video_token_id)

    def visuals(self, inputs: Mapping[str, Any]) -> list[Visual]:
        images = self._split(inputs, "pixel_values", "image_grid_thw")
        videos = self._split(inputs, "pixel_values_videos", "video_grid_thw")
        if not images and not videos:
            raise PromptError(
                "pixel_values and image_grid_thw, or pixel_values_videos and video_grid_thw, are missing: a "
                "request needs at least one image or video."
            )
        times = inputs.get("second_per_grid_ts")
        if times is not None and torch.as_tensor(times).numel() != len(videos):
            raise PromptError(
                f"second_per_grid_ts must hold one number for each of {len(videos)} videos, got {times!r}."
            )
        if videos and times is not None:
            for video, time in zip(videos, torch.as_tensor(times).reshape(-1, 1).double().cpu(), strict=True):
                video.tensors["second_per_grid_ts"] = time
        left = {_IMAGE: images, _VIDEO: videos}
        kinds = self._kinds(inputs["input_ids"][0])
        order, at = [], 0
        for kind, what in ((_IMAGE, "image"), (_VIDEO, "video")):
            there, needed = int((kinds == kind).sum()), sum(visual.tokens for visual in left[kind])
            if there != needed:
                raise PromptError(
                    f"the prompt has {there} visual tokens of {what}s, but its {what}s need {needed}."
                )
        visible = kinds[kinds > 0].tolist()
        while at < len(visible):
            order.append(left[visible[at]].pop(0))
            at += order[-1].tokens
        return order

    def encode(self, visual: Visual) -> Features:
        tensors = visual.tensors
        if "pixel_values" in tensors:
            output = self.model.get_image_features(
                pixel_values=tensors["pixel_values"],
                image_grid_thw=tensors["image_grid_thw"],
                return_dict=True,
            )
        else:
            output = self.model.get_video_features(
                pixel_values_videos=tensors["pixel_values_videos"],
                video_grid_thw=tensors["video_grid_thw"],
                return_dict=True,
            )
        planes = getattr(output, "deepstack_features", None) or ()
        # Newer transformers split them by image, of which there is one.
        alone = tuple(plane if isinstance(plane, Tensor) else plane[0] for plane in planes)
        return Features(output.pooler_output[0], alone)

    def positions(self, input_ids: Tensor, visuals: Sequence[Visual]) -> Tensor | None:
        def joined(name: str) -> Tensor | None:
            found = [visual.tensors[name] for visual in visuals if name in visual.tensors]
            return torch.cat(found) if found else None

        times = joined("second_per_grid_ts")
        positions, _ = self.model.model.get_rope_index(
            input_ids[None],
            mm_token_type_ids=self._kinds(input_ids)[None],
            image_grid_thw=joined("image_grid_thw"),
            video_grid_thw=joined("video_grid_thw"),
            **({} if times is None else {"second_per_grid_ts": times.float()}),
        )
        return positions[:, 0]

    def rope(self, rotary: Any, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if positions.dim() == 1:
            positions = positions.expand(3, -1)
        cos, sin = rotary(like, positions[:, None])
        return cos[0], sin[0]

    def example(self) -> dict[str, Tensor]:
        vision = self.config.vision_config
        side, image = int(vision.spatial_merge_size), self.visual_ids[0]
        channels = int(getattr(vision, "in_channels", 3))
        width = channels * int(vision.temporal_patch_size) * int(vision.patch_size) ** 2
        return {
            "input_ids": torch.tensor([[image, 0 if image else 1]]),
            "pixel_values": torch.zeros(side * side, width),
            "image_grid_thw": torch.tensor([[1, side, side]]),
        }

    def _kinds(self, input_ids: Tensor) -> Tensor:
        """Return transformers' token types (S,) of a prompt: 0 text, 1 image, 2 video."""
        image, video = self.visual_ids
        return (input_ids == image).int() * _IMAGE + (input_ids == video).int() * _VIDEO

    def _split(self, inputs: Mapping[str, Any], pixels: str, grids: str) -> list[Visual]:
        if inputs.get(pixels) is None and inputs.get(grids) is None:
            return []
        patches, grid = tensor_of(inputs, pixels, 2), tensor_of(inputs, grids, 2).cpu()
        merge, width = (
            int(self.config.vision_config.spatial_merge_size),
            self.example()["pixel_values"].shape[1],
        )
        if patches.shape[1] != width:
            raise PromptError(f"{pixels} must have {width} numbers a patch, got {describe(patches)}.")
        if grid.is_floating_point():
            raise PromptError(f"{grids} must hold integers, got {describe(grid)}.")
        if grid.shape[1] != 3 or bool((grid[:, 1:] % merge).any()) or bool((grid < 1).any()):
            raise PromptError(
                f"{grids} must hold (time, height, width) in patches, height and width multiples of {merge}, "
                f"got {grid.tolist()}."
            )
        counts = grid.prod(1).tolist()
        if sum(counts) != patches.shape[0]:
            raise PromptError(f"{grids} {grid.tolist()} needs {sum(counts)} patches, got {patches.shape[0]}.")
        return [
            Visual({pixels: some, grids: own[None]}, count // merge**2)
            for some, own, count in zip(patches.split(counts), grid, counts, strict=True)
        ]


class Qwen25VL(QwenVL):
    """`Qwen2_5_VLForConditionalGeneration`."""

    model_types = ("qwen2_5_vl",)
    architecture = "Qwen2_5_VLForConditionalGeneration"
    text_models = ("qwen2_5_vl_text",)


class Qwen3VL(QwenVL):
    """`Qwen3VLForConditionalGeneration`: DeepStack planes behind the first layers."""

    model_types = ("qwen3_vl",)
    architecture = "Qwen3VLForConditionalGeneration"
    text_models = ("qwen3_vl_text",)
    preprocessor = Qwen3VLPreprocessor
    parts = ("text_config", "vision_config")


class Qwen3VLMoe(Qwen3VL):
    """`Qwen3VLMoeForConditionalGeneration`: a mixture of experts as the text model."""

    model_types = ("qwen3_vl_moe",)
    architecture = "Qwen3VLMoeForConditionalGeneration"
    text_models = ("qwen3_vl_moe_text",)
