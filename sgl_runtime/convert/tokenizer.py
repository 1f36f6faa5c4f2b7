"""Tokenizers of chat-format checkpoints, without their Python files.

InternLM2's, and the slow Llama tokenizers of Yi and Phi-3, are sentencepiece models whose rules are written
down here once more, for the tokenizers library. Every other one transformers reads by itself.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgl_runtime.checkpoints import first_line, read_json
from sgl_runtime.errors import CheckpointError

START, END, CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
# By these names transformers' InternVLProcessor asks for them. The last marks a video in a text; the others
# take its place before the model sees it, and no checkpoint of the chat format has it.
_IMAGE_TOKENS = {
    "start_image_token": START,
    "end_image_token": END,
    "context_image_token": CONTEXT,
    "video_token": "<video>",
}
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SPACE = "▁"
_NORMAL, _UNKNOWN, _USER_DEFINED, _BYTE = 1, 2, 4, 6  # kinds of pieces
_BPE = 2
_ALL = 1 << 20


@dataclass(frozen=True)
class SentencePieceModel:
    """What a sentencepiece model file says.

    Attributes
    ----------
    pieces : (text, score, kind) by id
    add_dummy_prefix : whether a space is put before the text
    remove_extra_whitespaces : whether outer blanks go and inner ones become one
    """

    pieces: list[tuple[str, float, int]]
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory holds a tokenizer."""
    return any((directory / name).is_file() for name in _FILES)


def load_tokenizer(directory: Path, stop: str) -> Any:
    """Return the tokenizer of a chat-format checkpoint, with its image tokens named.

    Parameters
    ----------
    stop
        The token that ends a turn.

    Raises
    ------
    CheckpointError
        It cannot be read without remote code, or lacks the image tokens or ``stop``.
    """
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    kind = str(config.get("tokenizer_class", ""))
    sentencepiece = directory / "tokenizer.model"
    slow = kind.startswith("InternLM2") or not (directory / "tokenizer.json").is_file()
    if sentencepiece.is_file() and slow:
        return _from_sentencepiece(sentencepiece, config, kind, stop)
    return _by_transformers(directory, stop)


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a sentencepiece model file of the BPE kind with byte fallback.

    Raises
    ------
    CheckpointError
        The file is damaged, or asks for what is not written down here: another algorithm, no byte fallback,
        character normalisation, blanks that are not escaped or stand behind the words.
    """
    try:
        return _parse_sentencepiece(path.read_bytes())
    except _NotSupportedError as error:
        raise CheckpointError(f"{path}: a sentencepiece model with {error} is not supported.") from error
    except (IndexError, KeyError, TypeError, UnicodeDecodeError, struct.error, OSError) as error:
        raise CheckpointError(f"{path} is not a sentencepiece model ({first_line(error)}).") from error


def backend(model: SentencePieceModel, added: dict[int, Any], *, prefix_first_only: bool) -> Any:
    """Return a ``tokenizers.Tokenizer`` that encodes and decodes as sentencepiece does.

    One thing differs: where the model prefixes or trims blanks, it does so on both sides of a user-defined
    piece in the text too.

    Parameters
    ----------
    added
        ``AddedToken`` by id: found before anything else, and in place of the piece of that id.
    prefix_first_only
        A space is put before the whole, not before each stretch of text between added tokens; whatever the
        model says.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = [(added[i].content if i in added else text) for i, (text, _, _) in enumerate(model.pieces)]
    core = Tokenizer(
        models.BPE(
            {text: i for i, text in enumerate(pieces)},
            _merges(model, set(added)),
            unk_token=pieces[next(i for i, piece in enumerate(model.pieces) if piece[2] == _UNKNOWN)],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    trim, prefix = model.remove_extra_whitespaces, model.add_dummy_prefix and not prefix_first_only
    steps: list[Any] = []
    if trim:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" +"), " ")]
    if prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    if trim:
        steps.append(normalizers.Replace(Regex(rf"{_SPACE}+\z"), ""))
    core.normalizer = normalizers.Sequence(steps)
    if prefix_first_only:
        core.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    unwanted = _ALL if trim else int(prefix or prefix_first_only)
    strip = [decoders.Strip(" ", left=unwanted)] if unwanted else []
    core.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for i, (text, _, kind) in enumerate(model.pieces):
        if kind == _USER_DEFINED and i not in added and " " not in text:  # it looks for escaped blanks only
            core.add_tokens([AddedToken(text, normalized=not (trim or prefix))])
    for i, token in sorted(added.items()):
        core.add_special_tokens([token]) if token.special else core.add_tokens([token])
        if core.token_to_id(token.content) != i:
            got = core.token_to_id(token.content)
            raise CheckpointError(f"The tokenizer gives {token.content} the id {got} instead of {i}.")
    return core


