"""The request log over real HTTP: one line a request in every dialect, whatever becomes of it."""

from __future__ import annotations

import io
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from mlx_gptoss.server.log_output import BackgroundHandler
from mlx_gptoss.server.request_log import JsonFormatter, TextFormatter, escaped, text_line
from mlx_gptoss.server.run import Server

SECRET = "zebra"  # a word of every prompt here
CHAT = {"messages": [{"role": "user", "content": f"What is 12 + 30? {SECRET}"}], "max_tokens": 30}
DIALECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", CHAT),
    "chat of two": ("/v1/chat/completions", CHAT | {"n": 2, "seed": 1}),
    "responses": ("/v1/responses", {"input": f"What is 12 + 30? {SECRET}", "max_output_tokens": 30}),
    "completions": ("/v1/completions", {"prompt": f"12 + 30 = {SECRET}", "max_tokens": 30}),
    "messages": ("/v1/messages", CHAT | {"model": "claude"}),
    "ollama chat": ("/api/chat", {"model": "m", "messages": CHAT["messages"], "options": {"num_predict": 30}}),
    "ollama generate": ("/api/generate", {"model": "m", "prompt": SECRET, "options": {"num_predict": 30}}),
}


class Lines(logging.Handler):
    """Collects the records of requests."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def of(self, request_id: str, count: int = 1) -> list[dict[str, Any]]:
        """The lines with this id, as soon as there are `count`: a client may have its response before the line."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = [vars(r)["request"] for r in list(self.records) if vars(r)["request"]["request_id"] == request_id]
            if len(found) >= count:
                return found
            time.sleep(0.01)
        raise AssertionError(f"no line for {request_id}: {[record.getMessage() for record in self.records]}")


@pytest.fixture
def lines() -> Iterator[Lines]:
    log = logging.getLogger("mlx_gptoss.server.request_log")
    handler, level = Lines(), log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield handler
    log.setLevel(level)
    log.removeHandler(handler)


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_logs_one_line_with_its_counts_and_times(
    http: httpx.Client, lines: Lines, dialect: str, streams: bool
) -> None:
    path, body = DIALECTS[dialect]
    answer = http.post(path, json=body | {"stream": streams, "mood": "sunny"}, headers={"X-Request-Id": "abc-1"})
    assert answer.status_code == 200 and answer.headers["X-Request-Id"] == "abc-1"
    (line,) = lines.of("abc-1")
    assert (line["method"], line["path"], line["route"], line["status"]) == ("POST", path, path, 200)
    assert line["client"] == "127.0.0.1" and line["model"] == "mlx-gptoss-nano"
    assert line["ignored_fields"] and "mood" in line["ignored_fields"] and line["error_code"] is None
    assert line["prompt_tokens"] > 0 and 0 <= line["cached_tokens"] < line["prompt_tokens"]
    assert 0 < line["completion_tokens"] <= 60 and line["finish_reason"] in ("stop", "length")
    assert 0 <= line["queue_s"] <= line["ttft_s"] <= line["total_s"] and line["prefill_s"] > 0
    assert line["tokens_per_s"] > 0
    assert SECRET not in json.dumps(line)


