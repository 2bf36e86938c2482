"""Access checks, size limits, timeouts, and requests that are not HTTP."""

from __future__ import annotations

import json
import re
import socket
import time

import httpx
import openai
import pytest
from click.testing import CliRunner
from mlx_gptoss_cli.serve import serve as serve_command

from mlx_gptoss.server.connection import Timeouts
from mlx_gptoss.server.run import allowed_hosts

SUM = [{"role": "user", "content": "What is 12 + 30?"}]
BODY = {"messages": SUM, "max_tokens": 1}
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def keyed(serve, model):
    with serve(model, api_key="sésame", allowed_origins=("https://friend.example",), max_body_bytes=100_000) as server:
        yield server


@pytest.fixture(scope="module")
def short_timeouts(serve, model):
    with serve(model, timeouts=Timeouts(header_s=0.3, body_s=0.6, send_s=0.5)) as server:
        yield server


def raw(server, data, *, wait=60.0):
    """Send bytes and return the response: less than all of it, or nothing, if the server closes or is silent for `wait`
    seconds."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(wait)
        received = b""
        try:
            connection.sendall(data)
            while not is_complete(received) and (piece := connection.recv(65536)):
                received += piece
        except (TimeoutError, ConnectionError):
            pass
    return received


def is_complete(answer):
    head, end, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return bool(end and length and len(body) >= int(length[1]))


def head(length, *extra):
    lines = ("Host: localhost", "Content-Type: application/json", f"Content-Length: {length}", *extra)
    return "\r\n".join([f"POST {PATH} HTTP/1.1", *lines, "", ""]).encode()


def test_api_key(keyed):
    def ask(**headers):
        return httpx.post(keyed.url + PATH, json=BODY, headers=headers, timeout=60).status_code

    assert ask(Authorization="Bearer sésame".encode()) == 200
    for wrong in ("Bearer sesame", "Bearer", "Basic sesame", "sesame", ""):
        assert ask(Authorization=wrong) == 401
    with pytest.raises(openai.AuthenticationError) as refused:
        openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert refused.value.code == "invalid_api_key"
    assert httpx.get(keyed.url + "/metrics", timeout=60).status_code == 401
    assert httpx.get(keyed.url + "/health", timeout=60).status_code == 200


def test_body_is_not_read_without_a_key(keyed):
    answer = raw(keyed, head(99_999) + b"{")
    assert answer.startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost"}, 200),
        ({"Host": "127.0.0.1:1"}, 200),
        ({"Host": "[::1]:8080"}, 200),
        ({"Host": "rebound.example"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://rebound.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": "http://localhost.rebound.example"}, 403),
        ({"Origin": "http://127.0.0.1@rebound.example"}, 403),
        ({"Origin": "https://app://obsidian.md"}, 403),
        ({"Host": "host.docker.internal:8080"}, 200),
        ({"Host": "localhost:80", "Origin": "http://localhost:80"}, 200),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "https://127.0.0.1"}, 200),
        ({"Origin": "http://[::1]:5173"}, 200),
        ({"Origin": "vscode-webview://0abc"}, 200),
        ({"Origin": "app://obsidian.md"}, 200),
    ],
)
def test_other_hosts_and_origins_are_refused(http, headers, status):
    assert http.post(PATH, json=BODY, headers=headers).status_code == status


def test_cors_only_for_allowed_origins(http, keyed):
    ask = {"Origin": "https://friend.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in http.options(PATH, headers=ask).headers
    allowed = httpx.options(keyed.url + PATH, headers=ask, timeout=60)
    assert allowed.headers["access-control-allow-origin"] == "https://friend.example"
    other = httpx.options(keyed.url + PATH, headers={**ask, "Origin": "https://foe.example"}, timeout=60)
    assert "access-control-allow-origin" not in other.headers


def test_pages_of_this_machine_may_read_the_answers(http):
    for origin in ("http://localhost:3000", "vscode-webview://0abc", "app://obsidian.md"):
        ask = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-any"}
        assert http.options(PATH, headers=ask).headers["access-control-allow-origin"] == origin
        answer = http.post(PATH, json=BODY, headers={"Origin": origin})
        assert answer.headers["access-control-allow-origin"] == origin


def test_a_server_on_the_network_lets_no_page_in_unasked(serve, model):
    with serve(model, allowed_hosts=None) as server:
        for origin in ("http://localhost:3000", "app://obsidian.md", "null"):
            assert httpx.post(server.url + PATH, json=BODY, headers={"Origin": origin}, timeout=60).status_code == 403


def test_a_server_on_the_network_without_a_key_takes_no_foreign_name(serve, model):
    """DNS rebinding: the name of a page's site resolves to this machine."""
    with serve(model, allowed_hosts=allowed_hosts("0.0.0.0", keyed=False)) as server:
        for host, status in (
            ("192.168.1.20:8080", 200),
            ("[fe80::1]:8080", 200),
            (socket.gethostname(), 200),
            ("rebound.example", 403),
            ("127.0.0.1.rebound.example", 403),
        ):
            assert httpx.get(f"{server.url}/health", headers={"Host": host}, timeout=60).status_code == status, host
    assert allowed_hosts("0.0.0.0", keyed=True) is None


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--api-key", " "], "--api-key is empty"),
        (["--host", "0.0.0.0"], "set an --api-key, or accept that by --insecure"),
    ],
)
def test_an_open_server_has_to_be_asked_for(words, complaint):
    answer = CliRunner().invoke(serve_command, words, env={"MLX_GPTOSS_API_KEY": None})
    assert answer.exit_code == 2 and complaint in answer.output


