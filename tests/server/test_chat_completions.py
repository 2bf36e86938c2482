"""/v1/chat/completions through OpenAI's own client."""

from __future__ import annotations

import json
import math

import openai
import pytest

MODEL = "mlx-gptoss-nano"
SUM = [{"role": "user", "content": "What is 12 + 30?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Oslo?"}]


def create(client, **fields):
    return client.chat.completions.create(**{"model": MODEL, "messages": SUM, **fields})


def sum_deltas(chunks):
    """The sum of a stream's deltas, for its first choice."""
    total = {"content": "", "reasoning": "", "arguments": "", "reason": None, "name": None}
    for choice in (choice for chunk in chunks for choice in chunk.choices if choice.index == 0):
        total["content"] += choice.delta.content or ""
        total["reasoning"] += getattr(choice.delta, "reasoning", None) or ""
        for call in choice.delta.tool_calls or ():
            total["name"] = total["name"] or call.function.name
            total["arguments"] += call.function.arguments
        total["reason"] = choice.finish_reason or total["reason"]
    return total


def test_answer(client):
    reply = create(client)
    (choice,) = reply.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == ("12 + 30 = 42", "assistant", "stop")
    assert choice.message.reasoning == choice.message.reasoning_content and "The sum is 42" in choice.message.reasoning
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0
    assert (reply.model, reply.object) == (MODEL, "chat.completion")


def test_stream_adds_up_to_the_full_answer(client):
    message = create(client).choices[0].message
    chunks = list(create(client, stream=True, stream_options={"include_usage": True}))
    total = sum_deltas(chunks)
    assert (total["content"], total["reasoning"]) == (message.content, message.reasoning)
    assert len(chunks) > 10 and len({chunk.id for chunk in chunks}) == 1
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[0].choices[0].delta.role == "assistant" and not chunks[-1].choices


def test_stream_ends_with_done(http):
    body = {"messages": SUM, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["choices"] for line in lines[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_tool_call_and_its_result(client, weather_tool, stream):
    reply = create(client, messages=WEATHER, tools=[weather_tool], stream=stream)
    if stream:
        chunks = list(reply)
        total = sum_deltas(chunks)
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        assert len(calls) > 3 and calls[0].id and not any(call.id for call in calls[1:])
        id, reason = calls[0].id, total["reason"]
    else:
        (call,) = reply.choices[0].message.tool_calls
        total = {"name": call.function.name, "arguments": call.function.arguments}
        id, reason = call.id, reply.choices[0].finish_reason
        assert reply.choices[0].message.content is None
    assert (total["name"], json.loads(total["arguments"]), reason) == (
        "get_weather",
        {"location": "Oslo"},
        "tool_calls",
    )
    function = {"name": total["name"], "arguments": total["arguments"]}
    called = {"role": "assistant", "tool_calls": [{"id": id, "type": "function", "function": function}]}
    result = {"role": "tool", "tool_call_id": id, "content": '{"temperature": 4, "condition": "rainy"}'}
    answer = create(client, messages=[*WEATHER, called, result], tools=[weather_tool])
    assert answer.choices[0].message.content == "It is 4 degrees and rainy in Oslo."


def test_message_can_be_sent_back_unchanged(client):
    first = create(client).choices[0].message
    follow_up = {"role": "user", "content": "Add 5 to that."}
    reply = create(client, messages=[*SUM, first.model_dump(), follow_up])
    assert reply.choices[0].message.content == "42 + 5 = 47"


def test_content_parts_and_a_system_message(client):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "12 + 30?"}]
    messages = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": parts}]
    assert create(client, messages=messages).choices[0].message.content == "12 + 30 = 42"


def test_effort_changes_the_length_of_the_reasoning(client):
    low, high = (
        create(client, reasoning_effort=effort).usage.completion_tokens_details.reasoning_tokens
        for effort in ("low", "high")
    )
    assert 0 < low < high


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_cover_the_content(client, stream):
    reply = create(client, logprobs=True, top_logprobs=3, stream=stream)
    if stream:
        entries = [e for chunk in reply if (shown := chunk.choices[0].logprobs) for e in shown.content]
    else:
        entries = reply.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries) == b"12 + 30 = 42"
    for entry in entries:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob == entry.logprob  # greedy
        assert sum(math.exp(other.logprob) for other in entry.top_logprobs) <= 1.0001


def test_several_choices(client):
    asked = {
        "messages": [{"role": "user", "content": "Reverse the word supercalifragilistic."}],
        "temperature": 2,
        "max_tokens": 45,
    }
    first, second = (create(client, n=3, seed=7, **asked).choices for _ in range(2))
    texts = [choice.message.content for choice in first]
    assert texts == [choice.message.content for choice in second] and len(set(texts)) > 1
    assert [choice.index for choice in first] == [0, 1, 2]
    assert create(client, seed=8, **asked).choices[0].message.content == texts[1]
    streamed = list(create(client, n=3, seed=7, stream=True, **asked))
    assert {chunk.choices[0].index for chunk in streamed} == {0, 1, 2}
    assert sum_deltas(streamed)["content"] == texts[0]


def test_max_tokens_stop_and_logit_bias(client, model):
    short = create(client, max_completion_tokens=5)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 5)
    stopped = create(client, stop=["= 4"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("12 + 30 ", "stop")
    (one,) = model.tokenizer.encode("1")
    assert "1" not in create(client, logit_bias={str(one): -100}).choices[0].message.content


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"extra_body": {"audio": {"voice": "x"}}}, "audio"),
        ({"extra_body": {"functions": [{"name": "f"}]}}, "functions"),
        ({"extra_body": {"grammar": 'root ::= "a"'}}, "grammar"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 1025}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"chat_template_kwargs": {"reasoning_effort": 3}}}, "chat_template_kwargs.reasoning_effort"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools"),
    ],
)
def test_unsupported_fields_are_rejected_by_name(client, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, **fields)
    body = refused.value.body
    assert body["param"] is not None and body["param"].startswith(param), body
    assert body["type"] == "invalid_request_error" and body["message"]


def test_prompt_longer_than_the_context(client):
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, messages=[{"role": "user", "content": "word " * 3000}])
    assert refused.value.code == "context_length_exceeded" and "4096" in str(refused.value)


def test_any_model_name_means_the_loaded_model(client):
    for name in ("gpt-5", "", "gpt-oss:20b"):
        assert create(client, model=name, max_tokens=1).model == MODEL


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    other = client.models.retrieve("other/model")
    assert (other.id, other.context_length) == (MODEL, 4096)


def test_strict_model_names(serve, model):
    with serve(model, aliases=("gpt-4o",), strict_model=True) as server:
        strict = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in strict.models.list()] == [MODEL, "gpt-4o"]
        assert create(strict, model="gpt-4o", max_tokens=1).model == MODEL
        for ask in (lambda: create(strict, model="gpt-5"), lambda: strict.models.retrieve("gpt-5")):
            with pytest.raises(openai.NotFoundError) as refused:
                ask()
            assert refused.value.code == "model_not_found"
