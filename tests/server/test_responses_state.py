"""/v1/responses beyond one request: background, conversations, compaction, counting, and cutting what is too long."""

from __future__ import annotations

import time

import openai
import pytest

import mlx_gptoss
from mlx_gptoss.harmony.messages import Conversation, Message
from mlx_gptoss.harmony.render import render
from mlx_gptoss.server.openai.opaque import unpack
from mlx_gptoss.server.openai.truncation import truncated

MODEL = "mlx-gptoss-nano"
SUM = "What is 12 + 30?"
NEXT = "Add 5 to that."


def create(client, **fields):
    return client.responses.create(**{"model": MODEL, "input": SUM, **fields})


def wait(client, id):
    deadline = time.monotonic() + 60
    while (reply := client.responses.retrieve(id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return reply


# Background.


def test_background_response_is_polled(client, server, idle):
    reply = create(client, background=True)
    assert (reply.status, reply.background, reply.output) == ("queued", True, [])
    done = wait(client, reply.id)
    assert (done.status, done.output_text, done.background) == ("completed", "12 + 30 = 42", True)
    assert create(client, input=NEXT, previous_response_id=reply.id).output_text == "42 + 5 = 47"
    assert idle(server) and not server.service.background_tasks


def test_background_stream_survives_its_client(client):
    stream = create(client, background=True, stream=True, reasoning={"effort": "high"})
    first = [next(stream) for _ in range(4)]
    stream.close()
    assert [event.type.removeprefix("response.") for event in first[:3]] == ["created", "queued", "in_progress"]
    assert (first[0].response.status, first[2].response.status) == ("queued", "in_progress")
    id, seen = first[0].response.id, first[-1].sequence_number
    rest = list(client.responses.retrieve(id, stream=True, starting_after=seen))
    assert [event.sequence_number for event in rest] == list(range(seen + 1, seen + 1 + len(rest)))
    assert rest[-1].type == "response.completed" and rest[-1].response == client.responses.retrieve(id)
    again = list(client.responses.retrieve(id, stream=True))  # from what is stored
    assert again[: len(first)] == first and again[len(first) :] == rest
    assert list(client.responses.retrieve(id, stream=True, starting_after=rest[-1].sequence_number)) == []


def test_background_response_is_cancelled(client, server, idle):
    reply = create(client, background=True, reasoning={"effort": "high"}, input="Reverse the word planet.")
    assert client.responses.cancel(reply.id).status == "cancelled"
    assert wait(client, reply.id).status == "cancelled"
    assert list(client.responses.retrieve(reply.id, stream=True))[-1].type == "response.failed"
    assert idle(server)


def test_only_background_responses_are_streamed_again(client):
    with pytest.raises(openai.BadRequestError, match="background") as refused:
        list(client.responses.retrieve(create(client).id, stream=True))
    assert refused.value.body["param"] == "stream"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1", stream=True)


def test_a_server_that_drains_finishes_background_responses(model, serve):
    with serve(model) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        reply = create(client, background=True)
        server.drain()
    assert b'"status":"completed"' in server.service.store.get(reply.id).response


# Conversations.


def test_responses_in_a_conversation(client):
    conversation = client.conversations.create(metadata={"topic": "sums"}, items=[{"role": "user", "content": SUM}])
    assert (conversation.object, conversation.metadata) == ("conversation", {"topic": "sums"})
    first = create(client, input=[], conversation=conversation.id, store=False)
    assert (first.output_text, first.conversation.id) == ("12 + 30 = 42", conversation.id)
    second = create(client, input=NEXT, conversation={"id": conversation.id})
    assert second.output_text == "42 + 5 = 47"
    items = list(client.conversations.items.list(conversation.id, order="asc", limit=2))  # the client gets the pages
    assert [item.type for item in items] == ["message", "reasoning", "message", "message", "reasoning", "message"]
    assert [item.id for item in items[1:3]] == [item.id for item in first.output]
    assert items[-1].content[0].text == "42 + 5 = 47"
    referred = create(client, input=[{"type": "item_reference", "id": item.id} for item in items[:4]])
    assert referred.output_text == "42 + 5 = 47"


def test_conversation_is_read_changed_and_deleted(client):
    id = client.conversations.create().id
    assert client.conversations.retrieve(id).metadata == {}
    assert client.conversations.update(id, metadata={"a": "b"}).metadata == {"a": "b"}
    added = client.conversations.items.create(id, items=[{"role": "user", "content": SUM}, {"type": "reasoning"}]).data
    item = client.conversations.items.retrieve(added[0].id, conversation_id=id)
    assert (item.role, item.content[0].text) == ("user", SUM)
    assert client.conversations.items.delete(added[1].id, conversation_id=id).id == id
    assert [item.id for item in client.conversations.items.list(id)] == [added[0].id]
    assert client.conversations.delete(id).deleted
    for gone in (
        lambda: client.conversations.retrieve(id),
        lambda: client.conversations.update(id, metadata={}),
        lambda: client.conversations.delete(id),
        lambda: client.conversations.items.list(id),
        lambda: client.conversations.items.retrieve(added[0].id, conversation_id=id),
        lambda: create(client, conversation=id),
    ):
        with pytest.raises(openai.NotFoundError):
            gone()


def test_a_cancelled_response_adds_nothing_to_its_conversation(client, server, idle):
    id = client.conversations.create().id
    reply = create(client, conversation=id, background=True, input="Reverse the word planet.")
    client.responses.cancel(reply.id)
    if wait(client, reply.id).status == "cancelled":
        assert client.conversations.items.list(id).data == []
    assert idle(server)


# Counting and compaction.


def test_input_tokens_are_those_of_the_response(client, weather_tool):
    fields = {
        "input": [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": SUM}],
        "tools": [{"type": "function", **weather_tool["function"]}],
        "instructions": "You are a helpful assistant.",
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
    }
    count = client.responses.input_tokens.count(model=MODEL, **fields)
    assert count.object == "response.input_tokens"
    assert count.input_tokens == create(client, max_output_tokens=1, **fields).usage.input_tokens


def test_compaction(client):
    items = [
        {"role": "developer", "content": "You are a helpful assistant."},
        {"role": "user", "content": SUM},
        {"role": "assistant", "content": "12 + 30 = 42"},
        {"role": "user", "content": NEXT},
        {"role": "assistant", "content": "42 + 5 = 47"},
    ]
    compacted = client.responses.compact(model=MODEL, input=items)
    assert compacted.object == "response.compaction" and compacted.usage.output_tokens > 0
    *messages, summary = compacted.output
    texts = [(item.role, item.content[0].text) for item in messages]
    assert texts == [("developer", "You are a helpful assistant."), ("user", SUM), ("user", NEXT)]
    assert summary.type == "compaction" and unpack(summary.encrypted_content)
    kept = [item.model_dump(warnings=False) for item in compacted.output]
    reply = create(client, input=[*kept, {"role": "user", "content": SUM}], max_output_tokens=200)
    assert reply.output and reply.usage.input_tokens > 40
    again = client.responses.compact(model=MODEL, input=kept)  # the old summary is part of the new one
    assert [item.type for item in again.output] == ["message", "message", "message", "compaction"]


# Truncation.


@pytest.fixture(scope="module")
def small():
    with mlx_gptoss.load(slots=1, max_context=512) as model:
        yield model


def turn(number, calls=0):
    yield Message("user", f"Question {number}")
    for index in range(calls):
        yield Message("assistant", "Hm.", "analysis")
        yield Message("assistant", f'{{"n": {index}}}', "commentary", "functions.look", "<|constrain|>json")
        yield Message("tool", "found", "commentary", "assistant", name="functions.look")
    yield Message("assistant", f"Answer {number}.", "final")


def conversation(*turns):
    note = Message("developer", "# Instructions\n\nKeep this.")
    messages = [message for messages in turns for message in messages]
    return Conversation((messages[0], note, *messages[1:], Message("user", "And now?")), instructions="Be kind.")


def tokens(small, conversation):
    return len(render(conversation, small.tokenizer))


def test_a_conversation_that_fits_is_not_cut(small):
    short = conversation(turn(1))
    assert truncated(short, small, None) is short


def test_oldest_turns_are_dropped(small):
    long = conversation(*(turn(number) for number in range(40)))
    cut = truncated(long, small, 100)
    assert tokens(small, long) > 512 and tokens(small, cut) <= 412
    note, first, *rest = cut.messages
    assert (note.role, first.role) == ("developer", "user") and cut.instructions == "Be kind."
    assert long.messages[-len(rest) :] == tuple(rest)


def test_consecutive_requests_are_mostly_cut_at_the_same_place(small):
    begins = []
    for turns in range(30, 50):
        cut = truncated(conversation(*(turn(number) for number in range(turns))), small, None)
        assert tokens(small, cut) <= 512 - 64
        begins.append(cut.messages[1].content)
    assert len(set(begins)) <= len(begins) // 2


def test_calls_stay_with_their_results(small):
    long = conversation(*(turn(number, calls=2) for number in range(12)))
    kept = truncated(long, small, 100).messages
    assert kept[1].role == "user" and kept != long.messages
    calls = [message for message in kept if message.recipient == "functions.look"]
    assert calls and len(calls) == len([message for message in kept if message.role == "tool"])


def test_the_oldest_calls_of_a_long_last_turn_are_dropped(small):
    question, *rest = turn(1, calls=20)
    long = Conversation((question, *rest[:-1]))
    kept = truncated(long, small, 100).messages
    assert kept[0] == question and kept[1].channel == "analysis" and kept[-1] == rest[-2]
    assert tokens(small, Conversation(kept)) <= 412


def test_truncation_over_http(small, serve):
    items = [item for n in range(40) for item in ({"role": "user", "content": f"Note {n}."}, answer(n))]
    asked = [*items, {"role": "user", "content": SUM}]
    with serve(small) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        with pytest.raises(openai.BadRequestError) as refused:
            create(client, input=asked)
        assert refused.value.code == "context_length_exceeded"
        reply = create(client, input=asked, truncation="auto", max_output_tokens=100)
        assert reply.truncation == "auto" and reply.output and reply.usage.input_tokens <= 412


def answer(number):
    return {"role": "assistant", "content": f"I have noted {number}."}
