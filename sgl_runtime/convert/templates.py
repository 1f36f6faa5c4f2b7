"""The research code's conversation templates, as Jinja chat templates."""

from __future__ import annotations

from dataclasses import dataclass

from sgl_runtime.errors import CheckpointError

_SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
    "英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，"
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


@dataclass(frozen=True)
class Conversation:
    """How turns are written: each opens with its role's words and ends with ``end``."""

    system: str
    user: str
    assistant: str
    end: str
    message: str  # of the system, unless the chat begins with another

    @property
    def stop(self) -> str:
        """The token at which an answer ends."""
        return self.end.strip()


_CHATML = ("<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n")
CONVERSATIONS = {
    "internlm2-chat": Conversation(*_CHATML, "<|im_end|>", _SYSTEM_2),
    "Hermes-2": Conversation(*_CHATML, "<|im_end|>", _SYSTEM_2),
    "phi3-chat": Conversation("<|system|>\n", "<|user|>\n", "<|assistant|>\n", "<|end|>", _SYSTEM_2),
    "internvl2_5": Conversation(*_CHATML, "<|im_end|>\n", _SYSTEM_2_5),
}
# A message's content is text, or a list of images, videos and texts. The research code puts each image that
# opens a question on a line of its own; a text that brings the line break itself gets no second one.
_CONTENT = (
    "{%- macro write(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- set place = namespace(opening=true) -%}{%- for part in content -%}"
    "{%- if part['type'] == 'text' -%}{%- set place.opening = false -%}{{ part['text'] }}"
    "{%- else -%}{{ '<IMG_CONTEXT>' if part['type'] == 'image' else '<video>' }}"
    "{%- if place.opening and (loop.nextitem is not defined or loop.nextitem['type'] != 'text'"
    " or loop.nextitem['text'][:1] != '\\n') -%}{{ '\\n' }}{%- endif -%}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)


def conversation(name: str | None) -> Conversation:
    """Return the conversation template ``name``; CheckpointError when it is not known."""
    if name not in CONVERSATIONS:
        raise CheckpointError(
            f"The checkpoint's conversation template is {name!r}; known are {', '.join(CONVERSATIONS)}."
        )
    return CONVERSATIONS[name]


def chat_template(chat: Conversation) -> str:
    """Return a conversation template in Jinja.

    It writes no begin-of-text token: the tokenizer adds that where the research code's does.
    """
    system, user, assistant, end, message = (
        _quoted(text) for text in (chat.system, chat.user, chat.assistant, chat.end, chat.message)
    )
    return (
        f"{_CONTENT}"
        f"{{%- set told = messages[0]['role'] == 'system' -%}}"
        f"{{{{ {system} + (write(messages[0]['content']) if told else {message}) + {end} }}}}"
        f"{{%- for message in (messages[1:] if told else messages) -%}}"
        f"{{{{ ({assistant} if message['role'] == 'assistant' else {user}) "
        f"+ write(message['content']) + {end} }}}}"
        f"{{%- endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{{{{ {assistant} }}}}{{%- endif -%}}"
    )


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
