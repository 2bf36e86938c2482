"""Disconnects, a full queue, metrics, and shutdown."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import httpx
import pytest

import mlx_gptoss
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.server.guard import Gate
from mlx_gptoss.server.models.named import NamedModel
from mlx_gptoss.server.run import Server, listen
from mlx_gptoss.server.service import Service

PATH = "/v1/chat/completions"
KEY = "sesame"
KEYED = {"Authorization": f"Bearer {KEY}"}
SUM = [{"role": "user", "content": "What is 12 + 30?"}]


@pytest.fixture(scope="module")
def endless(model):
    """A request that runs until it is stopped: all special tokens, which could end it, are forbidden."""
    bias = {str(id): -100 for id in model.tokenizer.specials.values()}
    return {"prompt": "abc", "max_tokens": 4000, "logit_bias": bias}


@pytest.fixture(scope="module")
def narrow(serve):
    """A server with one slot and room for one waiting request."""
    with mlx_gptoss.load(max_context=4096, max_waiting=1) as model, serve(model) as server:
        yield server


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


def leave_after(server, path, body, received):
    """Send a request and disconnect after `received` bytes of the response."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + content)
        got = 0
        while got < received:
            got += len(connection.recv(65536))
        if not received:
            wait_until(lambda: server.service.open_queues)


@pytest.mark.parametrize(
    ("stream", "received"),
    [(True, 3000), (True, 0), (False, 0)],
    ids=["streaming", "before the stream", "not streamed"],
)
def test_disconnect_frees_the_slot(narrow, endless, stream, received, monkeypatch):
    model, streams = narrow.service.model, []
    submit = model._engine.submit
    monkeypatch.setattr(model._engine, "submit", lambda request: streams.append(submit(request)) or streams[-1])
    leave_after(narrow, "/v1/completions", {**endless, "stream": stream}, received)
    wait_until(lambda: not narrow.service.open_queues and model.status.running == 0)
    assert [stream.drain().reason for stream in streams] == ["cancelled"]
    assert httpx.post(narrow.url + PATH, json={"messages": SUM}, timeout=60).status_code == 200


def test_disconnect_during_prefill(narrow):
    long = {"prompt": [id % 200 for id in range(4000)], "max_tokens": 50}
    leave_after(narrow, "/v1/completions", long, 0)
    wait_until(lambda: not narrow.service.open_queues and narrow.service.model.status.running == 0)


@pytest.mark.parametrize("path", ["/v1/responses", PATH])
def test_disconnect_during_a_conversation(narrow, path):
    asked = {"input": SUM[0]["content"]} if path.endswith("responses") else {"messages": SUM}
    leave_after(narrow, path, {**asked, "stream": True}, 600)
    wait_until(lambda: not narrow.service.open_queues and not narrow.service.running_responses)


def test_full_queue_is_503_with_retry_after(narrow, endless):
    with httpx.Client(base_url=narrow.url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json={**endless, "stream": True}) as first:
            arriving = first.iter_raw()  # keep a reference: httpx disconnects when it is dropped
            next(arriving)
            waiting = threading.Thread(target=client.post, args=(PATH,), kwargs={"json": {"messages": SUM}})
            waiting.start()
            wait_until(lambda: narrow.service.model.status.waiting == 1)
            for body in ({"messages": SUM}, {"messages": SUM, "stream": True}):
                refused = client.post(PATH, json=body)
                assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["code"] == "busy"
            shown = client.get("/metrics").text
            assert "mlx_gptoss_running 1.0" in shown and "mlx_gptoss_waiting 1.0" in shown
        waiting.join(60)
        assert client.post(PATH, json={"messages": SUM, "n": 3}).status_code == 503  # more than slot and queue together
        wait_until(lambda: client.post(PATH, json={"messages": SUM}).status_code == 200)  # once those are cancelled
    assert not narrow.service.open_queues


def test_metrics_count_requests_and_tokens(narrow):
    def read():
        lines = [line for line in httpx.get(narrow.url + "/metrics", timeout=60).text.splitlines() if line[0] != "#"]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = read()
    usage = httpx.post(narrow.url + PATH, json={"messages": SUM}, timeout=60).json()["usage"]
    httpx.post(narrow.url + PATH, json={"messages": SUM, "n": 0}, timeout=60)
    after = read()

    def more(name):
        return after[name] - before.get(name, 0)

    assert more('mlx_gptoss_requests_total{path="/v1/chat/completions",status="200"}') == 1
    assert more('mlx_gptoss_requests_total{path="/v1/chat/completions",status="400"}') >= 1
    assert more("mlx_gptoss_prompt_tokens_total") == usage["prompt_tokens"]
    assert more("mlx_gptoss_completion_tokens_total") == usage["completion_tokens"]
    assert more("mlx_gptoss_cached_tokens_total") == usage["prompt_tokens_details"]["cached_tokens"]
    assert more("mlx_gptoss_time_to_first_token_seconds_count") == 1
    assert 10 < more("mlx_gptoss_inter_token_seconds_count") < usage["completion_tokens"]


def test_waiting_stream_gets_keep_alive_comments(narrow, endless, monkeypatch):
    monkeypatch.setattr("mlx_gptoss.server.sse.KEEP_ALIVE_S", 0.1)
    body = {**endless, "stream": True}
    with (
        httpx.stream("POST", narrow.url + "/v1/completions", json=body, timeout=60) as first,
        httpx.stream("POST", narrow.url + PATH, json={"messages": SUM, "stream": True}, timeout=60) as second,
    ):
        lines = first.iter_lines()
        next(lines)
        arriving = second.iter_lines()
        received_lines = [next(arriving) for _ in range(7)]
    assert received_lines.count(": keep-alive") >= 2
    wait_until(lambda: not narrow.service.open_queues)


