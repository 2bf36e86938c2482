"""Items of the Responses API: the fields that have a meaning here. conversation_items.py says which.

Unknown fields and unknown types of items are accepted.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ...harmony.checks import MAX_TOOL_NAME_CHARACTERS
from ..fields import MAX_PARTS, MAX_TOKEN_IDS, Name, RequestModel
from ..hosted.items import ID_PREFIXES as HOSTED_ID_PREFIXES

TEXT_PARTS = ("input_text", "output_text", "text")
ID_PREFIXES: Mapping[str, str] = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "compaction": "cmp",
    **HOSTED_ID_PREFIXES,
}

FunctionName = Annotated[str, Field(min_length=1, max_length=MAX_TOOL_NAME_CHARACTERS)]


class Part(RequestModel):
    """A part of a message or of a tool's output. Annotations and logprobs are those of an output sent back."""

    type: Name
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = Field(None, max_length=MAX_PARTS)
    logprobs: list[Any] | None = Field(None, max_length=MAX_TOKEN_IDS)

    def _ignored(self, prefix: str) -> Iterator[str]:
        if self.type in TEXT_PARTS or self.type == "refusal":
            yield from super()._ignored(prefix)
        else:
            yield prefix + self.type


Parts = Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]


class BaseItem(RequestModel):
    """What all items may have. Neither has an effect on the reply."""

    id: Name | None = None
    status: Name | None = None


class MessageItem(BaseItem):
    """A message. phase: for the assistant; "commentary" is text before a function call, "final_answer" the answer."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Parts | None = None
    phase: Name | None = None


class ReasoningPart(RequestModel):
    type: Name
    text: str = ""


ReasoningParts = Annotated[list[ReasoningPart], Field(max_length=MAX_PARTS, fail_fast=True)]


class ReasoningItem(BaseItem):
    """Reasoning: its text in `content` or, if it is absent, packed in `encrypted_content`, or in `summary`."""

    type: Literal["reasoning"]
    content: ReasoningParts | None = None
    summary: ReasoningParts | None = None
    encrypted_content: str | None = None


class FunctionCallItem(BaseItem):
    """A function call by the model. namespace: that of a tool of the type namespace."""

    type: Literal["function_call"]
    call_id: Name
    name: FunctionName
    namespace: FunctionName | None = None
    arguments: str | dict[str, Any] | None = None


class CustomCallItem(BaseItem):
    """A call of a custom tool, whose input is any text."""

    type: Literal["custom_tool_call"]
    call_id: Name
    name: FunctionName
    namespace: FunctionName | None = None
    input: str = ""


class CallOutputItem(BaseItem):
    """The result of a function or a custom tool."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: Name
    output: str | Parts | None = None


class CompactionItem(BaseItem):
    """A conversation so far, as /v1/responses/compact summarized it."""

    type: Literal["compaction", "compaction_summary"]
    encrypted_content: str


class ItemReference(BaseItem):
    """Stands for an item that this server stores."""

    type: Literal["item_reference"] | None = None
    id: Name


class OtherItem(BaseItem):
    """An item of any other type, such as local_shell_call."""

    type: Name

    def _ignored(self, prefix: str) -> Iterator[str]:
        yield from ()  # the conversation says whether the item as a whole has an effect

    @property
    def fields(self) -> Mapping[str, Any]:
        """Its own fields."""
        return self.model_extra or {}


_TAGS = {
    "message": "item[message]",
    "reasoning": "item[reasoning]",
    "function_call": "item[function_call]",
    "custom_tool_call": "item[custom_tool_call]",
    "function_call_output": "item[output]",
    "custom_tool_call_output": "item[output]",
    "compaction": "item[compaction]",
    "compaction_summary": "item[compaction]",
    "item_reference": "item[reference]",
}


def _tag(value: Any) -> str:
    """The tag of the item's class. An item without a type is a message or, with nothing but an id, a reference.

    Tags contain "[", so that errors.py leaves them out of the paths of fields.
    """
    fields = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    kind = fields.get("type")
    if kind is None:
        return _TAGS["item_reference" if fields.get("id") and "role" not in fields else "message"]
    return _TAGS.get(kind, "item[other]") if isinstance(kind, str) else "item[other]"


Item = Annotated[
    Annotated[MessageItem, Tag("item[message]")]
    | Annotated[ReasoningItem, Tag("item[reasoning]")]
    | Annotated[FunctionCallItem, Tag("item[function_call]")]
    | Annotated[CustomCallItem, Tag("item[custom_tool_call]")]
    | Annotated[CallOutputItem, Tag("item[output]")]
    | Annotated[CompactionItem, Tag("item[compaction]")]
    | Annotated[ItemReference, Tag("item[reference]")]
    | Annotated[OtherItem, Tag("item[other]")],
    Discriminator(_tag),
]


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
            content = fields.get("content", [])
            parts = [{"type": part_type, "text": content}] if isinstance(content, str) else content
            fields = {**fields, "type": "message", "content": parts}
        elif isinstance(item, ReasoningItem):
            fields.setdefault("summary", [])
        objects.append({"id": new_id(ID_PREFIXES.get(fields["type"], "item")), "status": "completed", **fields})
    return objects
