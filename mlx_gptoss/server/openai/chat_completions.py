"""POST /v1/chat/completions, streamed or not. The full response is the sum of the stream's deltas."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, WithJsonSchema
from starlette.responses import Response

from ...chat.reply import Event, Finished, ReasoningDelta, TextDelta, ToolCallDelta
from ...chat.stream import MAX_STOP_IDS, Events
from ...engine import Token
from ...harmony.messages import Effort
from ...harmony.openai import unknown_fields
from ...sampling import MAX_LOGPROBS
from ...tokenizer import Tokenizer
from ..body import BodyRoute
from ..disconnect import on_thread
from ..errors import from_exception, invalid_field
from ..event_queue import EventQueue
from ..fields import (
    MAX_MESSAGES,
    MaxTokens,
    Name,
    Object,
    SamplingFields,
    StreamOptions,
    Tools,
    effort_of,
    effort_of_thinking,
    with_choice_seed,
)
from ..ignored import ignore
from ..service import Service, ServiceDep
from ..sse import DONE, STREAMING_RESPONSES, encode_event, encode_events
from ..tool_kinds import check_tools, split_tools
from .respond import respond

MAX_CHOICES = 16
CONTENT_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]
}
MESSAGES_SCHEMA: dict[str, Any] = {  # for OpenAPI; harmony.openai checks the messages
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": CONTENT_SCHEMA,
            "reasoning": {"type": "string"},
            "tool_calls": {"type": "array", "items": {"type": "object"}},
            "tool_call_id": {"type": "string"},
        },
    },
}

router: APIRouter = APIRouter(route_class=BodyRoute)


class ChatRequest(SamplingFields):
    """The fields of OpenAI's chat completions, and of other servers, that have an effect.

    reasoning_effort: medium by default; so are its other spellings, in this order: reasoning (OpenRouter), think
        (Ollama), thinking (Anthropic), chat_template_kwargs (vLLM). include_reasoning: false leaves the reasoning out.
    tools: functions; tools of other kinds are left out if there are functions.
    """

    model: Name | None = None
    messages: Annotated[list[Any], WithJsonSchema(MESSAGES_SCHEMA)] = Field(max_length=MAX_MESSAGES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: MaxTokens = None
    max_completion_tokens: MaxTokens = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: Tools | None = None
    tool_choice: Name | Object | None = None
    parallel_tool_calls: bool | None = None
    response_format: Object | None = None
    guided_json: Object | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOP_IDS)
    json_schema: Object | None = None
    reasoning_effort: Name | None = None
    reasoning: Object | None = None
    think: bool | Name | None = None
    thinking: Object | bool | Name | None = None
    chat_template_kwargs: Object | None = None
    include_reasoning: bool | None = None
    modalities: Annotated[list[Name], Field(max_length=16)] | None = None

    def check(self) -> None:
        """Raise ApiError for what cannot be honoured."""
        self.check_rejected()
        if self.top_logprobs and not self.logprobs:
            raise invalid_field("top_logprobs", "needs logprobs: true")
        if self.modalities is not None and "text" not in self.modalities:
            raise invalid_field("modalities", "must contain text, the only kind of reply")

    @property
    def format(self) -> dict[str, Any] | None:
        """The response format. guided_json is vLLM's earlier name for a schema, json_schema llama.cpp's."""
        schema = self.guided_json if self.guided_json is not None else self.json_schema
        return self.response_format if schema is None else {"type": "json_schema", "json_schema": {"schema": schema}}

    @property
    def effort(self) -> Effort:
        """The reasoning effort, from the first spelling that says one."""
        template, reasoning = self.chat_template_kwargs or {}, self.reasoning or {}
        return (
            effort_of(self.reasoning_effort, "reasoning_effort")
            or effort_of(reasoning.get("effort"), "reasoning.effort")
            or (effort_of(reasoning["enabled"], "reasoning.enabled") if "enabled" in reasoning else None)
            or effort_of(self.think, "think")
            or effort_of_thinking(self.thinking)
            or effort_of(template.get("reasoning_effort"), "chat_template_kwargs.reasoning_effort")
            or effort_of(template.get("enable_thinking"), "chat_template_kwargs.enable_thinking")
            or "medium"
        )

    def ignored_fields(self) -> set[str]:
        """The paths of what has no effect, in the request and its messages, and the kinds of tools left out."""
        ignored = super().ignored_fields() | unknown_fields(self.messages)
        ignored |= {f"tools[].{kind}" for kind in split_tools(self.tools or ())[1]}
        ignored |= {"stream_options"} if self.stream_options is not None and not self.stream else set()
        template = {"reasoning_effort", "enable_thinking"}
        return ignored | {
            f"chat_template_kwargs.{name}" for name in (self.chat_template_kwargs or {}).keys() - template
        }


@router.post("/v1/chat/completions", responses=STREAMING_RESPONSES)
async def create(body: ChatRequest, request: Request, service: ServiceDep) -> Response:
    """Generate the assistant's next message."""
    service = await service.select(body.model)
    completion = await on_thread(request, _Completion, body, service)
    ignore(request, completion.ignored)
    return await respond(completion, request, service, stream=bool(body.stream))


async def full_response(body: ChatRequest, service: Service) -> dict[str, Any]:
    """Generate a full response, for one line of a batch file."""
    service = await service.select(body.model)
    completion = _Completion(body, service)
    return await completion.full_response(await service.start(*completion.replies()))


