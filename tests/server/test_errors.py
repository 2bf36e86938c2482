"""Every error, also one that no endpoint raises, has the form of the dialect that its path belongs to."""

from __future__ import annotations

import httpx
import pytest


@pytest.fixture(scope="module")
def closed(model, serve):
    """A server with a key and a small limit on bodies."""
    with serve(model, api_key="secret", max_body_bytes=1000) as server:
        yield server


def post(server, path, content="{}", **headers):
    return httpx.post(f"{server.url}{path}", content=content, headers=headers, timeout=60)


KEY = {"authorization": "Bearer secret"}
CASES = {  # status -> (the request, Anthropic's type)
    400: (("{", KEY), "invalid_request_error"),
    401: (("{}", {}), "authentication_error"),
    403: (("{}", {**KEY, "host": "evil.example"}), "permission_error"),
    413: ((" " * 1001, KEY), "request_too_large"),
}


@pytest.mark.parametrize("status", CASES)
def test_openai(closed, status):
    (content, headers), _ = CASES[status]
    answer = post(closed, "/v1/chat/completions", content, **headers)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"} and set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/messages"])
@pytest.mark.parametrize("status", CASES)
def test_anthropic(closed, status, path):
    (content, headers), kind = CASES[status]
    answer = post(closed, path, content, **headers)
    body = answer.json()
    assert (answer.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert body["error"]["message"] and body["request_id"] == answer.headers["request-id"]


def test_unknown_path_and_method(http):
    body = http.post("/v1/messages/nothing", json={}).json()
    assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")
    answer = http.put("/v1/messages", json={})
    assert (answer.status_code, answer.json()["error"]["type"]) == (405, "invalid_request_error")
    assert set(http.post("/v1/messagesx", json={}).json()) == {"error"}  # not below /v1/messages
