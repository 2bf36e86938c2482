"""POST /v1/responses: generate the next response, streamed, whole, or in the background; count its input tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...harmony.render import render
from ..body import BodyRoute
from ..disconnect import cancel_on_disconnect, on_thread
from ..errors import JsonResponse
from ..ignored import ignore
from ..service import Service, ServiceDep
from ..sse import STREAMING_RESPONSES, EventStream
from .context import read_context
from .model_response import ModelResponse
from .request import ContextRequest, ResponsesRequest
from .truncation import truncated

router: APIRouter = APIRouter(route_class=BodyRoute)


@router.post("/v1/responses", responses=STREAMING_RESPONSES)
async def create(body: ResponsesRequest, request: Request, service: ServiceDep) -> Response:
    """Generate the next response, from input items and optionally a previous response or a conversation."""
    service = await service.select(body.model)
    response = await on_thread(request, ModelResponse, body, service)
    ignore(request, response.context.ignored)
    queue = await cancel_on_disconnect(request, response.start())
    if body.background:
        log = response.run_in_background(queue)
        return EventStream(log.follow(), lambda: None) if body.stream else JsonResponse(response.response)
    if body.stream:
        return EventStream(response.stream(queue), partial(service.finish, queue))
    return JsonResponse(await cancel_on_disconnect(request, response.full_response(queue)))


async def full_response(body: ResponsesRequest, service: Service) -> dict[str, Any]:
    """Generate a full response, for one line of a batch file."""
    service = await service.select(body.model)
    response = ModelResponse(body, service)
    return await response.full_response(await response.start())


@router.post("/v1/responses/input_tokens")
async def count_input_tokens(body: ContextRequest, request: Request, service: ServiceDep) -> Response:
    """Count the tokens of the prompt that POST /v1/responses would make of the same fields."""
    service = await service.select(body.model)
    context = await on_thread(request, read_context, body, service)
    ignore(request, context.ignored)

    def count() -> int:
        conversation = context.conversation
        if body.truncation == "auto":
            conversation = truncated(conversation, service.model, None)
        return len(render(conversation, service.model.tokenizer, service.model.max_context))

    return JsonResponse({"object": "response.input_tokens", "input_tokens": await on_thread(request, count)})
