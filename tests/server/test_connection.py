"""Heads that are too long, and connections that are too many, over real sockets: the answer is a JSON error."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from mlx_gptoss.server import run
from mlx_gptoss.server.run import MAX_HEADER_BYTES

FORMS = {  # path -> whether an error has the form of its dialect
    "/v1/chat/completions": lambda body: set(body["error"]) == {"message", "type", "param", "code"},
    "/v1/messages": lambda body: body["type"] == "error" and set(body["error"]) == {"type", "message"},
    "/api/chat": lambda body: isinstance(body["error"], str),
}


def head(path: str, size: int, field: bytes = b"X") -> bytes:
    """The head of a GET request of `size` bytes, filled up with header fields of 1,000 bytes."""
    start = b"GET " + path.encode() + b" HTTP/1.1\r\nHost: localhost\r\n"
    left = size - len(start) - 2
    lines = []
    while left:
        line = min(left, 1000) if left - 1000 > 20 or left <= 1000 else left - 500
        lines.append(field + b": " + b"y" * (line - len(field) - 4) + b"\r\n")
        left -= line
    return start + b"".join(lines) + b"\r\n"


def ask(port: int, data: bytes, pieces: int = 1, wait: float = 0.0) -> tuple[int, dict[str, str], bytes]:
    """Send bytes in so many pieces, and return the status, the headers and the body of what comes back."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(60)
        step = -(-len(data) // pieces)
        try:
            for start in range(0, len(data), step):
                connection.sendall(data[start : start + step])
                time.sleep(wait)
        except ConnectionError:
            pass  # the server has answered before it had everything
        got = b""
        try:
            while (piece := connection.recv(1 << 16)) and not complete(got := got + piece):
                pass
        except ConnectionError:
            pass
    top, _, body = got.partition(b"\r\n\r\n")
    first, *lines = top.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return int(first.split(" ")[1]), headers, body


def complete(got: bytes) -> bool:
    top, _, body = got.partition(b"\r\n\r\n")
    length = [line for line in top.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(length) and len(body) >= int(length[0].split(b":")[1])


@pytest.mark.parametrize("path", FORMS)
@pytest.mark.parametrize("size", [MAX_HEADER_BYTES + 1, 60_000, 200_000])
@pytest.mark.parametrize("pieces", [1, 20])
def test_long_heads_get_a_431(server: Any, path: str, size: int, pieces: int) -> None:
    status, headers, body = ask(server.port, head(path, size), pieces, 0.0 if pieces == 1 else 0.01)
    assert (status, headers["content-type"], headers["connection"]) == (431, "application/json", "close")
    assert FORMS[path](json.loads(body)) and b"longer than 32768 bytes" in body


def test_heads_up_to_the_limit_are_read(server: Any) -> None:
    for size in (1000, MAX_HEADER_BYTES - 1, MAX_HEADER_BYTES):
        assert len(head("/health", size)) == size
        assert ask(server.port, head("/health", size))[0] == 200
        assert ask(server.port, head("/health", size), 20, 0.01)[0] == 200


def test_a_long_target_and_many_short_fields(server: Any) -> None:
    assert ask(server.port, b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 431
    assert ask(server.port, b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X:y\r\n" * 7_000 + b"\r\n")[0] == 431


def test_a_long_second_head_on_one_connection(server: Any) -> None:
    """It waits in the buffer while the first request is answered."""
    data = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + head("/health", 60_000)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(60)
        connection.sendall(data)
        got = b""
        try:
            while piece := connection.recv(1 << 16):
                got += piece
        except ConnectionError:
            pass
    assert got.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 431" in got


@pytest.mark.parametrize("data", [b"GET\r\n\r\n", b"\x16\x03\x01\x02\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"])
def test_what_is_no_request_gets_json_too(server: Any, data: bytes) -> None:
    status, headers, body = ask(server.port, data)
    assert (status, headers["content-type"]) == (400, "application/json")
    assert json.loads(body)["error"]["code"] == "invalid_http"


def test_garbage_within_a_body_ends_the_connection_alone(server: Any) -> None:
    start = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert ask(server.port, start + b"zz\r\n")[0] in (400, 500)
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("path", FORMS)
def test_too_many_connections_get_a_503(serve: Any, model: Any, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(run, "MAX_CONNECTIONS", 4)
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with ExitStack() as servers, ExitStack() as stack:
        server = servers.enter_context(serve(model))
        for _ in range(4):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            connection.sendall(request)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        body = b'{"model": "x", "messages": []}'
        fields = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}".encode()
        post = b"POST " + path.encode() + b" HTTP/1.1\r\n" + fields + b"\r\n\r\n" + body
        status, headers, answer = ask(server.port, post)
        assert (status, headers["content-type"], headers["retry-after"]) == (503, "application/json", "1")
        assert FORMS[path](json.loads(answer)) and b"connections" in answer
        stack.close()
        until = time.monotonic() + 60
        while ask(server.port, request)[0] != 200:
            assert time.monotonic() < until
