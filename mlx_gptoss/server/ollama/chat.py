"""POST /api/chat: the next message of a conversation, streamed unless the request says otherwise."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, WithJsonSchema
from starlette.responses import Response

from ...chat.stream import Events
from ...harmony.openai import unknown_fields
from ..fields import MAX_MESSAGES, MAX_TOOLS, check_schema
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

router: APIRouter = APIRouter(responses=ERROR_RESPONSES)


class ChatRequest(GenerationFields):
    """messages: without any, the reply is empty: so clients load a model. tools: functions; others are left out."""

    messages: Annotated[list[Any] | None, WithJsonSchema(MESSAGES_SCHEMA)] = Field(None, max_length=MAX_MESSAGES)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)

    def check(self) -> None:
        super().check()
        for index, tool in enumerate(self.tools or ()):
            check_schema(tool, f"tools[{index}]")

    def ignored_fields(self) -> set[str]:
        kinds = {f"tools[].{kind}" for kind in split_tools(self.tools or ())[1]}
        return super().ignored_fields() | unknown_fields(to_openai(self.messages or ())) | kinds


@router.post("/api/chat", responses=STREAMING_RESPONSES)
async def chat(body: ChatRequest, request: Request, service: ServiceDep) -> Response:
    """Generate the assistant's next message."""
    service.check_model(body.model)
    body.check()
    reply = Reply(body, service, _message)
    if not body.messages:
        return reply.idle_response(request)
    return await reply.respond(request, _start(body, service))


def _start(body: ChatRequest, service: Service) -> partial[Events]:
    """A callable that submits the conversation to the engine."""
    return partial(
        service.model.stream,
        to_openai(body.messages or ()),
        sampling=body.sampling(service.model.default_sampling),
        max_tokens=body.max_tokens,
        reasoning=body.effort,
        tools=check_tools(body.tools or ()),
        response_format=body.response_format,
    )


def _message(piece: Piece) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": piece.text}
    if piece.thinking:
        message["thinking"] = piece.thinking
    if piece.calls:
        message["tool_calls"] = list(piece.calls)
    return {"message": message}
