"""Chat requests in OpenAI's form: what they become, what is refused, and what the error messages say."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.harmony.messages import Conversation, Function, Message, ResponseFormat, ToolChoice
from mlx_gptoss.harmony.openai import from_chat, unknown_fields
from mlx_gptoss.harmony.openai_tools import functions_from_tools, response_format_of, tool_choice_of

USER = {"role": "user", "content": "Hi"}
ADD = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def test_a_conversation_with_everything() -> None:
    conversation = from_chat(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "1+1?", "name": "bob"},
            {"role": "assistant", "content": "Let me see.", "reasoning_content": "hm", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
            {"role": "assistant", "content": "2", "refusal": None, "annotations": [], "tool_calls": None},
            {"role": "system", "content": "Now rhyme."},
            {"role": "user", "content": [{"type": "input_text", "text": "Again"}]},
        ],
        reasoning="high",
        system="First.",
        tools=[{"type": "function", "function": ADD}],
        date="2025-06-28",
    )
    assert conversation == Conversation(
        (
            Message("user", "1+1?", name="bob"),
            Message("assistant", "hm", "analysis"),
            Message("assistant", "Let me see.", "commentary"),
            Message("assistant", '{"a": 1}', "commentary", "functions.add", "<|constrain|>json"),
            Message("tool", "2", "commentary", "assistant", name="functions.add"),
            Message("assistant", "2", "final"),
            Message("developer", "# Instructions\n\nNow rhyme."),
            Message("user", "Again"),
        ),
        reasoning="high",
        instructions="First.\n\nBe kind.\n\nBe brief.",
        functions=(Function("add", "Adds.", {"type": "object", "properties": {}}),),
        date="2025-06-28",
    )


def test_defaults() -> None:
    assert from_chat([USER]) == Conversation((Message("user", "Hi"),))


@pytest.mark.parametrize(
    "tool", [ADD, {"type": "function", **ADD}, {"type": "function", "function": {**ADD, "strict": False}}]
)
def test_tools_in_every_form(tool: dict[str, Any]) -> None:
    expected = (Function("add", "Adds.", {"type": "object", "properties": {}}),)
    assert functions_from_tools([tool]) == expected
    assert functions_from_tools(expected) == expected
    assert functions_from_tools([{"name": "stop", "description": None}]) == (Function("stop"),)
    assert functions_from_tools([{"name": "stop", "strict": True}]) == (Function("stop", strict=True),)


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_under_every_field_name(field: str) -> None:
    turns = from_chat([USER, {"role": "assistant", field: "hm", "content": "2"}]).messages[1:]
    assert turns == (Message("assistant", "hm", "analysis"), Message("assistant", "2", "final"))


def test_variants_of_calls() -> None:
    call = {"function": {"name": "functions.add", "arguments": {"a": "é"}}, "index": 0}
    turns = from_chat(
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "add", "content": "2"},
        ]
    ).messages
    assert turns[1:] == (
        Message("assistant", '{"a": "é"}', "commentary", "functions.add", "<|constrain|>json"),
        Message("tool", "2", "commentary", "assistant", name="functions.add"),
    )
    empty = from_chat([USER, {"role": "assistant", "content": ""}]).messages
    assert empty[1:] == (Message("assistant", "", "final"),)


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning": "Hm."},
        {"reasoning_content": "Hm.", "reasoning": None, "annotations": [], "audio": None, "mood": "good"},
        {"thinking": "Hm.", "reasoning": "", "provider_specific_fields": {"refusal": None}},
        {"reasoning": "Hm.", "reasoning_content": "another spelling of it"},
        {"reasoning_details": [{"type": "reasoning.text", "text": "Hm.", "signature": None}]},
        {"reasoning_details": [{"type": "reasoning.summary", "summary": "Hm."}]},
        {"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}], "reasoning": "Hm."},
        {"thinking_blocks": [{"type": "thinking", "thinking": "Hm.", "signature": "s"}]},
        {"content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Yes."}]},
        {"content": [{"type": "reasoning", "text": "Hm."}, {"type": "refusal", "refusal": "Yes."}]},
        {"content": None, "refusal": "Yes.", "reasoning": "Hm."},
    ],
)
def test_reasoning_in_every_spelling(fields: dict[str, Any]) -> None:
    assert from_chat([USER, {"role": "assistant", "content": "Yes.", **fields}]).messages[1:] == (
        Message("assistant", "Hm.", "analysis"),
        Message("assistant", "Yes.", "final"),
    )


def test_an_empty_assistant_message_says_nothing() -> None:
    for fields in ({"content": None}, {"tool_calls": []}, {"content": [], "reasoning": ""}):
        assert from_chat([USER, {"role": "assistant", **fields}, USER]).messages == (Message("user", "Hi"),) * 2


def test_the_earlier_form_of_calls() -> None:
    turns = from_chat(
        [
            USER,
            {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}},
            {"role": "function", "name": "add", "content": None},
        ]
    ).messages
    assert turns[1:] == (
        Message("assistant", "{}", "commentary", "functions.add", "<|constrain|>json"),
        Message("tool", "", "commentary", "assistant", name="functions.add"),
    )


def test_a_result_without_an_id_answers_the_last_call() -> None:
    calls = {"role": "assistant", "tool_calls": [CALL, {**CALL, "function": {"name": "sub", "arguments": "{}"}}]}
    for fields, name in (({}, "functions.sub"), ({"tool_name": "add"}, "functions.add")):
        assert from_chat([USER, calls, {"role": "tool", "content": "2", **fields}]).messages[-1].name == name


def test_any_name_of_a_function() -> None:
    call = {"id": "c1", "function": {"name": "get weather", "arguments": "{}"}}
    conversation = from_chat(
        [
            {**USER, "name": "Bob Smith"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
        ],
        tools=[{"name": "get weather"}, {"name": "get_weather"}],
    )
    user, called, result = conversation.messages
    assert user.name == "Bob_Smith"
    assert called.recipient == result.name == "functions.get_weather_"
    assert conversation.names.original("get_weather_") == "get weather"


def test_unknown_fields_are_listed() -> None:
    messages = [{**USER, "mood": "good", "audio": None}, {"role": "assistant", "content": "Hi", "tool_calls": []}]
    assert unknown_fields(messages) == {"messages[].mood"}
    assert unknown_fields([{**USER, "tool_calls": [CALL]}, "Hi", {"content": "?"}]) == {
        "messages[].tool_calls",
        "messages[].content",
    }


def after_user(message: Any) -> list[Any]:
    return [USER, message]


def calling(call: Any) -> list[Any]:
    return after_user({"role": "assistant", "content": None, "tool_calls": call})


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "non-empty list"),
        ("Hi", "non-empty list"),
        (USER, "non-empty list"),
        (["Hi"], r"messages\[0\] must be a dict"),
        ([{"content": "Hi"}], "role None"),
        ([{"role": "robot", "content": "Hi"}], "role 'robot': use one of system, developer"),
        ([{"role": ["user"], "content": "Hi"}], "use one of"),
        ([{"role": "user"}], "content must be a string"),
        ([{"role": "user", "content": None}], "content must be a string"),
        ([{"role": "user", "content": []}], "non-empty list of text parts"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "reads only text"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "text must be a string"),
        (calling("add"), "tool_calls must be a list"),
        (calling(["add"]), r"tool_calls\[0\] must be"),
        (calling([{"id": "c1", "type": "custom"}]), "must be"),
        (calling([{"id": "c1", "function": {"name": " "}}]), "a name of 1 to 1024 characters"),
        (after_user({"role": "assistant", "content": "a", "function_call": {"name": 3}}), "a name of 1 to"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "a part of type 'audio' cannot be read"),
        (calling([{"id": "c1", "function": {"name": "add", "arguments": 3}}]), "JSON in a string"),
        (calling([{"id": "c1", "function": None}]), "function must be"),
        (after_user({"role": "tool", "content": "2"}), "tool_call_id"),
        (after_user({"role": "tool", "content": "2", "tool_call_id": "c9"}), "which is in no assistant message"),
        (after_user({"role": "tool", "content": "2", "tool_call_id": {}}), "which is in no assistant message"),
    ],
)
def test_refused_messages(messages: Any, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        from_chat(messages)


@pytest.mark.parametrize(
    ("tools", "complaint"),
    [
        (ADD, "list of functions"),
        ([3], "only functions"),
        ([{"type": "web_search"}], "only functions"),
        ([{"type": "function", "function": "add"}], "function must be"),
        ([{"type": "function", "function": {}}], "name must be a name of"),
        ([{**ADD, "parameters": "none"}], "JSON schema"),
        ([{**ADD, "description": 3}], "description must be a string"),
        ([{**ADD, "strict": "yes"}], "strict must be true or false"),
        ([ADD, {**ADD, "description": "Adds two."}], "two tools are named 'add'"),
        ([Function("")], "a name of"),
    ],
)
def test_refused_tools(tools: Any, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        from_chat([USER], tools=tools)


SCHEMA = {"type": "object"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, ResponseFormat({"type": "object"})),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
            ResponseFormat(SCHEMA, "n"),
        ),
        ({"type": "json_schema", "name": "n", "schema": SCHEMA, "description": "d"}, ResponseFormat(SCHEMA, "n", "d")),
        ({"type": "json_schema", "json_schema": {"schema": SCHEMA, "color": 1}}, ResponseFormat(SCHEMA)),
        ({"type": "json_object", "schema": {"type": "array"}}, ResponseFormat({"type": "array"})),
    ],
)
def test_response_formats(value: Any, expected: ResponseFormat | None) -> None:
    assert response_format_of(value) == expected


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("json_object", 'must be {"type": "text"}'),
        ({}, "must be"),
        ({"type": "xml"}, "must be"),
        ({"type": "json_schema"}, "schema must be a JSON schema"),
        ({"type": "json_schema", "json_schema": "s"}, "json_schema must be"),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, "json_schema.schema must be"),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": 3}}, "true or false"),
    ],
)
def test_refused_response_formats(value: Any, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        response_format_of(value)


def test_tool_choices() -> None:
    functions = (Function("add"), Function("none"))
    for kind in ("auto", "none", "required"):
        assert tool_choice_of(kind, functions) == ToolChoice(kind)
    named = {"type": "function", "function": {"name": "none"}}
    assert tool_choice_of(named, functions) == ToolChoice("required", ("none",))
    assert tool_choice_of({"type": "function", "name": "add"}, functions) == ToolChoice("required", ("add",))
    assert tool_choice_of("add", functions) == ToolChoice("required", ("add",))
    tools = [{"type": "function", "function": {"name": "add"}}, {"type": "web_search"}]
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": tools}}
    assert tool_choice_of(allowed, functions) == ToolChoice("required", ("add",))
    allowed = {"type": "allowed_tools", "tools": [{"type": "function", "name": "add"}]}
    assert tool_choice_of(allowed, functions) == ToolChoice("auto", ("add",))
    assert tool_choice_of({"type": "allowed_tools", "tools": tools[1:]}, functions) == ToolChoice("none")
    for wrong, complaint in (
        ("sub", "not one of the tools"),
        (None, "must be"),
        ({"type": "allowed_tools", "mode": "all"}, "must be"),
        ({"type": "allowed_tools", "tools": [{"type": "function", "name": "sub"}]}, "not one of the tools"),
        ({"type": "function"}, "not one of the tools"),
    ):
        with pytest.raises(InvalidRequest, match=complaint):
            tool_choice_of(wrong, functions)


@pytest.mark.parametrize("effort", ["none", "", None, ["high"]])
def test_refused_reasoning_effort(effort: Any) -> None:
    with pytest.raises(InvalidRequest, match="low, medium, high"):
        from_chat([USER], reasoning=effort)


def test_refused_instructions() -> None:
    with pytest.raises(InvalidRequest, match="system must be a string"):
        from_chat([USER], system=3)  # type: ignore[arg-type]
