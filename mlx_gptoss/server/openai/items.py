"""Items of the Responses API: their fields, and their conversion to Harmony messages."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ...harmony.header import Header
from ...harmony.messages import Message
from ...harmony.names import NAMESPACE
from ...harmony.render import instructions_text
from ...tokenizer import CONSTRAIN
from ..errors import invalid_field
from ..fields import RequestModel

Status = Literal["in_progress", "completed", "incomplete"]


class Part(RequestModel):
    """A text part. Annotations and logprobs are accepted, so that output can be sent back, and have no effect."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class MessageItem(RequestModel):
    """A message. phase: only for the assistant; "commentary" is text before a function call."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]
    phase: Literal["commentary", "final_answer"] | None = None
    id: str | None = None
    status: Status | None = None


class ReasoningPart(RequestModel):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(RequestModel):
    """Reasoning, as this server returned it: plain text, never encrypted."""

    type: Literal["reasoning"]
    content: list[ReasoningPart] | None = None
    summary: list[Any] | None = Field(None, max_length=0)
    encrypted_content: None = None
    id: str | None = None
    status: Status | None = None


class FunctionCallItem(RequestModel):
    """A function call by the model."""

    type: Literal["function_call"]
    call_id: str
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,256}$")
    arguments: str
    id: str | None = None
    status: Status | None = None


class FunctionOutputItem(RequestModel):
    """The result of a function call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Part]
    id: str | None = None
    status: Status | None = None


def _item_type(value: Any) -> Any:
    """The item's type; an item without one is a message."""
    type_name = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return "message" if type_name is None else type_name


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")],
    Discriminator(_item_type),
]


@dataclass(frozen=True)
class ConversationItems:
    """A conversation built from items.

    messages: Harmony messages. instructions: texts of the system and developer messages before the first other message.
    calls: call_id -> the message that made the call.
    """

    messages: tuple[Message, ...] = ()
    instructions: tuple[str, ...] = ()
    calls: Mapping[str, Message] = field(default_factory=dict)

    def with_items(self, items: Sequence[Item]) -> ConversationItems:
        """Return the conversation with `items` appended. Raises ApiError for the output of an unknown call_id."""
        messages: list[Message] = list(self.messages)
        instructions, calls = list(self.instructions), dict(self.calls)
        for index, item in enumerate(items):
            if isinstance(item, MessageItem):
                text = _text(item.content)
                if item.role in ("system", "developer") and not messages:
                    instructions.append(text)
                else:
                    after = items[index + 1] if index + 1 < len(items) else None
                    messages.append(_message(item, text, before_call=isinstance(after, FunctionCallItem)))
            elif isinstance(item, ReasoningItem):
                reasoning = "".join(part.text for part in item.content or ())
                messages += [Message("assistant", reasoning, "analysis")] if reasoning else []
            elif isinstance(item, FunctionCallItem):
                recipient = NAMESPACE + item.name.removeprefix(NAMESPACE)
                call = Message("assistant", item.arguments, "commentary", recipient, f"{CONSTRAIN}json")
                calls[item.call_id] = call
                messages.append(call)
            else:
                messages.append(_result(item, calls.get(item.call_id), f"input[{index}].call_id"))
        return ConversationItems(tuple(messages), tuple(instructions), calls)

    def with_reply(self, messages: tuple[Message, ...], call_ids: Sequence[str]) -> ConversationItems:
        """Return the conversation with the model's reply appended. call_ids: ids of the calls in it, in order."""
        calls = (m for m in messages if Header(m.role, m.channel, m.recipient).function is not None)
        return replace(
            self, messages=(*self.messages, *messages), calls={**self.calls, **dict(zip(call_ids, calls, strict=False))}
        )


def new_id(prefix: str) -> str:
    """A random id such as "resp_6f..."."""
    return f"{prefix}_{secrets.token_hex(24)}"


def item_objects(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Input items as JSON objects for the client: with an id and a status, and content in parts."""
    objects = []
    for item in items:
        fields = item.model_dump(exclude_none=True)
        if isinstance(item, MessageItem):
            part_type = "output_text" if item.role == "assistant" else "input_text"
            parts = [{"type": part_type, "text": item.content}] if isinstance(item.content, str) else fields["content"]
            fields = {**fields, "type": "message", "content": parts}
        prefix = {"message": "msg", "reasoning": "rs"}.get(fields["type"], "fc")
        objects.append({"id": new_id(prefix), "status": "completed", **fields})
    return objects


def _text(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _message(item: MessageItem, text: str, before_call: bool) -> Message:
    """Convert a message item. before_call: a function call follows, so the text of the assistant is a preamble."""
    if item.role == "user":
        return Message("user", text)
    if item.role == "assistant":
        preamble = before_call if item.phase is None else item.phase == "commentary"
        return Message("assistant", text, "commentary" if preamble else "final")
    return Message("developer", instructions_text(text))


def _result(item: FunctionOutputItem, call: Message | None, param: str) -> Message:
    """Convert the output of `call`. param: the request field to name if the call is missing."""
    if call is None:
        raise invalid_field(param, f"is {item.call_id!r}: no function_call before it has that call_id")
    channel = "analysis" if call.channel == "analysis" else "commentary"
    return Message("tool", _text(item.output), channel, "assistant", name=call.recipient)
