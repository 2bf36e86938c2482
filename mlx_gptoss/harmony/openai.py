"""Converts the messages of a chat request, in the form of OpenAI's API, to a Conversation.

The messages are validated here. Error messages begin with the path of the field, such as "messages[0].content"; the
server takes the `param` of its error responses from it. What only other servers or clients need is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from ..errors import InvalidRequest
from ..tokenizer import CONSTRAIN
from .checks import items, string, tool_name
from .messages import Conversation, Effort, Function, Message
from .names import ToolNames
from .openai_tools import functions_from_tools
from .render import instructions_text

# Where clients put an assistant's reasoning. They may send several; the first one that has text counts.
_REASONING_FIELDS = ("reasoning", "reasoning_content", "thinking", "reasoning_text")
_REASONING_LISTS = ("reasoning_details", "thinking_blocks")  # lists of parts: OpenRouter's, litellm's
_REASONING_KEYS = ("text", "thinking", "summary", "reasoning", "content")  # where a part has its text
_FIELDS = {
    "system": {"content"},
    "developer": {"content"},
    "user": {"content", "name"},
    "assistant": {"content", "name", "refusal", "tool_calls", "function_call", *_REASONING_FIELDS, *_REASONING_LISTS},
    "tool": {"content", "name", "tool_name", "tool_call_id"},  # tool_name is Ollama's
    "function": {"content", "name"},  # OpenAI's earlier form of a tool message; function_call is that of a call
}
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_REASONING_PARTS = ("thinking", "redacted_thinking", "reasoning")
_MEDIA_PARTS = ("image_url", "image", "input_image", "input_audio", "audio", "video_url", "file", "input_file")


def from_chat(
    messages: Sequence[Mapping[str, Any]],
    *,
    reasoning: Effort = "medium",
    system: str | None = None,
    tools: Sequence[Mapping[str, Any] | Function] = (),
    date: str | None = None,
) -> Conversation:
    """Build the conversation of a chat request.

    messages: dicts with "role" and "content" (a string, or a list of text parts). System and developer messages at the
        beginning become the instructions, joined by blank lines after `system`; later ones stay where they are.
        An assistant's "reasoning", "reasoning_content" or "thinking" is its analysis. Its content is the final answer
        or, if there are "tool_calls", the preamble that the user saw before the calls (commentary). Other fields have
        no effect; unknown_fields() lists them.
    reasoning: the reasoning effort.
    system: instructions that precede those in `messages`.
    tools: functions, in the forms of functions_from_tools.
    date: the "Current date" line, YYYY-MM-DD.

    Raises InvalidRequest for an unknown role, for content other than text, if there are no messages, and for the
    result of an unknown call.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequest('messages must be a non-empty list such as [{"role": "user", "content": "Hi"}]')
    if reasoning not in get_args(Effort):
        raise InvalidRequest(f"reasoning must be one of {', '.join(get_args(Effort))}, not {reasoning!r}")
    if system is not None and not isinstance(system, str):
        raise InvalidRequest(f"system must be a string, not {system!r}")
    functions = functions_from_tools(tools)
    reader = _MessageReader(ToolNames(function.name for function in functions))
    instructions = [] if system is None else [system]
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = _role(message, where)
        if role in ("system", "developer") and not reader.messages:
            instructions.append(_text(message, where))
        else:
            reader.add(message, role, where)
    return Conversation(
        messages=tuple(reader.messages),
        reasoning=reasoning,
        instructions="\n\n".join(instructions) if instructions else None,
        functions=functions,
        date=date,
    )


def unknown_fields(messages: Iterable[Any]) -> set[str]:
    """The names of message fields that from_chat does not read, such as "messages[].annotations", unless empty."""
    return {
        f"messages[].{field}"
        for message in messages
        if isinstance(message, Mapping)
        for field, value in message.items()
        if field != "role" and field not in _FIELDS.get(str(message.get("role")), ()) and value not in (None, [], {})
    }


