"""Replies of /v1/messages, streamed or not."""

from __future__ import annotations

import base64
import json

import pytest
from anthropic_requests import (
    GREEDY,
    MODEL,
    RESULT,
    SUM,
    THINKING,
    WEATHER,
    create,
    dialogue,
    kinds,
    post,
    refused,
    said,
)

import mlx_gptoss
from mlx_gptoss.harmony.render import render


def test_answer(client):
    reply = create(client)
    assert (reply.type, reply.role, reply.model) == ("message", "assistant", MODEL)
    assert reply.id.startswith("msg_") and reply._request_id.startswith("req_")
    assert (kinds(reply), reply.content[0].text) == (["text"], "12 + 30 = 42")
    assert (reply.stop_reason, reply.stop_sequence) == ("end_turn", None)
    assert 0 < reply.usage.output_tokens_details.thinking_tokens < reply.usage.output_tokens


@pytest.mark.parametrize("thinking", [THINKING, {"type": "adaptive"}, {"type": "enabled", "budget_tokens": 10**9}])
def test_thinking_and_text(client, thinking):
    reply = create(client, thinking=thinking)
    thought, text = reply.content
    assert (thought.type, thought.signature, text.text) == ("thinking", "mlx-gptoss", "12 + 30 = 42")
    assert "2+0=2" in thought.thinking


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, False),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "adaptive"}}, True),
        ({"with_tools": True}, True),
        ({"with_tools": True, "thinking": {"type": "disabled"}}, False),
    ],
)
def test_thinking_is_shown_if_it_is_asked_for_or_there_are_tools(client, weather, fields, shown):
    fields = dict(fields)
    tools = {"tools": [weather]} if fields.pop("with_tools", False) else {}
    assert ("thinking" in kinds(create(client, **fields, **tools))) == shown


def test_omitted_thinking_comes_back_with_its_signature(client, seen, weather):
    thinking = {"type": "adaptive", "display": "omitted"}
    thought, use = create(client, messages=[WEATHER], tools=[weather], thinking=thinking).content
    assert (thought.thinking, use.type) == ("", "tool_use")
    reply = [thought.to_dict()]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": RESULT}
    conversation = seen(**dialogue(weather, result, call=use.id, reply=reply))
    assert said(conversation)[1] == ("assistant", "analysis", base64.b64decode(thought.signature[11:]).decode())
    assert "get_weather" in said(conversation)[1][2]


def test_tool_call_and_its_result(client, weather):
    first = create(client, messages=[WEATHER], tools=[weather])
    thought, use = first.content
    assert (thought.type, use.type, use.name, use.input) == (
        "thinking",
        "tool_use",
        "get_weather",
        {"location": "Oslo"},
    )
    assert use.id.startswith("toolu_") and first.stop_reason == "tool_use"
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": RESULT}]}
    history = [WEATHER, {"role": "assistant", "content": first.content}, result]
    second = create(client, messages=history, tools=[weather])
    assert second.content[-1].text == "It is 4 degrees and rainy in Oslo."
    assert (second.stop_reason, second.usage.cache_read_input_tokens > 0) == ("end_turn", True)


def test_stream_is_complete_and_in_order(http, weather):
    answer = post(http, messages=[WEATHER], tools=[weather], max_tokens=400, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.headers["request-id"]
    pairs = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [name.removeprefix("event: ") for name, _ in pairs] == [event["type"] for event in events]
    types = [event["delta"]["type"] if "index" in event and "delta" in event else event["type"] for event in events]
    order = [kind for kind, before in zip(types, [None, *types], strict=False) if kind != before]
    assert order == [
        "message_start", "ping", "content_block_start", "thinking_delta", "signature_delta", "content_block_stop",
        "content_block_start", "input_json_delta", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    start, delta = events[0]["message"], events[-2]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    usage = delta["usage"]
    assert start["usage"]["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert delta["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    parts = [event["delta"]["partial_json"] for event in events if "partial_json" in event.get("delta", {})]
    assert json.loads("".join(parts)) == {"location": "Oslo"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"thinking": THINKING},
        {"thinking": {"type": "adaptive", "display": "omitted"}},
        {"with_tools": True},
        {"with_tools": True, "max_tokens": 27},  # in the middle of a call
        {"stop_sequences": ["="]},
        {"max_tokens": 3},
    ],
)
def test_full_response_equals_the_folded_stream(client, weather, fields):
    fields = dict(fields)
    if fields.pop("with_tools", False):
        fields |= {"tools": [weather], "messages": [WEATHER]}
    full = create(client, **fields, extra_body=GREEDY).to_dict()
    with client.messages.stream(
        **{"model": MODEL, "max_tokens": 400, "messages": [SUM], **fields}, extra_body=GREEDY
    ) as stream:
        folded = stream.get_final_message().to_dict()
    for message in (full, folded):
        message.pop("id")
        message.pop("stop_details", None)
        usage = message["usage"]
        message["prompt"] = usage.pop("input_tokens") + usage.pop("cache_read_input_tokens")
        for block in message["content"]:
            block.pop("id", None)
            block.pop("parsed_output", None)
    assert full == folded


def test_stop_sequences(client):
    reply = create(client, stop_sequences=["never", "42", " = 4"])
    assert (reply.content[0].text, reply.stop_reason, reply.stop_sequence) == ("12 + 30", "stop_sequence", " = 4")
    assert create(client, stop_sequences=["never"]).stop_reason == "end_turn"
    assert create(client, stop_sequences=["never"], max_tokens=2).stop_reason == "max_tokens"


def test_prefill_is_continued(client, model, seen):
    messages = [SUM, {"role": "assistant", "content": [{"type": "text", "text": "12 + 30 ="}]}]
    conversation = seen(messages=messages)
    assert (conversation.prefill, said(conversation)) == ("12 + 30 =", [("user", None, SUM["content"])])
    reply = create(client, messages=messages, max_tokens=8, extra_body=GREEDY)
    raw = model.complete(
        render(conversation, model.tokenizer), max_tokens=8, sampling=mlx_gptoss.Sampling(temperature=0)
    )
    assert "".join(block.text for block in reply.content) == raw.text != ""
    assert reply.usage.output_tokens_details.thinking_tokens == 0


def test_prefill_obeys_the_schema(client, http):
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    output = {"format": {"type": "json_schema", "schema": {**schema, "additionalProperties": False}}}
    begun = [SUM, {"role": "assistant", "content": '{"sum":'}]
    text = create(client, messages=begun, output_config=output).content[0].text
    assert isinstance(json.loads('{"sum":' + text)["sum"], int)
    begun = [SUM, {"role": "assistant", "content": "The sum"}]
    assert "cannot be continued" in refused(http, messages=begun, output_config=output)


def test_structured_output(client):
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "integer"}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    formats = {"type": "json_schema", "schema": schema}
    for fields in ({"output_config": {"format": formats}}, {"extra_body": {"output_format": formats}}):
        assert set(json.loads(create(client, **fields).content[0].text)) == {"answer"}


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_call_can_be_required(client, weather, choice):
    choice["disable_parallel_tool_use"] = True
    reply = create(client, tools=[{**weather, "strict": True}], tool_choice=choice)
    assert (kinds(reply)[-1], reply.stop_reason) == ("tool_use", "tool_use")
    assert set(reply.content[-1].input) == {"location"}


def test_a_call_can_be_forbidden(client, weather):
    reply = create(client, messages=[WEATHER], tools=[weather], tool_choice={"type": "none"})
    assert "tool_use" not in kinds(reply)
