"""Rendering: a conversation -> the token ids that the model continues, identical to openai-harmony's.

Header parts and content are encoded separately with `Tokenizer.encode`, as in training. That encodes special tokens
in a message as plain text: a user cannot inject them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ..errors import InvalidRequest
from ..tokenizer import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START, Tokenizer
from .builtin import BUILTIN_TOOLS
from .messages import Conversation, Message, ResponseFormat
from .typescript import Namespace, tools_section

VALID_CHANNELS = "# Valid channels: analysis, commentary, final. Channel must be included for every message."
CALL_CHANNEL = "Calls to these tools must go to the commentary channel: 'functions'."


def render(conversation: Conversation, tokenizer: Tokenizer, max_context: int | None = None) -> list[int]:
    """Return the ids of the prompt: all messages, then `<|start|>assistant`. The model continues with its header.

    After a prefill (prefill_ids), it continues with the text of its answer.
    max_context: number of tokens that the context holds. A longer prompt is refused as soon as it is known to be one.
    Raises PromptTooLong for that, and InvalidRequest for a tool message without a name or an unknown built-in tool.
    """
    limit = sys.maxsize if max_context is None else max_context
    ids: list[int] = []
    for message in prompt_messages(conversation):
        tokenizer.check_length(limit, len(message.content), len(ids))
        for part in _message_ids(message, tokenizer):
            ids += part
            tokenizer.check_length(limit, 0, len(ids))
    ids += [tokenizer.special(START), *tokenizer.encode("assistant")]
    tokenizer.check_length(limit, len(conversation.prefill), len(ids))
    return ids + prefill_ids(conversation, tokenizer)


def prefill_ids(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """Return the ids with which the reply begins, as if the model had written them; none without a prefill."""
    if not conversation.prefill:
        return []
    special, encode = tokenizer.special, tokenizer.encode
    return [special(CHANNEL), *encode("final"), special(MESSAGE), *encode(conversation.prefill)]


def render_reply(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Return the ids that the model has to generate after `render` to write these messages: a training target.

    They begin after `<|start|>assistant` and end in `<|call|>` for a call, otherwise in `<|return|>`.
    Raises InvalidRequest for an empty list, and for a message that is not the assistant's or has a name.
    """
    if not messages or any(message.role != "assistant" or message.name for message in messages):
        raise InvalidRequest("a reply must have at least one message, all from the assistant and without a name")
    ids = render_messages(messages, tokenizer)
    if messages[-1].recipient is None:
        ids[-1] = tokenizer.special(RETURN)
    return ids[1 + len(tokenizer.encode("assistant")) :]


