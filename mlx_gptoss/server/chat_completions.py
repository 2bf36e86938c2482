"""POST /v1/chat/completions: chunks as they come, or their sum."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field, WithJsonSchema
from starlette.responses import Response

from ..chat.reply import Event, Finished, ReasoningDelta, TextDelta, ToolCallDelta
from ..chat.stream import Events
from ..engine import Token
from ..sampling import MAX_LOGPROBS
from ..tokenizer import Tokenizer
from .arrivals import Arrivals, unless_gone
from .errors import Json, from_exception, refuse
from .fields import BIG, SamplingFields, StreamOptions, WithoutEffect, check_schema, seeded
from .service import Here, Service
from .sse import ANSWERS, DONE, EventStream, frame, frames

MOST_MESSAGES = 10_000
MOST_TOOLS = 128
MOST_CHOICES = 16
TEXT = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]}
MESSAGES = {  # their fields are checked by harmony.openai
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {
                "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]
            },
            "reasoning": {"type": "string"},
            "tool_calls": {"type": "array", "items": {"type": "object"}},
            "tool_call_id": {"type": "string"},
        },
    },
}

router = APIRouter()


class ChatRequest(SamplingFields, WithoutEffect):
    """OpenAI's fields, as far as this model can honour them. reasoning_effort: medium by default."""

    model: str | None = None
    messages: Annotated[list[Any], WithJsonSchema(MESSAGES)] = Field(max_length=MOST_MESSAGES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=BIG)
    max_completion_tokens: int | None = Field(None, ge=1, le=BIG)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    store: Literal[False] | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None

    def check(self) -> None:
        """What the types alone cannot say."""
        if self.top_logprobs and not self.logprobs:
            raise refuse("top_logprobs", "needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", "needs stream: true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise refuse("max_tokens", "and max_completion_tokens differ: give one of them")
        for place, tool in enumerate(self.tools or ()):
            check_schema(tool, f"tools[{place}]")
        check_schema(self.response_format, "response_format")


@router.post("/v1/chat/completions", responses=ANSWERS)
async def create(body: ChatRequest, request: Request, service: Here) -> Response:
    """The assistant's next turn."""
    completion = _Completion(body, service)
    arrivals = await unless_gone(request, service.start(*completion.replies()))
    if body.stream:
        return EventStream(completion.stream(arrivals), partial(service.finish, arrivals))
    return Json(await unless_gone(request, completion.whole(arrivals)))


async def whole(body: ChatRequest, service: Service) -> dict[str, Any]:
    """The same for a line of a batch."""
    completion = _Completion(body, service)
    return await completion.whole(await service.start(*completion.replies()))


class _Completion:
    """One request's choices, from events to chunks."""

    def __init__(self, body: ChatRequest, service: Service) -> None:
        service.check_model(body.model)
        body.check()
        self._body = body
        self._service = service
        self._choices = [_Choice(index, service.model.tokenizer, bool(body.logprobs)) for index in range(body.n or 1)]
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.model_id,
        }

    def replies(self) -> list[partial[Events]]:
        body, model = self._body, self._service.model
        sampling = body.sampling(model.default_sampling, body.top_logprobs or 0)
        options: dict[str, Any] = {
            "max_tokens": body.max_completion_tokens or body.max_tokens,
            "reasoning": body.reasoning_effort,
            "tools": body.tools or (),
            "response_format": body.response_format,
            "tool_choice": body.tool_choice or "auto",
            "parallel_tool_calls": body.parallel_tool_calls is not False,
        }
        return [
            partial(model.stream, body.messages, sampling=seeded(sampling, choice.index), **options)
            for choice in self._choices
        ]

    async def deltas(self, arrivals: Arrivals) -> AsyncIterator[list[dict[str, Any]]]:
        """Entries of a chunk's `choices`, in batches."""
        watches = [self._service.metrics.watch() for _ in self._choices]
        try:
            async for batch in arrivals.batches():
                made = []
                for index, event in batch:
                    watches[index].saw(event)
                    made += self._choices[index].deltas(event)
                if made:
                    yield made
        finally:
            self._service.finish(arrivals)

    async def stream(self, arrivals: Arrivals) -> AsyncIterator[bytes]:
        options = self._body.stream_options
        usage = {"usage": None} if options is not None and options.include_usage else {}
        head = {**self._head, "object": "chat.completion.chunk"}
        opening = [choice.delta({"role": "assistant", "content": ""}) for choice in self._choices]
        try:
            yield frames({**head, "choices": [delta], **usage} for delta in opening)
            async for made in self.deltas(arrivals):
                yield frames({**head, "choices": [delta], **usage} for delta in made)
            if usage:
                yield frame({**head, "choices": [], "usage": self._usage()})
        except Exception as error:
            yield frame(from_exception(error).body())
        else:
            yield DONE

    async def whole(self, arrivals: Arrivals) -> dict[str, Any]:
        """All deltas, added up."""
        choices: list[dict[str, Any]] = [
            {"index": choice.index, "message": {"role": "assistant", "content": None}, "logprobs": None}
            for choice in self._choices
        ]
        async for made in self.deltas(arrivals):
            for delta in made:
                _add(choices[delta["index"]], delta)
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        ends = [choice.end for choice in self._choices if choice.end is not None]
        prompt = ends[0].usage.prompt_tokens
        generated = sum(end.usage.completion_tokens for end in ends)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": ends[0].usage.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": sum(end.reasoning_tokens for end in ends)},
        }


