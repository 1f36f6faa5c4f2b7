"""Whole checkpoints with their tokenizers, from the research code's files to an answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

from sgl_runtime import SGLConfig, SGLPipeline
from sgl_runtime.convert import convert, native_tokenizer
from sgl_runtime.errors import ConfigError

from .chat_format import chat_config, chat_tensors, make_native, save_chat
from .tokenizer_files import save_internlm2, save_llama, save_qwen2

sentencepiece = pytest.importorskip("sentencepiece", reason="trains the tokenizers of these checkpoints")
SAVE: dict[str, Any] = {"internlm2": save_internlm2, "qwen2": save_qwen2, "phi3": save_llama}
SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)


def _chat(directory: Path, kind: str, seed: int = 0) -> tuple[Path, Any]:
    make_native(kind, seed=seed).save_pretrained(directory / "native")
    tensors = chat_tensors(load_file(directory / "native" / "model.safetensors"), kind)
    chat = save_chat(directory / "chat", tensors, chat_config(kind))
    return chat, SAVE[kind](chat)


@pytest.mark.parametrize("kind", SAVE)
def test_converted_checkpoint(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture) -> None:
    """Tokenizer, chat template and end tokens, converted and read directly."""
    chat, _ = _chat(tmp_path, kind)
    capfd.readouterr()
    out = convert(chat, tmp_path / "out")
    assert "internvl_chat" not in capfd.readouterr().err  # transformers was not asked about the chat format
    direct, saved = native_tokenizer(chat), AutoTokenizer.from_pretrained(out)
    assert direct is not None
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the sign?"}]}]
    first, second = (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for tokenizer in (direct, saved)
    )
    assert first == second
    assert SYSTEM in first
    assert first.count("<IMG_CONTEXT>") == 1
    assert direct(first)["input_ids"] == saved(first)["input_ids"]
    stop = {"phi3": "<|end|>"}.get(kind, "<|im_end|>")
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [saved.convert_tokens_to_ids(stop), 2]
    config = json.loads((out / "config.json").read_text())
    assert config["image_token_id"] == saved.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert not list(out.glob("*.py"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    convert(chat, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_id_that_the_tokenizer_denies(tmp_path: Path) -> None:
    chat, (_, ids) = _chat(tmp_path, "internlm2")
    with pytest.raises(ConfigError, match=f"says {ids['<IMG_CONTEXT>']}"):
        convert(chat, tmp_path / "out", image_token_id=7)
    convert(chat, tmp_path / "out", image_token_id=ids["<IMG_CONTEXT>"])


@pytest.mark.parametrize("way", ["converted", "direct"])
def test_prompt_of_the_research_code(tmp_path: Path, way: str) -> None:
    """The pipeline on such a checkpoint sees the very ids that the research code's chat() makes."""
    chat, (model, ids) = _chat(tmp_path, "internlm2")
    place = convert(chat, tmp_path / "out") if way == "converted" else chat
    files = sorted(chat.iterdir())
    config = SGLConfig(keep_ratio=0.5, max_new_tokens=4, compile=False, max_batch=1)
    pipe = SGLPipeline.from_pretrained(place, place, config=config, device="cpu", dtype="float32")
    assert sorted(chat.iterdir()) == files
    pixels = np.random.default_rng(0).integers(0, 255, (28, 56, 3), dtype=np.uint8)
    image, per_tile, tiles = Image.fromarray(pixels), 4, 3  # two tiles and the thumbnail
    question = (
        f"<|im_start|>system\n{SYSTEM}<|im_end|><|im_start|>user\n"
        f"<img>{'<IMG_CONTEXT>' * per_tile * tiles}</img>\nthe sign?<|im_end|><|im_start|>assistant\n"
    )
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    pattern = "|".join(re.escape(name) for name in ids)
    expected = [ids["<s>"]]
    for part in re.split(f"({pattern})", question):
        expected += [ids[part]] if part in ids else reference.encode(part)
    inputs = pipe.small_processor(image, "the sign?")
    assert inputs["input_ids"][0].tolist() == expected
    result = pipe(image, "the sign?")
    assert len(result.mass) == per_tile * tiles
    assert pipe.small.model.generation_config.eos_token_id == [ids["<|im_end|>"], 2]