class _Completion:
    """One request: its choices, and their conversion from engine events to chunks. Raises ApiError if it is invalid."""

    def __init__(self, body: ChatRequest, service: Service) -> None:
        body.check()
        self._body = body
        self._service = service
        self.ignored: set[str] = body.ignored_fields()
        self._functions = check_tools(body.tools or ())
        choice = partial(_Choice, tokenizer=service.model.tokenizer, logprobs=bool(body.logprobs))
        self._choices = [choice(index, reasoning=body.include_reasoning is not False) for index in range(body.n or 1)]
        self._base = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.model_id,
        }

    def replies(self) -> list[partial[Events]]:
        """One callable per choice that submits it to the engine, for Service.start()."""
        body, model = self._body, self._service.model
        sampling = body.sampling(model.default_sampling, body.top_logprobs or 0)
        options: dict[str, Any] = {
            "max_tokens": body.max_completion_tokens or body.max_tokens,
            "reasoning": body.effort,
            "tools": self._functions,
            "response_format": body.format,
            "tool_choice": body.tool_choice or "auto",
            "stop_token_ids": body.stop_token_ids or (),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
        }
        return [
            partial(self._service.stream, body.messages, sampling=with_choice_seed(sampling, choice.index), **options)
            for choice in self._choices
        ]

    async def deltas(self, queue: EventQueue) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield batches of entries for a chunk's `choices`."""
        recorders = [self._service.metrics.track_reply() for _ in self._choices]
        try:
            async for batch in queue.batches():
                deltas = []
                for index, event in batch:
                    recorders[index].record(event)
                    deltas += self._choices[index].deltas(event)
                if deltas:
                    yield deltas
        finally:
            self._service.finish(queue)

    async def stream(self, queue: EventQueue) -> AsyncIterator[bytes]:
        """Yield server-sent events. An error in the middle becomes the last event, without [DONE]."""
        options = self._body.stream_options
        usage = {"usage": None} if options is not None and options.include_usage else {}
        head = {**self._base, "object": "chat.completion.chunk"}
        first_deltas = [choice.delta({"role": "assistant", "content": ""}) for choice in self._choices]
        try:
            yield encode_events({**head, "choices": [delta], **usage} for delta in first_deltas)
            async for deltas in self.deltas(queue):
                yield encode_events({**head, "choices": [delta], **usage} for delta in deltas)
            if usage:
                yield encode_event({**head, "choices": [], "usage": self._usage()})
        except Exception as error:
            yield encode_event(from_exception(error).body())
        else:
            yield DONE

    async def full_response(self, queue: EventQueue) -> dict[str, Any]:
        """The sum of all deltas."""
        choices: list[dict[str, Any]] = [
            {"index": choice.index, "message": {"role": "assistant", "content": None}, "logprobs": None}
            for choice in self._choices
        ]
        async for deltas in self.deltas(queue):
            for delta in deltas:
                _merge_delta(choices[delta["index"]], delta)
        return {**self._base, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        finished = [choice.finished for choice in self._choices if choice.finished is not None]
        prompt = finished[0].usage.prompt_tokens
        generated = sum(end.usage.completion_tokens for end in finished)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": finished[0].usage.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": sum(end.reasoning_tokens for end in finished)},
        }


class _Choice:
    """One reply of a request; converts its events to deltas."""

    def __init__(self, index: int, tokenizer: Tokenizer, logprobs: bool, reasoning: bool) -> None:
        self.index = index
        self._reasoning = reasoning
        self.finished: Finished | None = None
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._calls: dict[str, int] = {}  # call id -> index in tool_calls

    def delta(self, delta: dict[str, Any], tokens: Sequence[Token] = (), reason: str | None = None) -> dict[str, Any]:
        """An entry of a chunk's `choices`. tokens: those of the text, for logprobs. reason: the finish reason."""
        logprobs = None
        if self._logprobs and "content" in delta:
            logprobs = {"content": [logprob_entry(token, self._tokenizer) for token in tokens], "refusal": None}
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def deltas(self, event: Event) -> list[dict[str, Any]]:
        """Convert one engine event."""
        match event:
            case ReasoningDelta():
                if not self._reasoning:
                    return []
                return [self.delta({"reasoning": event.text, "reasoning_content": event.text})]
            case TextDelta():
                return [self.delta({"content": event.text}, event.tokens)]
            case ToolCallDelta():
                return [self.delta({"tool_calls": [self._call_delta(event)]})]
            case Finished():
                self.finished = event
                return [self.delta({}, reason=event.finish_reason)]
        return []  # a complete ToolCall: its deltas have already been sent

    def _call_delta(self, event: ToolCallDelta) -> dict[str, Any]:
        if event.id in self._calls:
            return {"index": self._calls[event.id], "function": {"arguments": event.text}}
        index = self._calls[event.id] = len(self._calls)
        function = {"name": event.name, "arguments": event.text}
        return {"index": index, "id": event.id, "type": "function", "function": function}


def logprob_entry(token: Token, tokenizer: Tokenizer) -> dict[str, Any]:
    """The logprobs entry of one token, in the format of chat completions and responses."""

    def entry(id: int, value: float) -> dict[str, Any]:
        return {"token": tokenizer.decode([id]), "logprob": value, "bytes": list(tokenizer.token_bytes(id))}

    return {**entry(token.id, token.logprob), "top_logprobs": [entry(*other) for other in token.top]}


def _merge_delta(choice: dict[str, Any], delta: dict[str, Any]) -> None:
    """Add a delta to a choice of the full response."""
    message = choice["message"]
    for name, value in delta["delta"].items():
        if name != "tool_calls":
            message[name] = (message.get(name) or "") + value
            continue
        calls = message.setdefault("tool_calls", [])
        for call in value:
            if call["index"] == len(calls):
                calls.append({name: value for name, value in call.items() if name != "index"})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    if delta["logprobs"] is not None:
        choice["logprobs"] = choice["logprobs"] or {"content": [], "refusal": None}
        choice["logprobs"]["content"] += delta["logprobs"]["content"]
    choice["finish_reason"] = delta["finish_reason"]