class _Choice:
    """One reply: its events become deltas."""

    def __init__(self, index: int, tokenizer: Tokenizer, logprobs: bool) -> None:
        self.index = index
        self.end: Finished | None = None
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._calls: dict[str, int] = {}  # id -> its place in tool_calls

    def delta(self, delta: dict[str, Any], tokens: Sequence[Token] = (), reason: str | None = None) -> dict[str, Any]:
        shown = None
        if self._logprobs and "content" in delta:
            shown = {"content": [logprob(token, self._tokenizer) for token in tokens], "refusal": None}
        return {"index": self.index, "delta": delta, "logprobs": shown, "finish_reason": reason}

    def deltas(self, event: Event) -> list[dict[str, Any]]:
        match event:
            case ReasoningDelta():
                return [self.delta({"reasoning": event.text, "reasoning_content": event.text})]
            case TextDelta():
                return [self.delta({"content": event.text}, event.tokens)]
            case ToolCallDelta():
                return [self.delta({"tool_calls": [self._call(event)]})]
            case Finished():
                self.end = event
                return [self.delta({}, reason=event.finish_reason)]
        return []  # a whole ToolCall: its deltas have said it all

    def _call(self, event: ToolCallDelta) -> dict[str, Any]:
        if event.id in self._calls:
            return {"index": self._calls[event.id], "function": {"arguments": event.text}}
        place = self._calls[event.id] = len(self._calls)
        function = {"name": event.name, "arguments": event.text}
        return {"index": place, "id": event.id, "type": "function", "function": function}


def logprob(token: Token, tokenizer: Tokenizer) -> dict[str, Any]:
    """A token as chat completions and responses show it."""

    def one(id: int, value: float) -> dict[str, Any]:
        return {"token": tokenizer.decode([id]), "logprob": value, "bytes": list(tokenizer.token_bytes(id))}

    return {**one(token.id, token.logprob), "top_logprobs": [one(*other) for other in token.top]}


def _add(choice: dict[str, Any], delta: dict[str, Any]) -> None:
    """Take a delta into the choice of a whole completion."""
    message = choice["message"]
    for name, value in delta["delta"].items():
        if name != "tool_calls":
            message[name] = (message.get(name) or "") + value
            continue
        calls = message.setdefault("tool_calls", [])
        for piece in value:
            if piece["index"] == len(calls):
                calls.append({name: value for name, value in piece.items() if name != "index"})
            else:
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    if delta["logprobs"] is not None:
        choice["logprobs"] = choice["logprobs"] or {"content": [], "refusal": None}
        choice["logprobs"]["content"] += delta["logprobs"]["content"]
    choice["finish_reason"] = delta["finish_reason"]