def render_messages(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the messages, one after the other. Raises InvalidRequest as render_message does."""
    return [id for message in messages for id in render_message(message, tokenizer)]


def render_message(message: Message, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of one message, from `<|start|>` to its end token.

    That is `<|call|>` for a message from the assistant with a recipient, otherwise `<|end|>`.

    Raises InvalidRequest for a tool's message without a name.
    """
    return [id for part in _message_ids(message, tokenizer) for id in part]


def _message_ids(message: Message, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Yield the ids of one message: its header, slices of its content, its end token."""
    special, encode = tokenizer.special, tokenizer.encode
    ids = [special(START), *_author(message, tokenizer)]
    if message.recipient not in (None, "all"):
        ids += encode(f" to={message.recipient}")
    if message.channel is not None:
        ids += [special(CHANNEL), *encode(message.channel)]
    if message.content_type is not None:
        ids += _content_type(message.content_type, tokenizer)
    yield [*ids, special(MESSAGE)]
    yield from tokenizer.encode_slices(message.content)
    called = message.role == "assistant" and message.recipient is not None
    yield [special(CALL if called else END)]


def prompt_messages(conversation: Conversation) -> tuple[Message, ...]:
    """Return the messages of the prompt: system, developer unless it would be empty, then the turns.

    Old reasoning is dropped by openai-harmony's rule: if the assistant's latest message is a final answer, analysis
    before the first final answer of the conversation is left out. Otherwise (a call awaits its result) all of it is
    kept.
    """
    turns = conversation.messages
    assistant = [message for message in turns if message.role == "assistant"]
    first_final = next((index for index, message in enumerate(turns) if message.channel == "final"), 0)
    if assistant and assistant[-1].channel == "final":
        kept = [message for message in turns[:first_final] if message.channel != "analysis"]
        turns = (*kept, *turns[first_final:])
    developer = developer_text(conversation)
    opening = [Message("system", system_text(conversation))]
    if developer:
        opening.append(Message("developer", developer))
    return (*opening, *turns)


def system_text(conversation: Conversation) -> str:
    """Return the system message: identity, dates, reasoning effort, built-in tools and the valid channels.

    Raises InvalidRequest for an unknown built-in tool.
    """
    about = [conversation.identity]
    if conversation.knowledge_cutoff is not None:
        about.append(f"Knowledge cutoff: {conversation.knowledge_cutoff}")
    if conversation.date is not None:
        about.append(f"Current date: {conversation.date}")
    sections = ["\n".join(about), f"Reasoning: {conversation.reasoning}"]
    if conversation.builtin_tools:
        texts = dict(conversation.tool_texts)
        sections.append(tools_section([_builtin(name, texts) for name in sorted(set(conversation.builtin_tools))]))
    sections.append(f"{VALID_CHANNELS}\n{CALL_CHANNEL}" if conversation.functions else VALID_CHANNELS)
    return "\n\n".join(sections)


def developer_text(conversation: Conversation) -> str:
    """Return the developer message: instructions, function declarations and the response format.

    Empty if the conversation has none of them.
    """
    sections = []
    if conversation.instructions is not None:
        sections.append(instructions_text(conversation.instructions))
    if conversation.functions:
        spelled = [replace(f, name=conversation.names.spelling(f.name)) for f in conversation.functions]
        sections.append(tools_section([Namespace("functions", functions=spelled)]))
    if conversation.response_format is not None and conversation.response_format.name is not None:
        sections.append(response_format_section(conversation.response_format))
    return "\n\n".join(sections)


def response_format_section(response_format: ResponseFormat) -> str:
    """Return the "# Response Formats" section, laid out as in OpenAI's guide to Harmony ("Structured output")."""
    comments = [f"// {line}\n" for line in response_format.description.splitlines()]
    schema = json.dumps(response_format.schema, ensure_ascii=False, separators=(",", ":"))
    return f"# Response Formats\n\n## {response_format.name}\n\n{''.join(comments)}{schema}"


def instructions_text(instructions: str) -> str:
    """Return the "# Instructions" section of a developer message."""
    return f"# Instructions\n\n{instructions}"


def _builtin(name: str, texts: Mapping[str, str]) -> Namespace:
    if name not in BUILTIN_TOOLS:
        known = " or ".join(BUILTIN_TOOLS)
        raise InvalidRequest(f"unknown built-in tool {name!r}: use {known}, or declare a function")
    tool = BUILTIN_TOOLS[name]
    return replace(tool, description=texts.get(name, tool.description))


def _author(message: Message, tokenizer: Tokenizer) -> list[int]:
    if message.role != "tool":
        ids = tokenizer.encode(message.role)
        return ids if message.name is None else ids + tokenizer.encode(f":{message.name}")
    if message.name is None:
        raise InvalidRequest('a tool message needs a name: that of the called function, such as "functions.add"')
    return tokenizer.encode(message.name)


def _content_type(content_type: str, tokenizer: Tokenizer) -> list[int]:
    if not content_type.startswith(CONSTRAIN):
        return tokenizer.encode(f" {content_type}")
    rest = content_type[len(CONSTRAIN) :]
    return [*tokenizer.encode(" "), tokenizer.special(CONSTRAIN), *tokenizer.encode(rest)]
