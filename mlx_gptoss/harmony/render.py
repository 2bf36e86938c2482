"""A conversation -> the ids that the model continues. The ids are openai-harmony's, one for one.

Text goes through `Tokenizer.encode`, piece by piece as the model was trained (header parts and content are encoded
apart), so special tokens written in a message stay text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..errors import InvalidRequest
from ..tokenizer import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START, Tokenizer
from .builtin import BUILTIN_TOOLS
from .messages import Conversation, Message, ResponseFormat
from .typescript import Namespace, tools_section

VALID_CHANNELS = "# Valid channels: analysis, commentary, final. Channel must be included for every message."
CALL_CHANNEL = "Calls to these tools must go to the commentary channel: 'functions'."


def render(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """All messages, then `<|start|>assistant`: the model goes on with its header.

    Raises InvalidRequest for a message or built-in tool that cannot be rendered.
    """
    ids = render_messages(prompt_messages(conversation), tokenizer)
    return [*ids, tokenizer.special(START), *tokenizer.encode("assistant")]


def render_reply(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """What the model would have to say after `render` to add these assistant messages: a trainer's target.

    It begins after `<|start|>assistant` and ends in `<|call|>` for a call, else in `<|return|>`.
    Raises InvalidRequest unless there is a message and all are the assistant's.
    """
    if not messages or any(message.role != "assistant" or message.name for message in messages):
        raise InvalidRequest("a reply is at least one message, and all of them the assistant's, without a name")
    ids = render_messages(messages, tokenizer)
    if messages[-1].recipient is None:
        ids[-1] = tokenizer.special(RETURN)
    return ids[1 + len(tokenizer.encode("assistant")) :]


def render_messages(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    return [id for message in messages for id in render_message(message, tokenizer)]


def render_message(message: Message, tokenizer: Tokenizer) -> list[int]:
    """One message from `<|start|>` to its end: `<|call|>` when the assistant addresses somebody, else `<|end|>`.

    Raises InvalidRequest for a tool's message without a name.
    """
    special, encode = tokenizer.special, tokenizer.encode
    ids = [special(START), *_author(message, tokenizer)]
    if message.recipient not in (None, "all"):
        ids += encode(f" to={message.recipient}")
    if message.channel is not None:
        ids += [special(CHANNEL), *encode(message.channel)]
    if message.content_type is not None:
        ids += _content_type(message.content_type, tokenizer)
    called = message.role == "assistant" and message.recipient is not None
    return [*ids, special(MESSAGE), *encode(message.content), special(CALL if called else END)]


def prompt_messages(conversation: Conversation) -> tuple[Message, ...]:
    """Every message the model is shown: system, developer when there is something to say, then the turns.

    The rule for old reasoning is openai-harmony's: once the assistant's latest message is a final answer, analysis
    before the conversation's first final answer is dropped. Until then (a call awaits its result) all is kept.
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
    """The system message: who the model is, what day it is, how hard to think, built-in tools, which channels there
    are. Raises InvalidRequest for a built-in tool that there is none of."""
    about = [conversation.identity]
    if conversation.knowledge_cutoff is not None:
        about.append(f"Knowledge cutoff: {conversation.knowledge_cutoff}")
    if conversation.date is not None:
        about.append(f"Current date: {conversation.date}")
    sections = ["\n".join(about), f"Reasoning: {conversation.reasoning}"]
    if conversation.builtin_tools:
        sections.append(tools_section([_builtin(name) for name in sorted(set(conversation.builtin_tools))]))
    sections.append(f"{VALID_CHANNELS}\n{CALL_CHANNEL}" if conversation.functions else VALID_CHANNELS)
    return "\n\n".join(sections)


def developer_text(conversation: Conversation) -> str:
    """The developer message: instructions, the functions that may be called, the form of the answer; empty when there
    is none of them."""
    sections = []
    if conversation.instructions is not None:
        sections.append(instructions_text(conversation.instructions))
    if conversation.functions:
        sections.append(tools_section([Namespace("functions", functions=conversation.functions)]))
    if conversation.response_format is not None and conversation.response_format.name is not None:
        sections.append(format_section(conversation.response_format))
    return "\n\n".join(sections)


def format_section(form: ResponseFormat) -> str:
    """The "# Response Formats" section, as OpenAI's guide to Harmony lays it out ("Structured output")."""
    comments = [f"// {line}\n" for line in form.description.splitlines()]
    schema = json.dumps(form.schema, ensure_ascii=False, separators=(",", ":"))
    return f"# Response Formats\n\n## {form.name}\n\n{''.join(comments)}{schema}"


def instructions_text(instructions: str) -> str:
    return f"# Instructions\n\n{instructions}"


def _builtin(name: str) -> Namespace:
    if name not in BUILTIN_TOOLS:
        raise InvalidRequest(
            f"there is no built-in tool {name!r}: use {' or '.join(BUILTIN_TOOLS)}, or offer a function"
        )
    return BUILTIN_TOOLS[name]


def _author(message: Message, tokenizer: Tokenizer) -> list[int]:
    if message.role != "tool":
        ids = tokenizer.encode(message.role)
        return ids if message.name is None else ids + tokenizer.encode(f":{message.name}")
    if message.name is None:
        raise InvalidRequest('a tool message needs the name of the function that answers, such as "functions.add"')
    return tokenizer.encode(message.name)


def _content_type(content_type: str, tokenizer: Tokenizer) -> list[int]:
    if not content_type.startswith(CONSTRAIN):
        return tokenizer.encode(f" {content_type}")
    rest = content_type[len(CONSTRAIN) :]
    return [*tokenizer.encode(" "), tokenizer.special(CONSTRAIN), *tokenizer.encode(rest)]
