"""/v1/responses/{id}: read, stream, cancel and delete responses that are stored or in progress."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from ..body import BodyRoute
from ..errors import ApiError, JsonResponse, invalid_field
from ..fields import MAX_INT64
from ..service import Service, ServiceDep
from ..sse import STREAMING_RESPONSES, EventStream
from .pages import PageQuery, list_response
from .running import EventLog
from .store import StoredResponse

router: APIRouter = APIRouter(route_class=BodyRoute)


@router.get("/v1/responses/{id}", responses=STREAMING_RESPONSES)
async def retrieve(
    id: str,
    service: ServiceDep,
    stream: bool = False,
    starting_after: Annotated[int, Query(ge=-1, le=MAX_INT64)] = -1,
) -> Response:
    """Return a stored response, or one in progress as written so far.

    stream: return the events of a background response, those so far and those to come, with sequence numbers over
    starting_after.
    """
    if stream:
        return EventStream(_event_log(service, id).follow(starting_after), lambda: None)
    running = service.running_responses.get(id)
    return _json(_stored(service, id).response) if running is None else JsonResponse(running.response)


@router.delete("/v1/responses/{id}")
async def delete(id: str, service: ServiceDep) -> Response:
    """Delete a stored response."""
    if not service.store.delete(id):
        raise _not_found(id)
    return JsonResponse({"id": id, "object": "response", "deleted": True})


@router.post("/v1/responses/{id}/cancel")
async def cancel(id: str, service: ServiceDep) -> Response:
    """Cancel a response in progress. One that has ended is returned unchanged."""
    running = service.running_responses.get(id)
    if running is None:
        return _json(_stored(service, id).response)
    running.queue.stop(ApiError(409, "the response was cancelled", code="cancelled"))
    return JsonResponse({**running.response, "status": "cancelled"})


@router.get("/v1/responses/{id}/input_items")
async def input_items(
    id: str,
    service: ServiceDep,
    page: PageQuery,
) -> Response:
    """List the input items of a stored response, one page at a time."""
    return list_response(_stored(service, id).input, page)


def _event_log(service: Service, id: str) -> EventLog:
    """The events of a background response, in progress or stored. Raises ApiError for any other."""
    running = service.running_responses.get(id)
    if running is not None and running.log is not None:
        return running.log
    events = _stored(service, id).events if running is None else ()
    if not events:
        raise invalid_field("stream", "needs a background response, and this one was not made with background: true")
    log = EventLog()
    log.append(list(events))
    log.close()
    return log


def _json(content: bytes) -> Response:
    return Response(content, media_type=JsonResponse.media_type)


def _stored(service: Service, id: str) -> StoredResponse:
    stored = service.store.get(id)
    if stored is None:
        raise _not_found(id)
    return stored


def _not_found(id: str) -> ApiError:
    return ApiError(404, f"the response {id!r:.100} is not stored", param="id", code="not_found")
