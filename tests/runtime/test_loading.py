"""Checkpoints: what loads, in which dtype, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgl_runtime import SGLConfig, SGLPipeline, checkpoints, hf
from sgl_runtime.errors import CheckpointError, ConfigError
from sgl_runtime.processing import Processor

from . import slow
from .checkpoints import save_checkpoint

CPU = torch.device("cpu")
HEAD = "language_model.lm_head.weight"  # its name on disk; in the model it is lm_head.weight


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "model", seed=1)


def _edit(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def _edit_weights(directory: Path, change: Any) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _refusal(directory: Path | str) -> str:
    with pytest.raises(CheckpointError) as failure:
        hf.load_model(directory, CPU, torch.float32)
    return str(failure.value)


def test_weights_arrive(directory: Path) -> None:
    model = hf.load_model(directory, CPU, torch.float32)
    saved = load_file(directory / "model.safetensors")
    state = model.state_dict()
    assert torch.equal(state["lm_head.weight"], saved[HEAD])
    assert not model.training


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.float16, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float16),
    ],
)
def test_dtype(tmp_path: Path, stored: torch.dtype, asked: Any, expected: torch.dtype) -> None:
    directory = save_checkpoint(tmp_path / "model")
    _edit_weights(directory, lambda t: t.update({name: value.to(stored) for name, value in t.items()}))
    _edit(directory / "config.json", dtype=str(stored).removeprefix("torch."))
    pipe = SGLPipeline.from_pretrained(directory, directory, device="cpu", dtype=asked)
    saved = load_file(directory / "model.safetensors")[HEAD]
    for vlm in (pipe.small, pipe.large):
        assert vlm.model.dtype == expected
        assert torch.equal(vlm.model.lm_head.weight, saved.to(expected))  # type: ignore[arg-type]


def test_auto_dtype_on_cuda() -> None:
    assert checkpoints.resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("tie", [None, True])
def test_untied_checkpoint_under_a_config_that_ties(directory: Path, tie: bool | None) -> None:
    _edit(directory / "config.json", tie_word_embeddings=tie)
    model: Any = hf.load_model(directory, CPU, torch.float32)
    saved = load_file(directory / "model.safetensors")
    assert torch.equal(model.lm_head.weight, saved[HEAD])
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert model.config.tie_word_embeddings is False  # later ties (a save, a resize) must not undo it


def test_tied_checkpoint(directory: Path) -> None:
    _edit_weights(directory, lambda t: t.pop(HEAD))
    _edit(directory / "config.json", tie_word_embeddings=True)
    model: Any = hf.load_model(directory, CPU, torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_tensors_named_as_in_the_model(directory: Path) -> None:
    expected = hf.load_model(directory, CPU, torch.float32).state_dict()

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name == HEAD:
                new = "lm_head.weight"
            else:
                new = "model." + name.replace("language_model.model.", "language_model.")
            tensors[new] = tensors.pop(name)
        assert tensors.keys() == expected.keys()

    _edit_weights(directory, rename)
    _edit(directory / "config.json", tie_word_embeddings=None)
    state = hf.load_model(directory, CPU, torch.float32).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_missing_tensors_are_named(directory: Path) -> None:
    _edit_weights(
        directory, lambda t: [t.pop(name) for name in list(t) if "layers.1" in name or "norm.weight" in name]
    )
    message = _refusal(directory)
    assert "lacks tensors" in message
    assert message.count("weight") + message.count("bias") == 10
    assert "more." in message


def test_unexpected_tensors_are_named(directory: Path) -> None:
    _edit_weights(directory, lambda t: t.update(adapter=torch.zeros(3)))
    assert "unknown tensors: adapter." in _refusal(directory)


def test_wrong_shapes_are_named(directory: Path) -> None:
    _edit_weights(directory, lambda t: t.update({HEAD: torch.zeros(9, 9)}))
    assert "lm_head.weight (9, 9) for (270, 64)" in _refusal(directory)


def test_not_a_checkpoint(directory: Path, tmp_path: Path) -> None:
    assert "There is no checkpoint directory" in _refusal(tmp_path / "nothing")
    assert "There is no checkpoint directory" in _refusal("./nothing")
    assert "There is no checkpoint directory" in _refusal("nothing")
    assert "is a file" in _refusal(directory / "config.json")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in _refusal(tmp_path / "empty")


def test_unreachable_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no connection\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    message = _refusal("nobody/nothing-at-all")
    assert "(no connection)" in message
    assert "download it first" in message


def test_hub_downloads_no_pickle_and_no_code(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.update(options) or str(directory)
    )
    assert checkpoints.checkpoint_directory("owner/name") == directory
    from fnmatch import fnmatch

    def fetched(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])

    assert not fetched("pytorch_model.bin")
    assert not fetched("modeling_internvl_chat.py")
    assert fetched("model-00001-of-00002.safetensors")
    assert fetched("chat_template.jinja")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin"])
def test_pickles_are_refused(directory: Path, name: str) -> None:
    (directory / "model.safetensors").rename(directory / name)
    message = _refusal(directory)
    assert name in message
    assert "refused" in message


def test_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    assert "no weights" in _refusal(directory)


@pytest.mark.parametrize("size", [0, 7, 3000])
def test_damaged_weights(directory: Path, size: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert str(directory) in _refusal(directory)


def test_damaged_config(directory: Path) -> None:
    (directory / "config.json").write_text("{broken")
    assert "could not be read as JSON" in _refusal(directory)
    (directory / "config.json").write_text("[]")
    assert "expected a JSON object" in _refusal(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "blip"}, "type 'blip' are not supported; supported are idefics3, internvl"),
        ({"model_type": "blip"}, "docs/families.md"),
        ({"model_type": "llava"}, "vision tower is of type 'internvl_vision'"),
        ({"auto_map": {"AutoModel": "evil.Model"}, "model_type": "evil"}, "type 'evil'"),
        ({"auto_map": {"AutoModel": "evil.Model"}, "model_type": "evil"}, "own code"),
    ],
)
def test_other_models(directory: Path, changes: dict[str, Any], message: str) -> None:
    _edit(directory / "config.json", **changes)
    assert message in _refusal(directory)


def test_code_beside_the_weights_is_not_run(directory: Path) -> None:
    (directory / "evil.py").write_text(
        f"open({str(directory / 'ran')!r}, 'w')\nclass Model: ...\nclass Config: ...\n"
    )
    _edit(directory / "config.json", auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Config"})
    hf.load_model(directory, CPU, torch.float32)
    assert not (directory / "ran").exists()


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            "sliding-window",
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "proportional",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
            "'proportional' is not supported",
        ),
    ],
)
def test_text_models_that_the_loop_cannot_run(text: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        hf.view(slow.make_model(text, **changes))


def test_not_an_internvl_model() -> None:
    with pytest.raises(CheckpointError, match="got Linear"):
        hf.view(torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="got InternVLModel"):
        hf.view(slow.make_model().model)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_types(rope: dict[str, Any]) -> None:
    from sgl_runtime.engine import VLM

    model = slow.make_model("qwen2", seed=4, rope_parameters=rope)
    inputs = slow.make_inputs("tIIIIttt", seed=4)
    engine = VLM(model, "small")
    assert engine.generate(engine.encode([engine.prompt(inputs)])[0], 8).token_ids == slow.greedy(
        model, inputs, 8
    )


def test_generation_settings_are_checked_at_load(directory: Path) -> None:
    path = directory / "generation_config.json"
    path.write_text(json.dumps({"repetition_penalty": 0.0}))
    with pytest.raises(CheckpointError, match="generation settings"):
        SGLPipeline.from_pretrained(directory, directory)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_half_a_config_is_refused(directory: Path, part: str) -> None:
    config = json.loads((directory / "config.json").read_text())
    del config[part]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=part):
        hf.load_model(directory, torch.device("cpu"), torch.float32)


def test_layer_is_checked_against_the_large_model(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="layers are 0 to 5"):
        SGLPipeline.from_pretrained(*pair, config=SGLConfig(prune_layer=6), device="cpu")


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("warp", "auto"),
        ("meta", "auto"),
        ("cuda:99", "auto"),
        ("cpu", "int8"),
        ("cpu", torch.int8),
        ("cpu", 3),
    ],
)
def test_device_and_dtype(pair: tuple[Path, Path], device: Any, dtype: Any) -> None:
    with pytest.raises(ConfigError, match=r"device='warp'|is not supported; write 'auto'|CUDA devices"):
        SGLPipeline.from_pretrained(*pair, device=device, dtype=dtype)


@pytest.mark.parametrize(
    ("version", "warned"), [("5.17.0", False), ("5.23.1", False), ("5.16.9", True), ("5.24rc1", True)]
)
def test_an_untried_transformers_is_told_once(
    version: str, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    hf._check_version.cache_clear()
    for _ in range(2):
        hf.view(slow.make_model())
    told = [record.getMessage() for record in caplog.records if "transformers" in record.getMessage()]
    assert len(told) == warned
    assert not warned or f"transformers {version} is not among the releases that were tested, 5.17" in told[0]


@pytest.mark.parametrize("model_type", ["idefics3", "llava_onevision"])
def test_a_tokenizers_code_is_never_offered_to_run(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on the terminal, and run it at a "y"."""
    directory = save_checkpoint(tmp_path / "model")
    (directory / "tok.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tok: ...\n")
    for name in ("tokenizer.json",):
        (directory / name).unlink()
    (directory / "vocab.json").write_text("{}")
    _edit(
        directory / "tokenizer_config.json",
        tokenizer_class="Tok",
        auto_map={"AutoTokenizer": ["tok.Tok", "tok.Tok"]},
    )
    _edit(directory / "config.json", model_type=model_type)
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    family = hf.view(slow.make_model()).family
    with pytest.raises(CheckpointError, match="tokenizer could not be loaded"):
        Processor.from_directory(directory, family)
    assert not (tmp_path / "ran").exists()
    assert not asked
