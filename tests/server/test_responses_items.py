"""Items of history in /v1/responses: what becomes of each in the prompt, and references to stored items."""

from __future__ import annotations

import openai
import pytest
from pydantic import TypeAdapter

from mlx_gptoss.harmony.messages import Message
from mlx_gptoss.server.errors import ApiError
from mlx_gptoss.server.openai.conversation_items import SUMMARY_INTRODUCTION, ConversationItems
from mlx_gptoss.server.openai.items import Item, item_objects
from mlx_gptoss.server.openai.opaque import pack, unpack
from mlx_gptoss.server.openai.response_tools import ResponseTools

MODEL = "mlx-gptoss-nano"
SUM = "What is 12 + 30?"
WEATHER = "What is the weather in Oslo?"
RESULT = '{"temperature": 4, "condition": "rainy"}'
USER = {"role": "user", "content": "Hi"}


def parsed(items):
    return TypeAdapter(list[Item]).validate_python(items)


def read(*items, tools=()):
    return ConversationItems().with_items(parsed(list(items)), ResponseTools(tools))


def call(name, arguments, content_type="<|constrain|>json"):
    return Message("assistant", arguments, "commentary", f"functions.{name}", content_type)


def result(name, text):
    return Message("tool", text, "commentary", "assistant", name=f"functions.{name}")


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (
            {"content": [{"type": "reasoning_text", "text": "a"}], "summary": [{"type": "summary_text", "text": "b"}]},
            "a",
        ),
        ({"content": [], "summary": [{"type": "summary_text", "text": "b"}], "encrypted_content": pack("a")}, "a"),
        ({"content": None, "summary": [{"type": "summary_text", "text": "b"}], "encrypted_content": "gAAAA"}, "b"),
        ({"summary": [{"type": "summary_text", "text": "b"}, {"type": "summary_text", "text": "c"}]}, "b\n\nc"),
        ({"summary": [], "encrypted_content": "gAAAA"}, None),
        ({"summary": []}, None),
    ],
)
def test_reasoning(item, text):
    wanted = () if text is None else (Message("assistant", text, "analysis"),)
    assert read(USER, {"type": "reasoning", "id": "rs_1", **item}).messages[1:] == wanted


def test_packed_text_is_read_back():
    for text in ("", "reason", "\ud800 é 日本"):
        assert unpack(pack(text)) == text and pack(text).isascii()
    assert unpack(pack("a")[:-1] + "!") is None and unpack("x") is None and unpack(None) is None


def test_messages():
    built = read(
        {"role": "system", "content": "One."},
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Two."}], "mood": "x"},
        USER,
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": [{"type": "output_text", "text": "A", "annotations": [{}]}], "id": "msg_1"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "developer", "content": "Three."},
    )
    assert built.instructions == ("One.", "Two.")
    assert built.messages == (
        Message("user", "Hi"),
        Message("assistant", "A", "final"),
        Message("assistant", "No.", "final"),
        Message("developer", "# Instructions\n\nThree."),
    )


def test_calls_and_results():
    built = read(
        USER,
        {"role": "assistant", "content": "Let me look."},
        {"type": "function_call", "call_id": "1", "name": "look", "arguments": {"a": 1}, "namespace": "crm", "x": 1},
        {"type": "custom_tool_call", "call_id": "2", "name": "patch", "input": "*** Begin"},
        {"type": "function_call_output", "call_id": "1", "output": None},
        {
            "type": "custom_tool_call_output",
            "call_id": "2",
            "output": [{"type": "input_text", "text": "done "}, {"type": "input_image", "image_url": "data:"}],
        },
    )
    assert built.messages[1:] == (
        Message("assistant", "Let me look.", "commentary"),
        call("crm__look", '{"a": 1}'),
        call("patch", "*** Begin", None),
        result("crm__look", ""),
        result("patch", "done [image omitted]"),
    )


def test_calls_of_other_tools_are_replayed_with_their_results():
    built = read(
        USER,
        {
            "type": "local_shell_call",
            "id": "ls_1",
            "call_id": "1",
            "status": "completed",
            "action": {"command": ["ls"]},
        },
        {"type": "local_shell_call_output", "call_id": "1", "output": "README"},
        {"type": "shell_call", "call_id": "2", "action": {"commands": ["pwd"]}},
        {"type": "shell_call_output", "call_id": "2", "output": [{"stdout": "/", "stderr": ""}]},
        {"type": "mcp_call", "id": "mcp_1", "server_label": "wiki", "name": "ask", "arguments": "{}", "output": "yes"},
        {"type": "code_interpreter_call", "code": "1 + 1", "outputs": [{"type": "logs", "logs": "2"}]},
    )
    assert built.messages[1:] == (
        call("local_shell", '{"action": {"command": ["ls"]}}'),
        result("local_shell", "README"),
        call("shell", '{"action": {"commands": ["pwd"]}}'),
        result("shell", '[{"stdout": "/", "stderr": ""}]'),
        call("wiki__ask", "{}"),
        result("wiki__ask", "yes"),
        Message("assistant", "1 + 1", "analysis", "python"),
        Message("tool", "2", "analysis", "assistant", name="python"),
    )
    assert not built.skipped


def test_items_without_text_are_skipped_and_named():
    skipped = ("web_search_call", "image_generation_call", "local_shell_call", "mcp_list_tools", "item_of_tomorrow")
    built = read(USER, *({"type": kind, "id": "x", "call_id": "1", "status": "completed"} for kind in skipped))
    assert built.messages == (Message("user", "Hi"),) and built.skipped == set(skipped)


