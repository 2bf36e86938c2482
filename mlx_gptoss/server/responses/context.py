"""From a request to the conversation that the model sees."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter

from ...chat.stream import Events
from ...errors import InvalidRequest
from ...harmony.messages import Conversation, without_old_reasoning
from ...harmony.openai_tools import response_format_of
from ..errors import ApiError, invalid_field
from ..hosted.selection import Selection, hosted_tools_of
from ..service import Service
from .approvals import ApprovedCall, read_approvals
from .conversation_items import ConversationItems
from .items import Item, ItemReference
from .request import ContextRequest, request_error
from .tools import ResponseTools
from .truncation import truncated

_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])
_ITEM: TypeAdapter[Item] = TypeAdapter(Item)


@dataclass(frozen=True)
class RequestContext:
    """A request as the model gets it.

    tools: those of the request. items: its input, with references replaced by the items. history: the conversation up
    to and with them, with all of its reasoning. conversation: the same with instructions, functions and the response
    format, and without old reasoning. ignored: the paths of what has no effect. hosted: the tools that the server
    runs. approved: calls of theirs that the conversation ends with, and that the client has approved.
    """

    tools: ResponseTools
    items: Sequence[Item]
    history: ConversationItems
    conversation: Conversation
    ignored: frozenset[str]
    hosted: Selection
    approved: tuple[ApprovedCall, ...]


def read_context(body: ContextRequest, service: Service) -> RequestContext:
    """Return the context of a request. Raises ApiError if it is invalid, or continues what is not stored."""
    body.check()
    try:
        selection = hosted_tools_of(body.all_tools, None if service.hosted is None else service.hosted.settings)
        tools = ResponseTools(selection.client_tools if selection else body.all_tools)
        response_format = response_format_of(body.format)
    except InvalidRequest as error:
        raise request_error(error) from error
    items = [_resolved(item, service) for item in body.items]
    history = _previous_history(body, service, tools).with_items(items, tools)
    history, approved = read_approvals(items, history, tools, service)
    if not history.messages:
        hint = "; this endpoint takes input, not messages" if "messages" in (body.model_extra or {}) else ""
        raise invalid_field("input", f"is missing: send a text or items{hint}", "missing_required_parameter")
    instructions = [] if body.instructions is None else [body.instructions]
    conversation = Conversation(
        messages=without_old_reasoning(history.messages),
        reasoning=body.effort,
        instructions="\n\n".join([*instructions, *history.instructions]) or None,
        functions=tools.functions,
        response_format=response_format,
        date=datetime.date.today().isoformat(),
    )
    ignored = body.ignored_fields() | {f"tools[].{kind}" for kind in tools.left_out}
    ignored |= {f"input[].{kind}" for kind in history.skipped - {"additional_tools"}}
    ignored |= set(selection.left_out) if selection else set()
    history = replace(history, skipped=frozenset())
    return RequestContext(tools, items, history, conversation, frozenset(ignored), selection, approved)


def submitter(service: Service, conversation: Conversation, *, truncate: bool, **options: Any) -> Callable[[], Events]:
    """Return a callable that submits a conversation to the engine, for Service.start().

    truncate: drop the oldest turns if the context cannot hold them. options: of Model.stream.
    """

    def submit() -> Events:
        try:
            fitting = truncated(conversation, service.model, options.get("max_tokens")) if truncate else conversation
            return service.stream(fitting, **options)
        except InvalidRequest as error:
            raise request_error(error) from error

    return submit


def _previous_history(body: ContextRequest, service: Service, tools: ResponseTools) -> ConversationItems:
    """The conversation to continue, empty for a new one. Raises ApiError if it is not available."""
    if body.conversation_id is not None:
        found = service.conversations.get(body.conversation_id)
        if found is None:
            message = f"conversation is {body.conversation_id!r:.100}: no conversation of that id is stored"
            raise ApiError(404, message, param="conversation", code="not_found")
        if not found.has_room(len(body.items)):
            raise invalid_field("conversation", "has no room for more items: start a new one", "conversation_too_large")
        items = _ITEMS.validate_json(b"[" + b",".join(found.items.values()) + b"]")
        return ConversationItems().with_items(items, tools, "conversation.items")
    if body.previous_response_id is None:
        return ConversationItems()
    stored = service.store.get(body.previous_response_id)
    if stored is None or stored.history is None:
        message = f"is {body.previous_response_id!r:.100}: that response is not stored, or it did not complete"
        raise invalid_field("previous_response_id", message, "previous_response_not_found")
    return stored.history


def _resolved(item: Item, service: Service) -> Item:
    """The item that a reference means. A reference to nothing stays; with_items() reports it."""
    if not isinstance(item, ItemReference):
        return item
    found = service.store.item(item.id) or service.conversations.item(item.id)
    return item if found is None else _ITEM.validate_python(json.loads(found))
