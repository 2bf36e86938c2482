"""Rendering: golden texts with a small vocabulary. test_corpus.py compares the ids with openai-harmony's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.harmony.messages import Conversation, Function, Message, ResponseFormat
from mlx_gptoss.harmony.render import (
    developer_text,
    prompt_messages,
    render,
    render_message,
    render_reply,
    system_text,
)
from mlx_gptoss.tokenizer import Tokenizer

USER = Message("user", "Hi <|end|>")
THOUGHT = Message("assistant", "thinking", channel="analysis")
CALL = Message("assistant", "{}", "commentary", "functions.add", "<|constrain|>json")
RESULT = Message("tool", "3", "commentary", "assistant", name="functions.add")
FINAL = Message("assistant", "three", channel="final")
ADD = Function("add", "Adds.", {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]})

SYSTEM = """\
<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: 2025-06-28

Reasoning: high

# Valid channels: analysis, commentary, final. Channel must be included for every message."""


def rendered(conversation: Conversation, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(render(conversation, tokenizer), specials=True)


def test_a_chat(small: Tokenizer) -> None:
    conversation = Conversation((USER,), reasoning="high", instructions="Be brief.", date="2025-06-28")
    assert rendered(conversation, small) == (
        f"{SYSTEM}<|end|><|start|>developer<|message|># Instructions\n\nBe brief.<|end|>"
        "<|start|>user<|message|>Hi <|end|><|end|><|start|>assistant"
    )
    # Special tokens in a user's text are encoded as plain text.
    assert render(conversation, small).count(small.special("<|end|>")) == 3


def test_functions_and_a_call(small: Tokenizer) -> None:
    turns = (USER, THOUGHT, CALL, RESULT)
    conversation = Conversation(turns, reasoning="high", functions=(ADD,), date="2025-06-28")
    assert rendered(conversation, small) == (
        f"{SYSTEM}\nCalls to these tools must go to the commentary channel: 'functions'.<|end|>"
        "<|start|>developer<|message|># Tools\n\n## functions\n\nnamespace functions {\n\n// Adds.\n"
        "type add = (_: {\na: number,\n}) => any;\n\n} // namespace functions<|end|>"
        "<|start|>user<|message|>Hi <|end|><|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>thinking<|end|>"
        "<|start|>assistant to=functions.add<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"
        "<|start|>functions.add to=assistant<|channel|>commentary<|message|>3<|end|>"
        "<|start|>assistant"
    )


def test_builtin_tools_and_a_call(small: Tokenizer) -> None:
    asked = Conversation((USER, Message("assistant", "1 + 1", "analysis", "python", "code")), reasoning="high")
    text = rendered(
        replace(asked, builtin_tools=("python", "browser"), date="2025-06-28").with_result("python", "2"), small
    )
    before, after = SYSTEM.split("# Valid")
    assert text.startswith(f"{before}# Tools\n\n## browser\n\n// Tool for browsing.\n")
    assert "\nnamespace browser {\n\n// Searches for information related to `query`" in text
    assert "type find = (_: {\npattern: string,\ncursor?: number, // default: -1\n}) => any;\n\n} // namespace" in text
    assert "## python\n\nUse this tool to execute Python code in your chain of thought. The code will not be" in text
    assert text.endswith(
        f"Depends on the cluster.\n\n# Valid{after}<|end|><|start|>user<|message|>Hi <|end|><|end|>"
        "<|start|>assistant to=python<|channel|>analysis code<|message|>1 + 1<|call|>"
        "<|start|>python to=assistant<|channel|>analysis<|message|>2<|end|><|start|>assistant"
    )
    with pytest.raises(InvalidRequest, match="unknown built-in tool 'bash': use browser or python"):
        render(Conversation((USER,), builtin_tools=("bash",)), small)  # type: ignore[arg-type]


def test_analysis_is_dropped_only_after_a_final_answer() -> None:
    def shown(*turns: Message) -> list[str]:
        return [message.content for message in prompt_messages(Conversation(turns))[1:]]

    assert shown(THOUGHT, FINAL, USER) == ["three", USER.content]
    assert shown(THOUGHT, CALL, RESULT) == ["thinking", "{}", "3"]
    assert shown(THOUGHT, FINAL, USER, THOUGHT, CALL, RESULT) == [
        *("thinking", "three", USER.content, "thinking", "{}", "3"),
    ]
    assert shown(THOUGHT) == ["thinking"]


def test_a_rendered_reply_starts_where_the_prompt_ends(small: Tokenizer) -> None:
    def reply(*messages: Message) -> str:
        return small.decode(render_reply(messages, small), specials=True)

    assert reply(THOUGHT, FINAL) == (
        "<|channel|>analysis<|message|>thinking<|end|><|start|>assistant<|channel|>final<|message|>three<|return|>"
    )
    assert reply(CALL) == " to=functions.add<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"
    with pytest.raises(InvalidRequest, match="assistant"):
        reply(USER)
    with pytest.raises(InvalidRequest, match="at least one"):
        reply()


def test_the_response_format_ends_the_developer_message() -> None:
    """The layout is that of OpenAI's guide to Harmony."""
    schema = {"properties": {"naïve": {"type": "array", "items": {"type": "string"}}}, "type": "object"}
    response_format = ResponseFormat(schema, "shopping_list", "What to buy.\nIn order.")
    shown = developer_text(Conversation((USER,), instructions="Be kind.", response_format=response_format))
    assert shown == (
        "# Instructions\n\nBe kind.\n\n# Response Formats\n\n## shopping_list\n\n// What to buy.\n// In order.\n"
        '{"properties":{"naïve":{"type":"array","items":{"type":"string"}}},"type":"object"}'
    )
    assert developer_text(Conversation((USER,), response_format=ResponseFormat(schema))) == ""


def test_a_tool_message_needs_a_name(small: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="name"):
        render_message(Message("tool", "3"), small)


def test_a_builtin_tool_with_another_description():
    texts = (("python", "Runs code."), ("browser", "Unused."))
    conversation = Conversation(builtin_tools=("python",), tool_texts=texts)
    assert "# Tools\n\n## python\n\nRuns code.\n\n# Valid channels" in system_text(conversation)
