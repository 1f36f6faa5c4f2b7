"""The server as others meet it: one line on bad starts, words on bad requests, nothing beside the page."""

from __future__ import annotations

import http.client
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest

from sgl_runtime import cli, tiny
from sgl_runtime.web import server
from tests.web.served import served

FIELDS = {"keep_ratio": "0.05", "prune_layer": "0", "exit_threshold": "0.9"}
SAMPLES = tiny.samples()


def request(
    address: str, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    return response.status, response.headers, response.read()


def ask(address: str, sample: tiny.Sample, **changes: str) -> tuple[int, str]:
    path = f"/answer?{urlencode({**FIELDS, 'prompt': sample['prompt'], **changes})}"
    data = Path(sample["image"]).read_bytes()
    status, _, body = request(address, "POST", path, data, content_type="application/octet-stream")
    return status, body.decode()


def begun(host: str, length: int) -> bytes:
    """The head of a question whose picture is to come."""
    return (
        f"POST /answer?prompt=a HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n"
        "Content-Type: application/octet-stream\r\n\r\n"
    ).encode()


def until(condition: Callable[[], bool]) -> None:
    """Wait for what the server does as soon as it has seen what was sent."""
    for _ in range(100):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def test_everyone_gets_their_own_answer(address: str) -> None:
    """Eight at once, over a pipeline that has memory for one."""
    questions = SAMPLES * 2
    with ThreadPoolExecutor(len(questions)) as users:
        for sample, (status, shown) in zip(
            questions, users.map(lambda sample: ask(address, sample), questions), strict=True
        ):
            assert status == 200
            assert f'<p id="text">{sample["answer"]}</p>' in shown


def test_an_error_is_one_text_and_the_server_goes_on(address: str) -> None:
    status, told = ask(address, SAMPLES[0], keep_ratio="7")
    assert status == 400
    assert told == "keep_ratio must be in (0, 1], got 7.0. 7 looks like a percentage, write 0.07."
    assert ask(address, SAMPLES[0])[0] == 200


def test_uploads_have_a_limit(address: str) -> None:
    host, port = urlsplit(address).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(begun(host, 2 * server.MAX_BYTES))
        client.sendall(bytes(server.MAX_BYTES + 1))
        answer = client.makefile("rb")
        assert answer.readline().startswith(b"HTTP/1.1 400")
        assert b"larger than 32 MiB" in next(line for line in answer if b"picture" in line)


def test_too_many_questions_are_refused(address: str) -> None:
    host, port = urlsplit(address).netloc.split(":")
    with ExitStack() as slow:
        for _ in range(server.MAX_QUESTIONS):
            client = slow.enter_context(socket.create_connection((host, int(port)), timeout=60))
            client.sendall(begun(host, 9))
        until(lambda: ask(address, SAMPLES[0]) == (503, "Too many questions are waiting. Try again later."))
    until(lambda: ask(address, SAMPLES[0])[0] == 200)


@pytest.mark.parametrize(
    "path",
    [
        "/page.html",
        "/../server.py",
        "/%2e%2e/server.py",
        "/examples/9",
        "/examples/..%2f..%2fsmall",
        "/etc/passwd",
    ],
)
def test_nothing_else_is_served(address: str, path: str) -> None:
    assert request(address, "GET", path)[0] == 404


def test_the_page_may_load_nothing_from_elsewhere(address: str) -> None:
    status, headers, page = request(address, "GET", "/")
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert b"http" not in page
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_foreign_pages_cannot_ask(address: str) -> None:
    assert request(address, "GET", "/", host="evil.example")[0] == 400
    status, _, told = request(address, "POST", "/answer?prompt=a", b"x", content_type="text/plain")
    assert (status, told) == (400, b"Send the picture's bytes as application/octet-stream.")


def test_the_settings_of_the_command_are_where_the_sliders_start() -> None:
    with served("--keep-ratio", "0.25", "--prune-layer", "0.5", "--exit-threshold", "0.5") as (
        address,
        process,
    ):
        page = request(address, "GET", "/")[2].decode()
        for name, value in {"keep_ratio": "0.25", "prune_layer": "5", "exit_threshold": "0.5"}.items():
            slider = page.split(f'id="{name}"')[1].split(">")[0]
            assert f'value="{value}"' in slider
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[0] == "sgl-vlm demo: ended.\n"
        assert process.returncode == 0


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["sgl-vlm", "demo", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), capsys.readouterr().err


def test_a_port_in_use_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, err = run("--web", "--port", port, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert err == (
        f"sgl-vlm: error: Cannot listen on 127.0.0.1, port {port} (Address already in use). Choose another "
        "--port, 0 for any that is free, or check --host.\n"
    )


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, err = run("--web", "--port", "0", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert err == 'sgl-vlm: error: The page needs uvicorn: pip install "sgl-vlm[web]".\n'


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--web", "--small", "a"), "--small came without --large: give both, or neither"),
        (("--web", "--large", "a"), "--large came without --small"),
        (("--small", "a", "--large", "b"), "--small and --large are for demo --web"),
        (("--web", "--host", "no such host"), "Cannot listen on no such host"),
    ],
)
def test_a_bad_start_is_one_line(
    arguments: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    code, err = run(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Path]]:
    """An address, where that server's temporary files would go, and what it says on stderr."""
    folder, complaints = tmp_path_factory.mktemp("temporary"), tmp_path_factory.mktemp("log") / "stderr"
    with (
        complaints.open("w") as file,
        served(environment={"TMPDIR": str(folder)}, complaints=file) as (address, _),
    ):
        yield address, folder, complaints


def test_uploads_stay_in_memory(watched: tuple[str, Path, Path]) -> None:
    """Nothing appears where temporary files go, while the server runs."""
    address, folder, _ = watched
    before = set(folder.rglob("*"))
    assert ask(address, SAMPLES[0])[0] == 200
    assert set(folder.rglob("*")) == before


def test_who_leaves_and_who_is_wrong_is_no_failure(watched: tuple[str, Path, Path]) -> None:
    address, _, complaints = watched
    said = complaints.read_text()
    host, port = urlsplit(address).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(begun(host, 9))
        time.sleep(0.2)  # the server waits for the picture by now
    assert ask(address, SAMPLES[0], keep_ratio="7")[0] == 400
    assert ask(address, SAMPLES[0])[0] == 200
    assert complaints.read_text() == said
