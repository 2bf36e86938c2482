"""/api/chat, streamed or not."""

from __future__ import annotations

import json
import re

import ollama
import pytest
from ollama_requests import ANSWER, DURATIONS, MODEL, RESULT, SUM, WEATHER, chat, lines


def test_answer(client):
    reply = client.chat(MODEL, SUM)
    assert (reply.message.role, reply.message.content) == ("assistant", "12 + 30 = 42")
    assert "The sum is 42" in reply.message.thinking and reply.message.tool_calls is None
    assert (reply.model, reply.done, reply.done_reason) == ("mlx-gptoss-nano", True, "stop")
    assert reply.prompt_eval_count > 20 and reply.eval_count > 20 and reply.load_duration == 0
    assert reply.total_duration > reply.eval_duration > 0 and reply.prompt_eval_duration >= 0


def test_stream_is_the_default_and_adds_up_to_the_full_answer(http):
    full = chat(http, stream=False)
    assert full.headers["content-type"] == "application/json"
    answer = chat(http)
    assert answer.headers["content-type"] == "application/x-ndjson"
    chunks = lines(answer)
    assert len(chunks) > 10 and [chunk["done"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    message = {
        "role": "assistant",
        "content": "".join(chunk["message"]["content"] for chunk in chunks),
        "thinking": "".join(chunk["message"].get("thinking", "") for chunk in chunks),
    }
    assert message == full.json()["message"]
    kept = full.json().keys() - {"created_at", "message", *DURATIONS}
    assert {name: chunks[-1][name] for name in kept} == {name: full.json()[name] for name in kept}
    assert chunks[-1].keys() == full.json().keys()


def test_times_are_in_rfc_3339_with_nanoseconds(http):
    times = [line["created_at"] for line in lines(chat(http))]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", time) for time in times)
    assert times == sorted(times)


@pytest.mark.parametrize("stream", [False, True])
def test_tool_call_and_its_result(client, weather_tool, stream):
    reply = client.chat(MODEL, WEATHER, tools=[weather_tool], stream=stream)
    chunks = list(reply) if stream else [reply]
    calling = [chunk.message for chunk in chunks if chunk.message.tool_calls]
    (call,) = calling[0].tool_calls
    assert len(calling) == 1 and chunks[-1].done_reason == "stop"
    assert (call.function.name, call.function.arguments) == ("get_weather", {"location": "Oslo"})
    thinking = "".join(chunk.message.thinking or "" for chunk in chunks)
    called = ollama.Message(role="assistant", thinking=thinking, tool_calls=[call])
    for named in ({"tool_name": "get_weather"}, {}):  # Home Assistant and LangChain do not say which call they answer
        result = {"role": "tool", "content": RESULT, **named}
        answer = client.chat(MODEL, [*WEATHER, called, result], tools=[weather_tool])
        assert answer.message.content == ANSWER


def test_a_call_has_an_id_and_its_arguments_are_an_object(http, weather_tool):
    message = chat(http, messages=WEATHER, tools=[weather_tool], stream=False).json()["message"]
    (call,) = message["tool_calls"]
    assert call["id"].startswith("call_") and call["function"]["index"] == 0
    assert call["function"]["arguments"] == {"location": "Oslo"} and message["content"] == ""
    result = {"role": "tool", "content": RESULT, "tool_call_id": call["id"]}
    answer = chat(http, messages=[*WEATHER, message, result], tools=[weather_tool], stream=False)
    assert answer.json()["message"]["content"] == ANSWER


def test_a_python_function_as_a_tool(client):
    def get_weather(location: str) -> str:
        """Get the current weather.

        Args:
            location: City name
        """
        return location

    (call,) = client.chat(MODEL, WEATHER, tools=[get_weather]).message.tool_calls
    assert get_weather(**call.function.arguments) == "Oslo"


def test_think(client):
    shown = {think: client.chat(MODEL, SUM, think=think) for think in (None, True, "low", "medium", "high", False)}
    counts = {think: reply.eval_count for think, reply in shown.items()}
    assert counts[None] == counts[True] == counts["medium"]
    assert counts["low"] == counts[False] < counts["medium"] < counts["high"]
    assert shown[False].message.thinking is None and shown[False].message.content == "12 + 30 = 42"
    assert all(reply.message.thinking for think, reply in shown.items() if think is not False)
    assert not any(chunk.message.thinking for chunk in client.chat(MODEL, SUM, think=False, stream=True))


def test_an_unknown_level_of_thinking(http):
    answer = chat(http, think="hardest")
    assert answer.status_code == 400 and "use one of low, medium, high" in answer.json()["error"]


def test_format_is_enforced(client):
    city = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Paris"]}}, "required": ["city"]}
    reply = client.chat(MODEL, SUM, format=city, think="low", options={"temperature": 1, "seed": 3})
    assert json.loads(reply.message.content)["city"] in ("Oslo", "Paris") and reply.message.thinking
    reply = client.generate(MODEL, "What is 12 + 30?", format=city, think=False)
    assert json.loads(reply.response)["city"] in ("Oslo", "Paris")
    assert client.chat(MODEL, SUM, format="json", options={"num_predict": 70}).message.content.startswith("{")
    assert client.chat(MODEL, SUM, format="").message.content == "12 + 30 = 42"


def test_options(client, http):
    long = {"options": {"num_predict": 5}}
    reply = client.chat(MODEL, SUM, **long)
    assert (reply.eval_count, reply.done_reason) == (5, "length")
    assert client.generate(MODEL, "Hi", **long).done_reason == "length"
    for unlimited in (-1, -2, 0):
        assert client.chat(MODEL, SUM, options={"num_predict": unlimited}).done_reason == "stop"
    assert client.chat(MODEL, SUM, options={"stop": ["="]}).message.content == "12 + 30 "
    warm = {"temperature": 2, "seed": 1, "num_predict": 20}
    assert client.chat(MODEL, SUM, options=warm).message == client.chat(MODEL, SUM, options=warm).message
    floats = {"top_k": 40.0, "seed": 7.0, "num_predict": 5.0, "repeat_penalty": 1.1, "min_p": 0.05, "top_p": 0}
    assert chat(http, options=floats).status_code == 200
    assert chat(http, options={"top_k": 1.5}).json()["error"].startswith("options.top_k")


def test_what_has_no_effect_is_named(http):
    answer = chat(http, options={"num_ctx": 8192, "mirostat": 0}, keep_alive="5m", shift=True, mood="happy")
    assert answer.status_code == 200
    names = ["keep_alive", "mood", "options.mirostat", "options.num_ctx", "shift"]
    assert answer.headers["X-Ignored-Fields"].split(", ") == names
    assert "X-Ignored-Fields" not in chat(http, think="low", options={"seed": 1}).headers


def test_logprobs(http):
    full = chat(http, logprobs=True, top_logprobs=3, stream=False).json()
    streamed = [
        entry for line in lines(chat(http, logprobs=True, top_logprobs=3)) for entry in line.get("logprobs", ())
    ]
    assert streamed == full["logprobs"]
    assert b"".join(bytes(entry["bytes"]) for entry in streamed) == b"12 + 30 = 42"
    assert all(len(entry["top_logprobs"]) == 3 and entry["logprob"] <= 0 for entry in streamed)
    assert "logprobs" not in chat(http, stream=False).json()


@pytest.mark.parametrize(
    ("keep_alive", "reason"),
    [
        (None, "load"),
        (-1.0, "load"),
        ("5m", "load"),
        (0, "unload"),
        (0.0, "unload"),
        ("0", "unload"),
        ("0m0s", "unload"),
    ],
)
def test_a_request_with_nothing_to_generate_loads_or_unloads(client, http, keep_alive, reason):
    for reply in (client.chat(MODEL, [], keep_alive=keep_alive), client.generate(MODEL, "", keep_alive=keep_alive)):
        assert (reply.done, reply.done_reason) == (True, reason)
    assert client.chat(MODEL, keep_alive=keep_alive).message.content == ""


def test_a_system_message_and_empty_extras(client, http):
    messages = [{"role": "SYSTEM", "content": "You are a helpful assistant.", "images": []}, *SUM]
    reply = chat(http, messages=messages, tools=[], options={}, stream=False, format=None)
    assert reply.json()["message"]["content"] == "12 + 30 = 42"


def test_the_prompt_is_that_of_chat_completions(http, weather_tool):
    called = {"name": "get_weather", "arguments": {"location": "Oslo"}}
    history = [
        {"role": "system", "content": "Be brief."},
        *WEATHER,
        {"role": "assistant", "thinking": "I look.", "tool_calls": [{"function": called}]},
        {"role": "tool", "content": RESULT, "tool_name": "get_weather"},
    ]
    own = chat(http, messages=history, tools=[weather_tool], stream=False).json()
    other = http.post("/v1/chat/completions", json={"messages": history, "tools": [weather_tool]}).json()
    assert own["prompt_eval_count"] == other["usage"]["prompt_tokens"]
    assert own["message"]["content"] == other["choices"][0]["message"]["content"] == ANSWER
