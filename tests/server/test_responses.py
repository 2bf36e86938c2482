"""/v1/responses through OpenAI's own client."""

from __future__ import annotations

import json
import threading

import openai
import pytest

MODEL = "mlx-gptoss-nano"
SUM = "What is 12 + 30?"
WEATHER = "What is the weather in Oslo?"


def create(client, **fields):
    return client.responses.create(**{"model": MODEL, "input": SUM, **fields})


@pytest.fixture(scope="module")
def weather(weather_tool):
    return {"type": "function", **weather_tool["function"]}


def test_answer(client):
    reply = create(client, instructions="You are a helpful assistant.", metadata={"a": "b"})
    assert (reply.output_text, reply.status, reply.error) == ("12 + 30 = 42", "completed", None)
    reasoning, message = reply.output
    assert (reasoning.type, message.type, message.phase) == ("reasoning", "message", "final_answer")
    assert "The sum is 42" in reasoning.content[0].text and reasoning.summary == []
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    assert 0 < reply.usage.output_tokens_details.reasoning_tokens < reply.usage.output_tokens
    assert (reply.metadata, reply.model, reply.store) == ({"a": "b"}, MODEL, True)


def test_events_are_in_order_and_add_up(client):
    events = list(create(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    types = [event.type.removeprefix("response.") for event in events]
    order = list(dict.fromkeys(types))
    assert order == [
        "created", "in_progress", "output_item.added", "content_part.added", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done", "output_text.delta", "output_text.done",
        "completed",
    ]  # fmt: skip
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    reasoning = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    final = events[-1].response
    assert text == final.output_text == "12 + 30 = 42"
    assert reasoning == final.output[0].content[0].text
    added = [event.item for event in events if event.type == "response.output_item.added"]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in added] == [item.id for item in done] == [item.id for item in final.output]
    assert all(item.status == "in_progress" and not item.content for item in added)
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {item.id for item in final.output}


def test_client_accumulates_the_stream(client):
    with client.responses.stream(model=MODEL, input=SUM) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == "12 + 30 = 42"


@pytest.mark.parametrize("stored", [True, False])
def test_function_call_and_its_result(client, weather, stored):
    """stored: the server keeps the call; otherwise the client sends its items back."""
    first = create(client, input=WEATHER, tools=[weather], store=stored)
    call = first.output[-1]
    assert [item.type for item in first.output] == ["reasoning", "function_call"]
    assert (call.name, json.loads(call.arguments), call.status) == ("get_weather", {"location": "Oslo"}, "completed")
    result = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": '{"temperature": 4, "condition": "rainy"}',
    }
    if stored:
        second = create(client, input=[result], tools=[weather], previous_response_id=first.id)
    else:
        items = [{"role": "user", "content": WEATHER}, *(item.model_dump() for item in first.output), result]
        second = create(client, input=items, tools=[weather])
    assert second.output_text == "It is 4 degrees and rainy in Oslo."


def test_stored_call_and_returned_items_give_the_same_prompt(client, weather):
    first = create(client, input=WEATHER, tools=[weather])
    result = {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "{}"}
    items = [{"role": "user", "content": WEATHER}, *(item.model_dump() for item in first.output), result]
    stored = create(client, input=[result], tools=[weather], previous_response_id=first.id)
    returned = create(client, input=items, tools=[weather])
    assert stored.usage.input_tokens == returned.usage.input_tokens
    assert stored.output_text == returned.output_text


def test_streamed_function_call(client, weather):
    events = list(create(client, input=WEATHER, tools=[weather], stream=True))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert len(deltas) > 3 and "".join(deltas) == done.arguments == events[-1].response.output[-1].arguments


def test_next_turn_omits_old_reasoning_and_instructions(client):
    first = create(client, instructions="You are a helpful assistant.")
    second = create(client, input="Add 5 to that.", previous_response_id=first.id)
    assert second.output_text == "42 + 5 = 47"
    turns = [
        {"role": "user", "content": SUM},
        {"role": "assistant", "content": "12 + 30 = 42"},
        {"role": "user", "content": "Add 5 to that."},
    ]
    assert second.usage.input_tokens == create(client, input=turns).usage.input_tokens
    assert second.previous_response_id == first.id and second.instructions is None


