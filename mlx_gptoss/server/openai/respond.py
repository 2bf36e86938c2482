"""What chat completions and completions do with a valid request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response

from ...chat.stream import Events
from ..disconnect import cancel_on_disconnect
from ..errors import JsonResponse
from ..event_queue import EventQueue
from ..service import Service
from ..sse import EventStream


class Completion(Protocol):
    """One request, and the conversion of its events to the chunks and the object of an endpoint."""

    def replies(self) -> Sequence[Callable[[], Events]]: ...

    def stream(self, queue: EventQueue) -> AsyncIterator[bytes]: ...

    async def full_response(self, queue: EventQueue) -> dict[str, Any]: ...


async def respond(completion: Completion, request: Request, service: Service, *, stream: bool) -> Response:
    """Generate a response, streamed or whole. A disconnect of the client cancels it."""
    queue = await cancel_on_disconnect(request, service.start(*completion.replies()))
    if stream:
        return EventStream(completion.stream(queue), partial(service.finish, queue))
    return JsonResponse(await cancel_on_disconnect(request, completion.full_response(queue)))
