"""Anthropic's `system` and `messages`, made of content blocks, as Harmony messages.

What the model cannot read is an error where the user shows it something (an image, a PDF). Where it stands in a tool's
result, a note takes its place, since the agent cannot leave it out. Blocks about tools that Anthropic runs itself are
skipped. Both are listed in `ignored`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import InvalidRequest
from ...harmony.checks import string, tool_name
from ...harmony.messages import Message
from ...harmony.names import ToolNames
from ...harmony.render import instructions_text
from ...tokenizer import CONSTRAIN
from .signature import omitted_thinking

# Lines for Anthropic's servers, which some clients put into the system prompt. They differ from request to request, so
# with them no prompt would begin like the one before it, and the prefix cache could not help.
_TRANSPORT_LINE = re.compile(r"^x-anthropic-.*(\n|\Z)", re.M | re.I)
_SEARCHED = 1 << 16  # characters at the beginning of a text: a search holds the interpreter's lock
_FIELDS = {  # block type -> the fields that are read, or that say nothing more
    "text": {"text"},
    "thinking": {"thinking", "signature"},
    "redacted_thinking": {"data"},
    "tool_use": {"id", "name", "input", "caller"},
    "tool_result": {"tool_use_id", "content", "is_error"},
    "document": {"source", "title", "context"},
    "search_result": {"content", "source", "title"},
}
Block = Mapping[str, Any]


class BlockReader:
    """Collects the Harmony messages of a request.

    names: the spelling of function names.
    messages: without the last message if that is the assistant's answer; its text is `prefill`, to be continued.
    instructions: texts of the system prompt. ignored: the paths of what has no effect.
    """

    def __init__(self, names: ToolNames) -> None:
        self.messages: list[Message] = []
        self.instructions: list[str] = []
        self.prefill: str = ""
        self.ignored: set[str] = set()
        self._names = names
        self._recipients: dict[str, str] = {}  # id of a tool_use block -> the recipient of the call

    def add_system(self, content: Any, where: str) -> None:
        """Take in a system prompt. One that follows other messages stays where it is."""
        texts = [self._text(block, at) for block, at in self._blocks(content, where, "system")]
        kept = [text for text in map(_without_transport, texts) if text]
        if not self.messages:
            self.instructions += kept
        elif kept:
            self.messages.append(Message("developer", instructions_text("\n\n".join(kept))))

    def add_messages(self, messages: Sequence[Any]) -> None:
        """Take in `messages`, oldest first. Raises InvalidRequest for what cannot be read."""
        for index, message in enumerate(messages):
            where = f"messages[{index}]"
            role = message.get("role") if isinstance(message, Mapping) else None
            if role not in ("user", "assistant", "system", "developer"):
                raise InvalidRequest(f'{where} must be {{"role": "user" or "assistant", "content": ...}}')
            self.ignored |= {f"messages[].{field}" for field in message.keys() - {"role", "content"}}
            if role == "user":
                self._add_user(message.get("content"), f"{where}.content")
            elif role == "assistant":
                self._add_assistant(message.get("content"), f"{where}.content", is_last=index == len(messages) - 1)
            else:
                self.add_system(message.get("content"), f"{where}.content")

    def _add_user(self, content: Any, where: str) -> None:
        """Append tool results and user messages, in their order."""
        texts: list[str] = []
        for block, at in self._blocks(content, where, "user"):
            if block["type"] != "tool_result":
                texts.append(self._text(block, at))
                continue
            self._append("user", texts, None)
            self._add_result(block, at)
        self._append("user", texts, None)

    def _add_assistant(self, content: Any, where: str, *, is_last: bool) -> None:
        """Append analysis, preambles (text that is not the message's last), calls, and the answer."""
        texts: list[str] = []
        blocks = self._blocks(content, where, "assistant")
        for block, at in blocks:
            kind = block["type"]
            if kind == "text":
                texts.append(string(block, "text", at))
            elif kind == "thinking":
                self._append("assistant", texts, "commentary")
                self._append("assistant", [_thinking(block, at)], "analysis")
            elif kind == "tool_use":
                self._append("assistant", texts, "commentary")
                self.messages.append(self._call(block, at))
            elif kind != "redacted_thinking":
                self.ignored.add(f"messages[].content[].{kind}")
        if is_last and any(block["type"] == "tool_use" for block, _ in blocks):
            raise InvalidRequest(f"{where} ends with a tool_use block: send its tool_result in a user message after it")
        if is_last:
            self.prefill = "".join(texts)
        else:
            self._append("assistant", texts, "final")

    def _append(self, role: Any, texts: list[str], channel: str | None) -> None:
        """Append a message with these texts, if they are not empty, and clear the list.

        The blocks of a user are paragraphs. Those of an assistant follow on from each other, as cited text does.
        """
        if any(texts):
            self.messages.append(
                Message(role, ("" if role == "assistant" else "\n\n").join(filter(None, texts)), channel)
            )
        texts.clear()

    def _add_result(self, block: Block, where: str) -> None:
        """Append the result of a call."""
        id = string(block, "tool_use_id", where)
        if id not in self._recipients:
            raise InvalidRequest(f"{where} answers the call {id!r:.200}, which is in no assistant message before it")
        content, texts = block.get("content"), []
        for inner, at in self._blocks("" if content is None else content, f"{where}.content", "tool_result"):
            text = _readable(inner, at)
            if text is None:
                self.ignored.add(f"messages[].content[].content[].{inner['type']}")
                text = f"[{inner['type']:.100}: left out, since the model reads only text]"
            texts.append(text)
        text = "\n\n".join(texts)
        if block.get("is_error") is True and "error" not in text.lower():
            text = f"Error: {text}"
        self.messages.append(Message("tool", text, "commentary", "assistant", name=self._recipients[id]))

    def _call(self, block: Block, where: str) -> Message:
        recipient = self._names.recipient(tool_name(block.get("name"), f"{where}.name"))
        self._recipients[string(block, "id", where)] = recipient
        value = block.get("input", {})
        if not isinstance(value, Mapping):
            raise InvalidRequest(f"{where}.input must be an object, the arguments of the call")
        try:
            arguments = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        except RecursionError as error:
            raise InvalidRequest(f"{where}.input is nested too deeply") from error
        return Message("assistant", arguments, "commentary", recipient, f"{CONSTRAIN}json")

    def _blocks(self, content: Any, where: str, role: str) -> list[tuple[Block, str]]:
        """The blocks of a content, each with its path. A string is one text block."""
        if isinstance(content, str):
            return [({"type": "text", "text": content}, where)]
        if not isinstance(content, list):
            raise InvalidRequest(f"{where} must be a string or a list of content blocks")
        blocks = [(block, f"{where}[{index}]") for index, block in enumerate(content)]
        for block, at in blocks:
            if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
                raise InvalidRequest(f'{at} must be a content block such as {{"type": "text", "text": "Hi"}}')
            if block["type"] in _FIELDS:
                self._note_fields(block, "system[]" if role == "system" else "messages[].content[]")
        return blocks

    def _note_fields(self, block: Block, prefix: str) -> None:
        for field in block.keys() - _FIELDS[block["type"]] - {"type"}:
            if field == "cache_control":
                self.ignored.add(field)
            elif block[field] not in (None, [], {}):
                self.ignored.add(f"{prefix}.{field}")

    def _text(self, block: Block, where: str) -> str:
        """The text of a block that a user or a system prompt shows the model."""
        text = _readable(block, where)
        if text is None:
            raise InvalidRequest(f"{where} is a block of type {block['type']!r:.100}: the model reads only text")
        return text


def _without_transport(text: str) -> str:
    """The text without the lines that are for Anthropic's servers. They are at the beginning of a system prompt."""
    end = len(text) if len(text) <= _SEARCHED else text.rfind("\n", 0, _SEARCHED) + 1 or _SEARCHED
    return _TRANSPORT_LINE.sub("", text[:end]) + text[end:]


def _readable(block: Block, where: str) -> str | None:
    """The text of a block; None for one that is not text."""
    if block["type"] == "text":
        return string(block, "text", where)
    if block["type"] == "search_result":
        return _joined(block.get("title"), block.get("source"), _inner_text(block.get("content"), f"{where}.content"))
    if block["type"] != "document":
        return None
    source = block.get("source")
    if not isinstance(source, Mapping):
        raise InvalidRequest(f'{where}.source must be an object such as {{"type": "text", "data": ...}}')
    if source.get("type") == "text":
        body = string(source, "data", f"{where}.source")
    elif source.get("type") == "content":
        body = _inner_text(source.get("content"), f"{where}.source.content")
    else:
        return None
    return _joined(block.get("title"), block.get("context"), body)


def _inner_text(content: Any, where: str) -> str:
    """The text of a document's or a search result's content: a string or text blocks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be a string or a list of text blocks")
    for index, block in enumerate(content):
        if not isinstance(block, Mapping) or block.get("type") != "text":
            raise InvalidRequest(f"{where}[{index}] must be a text block: the model reads only text")
    return "\n\n".join(string(block, "text", f"{where}[{index}]") for index, block in enumerate(content))


def _joined(*texts: Any) -> str:
    return "\n\n".join(text for text in texts if isinstance(text, str) and text)


def _thinking(block: Block, where: str) -> str:
    return string(block, "thinking", where) or omitted_thinking(block.get("signature"))
