"""Answers to approval requests: which calls of MCP tools the client has approved, or not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...harmony.messages import Message
from ...tokenizer import CONSTRAIN
from ..errors import invalid_field
from ..service import Service
from .conversation_items import ConversationItems
from .items import Item, OtherItem
from .response_tools import ResponseTools

REQUEST, RESPONSE = "mcp_approval_request", "mcp_approval_response"
MAX_REASON_CHARS = 1000


@dataclass(frozen=True)
class ApprovedCall:
    """A call of an MCP tool that is to run. id: that of the request for its approval."""

    id: str
    server_label: str
    name: str
    arguments: str


def read_approvals(
    items: Sequence[Item], history: ConversationItems, tools: ResponseTools, service: Service
) -> tuple[ConversationItems, tuple[ApprovedCall, ...]]:
    """Return the conversation with the calls that `items` answer for, and those of them that were approved.

    The result of a call that was not approved says so. Raises ApiError for an answer to a request that is neither
    among the items nor stored.
    """
    given = {item.id: item.fields for item in items if isinstance(item, OtherItem) and item.type == REQUEST}
    approved: list[ApprovedCall] = []
    messages = list(history.messages)
    for index, item in enumerate(items):
        if not isinstance(item, OtherItem) or item.type != RESPONSE:
            continue
        id = item.fields.get("approval_request_id")
        found = given.get(id) if isinstance(id, str) else None
        stored = service.store.item(id) if found is None and isinstance(id, str) else None
        call = _call(id, found or (json.loads(stored) if stored is not None else {}))
        if call is None:
            raise invalid_field(f"input[{index}].approval_request_id", f"is {id!r:.100}: no such request is known")
        recipient = tools.recipient(call.name, call.server_label)
        if not messages or messages[-1].recipient != recipient:
            messages.append(Message("assistant", call.arguments, "commentary", recipient, f"{CONSTRAIN}json"))
        if item.fields.get("approve") is True:
            approved.append(call)
        else:
            reason = str(item.fields.get("reason") or "")[:MAX_REASON_CHARS]
            text = f"error: the user did not approve this call{': ' if reason else ''}{reason}"
            messages.append(Message("tool", text, "commentary", "assistant", name=recipient))
    skipped = history.skipped - {REQUEST, RESPONSE}
    return replace(history, messages=tuple(messages), skipped=skipped), tuple(approved)


def _call(id: Any, fields: Mapping[str, Any]) -> ApprovedCall | None:
    label, name, arguments = (fields.get(key) for key in ("server_label", "name", "arguments"))
    if isinstance(label, str) and isinstance(name, str) and isinstance(arguments, str):
        return ApprovedCall(id, label, name, arguments)
    return None
