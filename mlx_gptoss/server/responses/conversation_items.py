"""From items of the Responses API to Harmony messages.

What an item of another server means here:

- Reasoning before a call of the same turn is replayed as analysis; encrypted reasoning cannot be read and is skipped.
- A call of a tool that the client ran itself, such as local_shell_call, is replayed as a function call if its result
  follows, since the model needs what it found out. So are mcp_call and code_interpreter_call, which hold their result.
- Calls without text, such as web_search_call or image_generation_call, and lists of tools are skipped and named.
- An image in the result of a tool becomes a note, since the rest is still of use.
  An image in a message is refused.
- A compacted conversation of another server cannot be read. It is refused, since the model would not know what it
  stands for. So is an item of an unknown type that holds a text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...harmony.header import Header
from ...harmony.messages import Message
from ...harmony.render import instructions_text
from ...tokenizer import CONSTRAIN
from ..errors import ApiError, invalid_field
from .items import (
    TEXT_PARTS,
    CallOutputItem,
    CompactionItem,
    CustomCallItem,
    FunctionCallItem,
    Item,
    ItemReference,
    MessageItem,
    OtherItem,
    Part,
    ReasoningItem,
)
from .opaque import unpack
from .tools import ResponseTools

SUMMARY_INTRODUCTION = "Summary of the conversation so far:\n\n"
_OMITTED = {"input_image": "[image omitted]", "input_file": "[file omitted]", "input_audio": "[audio omitted]"}
_REASONING_PARTS = ("reasoning_text", "summary_text")
_NO_ARGUMENTS = {"id", "call_id", "status", "caller", "created_by", "internal_chat_message_metadata_passthrough"}
_MESSAGE_FIELDS = {"role", "content", "text"}  # an item with one of them says something


@dataclass(frozen=True)
class ConversationItems:
    """A conversation built from items.

    messages: Harmony messages. instructions: texts of the system and developer messages before the first other message.
    calls: call_id -> the message that made the call. skipped: the types of items that were left out.
    """

    messages: tuple[Message, ...] = ()
    instructions: tuple[str, ...] = ()
    calls: Mapping[str, Message] = field(default_factory=dict)
    skipped: frozenset[str] = frozenset()

    def with_items(self, items: Sequence[Item], tools: ResponseTools, path: str = "input") -> ConversationItems:
        """Return the conversation with `items` appended. `tools`: those of the request, for the names of calls.

        Raises ApiError for content other than text, and for the output of an unknown call; it names the item, path[i].
        """
        reader = _ItemReader(self, tools, {_call_id(item) for item in items if _is_output(item)})
        for index, item in enumerate(items):
            after = items[index + 1] if index + 1 < len(items) else None
            reader.add(item, f"{path}[{index}]", before_call=isinstance(after, FunctionCallItem | CustomCallItem))
        return ConversationItems(
            tuple(reader.messages), tuple(reader.instructions), reader.calls, frozenset(reader.skipped)
        )

    def with_reply(self, messages: tuple[Message, ...], calls: Sequence[tuple[str, str]]) -> ConversationItems:
        """Return the conversation with the model's reply appended.

        calls: the id and the recipient of each call that the client has to answer, in order.
        """
        made, waiting = dict(self.calls), list(calls)
        for message in messages:
            called = message.role == "assistant" and Header(recipient=message.recipient).function is not None
            if called and waiting and waiting[0][1] == message.recipient:
                made[waiting.pop(0)[0]] = message
        return replace(self, messages=(*self.messages, *messages), calls=made)


class _ItemReader:
    """Appends items to a conversation. answered: the ids of the calls whose output follows."""

    def __init__(self, before: ConversationItems, tools: ResponseTools, answered: set[str]) -> None:
        self.messages: list[Message] = list(before.messages)
        self.instructions: list[str] = list(before.instructions)
        self.calls: dict[str, Message] = dict(before.calls)
        self.skipped: set[str] = set(before.skipped)
        self._tools = tools
        self._answered = answered

    def add(self, item: Item, where: str, before_call: bool) -> None:
        """Append one item. before_call: a call follows, so the text of an assistant's message is a preamble."""
        if isinstance(item, MessageItem):
            self._message(item, where, before_call)
        elif isinstance(item, ReasoningItem):
            if text := _reasoning(item):
                self.messages.append(Message("assistant", text, "analysis"))
        elif isinstance(item, FunctionCallItem):
            arguments = item.arguments or "{}"
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            self._call(item.call_id, self._tools.recipient(item.name, item.namespace), arguments, f"{CONSTRAIN}json")
        elif isinstance(item, CustomCallItem):
            self._call(item.call_id, self._tools.recipient(item.name, item.namespace), item.input, None)
        elif isinstance(item, CallOutputItem):
            self._result(item.call_id, text_of(item.output, f"{where}.output", in_result=True), where)
        elif isinstance(item, CompactionItem):
            self._compaction(item, where)
        elif isinstance(item, OtherItem):
            self._other(item, where)
        else:
            raise _unresolved(item, where)

    def _message(self, item: MessageItem, where: str, before_call: bool) -> None:
        if item.role == "assistant":
            preamble = before_call if item.phase is None else item.phase == "commentary"
            if item.content not in (None, []):
                text = text_of(item.content, f"{where}.content")
                self.messages.append(Message("assistant", text, "commentary" if preamble else "final"))
            return
        if item.content in (None, []):
            raise invalid_field(f"{where}.content", "is missing", "missing_required_parameter")
        text = text_of(item.content, f"{where}.content")
        if item.role == "user":
            self.messages.append(Message("user", text))
        elif self.messages:
            self.messages.append(Message("developer", instructions_text(text)))
        else:
            self.instructions.append(text)

    def _call(self, id: str, recipient: str, arguments: str, content_type: str | None) -> None:
        self.calls[id] = Message("assistant", arguments, "commentary", recipient, content_type)
        self.messages.append(self.calls[id])

    def _result(self, id: str, text: str, where: str) -> None:
        call = self.calls.get(id)
        if call is None:
            raise invalid_field(f"{where}.call_id", f"is {id!r:.100}: no call before it has that call_id")
        channel = "analysis" if call.channel == "analysis" else "commentary"
        self.messages.append(Message("tool", text, channel, "assistant", name=call.recipient))

    def _compaction(self, item: CompactionItem, where: str) -> None:
        summary = unpack(item.encrypted_content)
        if summary is None:
            message = "was made by another server and cannot be read: leave the item out, or send what it stands for"
            raise invalid_field(f"{where}.encrypted_content", message)
        self.messages.append(Message("user", SUMMARY_INTRODUCTION + summary))

    def _other(self, item: OtherItem, where: str) -> None:
        """A call of some other tool, or its result. Everything else is skipped."""
        id, fields = _call_id(item), item.fields
        if _is_output(item) and id in self.calls:
            self._result(id, _result_text(fields.get("output"), where), where)
        elif item.type == "mcp_call" and _texts(fields, "name", "arguments"):
            recipient = self._tools.recipient(fields["name"], fields.get("server_label"))
            result = fields.get("output") if fields.get("error") is None else fields["error"]
            self._call(where, recipient, fields["arguments"], f"{CONSTRAIN}json")
            self._result(where, _result_text(result, where), where)
        elif item.type == "code_interpreter_call" and _texts(fields, "code"):
            call = Message("assistant", fields["code"], "analysis", "python")
            logs = [output for output in fields.get("outputs") or () if isinstance(output, Mapping)]
            result = "".join(log["logs"] for log in logs if isinstance(log.get("logs"), str))
            self.messages += [call, Message("tool", result, "analysis", "assistant", name="python")]
        elif item.type.endswith("_call") and id in self._answered:
            arguments = {name: value for name, value in fields.items() if name not in _NO_ARGUMENTS}
            recipient = self._tools.recipient(item.type.removesuffix("_call"), None)
            self._call(id, recipient, json.dumps(arguments, ensure_ascii=False), f"{CONSTRAIN}json")
        elif _MESSAGE_FIELDS & fields.keys() and item.type != "additional_tools":
            raise invalid_field(f"{where}.type", f"is {item.type!r:.100}, which is unknown: send a message")
        else:
            self.skipped.add(item.type)


