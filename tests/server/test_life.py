"""Clients that leave, queues that are full, and how a server ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

import mlx_gptoss

PATH = "/v1/chat/completions"
KEY = "sesame"
KEYED = {"Authorization": f"Bearer {KEY}"}
SUM = [{"role": "user", "content": "What is 12 + 30?"}]


@pytest.fixture(scope="module")
def endless(model):
    """A request that goes on until it is stopped: every special token, which could end it, is forbidden."""
    bias = {str(id): -100 for id in model.tokenizer.specials.values()}
    return {"prompt": "abc", "max_tokens": 4000, "logit_bias": bias}


@pytest.fixture(scope="module")
def narrow(serve):
    """One slot, one place to wait."""
    with mlx_gptoss.load(max_context=4096, max_waiting=1) as model, serve(model) as server:
        yield server


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


def leave_after(server, path, body, received):
    """Send a request and hang up once so many bytes of the answer are there."""
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
            until(lambda: server.service.open_queues)


@pytest.mark.parametrize(
    ("stream", "received"), [(True, 3000), (True, 0), (False, 0)], ids=["streaming", "at once", "whole"]
)
def test_a_client_that_leaves_frees_its_slot(narrow, endless, stream, received, monkeypatch):
    model, streams = narrow.service.model, []
    submit = model._engine.submit
    monkeypatch.setattr(model._engine, "submit", lambda request: streams.append(submit(request)) or streams[-1])
    leave_after(narrow, "/v1/completions", {**endless, "stream": stream}, received)
    until(lambda: not narrow.service.open_queues and model.status.running == 0)
    assert [stream.drain().reason for stream in streams] == ["cancelled"]
    assert httpx.post(narrow.url + PATH, json={"messages": SUM}, timeout=60).status_code == 200


def test_a_client_that_leaves_while_its_prompt_is_computed(narrow):
    long = {"prompt": [id % 200 for id in range(4000)], "max_tokens": 50}
    leave_after(narrow, "/v1/completions", long, 0)
    until(lambda: not narrow.service.open_queues and narrow.service.model.status.running == 0)


@pytest.mark.parametrize("path", ["/v1/responses", PATH])
def test_leaving_a_conversation(narrow, path):
    asked = {"input": SUM[0]["content"]} if path.endswith("responses") else {"messages": SUM}
    leave_after(narrow, path, {**asked, "stream": True}, 600)
    until(lambda: not narrow.service.open_queues and not narrow.service.running_responses)


def test_beyond_the_queue_it_is_503_with_retry_after(narrow, endless):
    with httpx.Client(base_url=narrow.url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json={**endless, "stream": True}) as first:
            arriving = first.iter_raw()  # to be kept: the client leaves when it is forgotten
            next(arriving)
            waiting = threading.Thread(target=client.post, args=(PATH,), kwargs={"json": {"messages": SUM}})
            waiting.start()
            until(lambda: narrow.service.model.status.waiting == 1)
            for body in ({"messages": SUM}, {"messages": SUM, "stream": True}):
                refused = client.post(PATH, json=body)
                assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["code"] == "busy"
            shown = client.get("/metrics").text
            assert "mlx_gptoss_running 1.0" in shown and "mlx_gptoss_waiting 1.0" in shown
        waiting.join(60)
        assert client.post(PATH, json={"messages": SUM, "n": 3}).status_code == 503  # more than there will ever be
        assert client.post(PATH, json={"messages": SUM}).status_code == 200
    assert not narrow.service.open_queues


def test_metrics_count_what_was_done(narrow):
    def read():
        lines = [line for line in httpx.get(narrow.url + "/metrics", timeout=60).text.splitlines() if line[0] != "#"]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = read()
    usage = httpx.post(narrow.url + PATH, json={"messages": SUM}, timeout=60).json()["usage"]
    httpx.post(narrow.url + PATH, json={"messages": SUM, "nonsense": 1}, timeout=60)
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


def test_a_stream_that_waits_is_kept_alive(narrow, endless, monkeypatch):
    monkeypatch.setattr("mlx_gptoss.server.sse.KEEP_ALIVE_S", 0.1)
    body = {**endless, "stream": True}
    with (
        httpx.stream("POST", narrow.url + "/v1/completions", json=body, timeout=60) as first,
        httpx.stream("POST", narrow.url + PATH, json={"messages": SUM, "stream": True}, timeout=60) as second,
    ):
        lines = first.iter_lines()
        next(lines)
        arriving = second.iter_lines()
        heard = [next(arriving) for _ in range(7)]
    assert heard.count(": keep-alive") >= 2
    until(lambda: not narrow.service.open_queues)


def test_what_fails_in_the_middle_of_a_stream_is_an_event(serve):
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
            model = server.service.model = mlx_gptoss.load(max_context=4096)
        assert httpx.post(server.url + PATH, json={"messages": SUM}, timeout=60).status_code == 200
    model.close()


@pytest.fixture
def process():
    """mlx-gptoss serve as a process of its own, and where it listens."""
    words = [sys.executable, "-m", "mlx_gptoss_cli", "serve", "--port", "0", "--backend", "mlx", "--device", "cpu"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "MLX_GPTOSS_API_KEY": KEY}
    running = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=env)
    url = running.stderr.readline().split(" at ")[1].split(",")[0]
    until(lambda: _answers(url))
    yield running, url
    running.kill()
    running.wait()


def _answers(url):
    try:
        return httpx.get(url + "/health", timeout=60).status_code == 200
    except httpx.HTTPError:
        return False


def test_sigterm_lets_what_runs_come_to_its_end(process, endless):
    running, url = process
    body = {**endless, "max_tokens": 300, "stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60, headers=KEYED) as answer:
        lines = answer.iter_lines()
        next(lines)
        running.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(url + "/health", timeout=60).status_code == 503)
        refused = httpx.post(url + PATH, json={"messages": SUM}, headers=KEYED, timeout=60)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        *_, reason, last = [line for line in lines if line]
    assert last == "data: [DONE]" and json.loads(reason[6:])["choices"][0]["finish_reason"] == "length"
    assert running.wait(60) == 0
    assert "Traceback" not in running.stderr.read()


def test_a_second_signal_does_not_wait(process, endless):
    running, url = process
    body = {**endless, "stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60, headers=KEYED) as answer:
        lines = answer.iter_lines()
        next(lines)
        running.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(url + "/health", timeout=60).status_code == 503)
        running.send_signal(signal.SIGTERM)
        *pieces, last = [line for line in lines if line]
        assert json.loads(last[6:])["error"]["code"] == "draining" and len(pieces) < body["max_tokens"] / 2
    running.wait(60)
    assert "Traceback" not in running.stderr.read()


def test_the_key_may_come_from_the_environment_and_ctrl_c_exits_with_130(process):
    running, url = process
    assert httpx.get(url + "/v1/models", timeout=60).status_code == 401
    assert httpx.get(url + "/v1/models", headers=KEYED, timeout=60).status_code == 200
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130
    assert "Traceback" not in running.stderr.read()


def test_a_port_in_use_is_one_clear_error(server):
    words = [sys.executable, "-m", "mlx_gptoss_cli", "serve", "--port", str(server.port)]
    out = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert out.returncode == 1
    assert out.stderr.startswith("error: cannot listen") and "--port" in out.stderr and out.stderr.count("\n") == 1


def test_without_the_extra_the_error_names_it():
    code = (
        "import sys; sys.modules['fastapi'] = None; sys.argv = ['mlx-gptoss', 'serve']\n"
        "from mlx_gptoss_cli.main import main; main()"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (out.returncode, out.stderr) == (
        1,
        "error: the server's packages are missing: pip install 'mlx-gptoss[serve]'\n",
    )
