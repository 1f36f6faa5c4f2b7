"""Images, videos and a conversation to what a VLM takes, as transformers' processors make it.

Those processors cannot all be built without torchvision; tokenizers and PIL image processors can. What
differs between families is in their `Preprocessor`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image as PILImage
from torch import Tensor

from sgl_runtime import convert, hf
from sgl_runtime.checkpoints import as_checkpoint_error, first_line, read_json
from sgl_runtime.errors import CheckpointError, PromptError
from sgl_runtime.families import Family, Prepared, Preprocessor
from sgl_runtime.images import Image, open_image
from sgl_runtime.videos import Film, Video, open_video

MARKS = {"<image>": "image", "<video>": "video"}
_MARK = re.compile("|".join(MARKS))
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_ROLES = ("system", "user", "assistant")

Visuals: TypeAlias = Image | Video | Sequence[Image | Video | Film]
Message: TypeAlias = Mapping[str, Any]
Part = dict[str, str]


class Processor:
    """The tokenizer, chat template and image settings of one checkpoint.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer that knows the preprocessor's visual tokens.
    preprocessor
        That of the model's family.
    template
        Chat template (Jinja) that takes precedence over the tokenizer's own; without any, the parts of the
        conversation follow each other as they are.
    """

    def __init__(self, tokenizer: Any, preprocessor: Preprocessor, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.preprocessor = preprocessor
        template = template or tokenizer.chat_template
        self.template = template.get("default") if isinstance(template, dict) else template
        marks = {"image": preprocessor.image_mark, "video": preprocessor.video_mark}
        self._marks = {kind: mark for kind, mark in marks.items() if mark is not None}
        self._find = re.compile("|".join(re.escape(mark) for mark in self._marks.values()))

    @classmethod
    def from_directory(cls, directory: Path, family: Family) -> Processor:
        """Load the tokenizer and the image settings that lie beside a checkpoint.

        Raises
        ------
        CheckpointError
            No tokenizer, no image settings, or ones that do not belong to the model.
        """
        if convert.is_chat_format(directory):
            return cls._from_chat_format(directory, family)
        if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
            raise CheckpointError(
                f"{directory} holds no tokenizer: expected tokenizer.json and tokenizer_config.json."
            )
        try:
            tokenizer = hf.load_tokenizer(directory)
        except Exception as error:  # transformers raises many kinds; each means: no usable tokenizer
            raise CheckpointError(
                f"{directory}: the tokenizer could not be loaded ({first_line(error)})."
            ) from error
        return cls.of(directory, tokenizer, _image_settings(directory), _chat_template(directory), family)

    @classmethod
    def _from_chat_format(cls, directory: Path, family: Family) -> Processor:
        tokenizer = convert.native_tokenizer(directory)
        if tokenizer is None:
            raise CheckpointError(f"{directory} holds no tokenizer: expected the files beside the original.")
        return cls.of(directory, tokenizer, *convert.native_settings(directory), family)

    @classmethod
    def of(
        cls, source: Path, tokenizer: Any, settings: dict[str, Any], template: str | None, family: Family
    ) -> Processor:
        """Put a processor together for a model; ``source`` names it in messages."""
        try:
            with as_checkpoint_error("The image settings do not work"):
                processor = cls(tokenizer, family.preprocessor(settings, tokenizer, family), template)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from error
        for name, expected in zip(processor.preprocessor.visual_tokens, family.visual_ids, strict=True):
            known = tokenizer.convert_tokens_to_ids(name)
            if known != expected:
                raise CheckpointError(
                    f"{source}: the tokenizer gives {name} the id {known}, the model expects {expected}. The "
                    "tokenizer does not belong to the model."
                )
        return processor

    def __call__(self, visuals: Visuals, prompt: str | Sequence[Message]) -> dict[str, Tensor]:
        """Return the inputs of one request.

        Parameters
        ----------
        visuals
            One image or video, or a list: paths, encoded bytes, ``PIL.Image``, `Video`.
        prompt
            The user's text, or a conversation: messages with "role" (system, user, assistant) and "content".
            ``<image>`` and ``<video>`` mark where each goes; without any mark they come first in the first
            message of the user.

        Returns
        -------
        dict
            ``input_ids`` (1, S) int64, the tensors of the family's vision tower, and what each of the N
            visual tokens covers: ``visual_image`` (N,) int64 and ``visual_cells`` (N, 3, 2) fp32, see
            `sgl_runtime.mapping.Cells`.

        Raises
        ------
        ImageError, PromptError
            A bad image or video, none at all, an empty prompt, or marks that do not match.
        """
        opened = open_visuals(visuals)
        kinds = ["video" if isinstance(one, Film) else "image" for one in opened]
        text = self._render(self._conversation(prompt, kinds), kinds)
        parts = self._prepared(opened)
        first, *rest = self._find.split(text)
        text = first + "".join(part.text + piece for part, piece in zip(parts, rest, strict=True))
        bos = self.tokenizer.bos_token
        with_special = not (bos is not None and text.startswith(bos))
        ids = self.tokenizer(text, add_special_tokens=with_special)["input_ids"]
        owners = [torch.full((len(part.cells),), i) for i, part in enumerate(parts)]
        return {
            "input_ids": torch.tensor([ids], dtype=torch.int64),
            **self.preprocessor.merge(parts),
            "visual_image": torch.cat(owners),
            "visual_cells": torch.cat([part.cells for part in parts]),
        }

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return token ids as text, without special tokens and outer blanks."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True).strip()

    def _prepared(self, opened: Sequence[PILImage.Image | Film]) -> list[Prepared]:
        stills = [one for one in opened if not isinstance(one, Film)]
        images = iter(self.preprocessor.images(stills) if stills else [])
        return [
            self.preprocessor.video(one.frames, one.seconds) if isinstance(one, Film) else next(images)
            for one in opened
        ]

    def _conversation(self, prompt: str | Sequence[Message], kinds: list[str]) -> list[dict[str, Any]]:
        """Return the messages, each with its content as a list of parts, images and videos in place."""
        if not kinds:
            raise PromptError("A request needs at least one image, got none.")
        for kind in kinds:
            if kind not in self._marks:
                raise PromptError(f"The model takes no {kind}s; give single frames as images.")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        turns = [_turn(message) for message in _checked(messages)]
        marked = [part["type"] for turn in turns for part in turn["content"] if part["type"] != "text"]
        if marked and marked != kinds:
            raise PromptError(
                f"The prompt marks places for {_listed(marked)}, but there came {_listed(kinds)}."
            )
        asks = next((turn for turn in turns if turn["role"] == "user"), None)
        if turns[-1]["role"] != "user":
            raise PromptError(
                f"A conversation must end in the user's turn, which asks something; the last one's role is "
                f"{turns[-1]['role']}."
            )
        if asks is None or not _text(turns[-1]).strip():
            raise PromptError(f"The prompt must be a text that asks something, got {_text(turns[-1])!r}.")
        for turn in turns:
            self._check_text(_text(turn))
        if not marked:
            asks["content"] = [{"type": kind} for kind in kinds] + asks["content"]
        return turns

    def _check_text(self, text: str) -> None:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise PromptError(f"The prompt is not valid text: {text!r} holds bytes that are not UTF-8.")
        for token in (*self.preprocessor.visual_tokens, *self._marks.values()):
            if token in text:
                raise PromptError(f"The prompt holds the reserved token {token}; write <image> instead.")

    def _render(self, turns: list[dict[str, Any]], kinds: list[str]) -> str:
        """Return the conversation as text, with the preprocessor's mark for each image and video."""
        wanted = [self._marks[kind] for kind in kinds]
        flat = [{**turn, "content": self._flat(turn["content"])} for turn in turns]
        template = (self.preprocessor.video_template if "video" in kinds else None) or self.template
        if template is None:
            return "".join(turn["content"] for turn in flat)
        failure = (
            f"cannot place {_listed(kinds)} in this order: it leaves some out, or has an order of its own"
        )
        for messages in (turns, flat):  # some templates take parts, others only a string
            try:
                text = self.tokenizer.apply_chat_template(
                    messages, chat_template=template, add_generation_prompt=True, tokenize=False
                )
            except Exception as error:  # Jinja and the template itself raise what they like
                failure = f"fails: {first_line(error)}"
                continue
            if self._find.findall(text) == wanted:
                return text
        raise CheckpointError(f"The checkpoint's chat template {failure}.")

    def _flat(self, parts: list[Part]) -> str:
        return "".join(
            part["text"] if part["type"] == "text" else f"{self._marks[part['type']]}\n" for part in parts
        )