def text_of(content: str | list[Part] | None, where: str, in_result: bool = False) -> str:
    """The text of a message, or of the result of a tool, where other parts become a note.

    Raises ApiError for a part of a message that is not text.
    """
    if isinstance(content, str):
        return content
    parts = enumerate(content or ())
    return "".join(_part_text(part, f"{where}[{index}]", in_result) for index, part in parts)


def _part_text(part: Part, where: str, in_result: bool) -> str:
    if part.type == "refusal":
        return part.refusal or ""
    if part.type in _REASONING_PARTS:
        return ""
    if part.type in TEXT_PARTS:
        if part.text is None:
            raise invalid_field(f"{where}.text", "is missing", "missing_required_parameter")
        return part.text
    if in_result:
        return _OMITTED.get(part.type, f"[{part.type[:40]} omitted]")
    raise invalid_field(where, f"has the type {part.type!r:.100}: the model reads only text")


def _reasoning(item: ReasoningItem) -> str:
    """The text of reasoning: from its content, else from what this server packed, else from its summary."""
    text = "".join(part.text for part in item.content or ()) or unpack(item.encrypted_content)
    return text or "\n\n".join(part.text for part in item.summary or ())


def _result_text(output: Any, where: str) -> str:
    """The text of a result in any form: a string, parts with texts, or something else as JSON."""
    if output is None or isinstance(output, str):
        return output or ""
    if isinstance(output, list) and output and all(isinstance(part, Mapping) and "type" in part for part in output):
        texts = [part.get("text") for part in output]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    try:
        return json.dumps(output, ensure_ascii=False)
    except (ValueError, RecursionError):
        raise invalid_field(f"{where}.output", "is nested too deeply") from None


def _texts(fields: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(fields.get(name), str) and fields[name] for name in names)


def _is_output(item: Item) -> bool:
    return isinstance(item, CallOutputItem) or (isinstance(item, OtherItem) and item.type.endswith("_call_output"))


def _call_id(item: Item) -> str:
    """The id that a call and its output share. An older form of local_shell_call_output has it as `id`."""
    if isinstance(item, CallOutputItem):
        return item.call_id
    id = item.fields.get("call_id") if isinstance(item, OtherItem) else None
    return id if isinstance(id, str) else item.id or ""


def _unresolved(item: ItemReference, where: str) -> ApiError:
    message = f"is {item.id!r:.100}: no item of that id is stored; send the item itself"
    return invalid_field(f"{where}.id", message, "item_not_found")
