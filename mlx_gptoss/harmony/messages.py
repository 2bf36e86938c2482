"""Conversations as data: messages, functions, the response format and the tool choice, before tokenization.

Plain frozen dataclasses. This module knows no tokenizer and no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

from ..errors import InvalidRequest
from .names import ToolNames

Role = Literal["system", "developer", "user", "assistant", "tool"]
Effort = Literal["low", "medium", "high"]
BuiltinTool = Literal["browser", "python"]
Syntax = Literal["lark", "regex"]

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"


@dataclass(frozen=True, repr=False)
class Message:
    """One message with Harmony's header fields. Every header field but `role` may be None.

    role: the author's role. A message of role "tool" needs `name`.
    content: the text.
    channel: "analysis", "commentary" or "final" for the assistant. A tool's result has the channel of its call,
        mostly "commentary".
    recipient: the addressee, such as "functions.get_weather", "python" or "assistant"; None for everybody.
    content_type: "<|constrain|>json" for the arguments of a call as the model writes them; plain "json" occurs too.
    name: the author's name; for the result of a function, "functions.NAME".
    """

    role: Role
    content: str
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None

    def __repr__(self) -> str:
        return _short_repr(self)


@dataclass(frozen=True)
class TextFormat:
    """The input of a function that takes text instead of JSON arguments.

    syntax: of `definition`: "lark" (a grammar) or "regex" (Rust's), in llguidance's dialects. None for any text.
    definition: describes the texts that are allowed; it is enforced on the calls.
    """

    syntax: Syntax | None = None
    definition: str = ""


@dataclass(frozen=True)
class Function:
    """A function that the model may call. Its arguments are enforced on every call.

    name: any text. The model sees it as Conversation.names spells it.
    description: what it does, for the model.
    parameters: a JSON schema of type object, whose objects have no other properties than they list, unless it says so.
        None for a function without arguments.
    strict: whether a schema that cannot be enforced is refused. Otherwise only what can be enforced of it is.
    text_format: for a function that takes text; `parameters` is then None.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False
    text_format: TextFormat | None = None


@dataclass(frozen=True)
class ResponseFormat:
    """Makes the final answer JSON that is valid under `schema`.

    name, description: the heading and the comment under which the model sees the schema in the developer message.
        With name None the model does not see the schema; it is enforced all the same.
    """

    schema: Mapping[str, Any]
    name: str | None = None
    description: str = ""


@dataclass(frozen=True)
class ToolChoice:
    """Whether the turn may ("auto"), must ("required") or must not ("none") end in a call.

    names: the only functions that may be called; empty for all functions of the conversation.
    """

    kind: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class Conversation:
    """Everything that the model sees: the fields of the system and developer messages, then the turns.

    messages: the turns, oldest first.
    reasoning: the reasoning effort, in the system message.
    instructions: the text of the developer message (the "system prompt" of other chat formats).
    functions: the functions that the model may call, declared in the developer message.
    builtin_tools: tools that the model knows from its training; the caller has to run them. Calls of "browser" are
        addressed to browser.search, browser.open or browser.find and hold JSON; calls of "python" hold code.
    tool_texts: (tool, description) pairs in place of the descriptions of built-in tools that the model was trained on.
    response_format: enforced on the next final answer; None for free text.
    prefill: how the next final answer begins, without further reasoning; the model continues it.
    date: the "Current date" line, YYYY-MM-DD; None leaves the line out.
    identity: the first line of the system message.
    knowledge_cutoff: the "Knowledge cutoff" line; None leaves the line out.
    """

    messages: tuple[Message, ...] = ()
    reasoning: Effort = "medium"
    instructions: str | None = None
    functions: tuple[Function, ...] = ()
    builtin_tools: tuple[BuiltinTool, ...] = ()
    tool_texts: tuple[tuple[str, str], ...] = ()
    response_format: ResponseFormat | None = None
    prefill: str = ""
    date: str | None = None
    identity: str = IDENTITY
    knowledge_cutoff: str | None = KNOWLEDGE_CUTOFF

    @cached_property
    def names(self) -> ToolNames:
        """How the functions' names are spelled in Harmony's headers."""
        return ToolNames(function.name for function in self.functions)

    def __repr__(self) -> str:
        return _short_repr(self)

    def append(self, *messages: Message | Mapping[str, Any] | str) -> Conversation:
        """Return the conversation with messages appended; this one stays as it is.

        messages: Messages, dicts as OpenAI's API has them, or strings, which are the user's. Reasoning that led to an
            answer is dropped. Raises InvalidRequest for anything else.
        """
        added = tuple(message for one in messages for message in self._read(one))
        return replace(self, messages=without_old_reasoning(self.messages + added))

    def _read(self, message: Message | Mapping[str, Any] | str) -> tuple[Message, ...]:
        if isinstance(message, Message):
            return (message,)
        if isinstance(message, str):
            return (Message("user", message),)
        from .openai import from_chat  # which imports this module

        if not isinstance(message, Mapping):
            kind = type(message).__name__
            raise InvalidRequest(f"a conversation takes messages, dicts and strings, not {kind}: append(reply.text)")
        before = {"role": "user", "content": ""}  # a system message at the beginning would become the instructions
        return from_chat([before, message], tools=self.functions).messages[1:]

    def to_dict(self) -> dict[str, Any]:
        """Return the conversation as plain JSON data, which from_dict() reads."""
        from .saved import to_dict  # which imports this module

        return to_dict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Conversation:
        """Return the conversation of to_dict(). Raises InvalidRequest for data that is none, or of a later version."""
        from .saved import from_dict

        return from_dict(data)

    def with_user(self, text: str) -> Conversation:
        """Return the conversation with one more user message."""
        return replace(self, messages=(*self.messages, Message("user", text)))

    def with_result(self, function: str, result: str) -> Conversation:
        """Return the conversation with the result of a call appended.

        function: the name of the called function or built-in tool, with or without "functions.".
        result: what it returned, as text (usually JSON).

        The result answers the latest call of that name. Its author is the recipient of the call, and its channel is
        that of the call, so that call and result are kept or dropped together. Without such a call the result is a
        function's, on commentary.
        """
        full_name = self.names.recipient(function)
        calls = [message for message in self.messages if message.recipient in (function, full_name)]
        call = calls[-1] if calls else Message("assistant", "", recipient=full_name)
        channel = "analysis" if call.channel == "analysis" else "commentary"
        answer = Message("tool", result, channel, recipient="assistant", name=call.recipient)
        return replace(self, messages=(*self.messages, answer))


def without_old_reasoning(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the messages without the analysis that precedes the last final answer.

    The model was trained not to see that reasoning again. Reasoning after the last final answer, such as that between
    a call and its result, stays.
    """
    finals = [index for index, message in enumerate(messages) if message.channel == "final"]
    last = finals[-1] if finals else 0
    old = [message for message in messages[:last] if message.channel != "analysis"]
    return (*old, *messages[last:])


def _short_repr(value: Message | Conversation) -> str:
    """The repr of a dataclass without the fields that have their default values."""
    given = [
        (each.name, getattr(value, each.name)) for each in fields(value) if getattr(value, each.name) != each.default
    ]
    return f"{type(value).__name__}({', '.join(f'{name}={field!r}' for name, field in given)})"