def test_error_in_the_middle_of_a_stream_is_an_event(serve):
    model = mlx_gptoss.load(max_context=4096)
    with serve(model) as server:
        for path, body in ((PATH, {"messages": SUM}), ("/v1/responses", {"input": SUM[0]["content"]})):
            with httpx.stream("POST", server.url + path, json={**body, "stream": True}, timeout=60) as answer:
                lines = answer.iter_lines()
                next(lines)
                threading.Thread(target=model.close).start()
                *_, last = (json.loads(line[6:]) for line in lines if line.startswith("data: {"))
            error = last["error"] if path == PATH else last["response"]["error"]
            assert "closed" in error["message"] and error["code"] == "engine_error"
            model = mlx_gptoss.load(max_context=4096)
            server.service.models = [NamedModel(model, server.service.model_id)]
        assert httpx.post(server.url + PATH, json={"messages": SUM}, timeout=60).status_code == 200
    model.close()


def test_a_failed_engine_is_told_and_ends_the_server():
    """A server that could only answer 500 ends, so that its supervisor starts it again."""
    with pytest.raises(GptOssError, match="ZeroDivisionError"), mlx_gptoss.load() as model:
        listener = listen("127.0.0.1", 0)
        server = Server(Service([NamedModel(model, "nano")], Gate()), drain_s=60)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        failures, answers = [], []

        def serve():
            try:
                server.serve_on(listener)
            except GptOssError as error:
                failures.append(str(error))

        thread = threading.Thread(target=serve)
        thread.start()
        wait_until(lambda: _answers(url))
        with httpx.Client(base_url=url, timeout=60) as http:
            server.on_tick = types.MethodType(lambda self, counter: asyncio.sleep(0, False), server)  # it stays for now
            model._engine._loop.post(lambda: 1 / 0)
            wait_until(lambda: model.failure is not None)
            answers = [
                http.get("/health"),
                http.get("/ready"),
                http.get("/metrics"),
                http.post(PATH, json={"messages": SUM}),
            ]
            del server.on_tick
        thread.join(60)
    assert [answer.status_code for answer in answers] == [503, 503, 200, 500]
    assert answers[0].json()["status"] == "failed" and "\nmlx_gptoss_up 0.0\n" in answers[2].text
    assert len(failures) == 1 and "ZeroDivisionError" in failures[0]


@pytest.fixture
def process():
    """`mlx-gptoss serve` in a process of its own, and its URL."""
    words = [sys.executable, "-m", "mlx_gptoss_cli", "serve", "--port", "0", "--backend", "mlx", "--device", "cpu"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "MLX_GPTOSS_API_KEY": KEY}
    running = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=env)
    url = running.stderr.readline().split(" at ")[1].split(",")[0]
    wait_until(lambda: _answers(url))
    yield running, url
    running.kill()
    running.wait()


def _answers(url):
    try:
        return httpx.get(url + "/health", timeout=60).status_code == 200
    except httpx.HTTPError:
        return False


def test_sigterm_lets_running_requests_finish(process, endless):
    running, url = process
    body = {**endless, "max_tokens": 300, "stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60, headers=KEYED) as answer:
        lines = answer.iter_lines()
        next(lines)
        running.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(url + "/health", timeout=60).status_code == 503)
        refused = httpx.post(url + PATH, json={"messages": SUM}, headers=KEYED, timeout=60)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        *_, reason, last = [line for line in lines if line]
    assert last == "data: [DONE]" and json.loads(reason[6:])["choices"][0]["finish_reason"] == "length"
    assert running.wait(60) == 0
    assert "Traceback" not in running.stderr.read()


def test_second_signal_stops_at_once(process, endless):
    running, url = process
    body = {**endless, "stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60, headers=KEYED) as answer:
        lines = answer.iter_lines()
        next(lines)
        running.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(url + "/health", timeout=60).status_code == 503)
        running.send_signal(signal.SIGTERM)
        *chunks, last = [line for line in lines if line]
        assert json.loads(last[6:])["error"]["code"] == "draining" and len(chunks) < body["max_tokens"] / 2
    running.wait(60)
    assert "Traceback" not in running.stderr.read()


def test_key_from_the_environment_and_exit_code_of_ctrl_c(process):
    running, url = process
    assert httpx.get(url + "/v1/models", timeout=60).status_code == 401
    assert httpx.get(url + "/v1/models", headers=KEYED, timeout=60).status_code == 200
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130
    assert "Traceback" not in running.stderr.read()


def test_port_in_use_is_one_clear_error(server):
    words = [sys.executable, "-m", "mlx_gptoss_cli", "serve", "--port", str(server.port)]
    out = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert out.returncode == 1
    assert out.stderr.startswith("error: cannot listen") and "--port" in out.stderr and out.stderr.count("\n") == 1


def test_error_without_the_serve_extra_names_it():
    code = (
        "import sys; sys.modules['fastapi'] = None; sys.argv = ['mlx-gptoss', 'serve']\n"
        "from mlx_gptoss_cli.main import main; main()"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (out.returncode, out.stderr) == (
        1,
        "error: the server's packages are missing: pip install 'mlx-gptoss[serve]'\n",
    )
