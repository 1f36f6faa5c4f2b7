"""Every text model and vision tower: bit for bit there and back, and the configuration that belongs to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import InternVLConfig, InternVLForConditionalGeneration

from sgl_runtime import hf
from sgl_runtime.convert import convert, load_chat_format, native_settings
from sgl_runtime.errors import CheckpointError

from .chat_format import HEAD_DIM, IMAGE, TEXT, VISION, chat_config, chat_tensors, make_native, save_chat

CPU = torch.device("cpu")


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()
    }


def _pair(tmp_path: Path, kind: str, vision: str = "300M", **options: Any) -> tuple[Path, Path]:
    """The same model natively and in the chat format, in three files."""
    native = make_native(kind, vision, **options).to(torch.bfloat16)
    native.save_pretrained(tmp_path / "native")
    tensors = chat_tensors(_weights(tmp_path / "native"), kind)
    save_chat(tmp_path / "chat", tensors, chat_config(kind, vision, **options), files=3)
    return tmp_path / "native", tmp_path / "chat"


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("kind", TEXT)
def test_there_and_back(tmp_path: Path, kind: str, vision: str) -> None:
    native, chat = _pair(tmp_path, kind, vision)
    out = convert(chat, tmp_path / "out", image_token_id=IMAGE, shard_bytes=20_000)
    ours, theirs = _weights(out), _weights(native)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    back, before = chat_tensors(ours, kind), _weights(chat)
    assert back.keys() == before.keys()
    assert all(torch.equal(back[name], before[name]) for name in before)
    assert len(list(out.glob("*.safetensors"))) > 3
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == theirs.keys()


@pytest.mark.parametrize("kind", TEXT)
def test_computes_the_same(tmp_path: Path, kind: str) -> None:
    """Through OUT, directly, and by transformers: one function, past the length where scaled rotary
    embeddings change."""
    native, chat = _pair(tmp_path, kind)
    out = convert(chat, tmp_path / "out", image_token_id=IMAGE)
    reference = InternVLForConditionalGeneration.from_pretrained(native, dtype=torch.float32).eval()
    ids = torch.randint(6, 100, (1, 90), generator=torch.Generator().manual_seed(0))
    ids[0, 3:7] = IMAGE
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(input_ids=ids, pixel_values=pixels).logits
        for model in (
            hf.load_model(out, CPU, torch.float32),
            load_chat_format(chat, CPU, torch.float32, image_token_id=IMAGE),
        ):
            assert torch.equal(model(input_ids=ids, pixel_values=pixels).logits, expected)


@pytest.mark.parametrize("kind", TEXT)
def test_config(tmp_path: Path, kind: str) -> None:
    native, chat = _pair(tmp_path, kind)
    out = convert(chat, tmp_path / "out", image_token_id=IMAGE)
    ours, theirs = (InternVLConfig.from_pretrained(path).to_dict() for path in (out, native))
    assert ours == theirs
    assert ours["text_config"]["tie_word_embeddings"] is ours["tie_word_embeddings"] is False
    assert "auto_map" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("kind", ["internlm2", "qwen2"])
def test_tied(tmp_path: Path, kind: str) -> None:
    native, chat = _pair(tmp_path, kind, tied=True)
    out = convert(chat, tmp_path / "out", image_token_id=IMAGE)
    assert not any("lm_head" in name for name in _weights(out))
    assert _weights(out).keys() == _weights(native).keys()
    for model in (
        hf.load_model(out, CPU, torch.float32),
        load_chat_format(chat, CPU, torch.float32, image_token_id=IMAGE),
    ):
        assert model.config.tie_word_embeddings is True
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_output_layer_decides_against_config(tmp_path: Path) -> None:
    _, chat = _pair(tmp_path, "qwen2")
    config = chat_config("qwen2", tied=True)  # but the file holds an output layer
    (chat / "config.json").write_text(json.dumps(config))
    model = load_chat_format(chat, CPU, torch.bfloat16, image_token_id=IMAGE)
    assert model.config.tie_word_embeddings is False
    assert torch.equal(model.lm_head.weight, _weights(chat)["language_model.lm_head.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_of_a_direct_load(tmp_path: Path, dtype: torch.dtype) -> None:
    _, chat = _pair(tmp_path, "internlm2")
    model = load_chat_format(chat, CPU, dtype, image_token_id=IMAGE)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert model.dtype == dtype
    assert not model.training
    stored = _weights(chat)["mlp1.1.weight"].to(dtype)
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, stored)


def test_settings(tmp_path: Path) -> None:
    _, chat = _pair(tmp_path, "internlm2")
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": [42, 43], "top_k": 9}))
    out = convert(chat, tmp_path / "out", image_token_id=IMAGE)
    image = json.loads((out / "preprocessor_config.json").read_text())
    assert image == native_settings(chat)[0]
    assert image["size"] == {"height": 28, "width": 28}
    assert (image["crop_to_patches"], image["min_patches"], image["max_patches"]) == (True, 1, 12)
    assert image["image_mean"] == [0.485, 0.456, 0.406]
    assert image["image_std"] == [0.229, 0.224, 0.225]
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [42, 43, 2], "pad_token_id": 0}


def test_no_tiles(tmp_path: Path) -> None:
    _, chat = _pair(tmp_path, "internlm2")
    config = {**chat_config(), "dynamic_image_size": False}
    (chat / "config.json").write_text(json.dumps(config))
    image, _ = native_settings(chat)
    assert (image["crop_to_patches"], image["max_patches"]) == (False, 1)


@pytest.mark.parametrize(
    ("part", "changes", "told"),
    [
        (None, {"ps_version": "v1"}, "ps_version 'v1'"),
        (None, {"ps_version": None}, "ps_version"),
        (None, {"select_layer": -4}, "select_layer -4"),
        (None, {"pad2square": True}, "pad2square"),
        (None, {"force_image_size": 448}, "force_image_size 448"),
        (None, {"use_thumbnail": False}, "without a thumbnail"),
        (None, {"template": "vicuna"}, "'vicuna'"),
        (None, {"vision_config": None}, "without vision_config"),
        ("llm_config", {"architectures": ["Gemma2ForCausalLM"]}, "Gemma2ForCausalLM"),
        ("llm_config", {"hidden_size": None}, "hidden_size"),
        ("llm_config", {"rope_pos_id_version": "v2pe"}, "v2pe"),
        (
            "llm_config",
            {"rope_scaling": {"type": "nonsense", "factor": 2.0}},
            "rope_scaling of type .nonsense",
        ),
        ("vision_config", {"qk_normalization": True, "layer_norm_eps": 1e-5}, "qk_normalization"),
    ],
)
def test_what_cannot_be_expressed(tmp_path: Path, part: str | None, changes: Any, told: str) -> None:
    _, chat = _pair(tmp_path, "internlm2")
    config = chat_config()
    (config[part] if part else config).update(changes)
    (chat / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=told):
        convert(chat, tmp_path / "out", image_token_id=IMAGE)
    assert not (tmp_path / "out").exists()


def test_phi3_keeps_its_factors(tmp_path: Path) -> None:
    _, chat = _pair(tmp_path, "phi3")
    text = load_chat_format(chat, CPU, torch.float32, image_token_id=IMAGE).config.text_config
    assert text.rope_parameters["rope_type"] == "longrope"
    assert len(text.rope_parameters["long_factor"]) == HEAD_DIM // 2
    assert text.sliding_window is None
