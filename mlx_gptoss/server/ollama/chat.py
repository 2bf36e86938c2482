"""POST /api/chat: the next message of a conversation, streamed unless the request says otherwise."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, WithJsonSchema
from starlette.responses import Response

from ...chat.stream import Events, as_conversation
from ...harmony.openai import unknown_fields
from ..body import BodyRoute
from ..fields import MAX_MESSAGES, Tools
from ..responses.truncation import truncated
from ..service import Service, ServiceDep
from ..tool_kinds import check_tools, split_tools
from .errors import ERROR_RESPONSES
from .fields import GenerationFields
from .messages import to_openai
from .ndjson import STREAMING_RESPONSES
from .reply import Piece, Reply

MESSAGES_SCHEMA: dict[str, Any] = {  # for OpenAPI; messages.py and harmony.openai check the messages
    "type": "array",
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"enum": ["system", "user", "assistant", "tool"]},
            "content": {"type": "string"},
            "thinking": {"type": "string"},
            "tool_calls": {"type": "array", "items": {"type": "object"}},
            "tool_name": {"type": "string"},
            "tool_call_id": {"type": "string"},
        },
    },
}

router: APIRouter = APIRouter(route_class=BodyRoute, responses=ERROR_RESPONSES)


class ChatRequest(GenerationFields):
    """messages: without any, the reply is empty: so clients load a model. tools: functions; others are left out.

    truncate: true drops the oldest turns of a conversation that the context cannot hold; otherwise it is an error.
    """

    messages: Annotated[list[Any] | None, WithJsonSchema(MESSAGES_SCHEMA)] = Field(None, max_length=MAX_MESSAGES)
    tools: Tools | None = None
    truncate: bool | None = None

    def ignored_fields(self) -> set[str]:
        kinds = {f"tools[].{kind}" for kind in split_tools(self.tools or ())[1]}
        return super().ignored_fields() | unknown_fields(to_openai(self.messages or ())) | kinds


@router.post("/api/chat", responses=STREAMING_RESPONSES)
async def chat(body: ChatRequest, request: Request, service: ServiceDep) -> Response:
    """Generate the assistant's next message."""
    service = await service.select(body.model)
    body.check()
    reply = Reply(body, service, _message)
    if not body.messages:
        return await reply.idle_response(request)
    return await reply.respond(request, partial(_submit, to_openai(body.messages), body, service))


def _submit(messages: list[Any], body: ChatRequest, service: Service) -> Events:
    """Submit the conversation to the engine. Runs on a worker thread, since it may be long."""
    conversation = as_conversation(messages, reasoning=body.effort, tools=check_tools(body.tools or ()))
    if body.truncate:
        conversation = truncated(conversation, service.model, body.max_tokens)
    return service.stream(
        conversation,
        sampling=body.sampling(service.model.default_sampling),
        max_tokens=body.max_tokens,
        response_format=body.response_format,
    )


def _message(piece: Piece) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": piece.text}
    if piece.thinking:
        message["thinking"] = piece.thinking
    if piece.calls:
        message["tool_calls"] = list(piece.calls)
    return {"message": message}
