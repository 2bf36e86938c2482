"""What /v1/messages refuses, and what becomes of errors."""

from __future__ import annotations

import json
import threading

import anthropic
import httpx
import pytest
from anthropic_requests import IMAGE, SUM, WEATHER, create, dialogue, post, refused

import mlx_gptoss
from mlx_gptoss.server.errors import ApiError


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": None}, "messages is missing"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].source"),
        ({"messages": [SUM] * 10_001}, "messages"),
        ({"system": 5}, "system"),
        ({"system": [IMAGE]}, "system[0]"),
        ({"max_tokens": "1"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
        ({"stop_sequences": ["a" * 1025]}, "stop_sequences"),
        ({"stop_sequences": [1]}, "stop_sequences"),
        ({"thinking": True}, "thinking"),
        ({"output_config": {"effort": "extreme"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"output_format": {"type": "json_schema"}}, "output_config.format"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "a", "input_schema": []}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "a"}] * 1025}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool", "name": "a"}, "tools": [{"name": "b"}]}, "'a'"),
        ({"tool_choice": {"type": "tool"}, "tools": [{"name": "b"}]}, "tool_choice"),
    ],
)
def test_invalid_requests(http, fields, part):
    assert part in refused(http, **fields)


def use(**fields):
    return {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {}, **fields}


def deep(levels):
    value = {}
    for _ in range(levels):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize(
    ("blocks", "part"),
    [
        ([use()], "send its tool_result"),
        ([use(name="")], "messages[1].content[0].name"),
        ([use(name=5)], "messages[1].content[0].name"),
        ([use(id=5)], "messages[1].content[0].id"),
        ([use(input="{}")], "messages[1].content[0].input"),
        ([{"type": "thinking"}], "messages[1].content[0].thinking"),
    ],
)
def test_invalid_calls(http, blocks, part):
    assert part in refused(http, messages=[WEATHER, {"role": "assistant", "content": blocks}])


@pytest.mark.parametrize("result", [{"tool_use_id": "toolu_2"}, {"tool_use_id": 5}, {}])
def test_a_result_needs_its_call(http, weather, result):
    message = refused(http, **dialogue(weather, {"type": "tool_result", **result}))
    assert message.startswith("messages[2].content[0]")


@pytest.mark.parametrize("levels", [10, 200, 450, 3000])
@pytest.mark.parametrize("place", ["input", "schema", "content", "system", "extra"])
def test_deep_nesting_is_no_server_error(server, http, idle, weather, levels, place):
    nested = "[" * levels + "]" * levels if place in ("content", "system") else '{"a":' * levels + "{}" + "}" * levels
    fields = {
        "input": {"messages": [WEATHER, {"role": "assistant", "content": [use(input="@")]}, SUM]},
        "schema": {"tools": [{"name": "a", "input_schema": "@"}]},
        "content": {"messages": [{"role": "user", "content": "@"}]},
        "system": {"system": "@"},
        "extra": {"x": "@"},
    }[place]
    body = json.dumps({"messages": [SUM], "max_tokens": 1, **fields}).replace('"@"', nested)
    answer = http.post("/v1/messages", content=body)
    assert answer.status_code in (200, 400), answer.text
    assert answer.status_code == 200 or answer.json()["type"] == "error"
    assert idle(server)


def test_many_blocks(server, http, idle):
    blocks = [{"type": "text", "text": ""}] * 50_000
    answer = post(http, messages=[{"role": "user", "content": [*blocks, {"type": "text", "text": "Hi"}]}])
    assert answer.status_code == 200
    many = [{"type": f"kind_{number}"} for number in range(20_000)]
    answer = post(http, messages=[SUM, {"role": "assistant", "content": many}, SUM])
    assert answer.status_code == 200 and len(answer.headers["x-ignored-fields"]) <= 1024
    assert idle(server)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_a_prompt_over_the_context(http, path):
    answer = post(http, path, messages=[{"role": "user", "content": "word " * 10_000}])
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("prompt is too long")  # Claude Code compacts at these words


def test_errors_raise_the_exceptions_of_the_client(client, model, serve):
    with pytest.raises(anthropic.BadRequestError) as caught:
        create(client, messages=[{"role": "user", "content": [IMAGE]}])
    assert caught.value.request_id.startswith("req_")
    with serve(model, api_key="secret") as server:
        for key, error in (("wrong", anthropic.AuthenticationError), ("secret", None)):
            with anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0) as other:
                if error is None:
                    assert create(other, max_tokens=1).stop_reason == "max_tokens"
                    continue
                with pytest.raises(error):
                    create(other)
        server.service.strict_model = True
        with (
            anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as other,
            pytest.raises(anthropic.NotFoundError),
        ):
            create(other)


def test_a_full_queue_is_overloaded(serve):
    with mlx_gptoss.load(slots=1, max_context=1024, max_waiting=0) as small, serve(small) as server:
        url, fields = f"{server.url}/v1/messages", {"messages": [SUM], "temperature": 1}
        with httpx.stream(
            "POST", url, json={**fields, "stream": True, "stop_sequences": ["~never~"]}, timeout=60
        ) as busy:
            next(busy.iter_lines())
            answer = httpx.post(url, json={**fields, "max_tokens": 1}, timeout=60)
        assert answer.status_code in (200, 503)
        if answer.status_code == 503:
            assert (answer.json()["error"]["type"], "retry-after" in answer.headers) == ("overloaded_error", True)


def test_an_error_in_a_stream_is_its_last_event(serve, model):
    with serve(model) as server:
        with httpx.stream("POST", f"{server.url}/v1/messages", json={"messages": [SUM], "stream": True}) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "event: message_start"
            (queue,) = server.service.open_queues
            queue.stop(ApiError(503, "stopped"))
            rest = list(lines)
        data = json.loads(rest[-2].removeprefix("data: "))
        assert rest[-3] == "event: error"
        assert (data["type"], data["error"]["type"]) == ("error", "overloaded_error")
        assert data["request_id"] == answer.headers["request-id"]


def test_requests_are_measured_and_cancelled(server, http, idle):
    def tokens():
        return float(http.get("/metrics").text.split("\nmlx_gptoss_completion_tokens_total ")[1].split()[0])

    before = tokens()
    assert post(http, max_tokens=5).json()["usage"]["output_tokens"] == 5
    assert tokens() == before + 5
    with httpx.stream("POST", f"{server.url}/v1/messages", json={"messages": [SUM], "stream": True}) as answer:
        next(answer.iter_lines())
    assert idle(server)


def test_many_at_once(client):
    texts = []

    def ask():
        texts.append(create(client).content[0].text)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["12 + 30 = 42"] * 6
