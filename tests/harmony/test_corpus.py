"""Generated conversations are rendered to the same ids as by openai-harmony.

They cover every role, channel, recipient, content type and name, instructions, functions with any schema, built-in
tools, reasoning efforts, dates and identities.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gptoss.harmony.messages import Conversation, Function, Message, without_old_reasoning
from mlx_gptoss.harmony.render import prompt_messages, render, render_reply
from mlx_gptoss.harmony.typescript import Namespace, tools_section
from mlx_gptoss.tokenizer import Tokenizer

NAMES = st.text("abZ_9é", min_size=1, max_size=6)
NOTES = st.text('ab "\\\n\r/{}é\u2028', max_size=12)
# Few digits and small exponents: openai-harmony does not round longer numbers to the nearest float.
FLOATS = st.builds(lambda digits, exponent: float(f"{digits}e{exponent}"), st.integers(-999, 999), st.integers(-20, 20))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64) | FLOATS | NOTES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=4,
)
TYPES = ["string", "number", "integer", "boolean", "null", "array", "object", "strange"]
ANNOTATIONS = {
    "title": NOTES,
    "description": NOTES | st.just("the same"),
    "default": VALUES | st.sampled_from(["a", "b"]),
    "examples": st.lists(VALUES, max_size=3),
    "enum": st.lists(st.sampled_from(["a", "b", "", 'c"', 3, None]), max_size=3),
    "nullable": st.booleans(),
    "format": NOTES,
    "const": VALUES,
    "minimum": FLOATS,
    "pattern": NOTES,
    "$ref": st.just("#/$defs/a"),
}


def with_parts(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {"type": st.sampled_from([*TYPES, "object", "object", "array"])},
        optional={
            **ANNOTATIONS,
            "properties": st.dictionaries(NAMES, inner, max_size=4),
            "required": st.lists(st.sampled_from(["a", "b", "Z", 3]), max_size=3),
            "additionalProperties": inner,
            "items": inner,
            "oneOf": st.lists(inner, max_size=3) | st.none(),
            "anyOf": st.lists(inner, max_size=2),
            "allOf": st.lists(inner, max_size=2),
            "$defs": st.dictionaries(NAMES, inner, max_size=2),
        },
    )


LEAVES = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(TYPES) | st.lists(st.sampled_from([*TYPES, 1]), max_size=3), **ANNOTATIONS}
)
SCHEMAS = st.recursive(LEAVES | st.booleans() | st.none(), with_parts, max_leaves=8)
OBJECTS = st.fixed_dictionaries(
    {"type": st.just("object"), "properties": st.dictionaries(NAMES, SCHEMAS, max_size=5)},
    optional={"required": st.lists(NAMES, max_size=3), "description": NOTES},
)
PARAMETERS = st.none() | OBJECTS | SCHEMAS.filter(lambda schema: isinstance(schema, dict))
FUNCTIONS = st.lists(st.builds(Function, NAMES, NOTES, PARAMETERS), max_size=3).map(tuple)

THOUGHT = Message("assistant", "thinking", "analysis")
TURNS = [
    Message("user", "Hi <|end|>"),
    THOUGHT,
    Message("assistant", "I shall look.", "commentary"),
    Message("assistant", "{}", "commentary", "functions.add", "<|constrain|>json"),
    Message("tool", "3", "commentary", "assistant", name="functions.add"),
    Message("assistant", "1 + 1", "analysis", "python", "code"),
    Message("tool", "2", "analysis", "assistant", name="python"),
    Message("assistant", "three", "final"),
]
TEXTS = st.text(max_size=30) | st.sampled_from(["", " a", "x\n", "<|end|><|start|>system", "3.14 🎉", '{"a": 1}'])
CONTENT_TYPES = st.sampled_from([None, "json", "<|constrain|>json", "<|constrain|>", "<|constrain|> json", "code"])
RECIPIENTS = st.sampled_from([None, None, "functions.add", "all", "assistant", "browser.search", "python", "a b"])
CHANNELS = st.sampled_from([None, "analysis", "commentary", "final", "final"]) | NAMES
ROLES = ["user", "assistant", "system", "developer", "tool"]
MESSAGES = st.one_of(
    st.sampled_from(TURNS),
    st.builds(Message, st.just("assistant"), TEXTS, CHANNELS, RECIPIENTS, CONTENT_TYPES),
    st.builds(
        Message,
        st.sampled_from(ROLES),
        *(TEXTS, CHANNELS, RECIPIENTS | NAMES, CONTENT_TYPES | NAMES),
        name=st.sampled_from(["functions.add", "bob", "é <|end|>"]) | NAMES,
    ),
)
CONVERSATIONS = st.builds(
    Conversation,
    st.lists(MESSAGES, max_size=8).map(tuple),
    reasoning=st.sampled_from(["low", "medium", "high"]),
    instructions=st.none() | TEXTS,
    functions=FUNCTIONS,
    builtin_tools=st.sampled_from([(), ("browser",), ("python",), ("python", "browser")]),
    date=st.none() | st.dates().map(str) | TEXTS,
    identity=st.just("You are ChatGPT, a large language model trained by OpenAI.") | TEXTS,
    knowledge_cutoff=st.none() | st.just("2024-06") | TEXTS,
)


def to_openai_harmony(conversation: Conversation) -> Any:
    """Return the same conversation as openai-harmony's Conversation."""
    import openai_harmony as oh

    system = oh.SystemContent(
        model_identity=conversation.identity,
        reasoning_effort=oh.ReasoningEffort(conversation.reasoning.capitalize()),
        conversation_start_date=conversation.date,
        knowledge_cutoff=conversation.knowledge_cutoff,
    )
    for tool in conversation.builtin_tools:
        system = system.with_browser_tool() if tool == "browser" else system.with_python_tool()
    messages = [oh.Message.from_role_and_content(oh.Role.SYSTEM, system)]
    if conversation.instructions is not None or conversation.functions:
        developer = oh.DeveloperContent(instructions=conversation.instructions)
        if conversation.functions:
            spelled = [replace(tool, name=conversation.names.spelling(tool.name)) for tool in conversation.functions]
            developer = developer.with_function_tools([to_openai_harmony_tool(tool) for tool in spelled])
        messages.append(oh.Message.from_role_and_content(oh.Role.DEVELOPER, developer))
    return oh.Conversation.from_messages(messages + [to_openai_harmony_message(turn) for turn in conversation.messages])


