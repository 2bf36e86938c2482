"""llama.cpp's endpoints that agents use besides OpenAI's: props, slots, tokenize, detokenize and apply-template."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, WithJsonSchema
from starlette.responses import Response

from ..chat.stream import as_conversation
from ..harmony.messages import Effort
from ..harmony.openai import unknown_fields
from ..harmony.render import render
from ..tokenizer import Tokenizer
from .errors import JsonResponse, invalid_field
from .fields import MAX_MESSAGES, MAX_TOOLS, RequestModel, check_schema, effort_of
from .ignored import ignore
from .openai.chat_completions import MESSAGES_SCHEMA
from .service import ServiceDep
from .tool_kinds import check_tools

router: APIRouter = APIRouter()


class TokenizeRequest(RequestModel):
    """with_pieces: return the text of each token. parse_special: recognize special tokens, as by default."""

    content: str = ""
    with_pieces: bool | None = None
    parse_special: bool | None = None


class DetokenizeRequest(RequestModel):
    tokens: list[int]


class TemplateRequest(RequestModel):
    messages: Annotated[list[Any], WithJsonSchema(MESSAGES_SCHEMA)] = Field(max_length=MAX_MESSAGES)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    reasoning_effort: str | None = None

    @property
    def effort(self) -> Effort:
        return effort_of(self.reasoning_effort, "reasoning_effort") or "medium"


@router.get("/props")
async def props(service: ServiceDep) -> Response:
    """The context length, the number of slots and the default sampling."""
    model, sampling = service.model, service.model.default_sampling
    params = {
        "n_predict": -1,
        "seed": -1,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }
    return JsonResponse(
        {
            "default_generation_settings": {"n_ctx": model.max_context, "params": params},
            "total_slots": model.status.slots,
            "model_alias": service.model_id,
            "model_path": service.model_id,
            "chat_template": "",
            "modalities": {"vision": False, "audio": False},
            "build_info": "mlx-gptoss",
        }
    )


@router.get("/slots")
async def slots(service: ServiceDep) -> Response:
    """Whether each slot is in use."""
    status, context = service.model.status, service.model.max_context
    return JsonResponse(
        [{"id": index, "n_ctx": context, "is_processing": index < status.running} for index in range(status.slots)]
    )


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request, service: ServiceDep) -> Response:
    """The token ids of a text."""
    ignore(request, body.ignored_fields())
    tokenizer = service.model.tokenizer
    encode = tokenizer.encode if body.parse_special is False else tokenizer.encode_with_specials
    ids = await asyncio.to_thread(encode, body.content)
    if not body.with_pieces:
        return JsonResponse({"tokens": ids})
    return JsonResponse({"tokens": [{"id": id, "piece": _piece(id, tokenizer)} for id in ids]})


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request, service: ServiceDep) -> Response:
    """The text of token ids, special tokens included."""
    ignore(request, body.ignored_fields())
    size = service.model.config.vocab_size
    if any(not 0 <= id < size for id in body.tokens):
        raise invalid_field("tokens", f"must be ids from 0 to {size - 1}")
    return JsonResponse({"content": await asyncio.to_thread(_decode, body.tokens, service.model.tokenizer)})


@router.post("/apply-template")
async def apply_template(body: TemplateRequest, request: Request, service: ServiceDep) -> Response:
    """The prompt that a chat request would give to the model, as text. /v1/completions can continue it."""
    for index, tool in enumerate(body.tools or ()):
        check_schema(tool, f"tools[{index}]")
    ignore(request, body.ignored_fields() | unknown_fields(body.messages))
    return JsonResponse({"prompt": await asyncio.to_thread(_prompt, body, service.model.tokenizer)})


def _prompt(body: TemplateRequest, tokenizer: Tokenizer) -> str:
    conversation = as_conversation(body.messages, reasoning=body.effort, tools=check_tools(body.tools or ()))
    return _decode(render(conversation, tokenizer), tokenizer)


def _decode(ids: list[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode(ids, specials=True)


def _piece(id: int, tokenizer: Tokenizer) -> str | list[int]:
    """The text of one token, or its bytes where they are not whole characters."""
    if tokenizer.is_special(id):
        return tokenizer.decode([id], specials=True)
    content = tokenizer.token_bytes(id)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return list(content)
