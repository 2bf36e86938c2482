"""Conversations that grow by append(), and those that are kept as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gptoss import Conversation, Function, Message
from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.harmony.messages import ResponseFormat, TextFormat

FULL = Conversation(
    messages=(
        Message("user", "Hi", name="Ada"),
        Message("assistant", "{}", "commentary", "functions.f", "<|constrain|>json"),
        Message("tool", "1", "commentary", "assistant", name="functions.f"),
    ),
    reasoning="high",
    instructions="Be brief.",
    functions=(
        Function("f", "does", {"type": "object", "properties": {"a": {"enum": [1, 2.5, None, True]}}}, strict=True),
        Function("g", text_format=TextFormat("regex", "a+")),
        Function("h", text_format=TextFormat()),
    ),
    builtin_tools=("python",),
    tool_texts=(("python", "runs it"),),
    response_format=ResponseFormat({"type": "object"}, "form", "a form"),
    prefill="{",
    date="2026-01-02",
    identity="You are a parrot.",
    knowledge_cutoff=None,
)


@pytest.mark.parametrize("conversation", [FULL, Conversation(), Conversation().append("Hi")])
def test_json_and_back(conversation: Conversation) -> None:
    data = conversation.to_dict()
    assert Conversation.from_dict(json.loads(json.dumps(data))) == conversation
    assert data["version"] == 1


texts = st.text(max_size=5)
optional = st.none() | texts
messages = st.builds(
    Message, st.sampled_from(["system", "developer", "user", "assistant", "tool"]), texts, optional, optional, optional
)


@given(st.builds(Conversation, st.lists(messages, max_size=4).map(tuple), instructions=optional, prefill=texts))
def test_any_conversation_comes_back(conversation: Conversation) -> None:
    assert Conversation.from_dict(json.loads(json.dumps(conversation.to_dict()))) == conversation


def test_defaults_are_left_out() -> None:
    data = Conversation().append("Hi").to_dict()
    assert data == {"version": 1, "messages": [{"role": "user", "content": "Hi"}]}


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"items": value}
    return value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "to_dict"),
        ({"messages": []}, "version"),
        ({"version": 2}, "version 2.*update"),
        ({"version": True}, "version True"),
        ({"version": 1, "mesages": []}, "unknown field 'mesages'"),
        ({"version": 1, "messages": "x"}, r"conversation\.messages must be a list"),
        ({"version": 1, "messages": ["x"]}, r"conversation\.messages\[0\] must be a dict"),
        ({"version": 1, "messages": [{"role": "user"}]}, r"messages\[0\] is incomplete"),
        ({"version": 1, "messages": [{"role": "robot", "content": ""}]}, r"messages\[0\]\.role must be one of"),
        ({"version": 1, "messages": [{"role": ["user"], "content": ""}]}, r"messages\[0\]\.role must be one of"),
        ({"version": 1, "messages": [{"role": "user", "content": 3}]}, r"content must be a string, not 3"),
        ({"version": 1, "reasoning": "max"}, "low, medium, high"),
        ({"version": 1, "functions": [{"name": "f", "strict": 1}]}, "true or false"),
        ({"version": 1, "functions": [{"name": "f", "parameters": []}]}, "JSON schema"),
        ({"version": 1, "functions": [{"name": "f", "parameters": nested(200)}]}, "nested"),
        ({"version": 1, "tool_texts": [["python"]]}, "two strings"),
    ],
)
def test_data_that_is_no_conversation(data: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Conversation.from_dict(data)


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"parameters\.a has a set"):
        Conversation(functions=(Function("f", parameters={"a": {1}}),)).to_dict()


def test_append_takes_messages_dicts_and_strings() -> None:
    first = Conversation(functions=(Function("f"),)).append("Hi")
    assert first.messages == (Message("user", "Hi"),)
    second = first.append({"role": "assistant", "content": "Hello"}, "More?")
    assert [(m.role, m.content, m.channel) for m in second.messages] == [
        ("user", "Hi", None),
        ("assistant", "Hello", "final"),
        ("user", "More?", None),
    ]
    assert len(first.messages) == 1  # unchanged
    late = second.append({"role": "system", "content": "Be brief."}).messages[-1]
    assert late.role == "developer" and "Be brief." in late.content
    result = second.append({"role": "tool", "name": "f", "content": "1"}).messages[-1]
    assert (result.role, result.name) == ("tool", "functions.f")


def test_append_drops_the_reasoning_that_led_to_an_answer() -> None:
    thought, final = Message("assistant", "hm", "analysis"), Message("assistant", "Hello", "final")
    assert Conversation().append("Hi", thought, final).messages == (Message("user", "Hi"), final)
    assert Conversation().append("Hi", thought).messages == (Message("user", "Hi"), thought)


def test_append_of_what_is_no_message_names_the_remedy() -> None:
    with pytest.raises(InvalidRequest, match=r"not int"):
        Conversation().append(3)  # type: ignore[arg-type]
