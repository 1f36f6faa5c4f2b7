"""The page of ``sgl-vlm demo --web``: ask about a picture, and see how the answer came about."""

from sgl_runtime.web.answering import Answering, Reply
from sgl_runtime.web.server import listening, serve

__all__ = ["Answering", "Reply", "listening", "serve"]
