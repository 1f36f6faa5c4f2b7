"""The server of the page. It serves what is in memory: no file is named, read or written by a request."""

from __future__ import annotations

import asyncio
import base64
import io
import ipaddress
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sgl_runtime import tiny
from sgl_runtime.errors import ConfigError, ImageError, SGLError

if TYPE_CHECKING:
    from PIL import Image
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from sgl_runtime.pipeline import SGLPipeline
    from sgl_runtime.web.answering import Reply

MAX_BYTES = 32 * 2**20  # of an upload
MAX_QUESTIONS = 16  # under way at once; each holds an upload in memory
_PAGE = Path(__file__).parent / "page"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Give a socket that listens on ``host`` and ``port``; 0 is any that is free.

    Raises
    ------
    ConfigError
        The server's packages are missing, or the address cannot be had.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f'The page needs {error.name}: pip install "sgl-vlm[web]".') from error
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while ")[0]  # behind which Python says where, again
        raise ConfigError(
            f"Cannot listen on {host}, port {port} ({why}). Choose another --port, 0 for any that "
            "is free, or check --host."
        ) from error
    with listener:
        yield listener


def serve(pipe: SGLPipeline, listener: socket.socket) -> None:
    """Serve the page on ``listener``, one question at a time, until interrupted; prints the address."""
    import uvicorn

    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    is_local = ipaddress.ip_address(host).is_loopback
    # Names of this machine alone: a foreign page whose name resolves to it must not reach the server.
    hosts = ["localhost", shown] if is_local else ["*"]
    settings = uvicorn.Config(
        make_app(pipe, hosts),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    typer.echo(f"sgl-vlm demo: open http://{shown}:{port} (Ctrl-C ends it)")
    if not is_local:
        typer.echo("Whoever reaches this machine over the network can use it too.")
    with suppress(KeyboardInterrupt):  # uvicorn passes it on, unless the shell had it ignored
        uvicorn.Server(settings).run(sockets=[listener])
    typer.echo("sgl-vlm demo: ended.")


def make_app(pipe: SGLPipeline, hosts: list[str]) -> Starlette:
    """Return the page's application.

    Parameters
    ----------
    pipe
        Answers; its settings are those that the page starts with.
    hosts
        Names under which it may be asked, or "*".
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, PlainTextResponse
    from starlette.routing import Route

    from sgl_runtime.web.answering import FORMATS, Answering

    answer = Answering(pipe)
    turns = ThreadPoolExecutor(max_workers=1)  # the pipeline's memory serves one request at a time
    turns.submit(_rehearse, pipe).result()  # in that very thread, which gets threads of its own for torch
    places = asyncio.Semaphore(MAX_QUESTIONS)
    templates = _templates()
    examples = tiny.samples()
    page = templates.get_template("page.html").render(
        config=pipe.config,
        prune_layer=pipe.prune_layer,
        num_layers=pipe.large.num_layers,
        examples=examples,
        accept=",".join(f"image/{name.lower()}" for name in FORMATS),
        max_bytes=MAX_BYTES,
    )

    def answered(data: bytes, fields: Mapping[str, str]) -> str:
        return _shown(templates, answer(data, fields))

    async def ask(request: Request) -> Response:
        if places.locked():
            return PlainTextResponse(
                "Too many questions are waiting. Try again later.", 503, headers=_HEADERS
            )
        try:
            async with places:
                data = await _body(request)
                loop = asyncio.get_running_loop()
                shown = await loop.run_in_executor(turns, answered, data, request.query_params)
        except SGLError as error:
            return PlainTextResponse(str(error), 400, headers=_HEADERS)
        except ClientDisconnect:
            return PlainTextResponse("", 400)  # for nobody
        return HTMLResponse(shown, headers=_HEADERS)

    routes = [
        Route("/answer", ask, methods=["POST"]),
        _fixed("/", page.encode(), "text/html"),
        _fixed("/page.css", (_PAGE / "page.css").read_bytes(), "text/css"),
        _fixed("/page.js", (_PAGE / "page.js").read_bytes(), "text/javascript"),
    ]
    for number, example in enumerate(examples):
        routes.append(_fixed(f"/examples/{number}", Path(example["image"]).read_bytes(), "image/png"))
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)])


def _rehearse(pipe: SGLPipeline) -> None:
    """Run both VLMs once: the very first answer takes longer, and its times mean nothing."""
    example = tiny.samples()[0]
    pipe.with_config(replace(pipe.config, exit_threshold=None))(example["image"], example["prompt"])


def _shown(templates: Environment, reply: Reply) -> str:
    runs = reply.runs.values()
    return templates.get_template("answer.html").render(
        reply=reply,
        names=list(dict.fromkeys(stage for stages in runs for stage in stages)),
        longest=max(sum(stages.values()) for stages in runs),
    )


async def _body(request: Request) -> bytes:
    if request.headers.get("content-type") != "application/octet-stream":  # what no foreign page can send
        raise ImageError("Send the picture's bytes as application/octet-stream.")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BYTES:
            raise ImageError(f"The picture is larger than {MAX_BYTES // 2**20} MiB. Scale it down.")
    return bytes(data)


def _fixed(path: str, content: bytes, media_type: str) -> Route:
    from starlette.responses import Response
    from starlette.routing import Route

    async def send(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return Route(path, send)


def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["data_url"] = _data_url
    return templates


def _data_url(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=1)  # much faster than the default, hardly larger
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