def open_visuals(visuals: Any) -> list[PILImage.Image | Film]:
    """Open one image or video, or a list of them, for `Processor`; what is open stays as it is."""
    sources = visuals if isinstance(visuals, (list, tuple)) else [visuals]
    return [
        one if isinstance(one, Film) else open_video(one) if isinstance(one, Video) else open_image(one)
        for one in sources
    ]


def _checked(messages: Any) -> list[Message]:
    """Return the messages of a conversation; PromptError when it is anything else."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise PromptError(
            f"The prompt must be a text that asks something, or a list of messages, got {messages!r}."
        )
    for message in messages:
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in _ROLES or "content" not in message:
            raise PromptError(
                f"A message must have a role ({', '.join(_ROLES)}) and a content, got {message!r}."
            )
    return list(messages)


def _turn(message: Message) -> dict[str, Any]:
    """Return a message whose content is a list of parts, its marks split off."""
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise PromptError(f"A message's content must be a text or a list of parts, got {content!r}.")
    parts: list[Part] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts += _split(part["text"])
        elif kind in ("image", "video"):
            parts.append({"type": kind})
        else:
            raise PromptError(
                'A part of a message must be {"type": "text", "text": ...}, {"type": "image"} or '
                f'{{"type": "video"}}, got {part!r}.'
            )
    return {"role": message["role"], "content": parts}


def _split(text: str) -> list[Part]:
    """Return a text as parts, with images and videos where it marks them."""
    parts: list[Part] = []
    at = 0
    for mark in _MARK.finditer(text):
        parts += [{"type": "text", "text": text[at : mark.start()]}, {"type": MARKS[mark.group()]}]
        at = mark.end()
    parts.append({"type": "text", "text": text[at:]})
    return [part for part in parts if part.get("text") != ""]


def _text(turn: dict[str, Any]) -> str:
    return "".join(part.get("text", "") for part in turn["content"])


def _listed(kinds: list[str]) -> str:
    return " ".join(f"<{kind}>" for kind in kinds) if len(kinds) < 9 else f"{len(kinds)} images"


def _image_settings(directory: Path) -> dict[str, Any]:
    """Return a checkpoint's image settings, what its processor's add, and videos' as "video_processor"."""
    preprocessor, processor = directory / "preprocessor_config.json", directory / "processor_config.json"
    outer = read_json(processor) if processor.is_file() else {}
    inner = read_json(preprocessor) if preprocessor.is_file() else outer.get("image_processor")
    if not isinstance(inner, dict):
        raise CheckpointError(
            f"{directory} holds no preprocessor_config.json: size, mean and std of its images are unknown."
        )
    settings = {**outer, **inner}
    film = directory / "video_preprocessor_config.json"
    if film.is_file():
        settings["video_processor"] = read_json(film)
    settings["processor_class"] = outer.get("processor_class") or inner.get("processor_class")
    return settings


def _chat_template(directory: Path) -> str | None:
    """Return the template of older checkpoints, which keep it in chat_template.json."""
    path = directory / "chat_template.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else None
