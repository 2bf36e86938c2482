"""What Ollama's endpoints refuse, and the form of their errors."""

from __future__ import annotations

import json

import httpx
import ollama
import pytest
from ollama_requests import MODEL, SUM, chat

import mlx_gptoss


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("null", "JSON object"),
        ("", "body is empty"),
        ("{", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"messages": {}}', "messages"),
        ('{"messages": [1]}', "messages[0] must be a dict"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "messages[0] has the role"),
        ('{"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}', "messages[0].images cannot be read"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "messages[0] needs"),
        ('{"messages": [{"role": "assistant", "tool_calls": [1]}]}', "tool_calls[0]"),
        ('{"messages": [{"role": "user", "content": "x"}], "options": {"temperature": "hot"}}', "options.temperature"),
        ('{"messages": [{"role": "user", "content": "x"}], "options": {"temperature": 1e999}}', "options.temperature"),
        ('{"messages": [{"role": "user", "content": "x"}], "options": []}', "options"),
        ('{"messages": [{"role": "user", "content": "x"}], "format": "xml"}', "format is 'xml'"),
        ('{"messages": [{"role": "user", "content": "x"}], "format": {"type": "robot"}}', "robot"),
        ('{"messages": [{"role": "user", "content": "x"}], "stream": "no"}', "stream"),
        ('{"messages": [{"role": "user", "content": "x"}], "top_logprobs": 21}', "top_logprobs"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "browser"}]}', "tools has only browser"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": [{"function": {}}]}', "tools[0].function.name"),
    ],
)
def test_malformed_requests(http, body, words):
    answer = http.post("/api/chat", content=body)
    assert answer.status_code == 400 and words in answer.json()["error"]
    assert answer.json().keys() == {"error"}


@pytest.mark.parametrize("field", ["format", "tools"])
def test_schemas_over_the_limits(http, field):
    schema = {"type": "object"}
    for _ in range(100):
        schema = {"type": "object", "properties": {"a": schema}}
    value = schema if field == "format" else [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    answer = chat(http, **{field: value})
    assert answer.status_code == 400 and "levels deep" in answer.json()["error"]


def test_a_prompt_that_is_too_long(client):
    with pytest.raises(ollama.ResponseError, match="context holds") as refused:
        client.chat(MODEL, [{"role": "user", "content": "12 " * 4096}])
    assert refused.value.status_code == 400


def test_truncate_drops_the_oldest_turns(http):
    old = [{"role": "user", "content": "12 " * 4096}, {"role": "assistant", "content": "So?"}]
    cut = chat(http, messages=[*old, *SUM], truncate=True, stream=False).json()
    short = chat(http, stream=False).json()
    assert (cut["message"], cut["prompt_eval_count"]) == (short["message"], short["prompt_eval_count"])


def test_errors_of_the_guard_and_of_routing_have_the_same_form(http, serve, model):
    assert http.get("/api/nothing").json() == {"error": "GET /api/nothing: Not Found"}
    assert http.get("/api/chat").status_code == 405 and http.get("/api/chat").json().keys() == {"error"}
    foreign = http.get("/api/tags", headers={"Origin": "https://foe.example"})
    assert foreign.status_code == 403 and "origin" in foreign.json()["error"]
    with serve(model, api_key="sesame", max_body_bytes=1000) as server:
        assert "API key" in httpx.get(f"{server.url}/api/tags").json()["error"]
        keyed = ollama.Client(host=server.url, headers={"Authorization": "Bearer sesame"})
        assert keyed.list().models
        with pytest.raises(ollama.ResponseError, match="larger than 1000 bytes") as refused:
            keyed.generate(MODEL, "x" * 1001)
        assert refused.value.status_code == 413
        server.service.gate.draining = True
        with pytest.raises(ollama.ResponseError, match="shutting down"):
            keyed.chat(MODEL, SUM)


def test_an_error_in_the_middle_of_a_stream_is_its_last_line(serve):
    """The model's memory is freed while it generates."""
    with mlx_gptoss.load(max_context=4096) as model, serve(model) as server, httpx.Client(timeout=60) as http:
        body = {"prompt": "abc", "raw": True, "options": {"temperature": 2, "seed": 1, "stop": ["never said"]}}
        with http.stream("POST", f"{server.url}/api/generate", json=body) as answer:
            arriving = answer.iter_lines()
            first = json.loads(next(arriving))
            model.close()
            last = [json.loads(line) for line in arriving][-1]
    assert first["done"] is False and last.keys() == {"error"}


def test_arguments_that_are_no_object_are_an_error(http, weather_tool, monkeypatch):
    from mlx_gptoss.chat.reply import ToolCall
    from mlx_gptoss.errors import GptOssError
    from mlx_gptoss.server.ollama.reply import Reply

    reply = Reply(None, None, lambda piece: {})
    for arguments in ("[1]", "{", '{"a": NaN}', '{"a": 1e999}', "[" * 100_000):
        with pytest.raises(GptOssError, match="arguments that are not a JSON object"):
            reply._call(ToolCall("call_1", "f", arguments))
    assert reply._call(ToolCall("call_1", "f", '{"a": 1.5}'))["function"]["arguments"] == {"a": 1.5}