def test_counts_are_those_of_the_usage(http: httpx.Client, lines: Lines) -> None:
    for name in ("one", "two"):
        usage = http.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Id": name}).json()["usage"]
        (line,) = lines.of(name)
        assert line["prompt_tokens"] == usage["prompt_tokens"]
        assert line["completion_tokens"] == usage["completion_tokens"]
        assert line["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]


def test_an_id_is_made_where_the_client_sends_none_or_an_unfit_one(http: httpx.Client, lines: Lines) -> None:
    for given in ({}, {"X-Request-Id": "a b"}, {"X-Request-Id": "x" * 129}, {"X-Request-Id": "é"}):
        answer = http.get("/v1/models", headers=[(k, v.encode("latin-1")) for k, v in given.items()])
        made = answer.headers["X-Request-Id"]
        assert re.fullmatch(r"req_[0-9a-f]{24}", made)
        assert lines.of(made)[0]["route"] == "/v1/models"


def test_anthropics_request_id_is_that_of_the_log(http: httpx.Client, lines: Lines) -> None:
    answer = http.post("/v1/messages", json={"model": "claude"})
    assert answer.headers["request-id"] == answer.headers["X-Request-Id"] == answer.json()["request_id"]
    assert lines.of(answer.headers["request-id"])[0]["status"] == 400


def test_failed_and_refused_requests_have_a_line(http: httpx.Client, lines: Lines, serve: Any, model: Any) -> None:
    expected = {
        ("POST", "/v1/chat/completions", b"{"): (400, "invalid_json"),
        ("POST", "/v1/chat/completions", b'{"messages": [], "temperature": -1}'): (400, "invalid_value"),
        ("GET", "/no/such", None): (404, "status_404"),
        ("PUT", "/v1/models", None): (405, "status_405"),
        ("HEAD", "/v1/models", None): (200, None),
    }
    for (method, path, body), (status, code) in expected.items():
        answer = http.request(method, path, content=body, headers={"Content-Type": "application/json"})
        (line,) = lines.of(answer.headers["X-Request-Id"])
        assert (line["method"], line["path"], line["status"], line["error_code"]) == (method, path, status, code)
    wrong = http.get("/v1/models", headers={"Host": "evil.example"})
    assert lines.of(wrong.headers["X-Request-Id"])[0]["error_code"] == "wrong_host"
    with serve(model, api_key="hunter22") as keyed, httpx.Client(base_url=keyed.url) as client:
        for key, status in (("Bearer wrong-key", 401), ("Bearer hunter22", 200)):
            answer = client.get("/v1/models", headers={"Authorization": key})
            (line,) = lines.of(answer.headers["X-Request-Id"])
            assert line["status"] == status
            assert "hunter22" not in json.dumps(line) and "wrong-key" not in json.dumps(line)


@pytest.fixture
def held_engine(server: Server) -> Iterator[None]:
    """The engine computes nothing until the test ends."""
    release = threading.Event()
    engine = server.service.model._engine
    thread = threading.Thread(target=engine.call, args=(lambda runner: release.wait(60),))
    thread.start()
    yield
    release.set()
    thread.join()


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("dialect", ["chat", "responses", "completions", "messages", "ollama chat"])
@pytest.mark.usefixtures("held_engine")
def test_a_client_that_leaves_is_a_499(server: Server, lines: Lines, dialect: str, streams: bool) -> None:
    path, body = DIALECTS[dialect]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + path, json=body | {"stream": streams}, headers={"X-Request-Id": "gone"}, timeout=0.5)
    (line,) = lines.of("gone")
    assert (line["status"], line["path"], line["finish_reason"]) == (499, path, None)
    assert line["total_s"] >= 0.4


