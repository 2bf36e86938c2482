"""/v1/conversations: conversations that the server keeps in memory, for `conversation` in requests for responses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from ..body import BodyRoute
from ..disconnect import on_thread
from ..errors import ApiError, JsonResponse, dump_json, invalid_field
from ..fields import MAX_MESSAGES, Metadata, RequestModel
from ..ignored import ignore
from ..service import Service, ServiceDep
from .items import Item, ItemReference, item_objects, new_id
from .pages import PageFields, PageQuery, list_response
from .store import StoredConversation

router: APIRouter = APIRouter(route_class=BodyRoute)


class ConversationRequest(RequestModel):
    """metadata: kept with the conversation. items: its first items."""

    metadata: Metadata | None = None
    items: list[Item] | None = Field(default=None, max_length=MAX_MESSAGES)


class MetadataRequest(RequestModel):
    """metadata: takes the place of the conversation's."""

    metadata: Metadata | None = None


class ItemsRequest(RequestModel):
    """items: to be added at the end."""

    items: list[Item] = Field(max_length=MAX_MESSAGES)


@router.post("/v1/conversations")
async def create(request: Request, service: ServiceDep, body: ConversationRequest | None = None) -> Response:
    """Begin a conversation."""
    body = body or ConversationRequest()
    ignore(request, await on_thread(request, body.ignored_fields))
    items = await on_thread(request, _stored_items, body.items or [])
    return _put(service, new_id("conv"), StoredConversation(int(time.time()), body.metadata or {}, items))


@router.get("/v1/conversations/{id}")
async def retrieve(id: str, service: ServiceDep) -> Response:
    """Return a conversation, without its items."""
    return JsonResponse(_object(id, _found(service, id)))


@router.post("/v1/conversations/{id}")
async def update(id: str, body: MetadataRequest, request: Request, service: ServiceDep) -> Response:
    """Replace a conversation's metadata."""
    ignore(request, body.ignored_fields())
    return _put(service, id, replace(_found(service, id), metadata=body.metadata or {}))


@router.delete("/v1/conversations/{id}")
async def delete(id: str, service: ServiceDep) -> Response:
    """Delete a conversation with its items. Responses made in it stay."""
    if not service.conversations.delete(id):
        raise _not_found(id)
    return JsonResponse({"id": id, "object": "conversation.deleted", "deleted": True})


@router.get("/v1/conversations/{id}/items")
async def list_items(
    id: str,
    service: ServiceDep,
    page: PageQuery,
) -> Response:
    """List the items of a conversation, one page at a time."""
    return list_response(_found(service, id).items, page)


@router.post("/v1/conversations/{id}/items")
async def add_items(id: str, body: ItemsRequest, request: Request, service: ServiceDep) -> Response:
    """Add items at the end of a conversation, and return them."""
    added = await on_thread(request, _stored_items, body.items)
    ignore(request, await on_thread(request, body.ignored_fields))
    conversation = _found(service, id)
    if not (conversation.has_room(len(added)) and service.conversations.append(id, added)):
        raise _too_large()
    page = PageFields.model_construct(limit=len(added), order="asc")
    return list_response(added, page)


@router.get("/v1/conversations/{id}/items/{item_id}")
async def retrieve_item(id: str, item_id: str, service: ServiceDep) -> Response:
    """Return one item of a conversation."""
    return Response(_found_item(service, id, item_id), media_type=JsonResponse.media_type)


@router.delete("/v1/conversations/{id}/items/{item_id}")
async def delete_item(id: str, item_id: str, service: ServiceDep) -> Response:
    """Delete one item of a conversation, and return the conversation."""
    _found_item(service, id, item_id)
    conversation = _found(service, id)
    items = {key: item for key, item in conversation.items.items() if key != item_id}
    return _put(service, id, replace(conversation, items=items))


def _stored_items(items: Sequence[Item]) -> dict[str, bytes]:
    """Items as they are stored. Raises ApiError for one that no request could use."""
    for index, item in enumerate(items):
        if isinstance(item, ItemReference):
            raise invalid_field(f"items[{index}]", "is a reference: send the item itself")
    return {item["id"]: dump_json(item) for item in item_objects(items)}


def _put(service: Service, id: str, conversation: StoredConversation) -> Response:
    if not service.conversations.put(id, conversation):
        raise _too_large()
    return JsonResponse(_object(id, conversation))


def _object(id: str, conversation: StoredConversation) -> dict[str, Any]:
    metadata = dict(conversation.metadata)
    return {"id": id, "object": "conversation", "created_at": conversation.created, "metadata": metadata}


def _found(service: Service, id: str) -> StoredConversation:
    found = service.conversations.get(id)
    if found is None:
        raise _not_found(id)
    return found


def _found_item(service: Service, id: str, item_id: str) -> bytes:
    item = _found(service, id).items.get(item_id)
    if item is None:
        raise ApiError(404, f"the conversation has no item {item_id!r:.100}", param="item_id", code="not_found")
    return item


def _not_found(id: str) -> ApiError:
    return ApiError(404, f"the conversation {id!r:.100} is not stored", param="id", code="not_found")


def _too_large() -> ApiError:
    return invalid_field("items", "are more than a conversation may have: start a new one", "conversation_too_large")