def to_openai_harmony_tool(function: Function) -> Any:
    import openai_harmony as oh

    return oh.ToolDescription.new(function.name, function.description, function.parameters)


def to_openai_harmony_message(message: Message) -> Any:
    import openai_harmony as oh

    author = oh.Author(role=oh.Role(message.role), name=message.name)
    converted = oh.Message.from_author_and_content(author, message.content)
    converted.channel, converted.recipient, converted.content_type = (
        message.channel,
        message.recipient,
        message.content_type,
    )
    return converted


def reference_ids(reference: Any, conversation: Conversation, *, drop: bool = True) -> list[int]:
    import openai_harmony as oh

    config = oh.RenderConversationConfig(auto_drop_analysis=drop)
    return reference.render_conversation_for_completion(to_openai_harmony(conversation), oh.Role.ASSISTANT, config)


@settings(max_examples=200, deadline=None)
@given(conversation=CONVERSATIONS)
def test_ids_match_openai_harmony(published: Tokenizer, reference: Any, conversation: Conversation) -> None:
    assert render(conversation, published) == reference_ids(reference, conversation)


@pytest.mark.slow
@settings(max_examples=30_000, deadline=None)
@given(conversation=CONVERSATIONS)
def test_many_more_ids(published: Tokenizer, reference: Any, conversation: Conversation) -> None:
    assert render(conversation, published) == reference_ids(reference, conversation)


@pytest.mark.parametrize("name", ["browser", "python"])
def test_builtin_tools_are_declared_as_by_openai_harmony(published: Tokenizer, reference: Any, name: Any) -> None:
    for functions in ((), (Function("add"),)):
        conversation = Conversation((TURNS[0],), builtin_tools=(name,), functions=functions)
        ids = render(conversation, published)
        assert ids == reference_ids(reference, conversation)
        assert ("'functions'" in published.decode(ids)) == bool(functions)


@settings(max_examples=200, deadline=None)
@given(functions=FUNCTIONS.filter(len))
def test_any_schema_is_declared_as_by_openai_harmony(reference: Any, functions: tuple[Function, ...]) -> None:
    import openai_harmony as oh

    content = oh.DeveloperContent.new().with_function_tools([to_openai_harmony_tool(tool) for tool in functions])
    text = reference.decode(reference.render(oh.Message.from_role_and_content(oh.Role.DEVELOPER, content)))
    ours = tools_section([Namespace("functions", functions=functions)])
    assert ours == text.removeprefix("<|start|>developer<|message|>").removesuffix("<|end|>")


@settings(max_examples=100, deadline=None)
@given(answer=TEXTS, thought=TEXTS)
def test_training_targets_match_openai_harmony(published: Tokenizer, reference: Any, thought: str, answer: str) -> None:
    import openai_harmony as oh

    reply = (Message("assistant", thought, "analysis"), Message("assistant", answer, "final"))
    prompt = Conversation((TURNS[0],))
    whole = to_openai_harmony(Conversation((TURNS[0], *reply)))
    theirs = reference.render_conversation_for_training(whole, oh.RenderConversationConfig(auto_drop_analysis=False))
    assert render(prompt, published) + render_reply(reply, published) == theirs


@settings(max_examples=100, deadline=None)
@given(conversation=CONVERSATIONS)
def test_without_old_reasoning_drops_at_least_what_openai_harmony_drops(
    published: Tokenizer, reference: Any, conversation: Conversation
) -> None:
    """openai-harmony drops analysis before the first final answer, and only if a final answer comes last.

    without_old_reasoning drops analysis up to the last final answer. After that, neither renderer drops more.
    """
    kept = Conversation(without_old_reasoning(conversation.messages))
    finals = [place for place, message in enumerate(kept.messages) if message.channel == "final"]
    old = kept.messages[: finals[-1]] if finals else ()
    assert all(message.channel != "analysis" for message in old)
    assert prompt_messages(kept)[1:] == kept.messages
    assert render(kept, published) == reference_ids(reference, kept) == reference_ids(reference, kept, drop=False)