def test_retrieve_list_and_delete(client):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    reply = create(client, input=[*turns, {"role": "user", "content": SUM}])
    assert client.responses.retrieve(reply.id) == reply
    items = list(client.responses.input_items.list(reply.id, limit=2, order="asc"))  # the client requests the pages
    assert [item.content[0].text for item in items] == ["Hi", "Hello!", SUM]
    newest = client.responses.input_items.list(reply.id, limit=1)
    assert newest.data[0].id == items[-1].id and newest.has_more
    assert client.responses.cancel(reply.id).status == "completed"  # it has ended, so nothing is cancelled
    client.responses.delete(reply.id)
    for gone in (client.responses.retrieve, client.responses.cancel, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            gone(reply.id)
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, previous_response_id=reply.id)
    assert refused.value.code == "previous_response_not_found"


def test_store_false_is_not_stored(client):
    reply = create(client, store=False)
    assert reply.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(reply.id)


def test_running_response_is_retrieved_and_cancelled(client, server, idle):
    stream = create(client, reasoning={"effort": "high"}, stream=True)
    first = next(iter(stream))
    assert client.responses.retrieve(first.response.id).status == "in_progress"
    assert client.responses.cancel(first.response.id).status == "cancelled"
    last = list(stream)[-1]
    assert (last.type, last.response.status) == ("response.failed", "cancelled")
    assert client.responses.retrieve(first.response.id).status == "cancelled"
    assert idle(server)


def test_token_limit_gives_an_incomplete_response(client):
    reply = create(client, max_output_tokens=6)
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert reply.output[-1].status == "incomplete"
    assert list(create(client, max_output_tokens=6, stream=True))[-1].type == "response.incomplete"


def test_logprobs(client):
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    part = create(client, **asked).output[-1].content[0]
    assert b"".join(bytes(one.bytes) for one in part.logprobs) == part.text.encode()
    assert all(len(one.top_logprobs) == 2 for one in part.logprobs)
    deltas = [e for e in create(client, **asked, stream=True) if e.type == "response.output_text.delta"]
    assert [one.token for e in deltas for one in e.logprobs] == [one.token for one in part.logprobs]


def custom(definition):
    return {"type": "custom", "name": "a", "format": {"type": "grammar", "syntax": "lark", "definition": definition}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True, "store": False}, "background"),
        ({"truncation": "middle"}, "truncation"),
        ({"conversation": "conv_1", "previous_response_id": "resp_1"}, "conversation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"max_tool_calls": -1}, "max_tool_calls"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"reasoning": {"effort": 1}}, "reasoning.effort"),
        ({"include": "all"}, "include"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"text": {"format": {"type": "json_schema", "schema": 1}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "json_schema": {"schema": 1}}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format"),
        ({"extra_body": {"guided_regex": "a+"}}, "guided_regex"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "web_search"}, {"type": "function", "name": 1}]}, "tools[1].name"),
        ({"tools": [{"type": "custom", "name": "a", "format": {"type": "grammar"}}]}, "tools[0].format"),
        ({"tools": [{"type": "namespace", "name": "a", "tools": [{"type": "function"}]}]}, "tools[0].tools[0].name"),
        ({"tools": [custom("start: (")]}, "tools"),
        ({"tools": [{"type": "function", "name": "a", "parameters": {"not": {}}, "strict": True}]}, "tools"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"input": []}, "input"),
        ({"input": [1]}, "input[0]"),
        ({"input": [{"role": "critic", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "x", "name": ""}]}, "input[0].name"),
        ({"input": [{"type": "compaction", "encrypted_content": "gAAAA"}]}, "input[0].encrypted_content"),
        ({"input": [{"type": "mesage", "role": "user", "content": "Hi"}]}, "input[0].type"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ],
)
def test_errors_name_the_field_that_the_client_sent(client, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, **fields)
    body = refused.value.body
    assert body["param"] is not None and body["param"].startswith(param), body
    words = ("response_format", "messages[", "json_schema.") if "json_schema" not in param else ()
    assert not any(word in body["message"] for word in words), body


def test_concurrent_requests(client):
    texts = [None] * 6

    def ask(index):
        texts[index] = create(client, input=f"What is {index + 10} + 30?").output_text

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [f"{index + 10} + 30 = {index + 40}" for index in range(len(texts))]
