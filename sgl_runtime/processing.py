"""Images and a prompt to `input_ids` and `pixel_values`, as transformers' InternVLProcessor makes them.

InternVLProcessor itself cannot be built without torchvision; the tokenizer and the PIL image processor can.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from sgl_runtime import hf
from sgl_runtime.errors import CheckpointError, PromptError
from sgl_runtime.images import Image, open_image

PLACEHOLDER = "<image>"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PIXEL_SETTINGS = (
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
_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
}


class Processor:
    """The tokenizer, chat template and image settings of one checkpoint.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer that knows ``<img>``, ``</img>`` and ``<IMG_CONTEXT>``.
    image_settings
        Keyword arguments of ``GotOcr2ImageProcessorPil``.
    tokens_per_tile
        Visual tokens of one tile.
    template
        Chat template (Jinja) that takes precedence over the tokenizer's own, as in InternVLProcessor; without
        any, the images come first, then the prompt.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_settings: dict[str, Any],
        tokens_per_tile: int,
        template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.tokens_per_tile = tokens_per_tile
        template = template or tokenizer.chat_template
        self.template = template.get("default") if isinstance(template, dict) else template
        self.image_processor = hf.image_processor(**image_settings)
        self.start, self.end, self.context = (
            getattr(tokenizer, name, None) or default for name, default in _TOKENS.items()
        )

    @classmethod
    def from_directory(cls, directory: Path, model: hf.ModelView) -> Processor:
        """Load the tokenizer and the image settings that lie beside a checkpoint.

        Raises
        ------
        CheckpointError
            No tokenizer, no image settings, or ones that do not belong to the model.
        """
        if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
            raise CheckpointError(
                f"{directory} holds no tokenizer: expected tokenizer.json and tokenizer_config.json."
            )
        try:
            tokenizer = hf.load_tokenizer(directory)
        except Exception as error:  # transformers raises many kinds; each means: no usable tokenizer
            raise CheckpointError(
                f"{directory}: the tokenizer could not be loaded ({hf.first_line(error)})."
            ) from error
        settings = _image_settings(directory)
        try:
            processor = cls(tokenizer, settings, model.tokens_per_tile, _chat_template(directory))
            processor.image_processor(images=PILImage.new("RGB", (8, 8)))
        except Exception as error:  # whatever wrong settings make the image processor raise
            raise CheckpointError(
                f"{directory}: the image settings do not work ({hf.first_line(error)})."
            ) from error
        known = tokenizer.convert_tokens_to_ids(processor.context)
        if known != model.image_token_id:
            raise CheckpointError(
                f"{directory}: the tokenizer gives {processor.context} the id {known}, the model expects "
                f"{model.image_token_id}. The tokenizer does not belong to the model."
            )
        size: Any = processor.image_processor.size
        if (size.height, size.width) != model.tile_size:
            raise CheckpointError(
                f"{directory}: the image settings make tiles of {size.height} x {size.width}, the model "
                f"takes {model.tile_size[0]} x {model.tile_size[1]}."
            )
        return processor

    def __call__(self, images: Image | Sequence[Image], prompt: str) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``pixel_values`` of one request.

        Parameters
        ----------
        images
            One image or a list: paths, encoded bytes or ``PIL.Image``.
        prompt
            The user's text. ``<image>`` marks where each image goes; without any mark the images come first.

        Returns
        -------
        dict
            ``input_ids`` (1, S) int64 and ``pixel_values`` (tiles, 3, height, width) fp32.

        Raises
        ------
        ImageError, PromptError
            A bad image, no image, an empty prompt, or marks that do not match the images.
        """
        sources: list[Any] = list(images) if isinstance(images, (list, tuple)) else [images]
        content = self._content(prompt, len(sources))
        tiles, counts = self._tiles(sources)
        first, *rest = self._render(content, len(sources)).split(self.context)
        spans = [f"{self.start}{self.context * self.tokens_per_tile * count}{self.end}" for count in counts]
        text = first + "".join(span + piece for span, piece in zip(spans, rest, strict=True))
        bos = self.tokenizer.bos_token
        with_special = not (bos is not None and text.startswith(bos))
        ids = self.tokenizer(text, add_special_tokens=with_special)["input_ids"]
        return {"input_ids": torch.tensor([ids], dtype=torch.int64), "pixel_values": tiles}

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return token ids as text, without special tokens and outer blanks."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True).strip()

    def tiling(self, image: Image) -> tuple[int, int, bool]:
        """Return (columns, rows, thumbnail): how an image is cut into tiles, left to right, top to bottom.

        The tokens of a tile are a square grid, row by row; a thumbnail of the whole image is the last tile.
        """
        settings: Any = self.image_processor
        if not settings.crop_to_patches or settings.max_patches <= 1:
            return 1, 1, False
        width, height = open_image(image).size
        tile = (settings.size.height, settings.size.width)
        columns, rows = hf.tiled_canvas((height, width), tile, settings.min_patches, settings.max_patches)
        return columns, rows, columns * rows > 1

    def _content(self, prompt: str, num_images: int) -> list[dict[str, str]]:
        """Return the user's message as a list of image and text parts."""
        if num_images == 0:
            raise PromptError("A request needs at least one image, got none.")
        if not isinstance(prompt, str) or not prompt.replace(PLACEHOLDER, "").strip():
            raise PromptError(f"The prompt must be a text that asks something, got {prompt!r}.")
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise PromptError(f"The prompt is not valid text: {prompt!r} holds bytes that are not UTF-8.")
        if self.context in prompt:
            raise PromptError(
                f"The prompt holds the reserved token {self.context}; write {PLACEHOLDER} instead."
            )
        marks = prompt.count(PLACEHOLDER)
        if marks == 0:
            return [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]
        if marks != num_images:
            raise PromptError(
                f"The prompt marks {marks} places with {PLACEHOLDER}, but there are {num_images} images."
            )
        first, *rest = prompt.split(PLACEHOLDER)
        parts = [{"type": "text", "text": first}]
        for text in rest:
            parts += [{"type": "image"}, {"type": "text", "text": text}]
        return [part for part in parts if part.get("text") != ""]

    def _render(self, content: list[dict[str, str]], num_images: int) -> str:
        """Return the prompt as text, with one context token for each image."""
        flat = "".join(part.get("text", f"{self.context}\n") for part in content)
        if self.template is None:
            return flat
        failure = f"does not put {self.context} once for each of {num_images} images"
        for message in (content, flat):  # some templates take parts, others only a string
            try:
                text = self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": message}],
                    chat_template=self.template,
                    add_generation_prompt=True,
                    tokenize=False,
                )
            except Exception as error:  # Jinja and the template itself raise what they like
                failure = f"fails: {hf.first_line(error)}"
                continue
            if text.count(self.context) == num_images:
                return text
        raise CheckpointError(f"The checkpoint's chat template {failure}.")

    def _tiles(self, sources: Sequence[Any]) -> tuple[Tensor, list[int]]:
        """Return all tiles (tiles, 3, height, width) and how many each image has."""
        tiles: list[np.ndarray] = []
        counts = []
        for source in sources:
            features = self.image_processor(images=open_image(source))
            tiles += features["pixel_values"]
            counts.append(int(features["num_patches"][0]))
        return torch.from_numpy(np.stack(tiles)).float(), counts