def test_a_compacted_conversation():
    summary = read({"type": "compaction", "id": "cmp_1", "encrypted_content": pack("They said hi.")}, USER)
    assert summary.messages[0] == Message("user", f"{SUMMARY_INTRODUCTION}They said hi.")
    with pytest.raises(ApiError, match="another server"):
        read({"type": "compaction", "encrypted_content": "gAAAA"})


def test_reply_calls_are_matched_by_recipient():
    """The calls of tools that the server ran are not the client's to answer."""
    python = Message("assistant", "1 + 1", "analysis", "python")
    one = call("look", "{}")
    built = ConversationItems().with_reply((python, one), [("call_1", "functions.look")])
    assert built.calls == {"call_1": one}


def test_stored_items_have_an_id_and_a_status():
    items = parsed([USER, {"type": "reasoning"}, {"type": "web_search_call", "action": {"type": "search"}}])
    message, reasoning, search = item_objects(items)
    assert message["content"] == [{"type": "input_text", "text": "Hi"}] and message["id"].startswith("msg_")
    assert reasoning["summary"] == [] and search["action"] == {"type": "search"}
    assert {item["status"] for item in (message, reasoning, search)} == {"completed"}


# Through HTTP.


def create(client, **fields):
    return client.responses.create(**{"model": MODEL, "input": SUM, **fields})


@pytest.fixture(scope="module")
def weather(weather_tool):
    return {"type": "function", **weather_tool["function"]}


def test_references_to_stored_items(client, weather):
    """The AI SDK sends ids of what the server has, and the items that it has not."""
    user = {"role": "user", "content": [{"type": "input_text", "text": WEATHER}]}
    first = create(client, input=[user], tools=[weather])
    references = [{"type": "item_reference", "id": item.id} for item in first.output]
    output = {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": RESULT}
    second = create(client, input=[user, *references, output], tools=[weather])
    assert second.output_text == "It is 4 degrees and rainy in Oslo."
    continued = create(client, input=[output], previous_response_id=first.id, tools=[weather])
    assert second.usage.input_tokens == continued.usage.input_tokens
    asked = client.responses.input_items.list(second.id, order="asc").data
    assert [item.id for item in asked[1:3]] == [item.id for item in first.output]
    third = create(client, input=[{"id": item.id} for item in asked], tools=[weather])  # the type may be left out
    assert third.output_text == second.output_text
    for response in (first, second, third, continued):
        client.responses.delete(response.id)
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, input=[user, *references])
    assert (refused.value.code, refused.value.body["param"]) == ("item_not_found", "input[1].id")


def test_stateless_replay_keeps_the_reasoning(client, weather):
    """Codex sends back items without their content, and does not let the server store anything."""
    fields = {"tools": [weather], "store": False, "include": ["reasoning.encrypted_content"]}
    first = create(client, input=WEATHER, **fields)
    items = [item.model_dump(exclude={"content", "id", "status"}) for item in first.output]
    assert items[0]["type"] == "reasoning" and unpack(items[0]["encrypted_content"]) == first.output[0].content[0].text
    output = {"type": "function_call_output", "call_id": items[-1]["call_id"], "output": RESULT}
    second = create(client, input=[{"role": "user", "content": WEATHER}, *items, output], **fields)
    without = create(client, input=[{"role": "user", "content": WEATHER}, *items[1:], output], **fields)
    assert second.output_text == "It is 4 degrees and rainy in Oslo."
    assert second.usage.input_tokens > without.usage.input_tokens + 3
    assert not hasattr(create(client).output[0], "encrypted_content") or not create(client).output[0].encrypted_content


def test_what_has_no_effect_is_named(http):
    items = [
        {**USER, "provider_specific_fields": {}},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"role": "user", "content": [{"type": "input_text", "text": SUM, "cache_control": {}}]},
    ]
    body = {
        "input": items,
        "client_metadata": {"a": 1},
        "prompt_cache_key": "x",
        "text": {"verbosity": "low"},
        "reasoning": {"effort": "minimal", "context": "auto"},
        "include": ["file_search_call.results"],
        "top_logprobs": 2,
        "service_tier": "flex",
        "stream_options": {"include_obfuscation": False},
        "tools": [{"type": "image_generation"}, {"type": "function", "name": "f"}],
    }
    reply = http.post("/v1/responses", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["reasoning"]["effort"] == "low"
    assert set(reply.headers["X-Ignored-Fields"].split(", ")) == {
        "client_metadata",
        "include[].file_search_call.results",
        "input[].content[].cache_control",
        "input[].provider_specific_fields",
        "input[].web_search_call",
        "prompt_cache_key",
        "reasoning.context",
        "service_tier",
        "stream_options",
        "stream_options.include_obfuscation",
        "text.verbosity",
        "tools[].image_generation",
        "top_logprobs",
    }


@pytest.mark.parametrize("kind", ["auto", "concise", "detailed"])
def test_summary_is_the_reasoning(client, kind):
    events = list(create(client, reasoning={"summary": kind}, stream=True))
    types = [event.type.removeprefix("response.") for event in events]
    order = [kind for kind in dict.fromkeys(types) if "reasoning" in kind or "part" in kind]
    assert order == [
        "content_part.added", "reasoning_summary_part.added", "reasoning_text.delta", "reasoning_summary_text.delta",
        "reasoning_text.done", "content_part.done", "reasoning_summary_text.done", "reasoning_summary_part.done",
    ]  # fmt: skip
    item = events[-1].response.output[0]
    deltas = "".join(event.delta for event in events if event.type == "response.reasoning_summary_text.delta")
    assert [part.text for part in item.summary] == [part.text for part in item.content] == [deltas]
    assert events[-1].response.reasoning.summary == kind


def test_no_summary_by_default(client):
    assert create(client).output[0].summary == create(client, reasoning={"summary": "none"}).output[0].summary == []