class _MessageReader:
    """Collects the Harmony messages of a chat. names: the spelling of function names."""

    def __init__(self, names: ToolNames) -> None:
        self.messages: list[Message] = []
        self._names = names
        self._recipients: dict[str, str] = {}  # call id -> the recipient of the call
        self._last_called: str | None = None  # the recipient of the last call

    def add(self, message: Mapping[str, Any], role: str, where: str) -> None:
        """Append one message. `role` is valid."""
        if role == "assistant":
            self.messages += self._assistant(message, where)
        elif role == "user":
            self.messages.append(Message("user", _text(message, where), name=self._author(message, where)))
        elif role in ("tool", "function"):
            name = self._answered_function(message, where)
            self.messages.append(Message("tool", _text(message, where), "commentary", "assistant", name=name))
        else:
            self.messages.append(Message("developer", instructions_text(_text(message, where))))

    def _assistant(self, message: Mapping[str, Any], where: str) -> Iterator[Message]:
        """Yield analysis, then a preamble and calls, or the final answer. An empty message yields nothing."""
        name = self._author(message, where)
        if reasoning := _reasoning(message, where):
            yield Message("assistant", reasoning, "analysis", name=name)
        calls = items(message, "tool_calls", where)
        if message.get("function_call") is not None:
            calls = [*calls, {"function": message["function_call"]}]
        content = None
        if message.get("content") not in (None, []):
            content = _text(message, where)
        elif isinstance(message.get("refusal"), str):
            content = message["refusal"]
        if content is not None and (content or not calls):
            yield Message("assistant", content, "commentary" if calls else "final", name=name)
        for index, call in enumerate(calls):
            yield self._call(call, f"{where}.tool_calls[{index}]")

    def _call(self, call: Any, where: str) -> Message:
        """Return the message of one entry of `tool_calls`."""
        kind = call.get("type") or "function" if isinstance(call, Mapping) else None
        if kind not in ("function", "custom"):
            raise InvalidRequest(f'{where} must be {{"id", "type": "function", "function": {{"name", "arguments"}}}}')
        function = call.get(kind)
        if not isinstance(function, Mapping):
            raise InvalidRequest(f'{where}.{kind} must be {{"name": ..., "arguments": ...}}, not {function!r}')
        recipient = self._names.recipient(tool_name(function.get("name"), f"{where}.{kind}.name"))
        self._last_called = recipient
        if call.get("id") is not None:
            self._recipients[string(call, "id", where)] = recipient
        if kind == "custom":
            return Message("assistant", string(function, "input", f"{where}.custom"), "commentary", recipient)
        arguments = function.get("arguments")
        if isinstance(arguments, Mapping):
            arguments = json.dumps(arguments, ensure_ascii=False)
        if not isinstance(arguments, str | None):
            raise InvalidRequest(f"{where}.function.arguments must be JSON in a string, not {arguments!r}")
        return Message("assistant", arguments or "{}", "commentary", recipient, f"{CONSTRAIN}json")

    def _answered_function(self, message: Mapping[str, Any], where: str) -> str:
        """The recipient of the call that a tool message answers: found by its id or name, else the last call."""
        call, name = message.get("tool_call_id"), message.get("name") or message.get("tool_name")
        if isinstance(call, str) and call in self._recipients:
            return self._recipients[call]
        if name:
            return self._names.recipient(tool_name(name, f"{where}.name"))
        if call is None and self._last_called is not None:
            return self._last_called
        if call is None:
            raise InvalidRequest(f"{where} needs the tool_call_id of the call that it answers, or the function's name")
        raise InvalidRequest(f"{where} answers the call {call!r}, which is in no assistant message before it")

    def _author(self, message: Mapping[str, Any], where: str) -> str | None:
        name = message.get("name")
        return None if not name else self._names.spelling(tool_name(name, f"{where}.name"))


def _role(message: Any, where: str) -> str:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f'{where} must be a dict such as {{"role": "user", "content": "Hi"}}, not {message!r}')
    role = message.get("role")
    if not isinstance(role, str) or role not in _FIELDS:
        raise InvalidRequest(f"{where} has the role {role!r}: use one of {', '.join(_FIELDS)}")
    return role


def _text(message: Mapping[str, Any], where: str) -> str:
    """Return the text of a message's content, a string or a list of parts. Reasoning in it is left out."""
    content = message.get("content")
    if content is None and message["role"] in ("tool", "function"):
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f"{where}.content must be a string or a non-empty list of text parts, not {content!r}")
    return "".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _REASONING_PARTS:
        return ""
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        media = f"a part of type {kind!r} cannot be read" if kind in _MEDIA_PARTS else "not a text part"
        raise InvalidRequest(f'{where} must be {{"type": "text", "text": ...}}: the model reads only text ({media})')
    return string(part, _TEXT_PARTS[kind], where)


def _reasoning(message: Mapping[str, Any], where: str) -> str:
    """The assistant's reasoning, from the first place that has some; empty if none has."""
    for field in _REASONING_FIELDS:
        value = message.get(field)
        if value and not isinstance(value, Mapping):
            return string(message, field, where)
    content = message["content"] if isinstance(message.get("content"), list) else []
    thoughts = [part for part in content if isinstance(part, Mapping) and part.get("type") in _REASONING_PARTS]
    for parts in (thoughts, *(items(message, field, where) for field in _REASONING_LISTS)):
        if text := "".join(map(_thought, parts)):
            return text
    return ""


def _thought(part: Any) -> str:
    """The text of a reasoning part; empty for one that is encrypted."""
    texts = [part.get(key) for key in _REASONING_KEYS] if isinstance(part, Mapping) else []
    return next((text for text in texts if isinstance(text, str)), "")
