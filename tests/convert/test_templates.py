"""Chat templates against the research code's way of writing a conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sgl_runtime.convert.templates import CONVERSATIONS, chat_template, conversation
from sgl_runtime.errors import CheckpointError

from .tokenizer_files import save_qwen2

SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、"
    "清华大学及多家合作单位联合开发的多模态大语言模型。"
)
# name: (system template, system message, roles, separator), as registered in the research code
RESEARCH = {
    "internlm2-chat": (
        "<|im_start|>system\n{}",
        SYSTEM_2,
        ("<|im_start|>user\n", "<|im_start|>assistant\n"),
        "<|im_end|>",
    ),
    "Hermes-2": (
        "<|im_start|>system\n{}",
        SYSTEM_2,
        ("<|im_start|>user\n", "<|im_start|>assistant\n"),
        "<|im_end|>",
    ),
    "phi3-chat": ("<|system|>\n{}", SYSTEM_2, ("<|user|>\n", "<|assistant|>\n"), "<|end|>"),
    "internvl2_5": (
        "<|im_start|>system\n{}",
        SYSTEM_2_5,
        ("<|im_start|>user\n", "<|im_start|>assistant\n"),
        "<|im_end|>\n",
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_qwen2(directory)
    return AutoTokenizer.from_pretrained(directory)


def _research(name: str, turns: list[str | None], system: str | None = None) -> str:
    """What the research code writes: separator style MPT, turns in turn, the last one open."""
    template, message, roles, separator = RESEARCH[name]
    text = template.format(system or message) + separator
    for number, turn in enumerate(turns):
        text += roles[number % 2] + ("" if turn is None else turn + separator)
    return text.replace("<image>", "<IMG_CONTEXT>")


def _ours(tokenizer: Any, name: str, messages: list[dict[str, Any]], *, ask: bool = True) -> str:
    return tokenizer.apply_chat_template(
        messages,
        chat_template=chat_template(conversation(name)),
        tokenize=False,
        add_generation_prompt=ask,
    )


def _user(*parts: str) -> dict[str, Any]:
    content = [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def test_every_template_is_tested() -> None:
    assert CONVERSATIONS.keys() == RESEARCH.keys()


@pytest.mark.parametrize("name", RESEARCH)
def test_question(tokenizer: Any, name: str) -> None:
    expected = _research(name, ["<image>\nWhat does it say?", None])  # the research code adds "<image>\n"
    assert _ours(tokenizer, name, [_user("<image>", "What does it say?")]) == expected
    assert _ours(tokenizer, name, [_user("<image>", "\nWhat does it say?")]) == expected
    plain = [{"role": "user", "content": "<IMG_CONTEXT>\nWhat does it say?"}]
    assert _ours(tokenizer, name, plain) == expected


@pytest.mark.parametrize("name", RESEARCH)
def test_images_inside_the_question(tokenizer: Any, name: str) -> None:
    asked = 'Image-1: <image>\nImage-2: <image>\nIs it\'s "same" {x}?'
    parts = _user("Image-1: ", "<image>", "\nImage-2: ", "<image>", '\nIs it\'s "same" {x}?')
    assert _ours(tokenizer, name, [parts]) == _research(name, [asked, None])
    opening = _user("<image>", "<image>", "Which?")
    assert _ours(tokenizer, name, [opening]) == _research(name, ["<image>\n<image>\nWhich?", None])


@pytest.mark.parametrize("name", RESEARCH)
def test_history(tokenizer: Any, name: str) -> None:
    messages = [
        _user("<image>", "What?"),
        {"role": "assistant", "content": "A sign."},
        {"role": "user", "content": "Where?"},
    ]
    expected = _research(name, ["<image>\nWhat?", "A sign.", "Where?", None])
    assert _ours(tokenizer, name, messages) == expected
    closed = _research(name, ["<image>\nWhat?", "A sign.", "Where?"])
    assert _ours(tokenizer, name, messages, ask=False) == closed


@pytest.mark.parametrize("name", RESEARCH)
@pytest.mark.parametrize("parts", [False, True])
def test_other_system_message(tokenizer: Any, name: str, parts: bool) -> None:
    content: Any = [{"type": "text", "text": "Be brief."}] if parts else "Be brief."
    messages = [{"role": "system", "content": content}, {"role": "user", "content": "Hello"}]
    assert _ours(tokenizer, name, messages) == _research(name, ["Hello", None], "Be brief.")


def test_video(tokenizer: Any) -> None:
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]}
    assert "user\n<video>\nWhat happens?<" in _ours(tokenizer, "internvl2_5", [message])


@pytest.mark.parametrize("name", RESEARCH)
def test_stop(name: str) -> None:
    assert conversation(name).stop == RESEARCH[name][3].strip()


@pytest.mark.parametrize("name", [None, "vicuna_v1.1"])
def test_unknown_template(name: str | None) -> None:
    with pytest.raises(CheckpointError, match="known are internlm2-chat"):
        conversation(name)


def test_file_is_written_with_the_template(tmp_path: Path, tokenizer: Any) -> None:
    """Jinja survives the way through tokenizer files."""
    tokenizer.chat_template = chat_template(conversation("internvl2_5"))
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template
