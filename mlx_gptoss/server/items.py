"""Items of the Responses API, which go in and come out: their fields, and the messages that they are."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ..harmony.header import NAMESPACE, Header
from ..harmony.messages import Message
from ..harmony.render import instructions_text
from ..tokenizer import CONSTRAIN
from .errors import invalid_field
from .fields import StrictModel

Status = Literal["in_progress", "completed", "incomplete"]


class Part(StrictModel):
    """A piece of text. Annotations and logprobs of text that is sent back say nothing to the model."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class MessageItem(StrictModel):
    """phase: of the assistant's; commentary is what it said before a call."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]
    phase: Literal["commentary", "final_answer"] | None = None
    id: str | None = None
    status: Status | None = None


class ReasoningPart(StrictModel):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(StrictModel):
    """What the model thought, as this server gave it: in the open, so that nothing is encrypted."""

    type: Literal["reasoning"]
    content: list[ReasoningPart] | None = None
    summary: list[Any] | None = Field(None, max_length=0)
    encrypted_content: None = None
    id: str | None = None
    status: Status | None = None


class FunctionCallItem(StrictModel):
    """The model called a function."""

    type: Literal["function_call"]
    call_id: str
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,256}$")
    arguments: str
    id: str | None = None
    status: Status | None = None


class FunctionOutputItem(StrictModel):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Part]
    id: str | None = None
    status: Status | None = None


def _item_type(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return "message" if kind is None else kind


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")],
    Discriminator(_item_type),
]


@dataclass(frozen=True)
class ConversationItems:
    """A conversation as items tell it. instructions: system and developer messages from before the first turn.
    calls: call_id -> the message that made the call."""

    messages: tuple[Message, ...] = ()
    instructions: tuple[str, ...] = ()
    calls: Mapping[str, Message] = field(default_factory=dict)

    def with_items(self, items: Sequence[Item]) -> ConversationItems:
        """With more items. Raises ApiError for a result of a call that nobody made."""
        messages: list[Message] = list(self.messages)
        instructions, calls = list(self.instructions), dict(self.calls)
        for place, item in enumerate(items):
            if isinstance(item, MessageItem):
                text = _text(item.content)
                if item.role in ("system", "developer") and not messages:
                    instructions.append(text)
                else:
                    after = items[place + 1] if place + 1 < len(items) else None
                    messages.append(_message(item, text, before_call=isinstance(after, FunctionCallItem)))
            elif isinstance(item, ReasoningItem):
                thought = "".join(part.text for part in item.content or ())
                messages += [Message("assistant", thought, "analysis")] if thought else []
            elif isinstance(item, FunctionCallItem):
                recipient = NAMESPACE + item.name.removeprefix(NAMESPACE)
                call = Message("assistant", item.arguments, "commentary", recipient, f"{CONSTRAIN}json")
                calls[item.call_id] = call
                messages.append(call)
            else:
                messages.append(_result(item, calls.get(item.call_id), f"input[{place}].call_id"))
        return ConversationItems(tuple(messages), tuple(instructions), calls)

    def with_reply(self, messages: tuple[Message, ...], call_ids: Sequence[str]) -> ConversationItems:
        """With the model's reply, in which it made the calls of these ids, in order."""
        made = (m for m in messages if Header(m.role, m.channel, m.recipient).function is not None)
        return replace(
            self, messages=(*self.messages, *messages), calls={**self.calls, **dict(zip(call_ids, made, strict=False))}
        )


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(24)}"


def item_objects(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Input items as the interface shows them: with an id, content in parts."""
    shown = []
    for item in items:
        fields = item.model_dump(exclude_none=True)
        if isinstance(item, MessageItem):
            kind = "output_text" if item.role == "assistant" else "input_text"
            parts = [{"type": kind, "text": item.content}] if isinstance(item.content, str) else fields["content"]
            fields = {**fields, "type": "message", "content": parts}
        prefix = {"message": "msg", "reasoning": "rs"}.get(fields["type"], "fc")
        shown.append({"id": new_id(prefix), "status": "completed", **fields})
    return shown


def _text(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _message(item: MessageItem, text: str, before_call: bool) -> Message:
    if item.role == "user":
        return Message("user", text)
    if item.role == "assistant":
        preamble = before_call if item.phase is None else item.phase == "commentary"
        return Message("assistant", text, "commentary" if preamble else "final")
    return Message("developer", instructions_text(text))


def _result(item: FunctionOutputItem, call: Message | None, where: str) -> Message:
    if call is None:
        raise invalid_field(where, f"is {item.call_id!r}: no function_call before it has that call_id")
    channel = "analysis" if call.channel == "analysis" else "commentary"
    return Message("tool", _text(item.output), channel, "assistant", name=call.recipient)