def _from_sentencepiece(path: Path, config: dict[str, Any], kind: str, stop: str) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    added = _added_tokens(path.parent, config)
    # Unless told otherwise, slow Llama tokenizers leave prefixes to sentencepiece, for every stretch of text.
    first_only = kind.startswith("Llama") and config.get("legacy", True) is False
    core = backend(read_sentencepiece(path), added, prefix_first_only=first_only)
    _check_known(path.parent, core.get_vocab(), stop)
    names = {f"{name}_token": _text(config.get(f"{name}_token")) for name in ("bos", "eos", "unk", "pad")}
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    special = {name: text or defaults.get(name) for name, text in names.items()}
    begin = [special["bos_token"]] if config.get("add_bos_token", True) else []
    final = [special["eos_token"]] if config.get("add_eos_token", False) else []
    core.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", *final],
        pair=[*begin, "$A", *final, *(f"{token}:1" for token in begin), "$B:1", *(f"{t}:1" for t in final)],
        special_tokens=[(token, core.token_to_id(token)) for token in dict.fromkeys([*begin, *final])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=False,
        model_max_length=config.get("model_max_length"),
        extra_special_tokens=_IMAGE_TOKENS,
        **{name: token for name, token in special.items() if token is not None},
    )


def _by_transformers(directory: Path, stop: str) -> Any:
    from transformers import AutoTokenizer, PreTrainedConfig

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    options["config"] = (
        PreTrainedConfig()
    )  # or it reads config.json, and warns that it does not know its kind
    try:
        plain = AutoTokenizer.from_pretrained(directory, **options)
        named = AutoTokenizer.from_pretrained(directory, **options, **_IMAGE_TOKENS)
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise CheckpointError(
            f"{directory}: the tokenizer could not be read without remote code: {first_line(error)}"
        ) from error
    _check_known(directory, plain.get_vocab(), stop)  # giving a token a name would add it
    return named


def _check_known(directory: Path, vocab: dict[str, int], stop: str) -> None:
    missing = [token for token in (START, END, CONTEXT, stop) if token not in vocab]
    if missing:
        raise CheckpointError(f"{directory}: the tokenizer does not know {', '.join(missing)}.")


def _added_tokens(directory: Path, config: dict[str, Any]) -> dict[int, Any]:
    """Return the ``AddedToken`` of each id that the configuration or added_tokens.json adds or renames."""
    from tokenizers import AddedToken

    found = config.get("added_tokens_decoder")
    if found is not None:
        return {int(i): AddedToken(**token) for i, token in found.items()}
    special = {_text(token) for token in config.get("additional_special_tokens") or []}
    path = directory / "added_tokens.json"
    extra = read_json(path) if path.is_file() else {}
    tokens = {
        **{i: token for i, token in enumerate(("<unk>", "<s>", "</s>"))},
        **{i: t for t, i in extra.items()},
    }
    return {
        i: AddedToken(token, normalized=False, special=i < 3 or token in special)
        for i, token in tokens.items()
    }


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _merges(model: SentencePieceModel, renamed: set[int]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that make a piece: the best piece first, as sentencepiece merges them."""
    scores = {
        text: score
        for i, (text, score, kind) in enumerate(model.pieces)
        if kind == _NORMAL and i not in renamed
    }
    found = []
    for text, score in scores.items():
        for cut in range(1, len(text)):
            if text[:cut] in scores and text[cut:] in scores:
                found.append((-score, cut, text))
    return [(text[:cut], text[cut:]) for _, cut, text in sorted(found)]


class _NotSupportedError(Exception):
    """Names a property of a sentencepiece model."""


def _parse_sentencepiece(data: bytes) -> SentencePieceModel:
    pieces, trainer, normalizer = [], dict[int, Any](), dict[int, Any]()
    for number, value in _fields(data):  # ModelProto of sentencepiece_model.proto
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
            pieces.append((piece[1].decode(), score, piece.get(3, _NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    for bad, what in (
        (trainer.get(3, 1) != _BPE, "another algorithm than BPE"),
        (sum(kind == _BYTE for _, _, kind in pieces) != 256, "no byte fallback"),
        (trainer.get(24, 0), "blanks behind the words"),
        (
            any(kind == _USER_DEFINED and _SPACE in text for text, _, kind in pieces)
            and (normalizer.get(3, 1) or normalizer.get(4, 1)),
            "blanks in user-defined pieces, and a prefix or trimmed blanks",
        ),
        (all(kind != _UNKNOWN for _, _, kind in pieces), "no unknown piece"),
        (normalizer.get(2), "character normalisation"),
        (not normalizer.get(5, 1), "blanks that are not escaped"),
    ):
        if bad:
            raise _NotSupportedError(what)
    return SentencePieceModel(pieces, bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of a protocol buffer's fields: integers as such, all else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}[wire]
        if at + size > len(data):
            raise IndexError("it is cut short")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