def _image_settings(directory: Path) -> dict[str, Any]:
    """Return the arguments of the image processor, from preprocessor_config.json or processor_config.json."""
    preprocessor, processor = directory / "preprocessor_config.json", directory / "processor_config.json"
    outer = hf.read_json(processor) if processor.is_file() else {}
    inner = hf.read_json(preprocessor) if preprocessor.is_file() else outer.get("image_processor")
    if not isinstance(inner, dict):
        raise CheckpointError(
            f"{directory} holds no preprocessor_config.json: tile size, mean and std are unknown."
        )
    missing = [name for name in ("size", "image_mean", "image_std") if inner.get(name) is None]
    if missing:
        raise CheckpointError(f"{directory}/preprocessor_config.json lacks {', '.join(missing)}.")
    settings = {name: inner[name] for name in _PIXEL_SETTINGS if inner.get(name) is not None}
    # InternVLProcessor cuts images into tiles whatever the image settings beside it say.
    declared = "InternVLProcessor" in (outer.get("processor_class"), inner.get("processor_class"))
    settings["crop_to_patches"] = declared or bool(inner.get("crop_to_patches", False))
    return settings


def _chat_template(directory: Path) -> str | None:
    """Return the template of older checkpoints, which keep it in chat_template.json."""
    path = directory / "chat_template.json"
    template = hf.read_json(path).get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else None
