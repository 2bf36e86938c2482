"""llama.cpp's endpoints that agents use besides OpenAI's: props, slots, tokenize, detokenize and apply-template."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, WithJsonSchema
from starlette.responses import Response

from ..chat.stream import as_conversation
from ..harmony.messages import Effort
from ..harmony.openai import unknown_fields
from ..harmony.render import render
from ..tokenizer import Tokenizer
from .body import BodyRoute
from .disconnect import on_thread
from .errors import JsonResponse, dump_json, invalid_field
from .fields import MAX_MESSAGES, Name, RequestModel, TokenIds, Tools, effort_of
from .ignored import ignore
from .models.named import ServedModel
from .openai.chat_completions import MESSAGES_SCHEMA
from .service import ServiceDep
from .tool_kinds import check_tools

router: APIRouter = APIRouter(route_class=BodyRoute)


class TokenizeRequest(RequestModel):
    """with_pieces: return the text of each token. parse_special: recognize special tokens, as by default."""

    content: str = ""
    with_pieces: bool | None = None
    parse_special: bool | None = None


class DetokenizeRequest(RequestModel):
    tokens: TokenIds


class TemplateRequest(RequestModel):
    messages: Annotated[list[Any], WithJsonSchema(MESSAGES_SCHEMA)] = Field(max_length=MAX_MESSAGES)
    tools: Tools | None = None
    reasoning_effort: Name | None = None

    @property
    def effort(self) -> Effort:
        return effort_of(self.reasoning_effort, "reasoning_effort") or "medium"

    def ignored_fields(self) -> set[str]:
        return super().ignored_fields() | unknown_fields(self.messages)


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
            **({"hosted_tools": service.hosted.requestable()} if service.hosted else {}),
        }
    )


@router.get("/slots")
async def slots(service: ServiceDep) -> Response:
    """Whether each slot is in use. The first has the prompts that are being read: their tokens, and those done."""
    status, context = service.model.status, service.model.max_context
    found: list[dict[str, Any]] = [
        {"id": index, "n_ctx": context, "is_processing": index < status.running} for index in range(status.slots)
    ]
    if found and status.prompt_tokens:
        found[0]["n_prompt_tokens"] = status.prompt_tokens
        found[0]["n_prompt_tokens_processed"] = status.prefilled_tokens
    return JsonResponse(found)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request, service: ServiceDep) -> Response:
    """The token ids of a text."""
    ignore(request, body.ignored_fields())
    return await on_thread(request, _tokens_response, body, service.model)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request, service: ServiceDep) -> Response:
    """The text of token ids, special tokens included."""
    ignore(request, body.ignored_fields())
    return await on_thread(request, _text_response, body.tokens, service.model)


@router.post("/apply-template")
async def apply_template(body: TemplateRequest, request: Request, service: ServiceDep) -> Response:
    """The prompt that a chat request would give to the model, as text. /v1/completions can continue it."""
    ignore(request, await on_thread(request, body.ignored_fields))
    return await on_thread(request, _prompt_response, body, service.model)


def _tokens_response(body: TokenizeRequest, model: ServedModel) -> Response:
    tokenizer = model.tokenizer
    ids = tokenizer.encode_within(model.max_context, body.content, specials=body.parse_special is not False)
    if not body.with_pieces:
        return JsonResponse({"tokens": ids})
    pieces = [dump_json({"id": id, "piece": _piece(id, tokenizer)}) for id in ids]  # one call for all takes too long
    return Response(b'{"tokens":[' + b",".join(pieces) + b"]}", media_type=JsonResponse.media_type)


def _text_response(ids: list[int], model: ServedModel) -> Response:
    size = model.config.vocab_size
    if any(not 0 <= id < size for id in ids):
        raise invalid_field("tokens", f"must be ids from 0 to {size - 1}")
    return JsonResponse({"content": model.tokenizer.decode(ids, specials=True)})


def _prompt_response(body: TemplateRequest, model: ServedModel) -> Response:
    conversation = as_conversation(body.messages, reasoning=body.effort, tools=check_tools(body.tools or ()))
    ids = render(conversation, model.tokenizer, model.max_context)
    return JsonResponse({"prompt": model.tokenizer.decode(ids, specials=True)})


def _piece(id: int, tokenizer: Tokenizer) -> str | list[int]:
    """The text of one token, or its bytes where they are not whole characters."""
    if tokenizer.is_special(id):
        return tokenizer.decode([id], specials=True)
    content = tokenizer.token_bytes(id)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return list(content)
