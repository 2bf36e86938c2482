"""Requests to /v1/messages, and what its tests read from the answers."""

from __future__ import annotations

MODEL = "claude-of-any-name"
SUM = {"role": "user", "content": "What is 12 + 30?"}
WEATHER = {"role": "user", "content": "What is the weather in Oslo?"}
RESULT = '{"temperature": 4, "condition": "rainy"}'
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
GREEDY = {"temperature": 0}  # a field that the client no longer has
THINKING = {"type": "enabled", "budget_tokens": 1024}


def create(client, **fields):
    return client.messages.create(**{"model": MODEL, "max_tokens": 400, "messages": [SUM], **fields})


def post(http, path="/v1/messages", **fields):
    return http.post(path, json={"messages": [SUM], "max_tokens": 1, **fields})


def refused(http, **fields):
    """The message of the 400 that the request gets."""
    answer = post(http, **fields)
    body = answer.json()
    assert (answer.status_code, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
    assert body["request_id"] == answer.headers["request-id"]
    return body["error"]["message"]


def ignored(answer):
    assert answer.status_code == 200, answer.text
    names = answer.headers.get("x-ignored-fields")
    return set(names.split(", ")) if names else set()


def kinds(message):
    return [block.type for block in message.content]


def dialogue(weather, *blocks, call="toolu_1", reply=()):
    """The fields of a request: a question, a call, and a user message with these blocks."""
    use = {"type": "tool_use", "id": call, "name": "get_weather", "input": {"location": "Oslo"}}
    answer = {"role": "assistant", "content": [*reply, use]}
    return {"messages": [WEATHER, answer, {"role": "user", "content": list(blocks)}], "tools": [weather]}


def said(conversation):
    """The messages as (role, channel, content)."""
    return [(message.role, message.channel, message.content) for message in conversation.messages]
