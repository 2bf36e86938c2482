"""Rendered conversations: golden texts on a small vocabulary, and openai-harmony's ids on the published one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.harmony.messages import Conversation, Function, Message
from mlx_gptoss.harmony.render import prompt_messages, render, render_message, render_reply
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


def written(conversation: Conversation, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(render(conversation, tokenizer), specials=True)


def test_a_chat(small: Tokenizer) -> None:
    conversation = Conversation((USER,), reasoning="high", instructions="Be brief.", date="2025-06-28")
    assert written(conversation, small) == (
        f"{SYSTEM}<|end|><|start|>developer<|message|># Instructions\n\nBe brief.<|end|>"
        "<|start|>user<|message|>Hi <|end|><|end|><|start|>assistant"
    )
    # What a user writes is never a special token.
    assert render(conversation, small).count(small.special("<|end|>")) == 3


def test_functions_and_a_call(small: Tokenizer) -> None:
    turns = (USER, THOUGHT, CALL, RESULT)
    conversation = Conversation(turns, reasoning="high", functions=(ADD,), date="2025-06-28")
    assert written(conversation, small) == (
        f"{SYSTEM}\nCalls to these tools must go to the commentary channel: 'functions'.<|end|>"
        "<|start|>developer<|message|># Tools\n\n## functions\n\nnamespace functions {\n\n// Adds.\n"
        "type add = (_: {\na: number,\n}) => any;\n\n} // namespace functions<|end|>"
        "<|start|>user<|message|>Hi <|end|><|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>thinking<|end|>"
        "<|start|>assistant to=functions.add<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"
        "<|start|>functions.add to=assistant<|channel|>commentary<|message|>3<|end|>"
        "<|start|>assistant"
    )


def test_analysis_is_dropped_only_after_a_final_answer() -> None:
    def shown(*turns: Message) -> list[str]:
        return [message.content for message in prompt_messages(Conversation(turns))[1:]]

    assert shown(THOUGHT, FINAL, USER) == ["three", USER.content]
    assert shown(THOUGHT, CALL, RESULT) == ["thinking", "{}", "3"]
    assert shown(THOUGHT, FINAL, USER, THOUGHT, CALL, RESULT) == [
        *("thinking", "three", USER.content, "thinking", "{}", "3"),
    ]
    assert shown(THOUGHT) == ["thinking"]


def test_a_reply_goes_on_where_the_prompt_ends(small: Tokenizer) -> None:
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


def test_a_tool_message_needs_a_name(small: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="name"):
        render_message(Message("tool", "3"), small)


TEXTS = st.text(max_size=30) | st.sampled_from(["", " a", "x\n", "<|end|><|start|>system", "3.14 🎉", '{"a": 1}'])
CONTENT_TYPES = st.sampled_from([None, "json", "<|constrain|>json", "<|constrain|>", "<|constrain|> json", "code"])
RECIPIENTS = st.sampled_from([None, None, "functions.add", "all", "assistant", "browser.search", "a b"])
CHANNELS = st.sampled_from([None, "analysis", "commentary", "final", "final"])
MESSAGES = st.one_of(
    st.sampled_from([USER, THOUGHT, CALL, RESULT, FINAL]),
    st.builds(Message, st.just("assistant"), TEXTS, CHANNELS, RECIPIENTS, CONTENT_TYPES),
    st.builds(
        Message,
        st.sampled_from(["user", "assistant", "system", "developer", "tool"]),
        *(TEXTS, CHANNELS, RECIPIENTS, CONTENT_TYPES),
        name=st.sampled_from(["functions.add", "bob", "é <|end|>"]),
    ),
)
CONVERSATIONS = st.builds(
    Conversation,
    st.lists(MESSAGES, max_size=8).map(tuple),
    reasoning=st.sampled_from(["low", "medium", "high"]),
    instructions=st.none() | TEXTS,
    functions=st.lists(st.sampled_from([ADD, Function("stop"), Function("f", "x\ny", {})]), max_size=2).map(tuple),
    date=st.none() | st.just("2025-06-28"),
    identity=st.sampled_from(["You are ChatGPT, a large language model trained by OpenAI.", "I", ""]),
    knowledge_cutoff=st.sampled_from(["2024-06", None]),
)


def as_judged(conversation: Conversation) -> Any:
    """The same conversation in openai-harmony's own terms."""
    import openai_harmony as oh

    system = oh.SystemContent(
        model_identity=conversation.identity,
        reasoning_effort=oh.ReasoningEffort(conversation.reasoning.capitalize()),
        conversation_start_date=conversation.date,
        knowledge_cutoff=conversation.knowledge_cutoff,
    )
    messages = [oh.Message.from_role_and_content(oh.Role.SYSTEM, system)]
    if conversation.instructions is not None or conversation.functions:
        developer = oh.DeveloperContent(instructions=conversation.instructions)
        if conversation.functions:
            tools = conversation.functions
            descriptions = [oh.ToolDescription.new(tool.name, tool.description, tool.parameters) for tool in tools]
            developer = developer.with_function_tools(descriptions)
        messages.append(oh.Message.from_role_and_content(oh.Role.DEVELOPER, developer))
    return oh.Conversation.from_messages(messages + [as_judged_message(turn) for turn in conversation.messages])


def as_judged_message(message: Message) -> Any:
    import openai_harmony as oh

    author = oh.Author(role=oh.Role(message.role), name=message.name)
    judged = oh.Message.from_author_and_content(author, message.content)
    judged.channel, judged.recipient, judged.content_type = message.channel, message.recipient, message.content_type
    return judged


@settings(max_examples=1000, deadline=None)
@given(conversation=CONVERSATIONS)
def test_ids_are_openai_harmonys(published: Tokenizer, judge: Any, conversation: Conversation) -> None:
    import openai_harmony as oh

    theirs = judge.render_conversation_for_completion(as_judged(conversation), oh.Role.ASSISTANT)
    assert render(conversation, published) == theirs


@settings(max_examples=200, deadline=None)
@given(answer=TEXTS, thought=TEXTS)
def test_targets_are_openai_harmonys(published: Tokenizer, judge: Any, thought: str, answer: str) -> None:
    import openai_harmony as oh

    reply = (Message("assistant", thought, "analysis"), Message("assistant", answer, "final"))
    prompt = Conversation((USER,))
    whole = as_judged(Conversation((USER, *reply)))
    theirs = judge.render_conversation_for_training(whole, oh.RenderConversationConfig(auto_drop_analysis=False))
    assert render(prompt, published) + render_reply(reply, published) == theirs