def test_sandboxed_frames_are_let_in_by_name(serve, model):
    with serve(model, allowed_origins=("null",)) as server:
        answer = httpx.post(server.url + PATH, json=BODY, headers={"Origin": "null"}, timeout=60)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "null")


def test_form_of_a_page_is_rejected(http):
    """A browser sends text/plain to any site without a CORS preflight, but never without an Origin."""
    headers = {"Content-Type": "text/plain", "Origin": "http://localhost:3000"}
    assert http.post(PATH, content=json.dumps(BODY), headers=headers).status_code == 400


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_json_of_a_program_needs_no_content_type(http, content_type):
    headers = {} if content_type is None else {"Content-Type": content_type}
    assert http.post(PATH, content=json.dumps(BODY), headers=headers).status_code == 200


def test_large_bodies_are_rejected_while_they_are_read(keyed, idle):
    key = "Authorization: Bearer sésame"
    large = raw(keyed, head(100_001, key))
    assert large.startswith(b"HTTP/1.1 413")
    chunked = head(0, key, "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
    endless = raw(keyed, chunked + b"10000\r\n" + b" " * 65536 + b"\r\n10000\r\n" + b" " * 65536 + b"\r\n")
    assert endless.startswith(b"HTTP/1.1 413") and b"100000" in endless
    assert idle(keyed)  # no byte of the bodies is counted any more


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("[" + "0," * 250_001 + "0]", 413),
        ("[" * 100_000, 400),
        ('{"messages": ' + "[" * 5000 + "]" * 5000 + "}", 400),
        ('{"messages": [' + "1" * 5000 + "]}", 400),
        ('{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}', 400),
        ('{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1}', 200),
        ('{"messages": [{"role": "\\ud800", "content": "x"}]}', 400),
        ('{"model": "\\ud800", "messages": []}', 400),
        ("\ud7ff", 400),
        ("null", 400),
        ("", 400),
        ('{"messages": [{"role": "user", "content": "x"}], "messages": 1}', 400),
    ],
)
def test_malformed_bodies(http, body, code):
    answer = http.post(PATH, content=body.encode(), headers={"Content-Type": "application/json"})
    assert answer.status_code == code, answer.text
    if code != 200:
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("deep", [True, False])
def test_schemas_over_the_limits(http, deep):
    schema = {"type": "object"}
    if deep:
        for _ in range(100):
            schema = {"type": "object", "properties": {"a": schema}}
    else:
        schema["properties"] = {f"a{number}": {"type": "string"} for number in range(6000)}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    answer = http.post(PATH, json={**BODY, "tools": [tool]})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "schema_too_large"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + b"\x00\xff garbage\r\n\r\n" * 5,
        b"\r\n" * 50_000,
        bytes(range(256)) * 40,
    ],
)
def test_bytes_that_are_not_http(server, http, data):
    answer = raw(server, data, wait=0.3)
    assert not answer or answer.startswith(b"HTTP/1.1 ")
    assert http.get("/health").json()["status"] == "ok"


def test_paths_do_not_reach_files(http, model):
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page//etc/passwd", "/%00"):
        assert http.get(path).status_code == 404
    named = http.post(PATH, json={**BODY, "model": "/etc/passwd"}).json()
    assert named["model"] == http.get("/v1/models/%2e%2e%2fetc%2fpasswd").json()["id"] == "mlx-gptoss-nano"


@pytest.mark.parametrize(
    "data",
    [b"", b"POST /v1/chat", head(50), head(50) + b'{"messages"', b"GET /health HTTP/1.1\r\nHost: "],
)
def test_incomplete_request_is_cut_off(short_timeouts, data):
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", short_timeouts.port)) as connection:
        connection.sendall(data)
        connection.settimeout(60)
        with pytest.raises((ConnectionError, EOFError)):
            if not connection.recv(1000):
                raise EOFError
    assert 0.2 < time.monotonic() - started < Timeouts().header_s


def test_slow_headers_are_cut_off(short_timeouts):
    with socket.create_connection(("127.0.0.1", short_timeouts.port)) as connection, pytest.raises(ConnectionError):
        for byte in head(50):
            connection.sendall(bytes([byte]))
            time.sleep(0.05)


def test_idle_keep_alive_connection_stays_open(serve, model):
    timeouts = Timeouts(header_s=2.0)
    with serve(model, timeouts=timeouts) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get("/health").status_code == 200
        connection = client.get("/health").extensions["network_stream"].get_extra_info("client_addr")
        time.sleep(timeouts.header_s + 0.5)
        last = client.get("/health")
        assert last.status_code == 200
        assert last.extensions["network_stream"].get_extra_info("client_addr") == connection


def test_client_that_does_not_read_is_cut_off(short_timeouts):
    """It requests more than all buffers can hold."""
    ask = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", short_timeouts.port)) as connection:
        connection.sendall(ask * 600)
        until = time.monotonic() + 120
        while not short_timeouts.server_state.connections and time.monotonic() < until:
            time.sleep(0.01)
        assert short_timeouts.server_state.connections
        while short_timeouts.server_state.connections and time.monotonic() < until:
            time.sleep(0.01)
        assert not short_timeouts.server_state.connections
        received = 0
        with pytest.raises(ConnectionError):
            while piece := connection.recv(1 << 20):
                received += len(piece)
            raise ConnectionResetError  # closed early, without a reset
        assert received < 600 * len(httpx.get(short_timeouts.url + "/openapi.json", timeout=60).content)
