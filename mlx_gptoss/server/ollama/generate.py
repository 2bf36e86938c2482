"""POST /api/generate: the answer to one prompt, or the continuation of a raw text."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from ...chat.stream import Events
from ..body import BodyRoute
from ..errors import invalid_field
from ..fields import MAX_PARTS
from ..service import Service, ServiceDep
from .errors import ERROR_RESPONSES
from .fields import GenerationFields
from .ndjson import STREAMING_RESPONSES
from .reply import Piece, Reply

router: APIRouter = APIRouter(route_class=BodyRoute, responses=ERROR_RESPONSES)


class GenerateRequest(GenerationFields):
    """prompt: without one, the reply is empty. system: instructions. raw: continue the prompt as it stands.

    The deprecated fields template and context have no effect.
    """

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    images: list[Any] | None = Field(None, max_length=MAX_PARTS)

    def check(self) -> None:
        super().check()
        if self.images:
            raise invalid_field("images", "cannot be read: the model reads only text")
        if self.raw and self.system:
            raise invalid_field("system", "has no place in a raw prompt: put it into the prompt, or leave raw out")
        if self.raw and self.format:
            raise invalid_field("format", "is not supported with raw: leave one of them out")


@router.post("/api/generate", responses=STREAMING_RESPONSES)
async def generate(body: GenerateRequest, request: Request, service: ServiceDep) -> Response:
    """Answer a prompt."""
    service = await service.select(body.model)
    body.check()
    reply = Reply(body, service, _response)
    if not body.prompt:
        return await reply.idle_response(request)
    start = _continue_raw if body.raw else _answer
    return await reply.respond(request, partial(start, body.prompt, body, service))


def _answer(prompt: str, body: GenerateRequest, service: Service) -> Events:
    return service.stream(
        [{"role": "user", "content": prompt}],
        system=body.system or None,
        sampling=body.sampling(service.model.default_sampling),
        max_tokens=body.max_tokens,
        reasoning=body.effort,
        response_format=body.response_format,
    )


def _continue_raw(prompt: str, body: GenerateRequest, service: Service) -> Events:
    """Tokenize and submit the prompt; special tokens in it are recognized. Runs on a worker thread."""
    model = service.model
    ids = model.tokenizer.encode_within(model.max_context, prompt, specials=True)
    return service.stream_raw(ids, sampling=body.sampling(model.default_sampling), max_tokens=body.max_tokens)


def _response(piece: Piece) -> dict[str, Any]:
    return {"response": piece.text, **({"thinking": piece.thinking} if piece.thinking else {})}