def test_a_client_that_leaves_before_its_body_is_complete_is_a_499(server: Server, lines: Lines) -> None:
    address = urlsplit(server.url)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Request-Id: half\r\nContent-Length: 99\r\n\r\n{"
    with socket.create_connection((address.hostname or "", address.port or 0)) as connection:
        connection.sendall(head.encode())
        time.sleep(0.2)
    (line,) = lines.of("half")
    assert (line["status"], line["completion_tokens"]) == (499, None)


def test_a_response_in_the_background_has_a_second_line_at_its_end(http: httpx.Client, lines: Lines) -> None:
    body = {"input": "What is 12 + 30?", "background": True, "max_output_tokens": 20}
    assert http.post("/v1/responses", json=body, headers={"X-Request-Id": "later"}).status_code == 200
    first, second = lines.of("later", count=2)
    assert first["completion_tokens"] is None and first["status"] == 200
    assert second["completion_tokens"] > 0 and second["background"] is True


def test_health_checks_are_logged_at_debug_only(http: httpx.Client, lines: Lines) -> None:
    ids = {path: http.get(path).headers["X-Request-Id"] for path in ("/health", "/ready", "/metrics", "/v1/models")}
    for path, request_id in ids.items():
        lines.of(request_id)
        (record,) = [r for r in lines.records if vars(r)["request"]["request_id"] == request_id]
        assert record.levelname == ("INFO" if path == "/v1/models" else "DEBUG")


def test_a_client_cannot_forge_a_line(http: httpx.Client, lines: Lines) -> None:
    """Neither by a path, nor by an id, in text or in JSON."""
    path = "/v1/models/a%0A2026-01-01T00:00:00Z%20INFO%20forged%1b[2J%E2%80%AE%22%20status=200" + "x" * 3000
    answer = http.get(path)
    lines.of(answer.headers["X-Request-Id"])
    (record,) = [r for r in lines.records if answer.headers["X-Request-Id"] in r.getMessage()]
    for formatter in (TextFormatter(), JsonFormatter()):
        line = formatter.format(record)
        assert line.isascii() and line.isprintable() and len(line) < 1500
    assert '"/v1/models/a\\n2026' in TextFormatter().format(record)
    assert r"\" status=200x" in TextFormatter().format(record)
    assert json.loads(JsonFormatter().format(record))["path"].startswith("/v1/models/a\\n2026")


def test_other_records_stay_on_their_line_too() -> None:
    record = logging.LogRecord("elsewhere", logging.WARNING, "f", 1, "a name: %s", ("x\n2026 INFO \x1b[1m",), None)
    assert TextFormatter().format(record).endswith(r"WARNING elsewhere: a name: x\n2026 INFO \x1b[1m")
    assert json.loads(JsonFormatter().format(record))["message"] == "a name: x\n2026 INFO \x1b[1m"


def test_escaping_is_bounded() -> None:
    assert escaped("a\\n\ud800\u202e" + "b" * 300) == r"a\\n\ud800\u202e" + "b" * 195 + "..."
    assert "ä" in escaped("ä")
    values = dict.fromkeys(("client", "method", "path", "route", "status"), None)
    assert text_line({**values, "model": 'a "b" c=d', "total_s": 1.5}) == r'- - - - model="a \"b\" c=d" total_s=1.5'


def test_a_reader_that_stops_does_not_stop_the_writer() -> None:
    gate, stream = threading.Event(), io.StringIO()

    class Stalled(io.StringIO):
        def write(self, text: str) -> int:
            gate.wait()
            return stream.write(text)

    handler = BackgroundHandler(Stalled())
    started = time.monotonic()
    for number in range(10_100):
        handler.handle(logging.LogRecord("x", logging.INFO, "f", 1, f"line {number}", (), None))
    assert time.monotonic() - started < 30
    gate.set()
    handler.close()
    written = stream.getvalue().splitlines()
    assert any(re.fullmatch(r"\d+ lines of the log were dropped: it was not read", line) for line in written)
    assert sum(line.startswith("line ") for line in written) >= 10_000


def test_a_closed_standard_error_is_no_error() -> None:
    stream = io.StringIO()
    handler = BackgroundHandler(stream)
    stream.close()
    handler.handle(logging.LogRecord("x", logging.INFO, "f", 1, "line", (), None))
    handler.close()


def test_serve_writes_the_lines_to_standard_error() -> None:
    """A process of its own: JSON, ordinary requests, no health checks, nothing of uvicorn."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_gptoss_cli", "serve", "--model", "nano", "--port", str(port)]
    process = subprocess.Popen([*command, "--log-format", "json"], stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            try:
                httpx.get(f"{url}/health", timeout=5)
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=60).status_code == 200
        assert httpx.get(f"{url}/nothing", timeout=60).status_code == 404
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=60)
    found = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    requests = [(one["level"], one["method"], one["path"], one["status"]) for one in found if "path" in one]
    assert requests == [("info", "POST", "/v1/chat/completions", 200), ("info", "GET", "/nothing", 404)]
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", one["time"]) for one in found)
    assert "uvicorn" not in errors and "/health" not in errors
