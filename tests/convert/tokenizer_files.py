"""Tokenizer files as the chat-format checkpoints have them, tiny, and texts to try them on."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

_ENGLISH = "the of attention mass visual token small large model image answer question def return"
_OTHERS = "你是 书生 多模态 大模型 é ñ ß 🙂 \n \t \r\n a aa aaa ab aba bab 1 22 333 .,;:!?"
WORDS = [*_ENGLISH.split(" "), *_OTHERS.split(" ")]
IMAGE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>"]
RARE = [
    "<s>",
    "</s>",
    "<0x0A>",
    "[UNUSED_TOKEN_146]",
    "▁",
    "▁▁",
    "\u3000",
    "\u200d",
    "\u0301",
    "𝔘",
    "\x00",
    "ﬁ",
]


def texts(count: int, seed: int = 0) -> Iterator[str]:
    """Random strings: words with and without blanks, runs of few letters, characters from everywhere."""
    rng = random.Random(seed)
    words = [*WORDS, *RARE, " ", "  ", "     "]
    blocks = [(32, 127), (127, 0x2000), (0x4E00, 0x9FFF), (0x1F300, 0x1F700), (0, 32)]
    for number in range(count):
        length = rng.randrange(1, 30)
        if number % 4 == 0:
            yield "".join(rng.choices(words, k=length))
        elif number % 4 == 1:
            yield " ".join(rng.choices(words, k=length))
        elif number % 4 == 2:
            yield "".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(length))
        else:
            yield "".join(rng.choices("aab  ▁", k=length))


def train_sentencepiece(**options: Any) -> bytes:
    """Return a tiny sentencepiece model: BPE with byte fallback."""
    import sentencepiece

    rng = random.Random(1)
    sentences = [" ".join(rng.choices(WORDS, k=12)).replace("\n", " ") for _ in range(400)]
    sentences += ["aaaa aa aaaaaaa", "abab ab abababab", "  x    y", "111 22 3333"] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        minloglevel=3,
        **{
            "model_type": "bpe",
            "vocab_size": 480,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            **options,
        },
    )
    return model.getvalue()


def append_pieces(model: bytes, pieces: list[str]) -> bytes:
    """Append normal pieces with the lowest of scores to a sentencepiece model, as InternLM2's unused ones."""
    for piece in pieces:
        text = piece.encode()
        body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -1e9)
        model += b"\x0a" + bytes([len(body)]) + body
    return model


def added(tokens: dict[int, str], **flags: bool) -> dict[str, Any]:
    common = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {str(i): {"content": token, **common, **flags} for i, token in tokens.items()}


def save_internlm2(directory: Path, **changes: Any) -> tuple[bytes, dict[str, int]]:
    """Write InternLM2's files; return the sentencepiece model and the ids of the added tokens."""
    unused = [f"[UNUSED_TOKEN_{number}]" for number in range(142, 147)]
    model = train_sentencepiece(add_dummy_prefix=False, remove_extra_whitespaces=False)
    model = append_pieces(model, unused)
    size = 480 + len(unused)
    names = ["<|im_end|>", "<|im_start|>", *IMAGE_TOKENS, "<box>", "</box>"]
    tokens = {size - 2 + i: name for i, name in enumerate(names)}
    config = {
        "added_tokens_decoder": added({0: "<unk>", 1: "<s>", 2: "</s>", **tokens}),
        "additional_special_tokens": names,
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 8192,
        "tokenizer_class": "InternLM2Tokenizer",
        "chat_template": "{{ 'another' }}",
        **changes,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "tokenization_internlm2.py").write_text("raise SystemExit('remote code was run')\n")
    return model, {name: i for i, name in {1: "<s>", 2: "</s>", **tokens}.items()}


def save_llama(directory: Path, **changes: Any) -> bytes:
    """Write the slow Llama tokenizer of Yi or Phi-3: a sentencepiece model that prefixes a space."""
    model = train_sentencepiece(add_dummy_prefix=True, remove_extra_whitespaces=False)
    names = [
        "<|endoftext|>",
        "<|assistant|>",
        "<|system|>",
        "<|end|>",
        "<|user|>",
        "<|im_end|>",
        *IMAGE_TOKENS,
    ]
    tokens = {480 + i: name for i, name in enumerate(names)}
    config = {
        "added_tokens_decoder": {
            **added({0: "<unk>", 1: "<s>", 2: "</s>"}),
            **added(tokens, rstrip=True),
        },
        "add_bos_token": False,
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer",
        **changes,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return model


def save_qwen2(directory: Path) -> None:
    """Write Qwen2's files: vocab.json, merges.txt, and added tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "a"), ("o", "f")]
    vocab = {piece: i for i, piece in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *IMAGE_TOKENS, "<box>", "</box>"]
    tokens = {len(vocab) + i: name for i, name in enumerate(names)}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": added(tokens),
        "additional_special_tokens": names[1:],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "tokenizer_class": "Qwen2Tokenizer",
        "errors": "replace",
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(vocab))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges))
    (directory / "added_tokens.json").write_text(json.dumps({name: i for i, name in tokens.items()}))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
