"""Tokenizers without remote code: sentencepiece's own library says what is right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sgl_runtime.convert.tokenizer import backend, load_tokenizer, read_sentencepiece
from sgl_runtime.errors import CheckpointError

from .tokenizer_files import (
    IMAGE_TOKENS,
    append_pieces,
    save_internlm2,
    save_llama,
    save_qwen2,
    texts,
    train_sentencepiece,
)

sentencepiece = pytest.importorskip("sentencepiece", reason="compared with the sentencepiece library")


def _reference(model: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.mark.parametrize(
    ("prefix", "trim", "symbols"),
    [
        (False, False, []),
        (False, False, ["<sep>", "▁▁▁", "aba", "of  the", "[UNUSED_TOKEN_146]"]),
        (True, False, []),
        (False, True, []),
        (True, True, []),
        (True, False, ["<sep>", "[UNUSED]"]),  # which the texts do not hold
        (True, True, ["<sep>", "[UNUSED]"]),
    ],
)
def test_encodes_and_decodes_as_sentencepiece(
    tmp_path: Path, prefix: bool, trim: bool, symbols: list[str]
) -> None:
    model = train_sentencepiece(
        add_dummy_prefix=prefix, remove_extra_whitespaces=trim, user_defined_symbols=symbols
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model)
    core, reference = backend(read_sentencepiece(path), {}, prefix_first_only=False), _reference(model)
    pieces = set()
    for text in texts(3000):
        ids = reference.encode(text)
        assert core.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert core.decode(ids) == reference.decode(ids), repr(text)
        pieces.update(ids)
    assert len(pieces) > 300  # most of the vocabulary was seen


def _internlm2_ids(text: str, reference: Any, ids: dict[str, int]) -> list[int]:
    """As the remote slow tokenizer: added tokens first, sentencepiece on what is between them."""
    pattern = "|".join(re.escape(name) for name in sorted(ids, key=len, reverse=True))
    found = [ids["<s>"]]
    for part in re.split(f"({pattern})", text):
        found += [ids[part]] if part in ids else reference.encode(part)
    return found


@pytest.mark.parametrize("saved", [False, True])
def test_internlm2(tmp_path: Path, saved: bool) -> None:
    model, ids = save_internlm2(tmp_path)
    reference = _reference(model)
    tokenizer = load_tokenizer(tmp_path, "<|im_end|>")
    if saved:
        tokenizer.save_pretrained(tmp_path / "saved")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=False)
    special = [*ids, ""]
    for number, text in enumerate(texts(1500, seed=2)):
        text = f"{special[number % len(special)]}{text}{special[number % 7]}"
        expected = _internlm2_ids(text, reference, ids)
        assert tokenizer(text)["input_ids"] == expected, repr(text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected[1:]
        plain = [i for i in expected if i not in ids.values()]
        assert tokenizer.decode(plain, skip_special_tokens=True) == reference.decode(plain)
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKENS) == [ids[name] for name in IMAGE_TOKENS]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")
    assert tokenizer.context_image_token == "<IMG_CONTEXT>"
    answer = [*reference.encode("你是 small"), ids["<|im_end|>"]]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "你是 small"


def test_internlm2_without_bos(tmp_path: Path) -> None:
    model, _ = save_internlm2(tmp_path, add_bos_token=False, add_eos_token=True)
    assert load_tokenizer(tmp_path, "<|im_end|>")("the")["input_ids"] == [*_reference(model).encode("the"), 2]


def test_older_added_tokens(tmp_path: Path) -> None:
    """added_tokens.json alone, as before tokenizer_config.json listed them."""
    model, ids = save_internlm2(tmp_path, added_tokens_decoder=None)
    (tmp_path / "added_tokens.json").write_text(json.dumps({name: i for name, i in ids.items() if i > 2}))
    tokenizer = load_tokenizer(tmp_path, "<|im_end|>")
    text = "<|im_start|>user\n<img><IMG_CONTEXT></img>\nthe image<|im_end|>"
    assert tokenizer(text)["input_ids"] == _internlm2_ids(text, _reference(model), ids)
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == "user\n\nthe image"


@pytest.mark.parametrize("legacy", [True, False])
def test_slow_llama(tmp_path: Path, legacy: bool) -> None:
    """Blanks behind an added token go (rstrip); the prefix is before every stretch, or only the first."""
    model = save_llama(tmp_path, legacy=legacy)
    reference, tokenizer = _reference(model), load_tokenizer(tmp_path, "<|end|>")
    pieces = reference.encode("the image", out_type=str)
    assert pieces[0].startswith("▁")
    bare = tokenizer.convert_ids_to_tokens(tokenizer("the image")["input_ids"])
    assert bare == pieces
    turn = tokenizer.convert_ids_to_tokens(tokenizer("<|user|>\nthe image<|end|>")["input_ids"])
    assert (turn[0], turn[-1]) == ("<|user|>", "<|end|>")
    inner = turn[1:-1]
    if legacy:
        assert inner == pieces
    else:
        assert "".join(inner) == "the▁image"
    assert tokenizer.decode(tokenizer("the image")["input_ids"]) == "the image"


def test_llama_texts(tmp_path: Path) -> None:
    model = save_llama(tmp_path)
    reference, tokenizer = _reference(model), load_tokenizer(tmp_path, "<|end|>")
    plain = [text for text in texts(1500, seed=3) if not re.search("</?s>", text)]
    assert len(plain) > 1000
    for text in plain:
        ids = reference.encode(text)
        assert tokenizer(text)["input_ids"] == ids, repr(text)
        assert tokenizer.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize("kind", ["vocab.json", "tokenizer.json"])
def test_others_stay_as_transformers_reads_them(tmp_path: Path, kind: str) -> None:
    save_qwen2(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    if kind == "tokenizer.json":
        plain.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, "<|im_end|>")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in texts(800, seed=4):
        text = f"<|im_start|>{text}<box>{text}"
        assert tokenizer(text)["input_ids"] == plain(text)["input_ids"] == again(text)["input_ids"]
        ids = plain(text)["input_ids"]
        for skip in (False, True):
            expected = plain.decode(ids, skip_special_tokens=skip)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == expected
            assert again.decode(ids, skip_special_tokens=skip) == expected
    assert again.start_image_token == "<img>"
    assert again.convert_tokens_to_ids(IMAGE_TOKENS) == plain.convert_tokens_to_ids(IMAGE_TOKENS)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"byte_fallback": False, "vocab_size": 150}, "no byte fallback"),
        ({"model_type": "unigram", "vocab_size": 330}, "another algorithm"),
        ({"user_defined_symbols": ["▁▁"], "add_dummy_prefix": True}, "blanks in user-defined pieces"),
        ({"normalization_rule_name": "nmt_nfkc"}, "character normalisation"),
        ({"treat_whitespace_as_suffix": True}, "blanks behind the words"),
    ],
)
def test_other_sentencepiece_models(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_sentencepiece(**options))
    with pytest.raises(CheckpointError, match=told):
        read_sentencepiece(path)


@pytest.mark.parametrize("damage", [b"", b"not a model", "cut"])
def test_damaged_sentencepiece_model(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_sentencepiece()[:-3] if damage == "cut" else damage)
    with pytest.raises(CheckpointError, match="sentencepiece model"):
        read_sentencepiece(path)


def test_ids_that_do_not_fit(tmp_path: Path) -> None:
    model, ids = save_internlm2(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(append_pieces(model, [f"[{i}]" for i in range(9)]))
    (tmp_path / "added_tokens.json").write_text("{}")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["700"] = config["added_tokens_decoder"].pop(str(ids["</box>"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="instead of 700"):
        load_tokenizer(tmp_path, "<|im_end|>")


def test_without_image_tokens(tmp_path: Path) -> None:
    save_qwen2(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    content = path.read_text().replace("<IMG_CONTEXT>", "<OTHER>")
    path.write_text(content)
    (tmp_path / "added_tokens.json").unlink()
    with pytest.raises(CheckpointError, match="<IMG_CONTEXT>"):
        load_tokenizer(tmp_path, "<|im_end|>")


def test_remote_code_is_refused(tmp_path: Path) -> None:
    save_internlm2(tmp_path)
    (tmp_path / "tokenizer.model").rename(tmp_path / "vocab.json")
    with pytest.raises(CheckpointError, match="without remote code"):
        load_tokenizer(tmp_path, "<|im_end|>")
