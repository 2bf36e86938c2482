"""What a conversation is made of, before it becomes tokens. Plain frozen data; knows no tokenizer and no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Role = Literal["system", "developer", "user", "assistant", "tool"]
Effort = Literal["low", "medium", "high"]
BuiltinTool = Literal["browser", "python"]

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"


@dataclass(frozen=True)
class Message:
    """One message as Harmony knows it.

    role: who speaks; a tool's message also has `name` (for a function, "functions.NAME").
    channel: "analysis", "commentary" or "final" for the assistant; that of the call, mostly "commentary", for a
        tool's result.
    recipient: whom it is addressed to when not everybody, such as "functions.get_weather", "python" or "assistant".
    content_type: "<|constrain|>json" for a call's arguments as the model writes them; plain "json" also occurs.
    """

    role: Role
    content: str
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Function:
    """A function that the model may call. `parameters` is a JSON schema of type object, or None for no arguments.

    strict: whether the arguments of a call are made to obey the schema, not only shown it.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False


@dataclass(frozen=True)
class ResponseFormat:
    """The final answer is JSON that obeys `schema`. The model is shown the schema under a name; None shows nothing."""

    schema: Mapping[str, Any]
    name: str | None = None
    description: str = ""


@dataclass(frozen=True)
class ToolChoice:
    """Whether the turn may, must or must not end in a call. name: the only function that may be called."""

    kind: Literal["auto", "none", "required"] = "auto"
    name: str | None = None


@dataclass(frozen=True)
class Conversation:
    """All that the model is shown: the system message's fields, the developer's, then the turns.

    instructions: the developer message's text (what other formats call the system prompt).
    builtin_tools: those that the model knows from its training; whoever asks has to run them. Calls of "browser" are
        named browser.search, browser.open and browser.find and hold JSON, those of "python" hold code.
    response_format: what the next final answer is made to obey; None for any text.
    date: the "Current date" line, YYYY-MM-DD; None leaves the line out.
    """

    messages: tuple[Message, ...] = ()
    reasoning: Effort = "medium"
    instructions: str | None = None
    functions: tuple[Function, ...] = ()
    builtin_tools: tuple[BuiltinTool, ...] = ()
    response_format: ResponseFormat | None = None
    date: str | None = None
    identity: str = IDENTITY
    knowledge_cutoff: str | None = KNOWLEDGE_CUTOFF

    def with_user(self, text: str) -> Conversation:
        """The conversation with the user's next turn."""
        return replace(self, messages=(*self.messages, Message("user", text)))

    def with_result(self, function: str, result: str) -> Conversation:
        """The conversation with what a called function or built-in tool returned, as text (usually JSON).

        function: its name as the call gave it. The latest call of that name is answered: by whom it was addressed to,
        and on its channel, so that both are kept or dropped together.
        """
        full = function if function.startswith("functions.") else f"functions.{function}"
        calls = [message for message in self.messages if message.recipient in (function, full)]
        call = calls[-1] if calls else Message("assistant", "", recipient=full)
        channel = "analysis" if call.channel == "analysis" else "commentary"
        answer = Message("tool", result, channel, recipient="assistant", name=call.recipient)
        return replace(self, messages=(*self.messages, answer))


def without_old_reasoning(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages without the analysis that stands before the last final answer: the model was trained not to see it
    again. Between a call and its result it stays."""
    finals = [index for index, message in enumerate(messages) if message.channel == "final"]
    last = finals[-1] if finals else 0
    old = [message for message in messages[:last] if message.channel != "analysis"]
    return (*old, *messages[last:])
