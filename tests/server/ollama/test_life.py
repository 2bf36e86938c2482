"""Disconnects and metrics of Ollama's endpoints."""

from __future__ import annotations

import json
import re
import socket
import time

import pytest
from ollama_requests import SUM, chat


@pytest.fixture(scope="module")
def endless(model):
    """Options of a reply that runs until it is stopped: all special tokens, which could end it, are forbidden."""
    return {"num_predict": 4000, "logit_bias": {str(id): -100 for id in model.tokenizer.specials.values()}}


@pytest.mark.parametrize(("stream", "received"), [(True, 2000), (True, 0), (False, 0)])
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_disconnect_frees_the_slot(server, idle, endless, path, stream, received):
    body = json.dumps({"messages": SUM, "prompt": "12", "stream": stream, "options": endless}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head + body)
        got = 0
        while got < received:
            got += len(connection.recv(65536))
        deadline = time.monotonic() + 60
        while not server.service.open_queues and time.monotonic() < deadline:
            time.sleep(0.002)
        assert server.service.open_queues
    assert idle(server)


def test_metrics_count_tokens(http):
    def generated():
        (line,) = re.findall(r"^mlx_gptoss_completion_tokens_total (\S+)", http.get("/metrics").text, re.M)
        return float(line)

    before = generated()
    count = chat(http, stream=False).json()["eval_count"]
    assert generated() == before + count
    assert 'mlx_gptoss_requests_total{path="/api/chat",status="200"}' in http.get("/metrics").text
