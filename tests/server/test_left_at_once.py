"""A client that leaves at the moment its request has been submitted: nothing of the request stays behind."""

from __future__ import annotations

import asyncio
import json

import pytest

from mlx_gptoss.server.app import build_app
from mlx_gptoss.server.guard import Gate
from mlx_gptoss.server.models.named import NamedModel
from mlx_gptoss.server.service import Service

HELLO = [{"role": "user", "content": "Hi"}]
REQUESTS = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/responses/compact": {"input": "Hi"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 50},
    "/api/chat": {"messages": HELLO},
    "/api/generate": {"prompt": "Hi"},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", list(REQUESTS))
def test_a_client_that_leaves_when_its_request_is_submitted(model, monkeypatch, path, stream):
    body = json.dumps(REQUESTS[path] | ({} if path.endswith("compact") else {"stream": stream})).encode()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
    }
    start = Service.start

    async def run() -> Service:
        service, left, messages = Service([NamedModel(model, "nano")], Gate()), asyncio.Event(), [body]

        async def start_and_leave(self, *replies):
            queue = await start(self, *replies)
            left.set()
            return queue

        async def receive():
            if messages:
                return {"type": "http.request", "body": messages.pop(), "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            return None

        monkeypatch.setattr(Service, "start", start_and_leave)
        await build_app(service)(scope, receive, send)
        assert left.is_set()
        return service

    service = asyncio.run(run())
    assert not service.open_queues and not service.running_responses and not service.leases
