"""POST /v1/messages, streamed or not, and .../count_tokens. The full response is the stream's events, folded."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from pydantic import AliasChoices, Field, WithJsonSchema
from starlette.responses import Response

from ...chat.stream import Events
from ...harmony.messages import Conversation, Effort, ResponseFormat, without_old_reasoning
from ...harmony.names import ToolNames
from ...harmony.render import render
from ..body import BodyRoute
from ..disconnect import cancel_on_disconnect, on_thread
from ..errors import JsonResponse, from_exception, invalid_field
from ..event_queue import EventQueue
from ..fields import (
    MAX_MESSAGES,
    MAX_PARTS,
    MaxTokens,
    Name,
    Object,
    RequestModel,
    SamplingFields,
    StopStrings,
    Tools,
    effort_of,
    effort_of_thinking,
)
from ..ignored import ignore
from ..service import Service, ServiceDep
from ..sse import STREAMING_RESPONSES, EventStream, encode_event
from .blocks import BlockReader
from .errors import REQUEST_ID, ErrorBody, error_body, new_request_id
from .events import MessageWriter, Thinking, fold_event
from .tools import ToolChoice, functions_of, ignored_tools

FORMAT_NAME = "response"  # the heading under which the model sees the schema of its answer
CONTENT_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}
MESSAGES_SCHEMA: dict[str, Any] = {  # for OpenAPI; blocks.py checks the messages
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": ["user", "assistant", "system"]}, "content": CONTENT_SCHEMA},
    },
}


class MessageStream(EventStream):
    """A stream of events that sends a ping while the model is silent, as Anthropic's does."""

    keep_alive: ClassVar[bytes | None] = encode_event({"type": "ping"}, "ping")


router: APIRouter = APIRouter(
    route_class=BodyRoute, responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
)


class OutputConfig(RequestModel):
    """effort: of the reasoning. format: {"type": "json_schema", "schema"}, enforced on the answer."""

    effort: Name | None = None
    format: Object | None = None


class MessagesRequest(SamplingFields):
    """The fields of Anthropic's Messages that have an effect, and the sampling fields of the other endpoints.

    max_tokens: without it, what the context leaves. output_format: an earlier place of output_config.format.
    """

    model: Name | None = None
    messages: Annotated[list[Any], WithJsonSchema(MESSAGES_SCHEMA)] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Annotated[
        str | Annotated[list[Any], Field(max_length=MAX_PARTS)] | None, WithJsonSchema(CONTENT_SCHEMA)
    ] = None
    stream: bool | None = None
    max_tokens: MaxTokens = None
    stop: StopStrings = Field(None, validation_alias=AliasChoices("stop_sequences", "stop"))
    thinking: Object | None = None
    output_config: OutputConfig | None = None
    output_format: Object | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None

    def check(self) -> None:
        """Raise ApiError for what cannot be honoured."""
        self.check_rejected()

    @property
    def _format(self) -> dict[str, Any] | None:
        return (self.output_config.format if self.output_config else None) or self.output_format

    @property
    def effort(self) -> Effort:
        """The reasoning effort: low without thinking, else as output_config or the budget says, else medium."""
        thinking = self.thinking or {}
        if thinking.get("type") == "disabled":
            return "low"
        named = effort_of(self.output_config.effort, "output_config.effort") if self.output_config else None
        return named or effort_of_thinking(thinking) or "medium"

    @property
    def response_format(self) -> ResponseFormat | None:
        """The schema of the answer. Raises ApiError for another kind of format."""
        if self._format is None:
            return None
        schema = self._format.get("schema")
        if self._format.get("type") != "json_schema" or not isinstance(schema, dict):
            raise invalid_field("output_config.format", 'must be {"type": "json_schema", "schema": {...}}')
        return ResponseFormat(schema, FORMAT_NAME)

    @property
    def shown_thinking(self) -> Thinking:
        """What becomes of the reasoning.

        The model always reasons. As in Anthropic's API, the reply has a thinking block only if the request turns
        thinking on: many programs read `content[0].text`. With tools there is one by default, too. A program with tools
        looks at the type of each block, and the model needs its reasoning back, together with the tool's result.
        """
        kind = (self.thinking or {}).get("type")
        if kind == "disabled" or (kind is None and not self.tools):
            return "hidden"
        return "omitted" if (self.thinking or {}).get("display") == "omitted" else "shown"


@router.post("/v1/messages", responses=STREAMING_RESPONSES)
async def create(body: MessagesRequest, request: Request, service: ServiceDep) -> Response:
    """Generate the assistant's next message."""
    service = await service.select(body.model)
    message = await on_thread(request, _Message, body, service)
    queue = await cancel_on_disconnect(request, service.start(message.submit))
    ignore(request, message.ignored)
    headers = {REQUEST_ID: message.request_id}
    if body.stream:
        close = partial(service.finish, queue)
        return MessageStream(message.stream(queue), close, headers)
    return JsonResponse(await cancel_on_disconnect(request, message.full_response(queue)), headers=headers)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: MessagesRequest, request: Request, service: ServiceDep) -> Response:
    """Count the tokens of the prompt that /v1/messages would make of this request."""
    service = await service.select(body.model)
    message = await on_thread(request, _Message, body, service)
    count = await on_thread(request, message.count_tokens)
    ignore(request, message.ignored)
    return JsonResponse({"input_tokens": count}, headers={REQUEST_ID: message.request_id})


class _Message:
    """One request: its conversation, and the message being written. Raises ApiError if the request is invalid."""

    def __init__(self, body: MessagesRequest, service: Service) -> None:
        body.check()
        self._body = body
        self._service = service
        self._functions = functions_of(body.tools or ())
        self._reader = BlockReader(ToolNames(function.name for function in self._functions))
        # The name that was asked for: Claude Code drops the thinking of messages that another model wrote.
        self._writer = MessageWriter(body.model or service.model_id, body.shown_thinking)
        self._prompt_tokens = 0
        self.ignored: set[str] = set()  # the paths of what has no effect, once the conversation has been read
        self.request_id: str = new_request_id()

    @cached_property
    def conversation(self) -> Conversation:
        """The request as a Conversation. Raises InvalidRequest for messages that cannot be read."""
        body, reader = self._body, self._reader
        if body.system is not None:
            reader.add_system(body.system, "system")
        reader.add_messages(body.messages)
        self.ignored = body.ignored_fields() | reader.ignored | ignored_tools(body.tools or ())
        return Conversation(
            messages=without_old_reasoning(tuple(reader.messages)),
            reasoning=body.effort,
            instructions="\n\n".join(reader.instructions) or None,
            functions=self._functions,
            response_format=body.response_format,
            prefill=reader.prefill,
            date=datetime.date.today().isoformat(),
        )

    def submit(self) -> Events:
        """Submit the request to the engine. It runs on a worker thread."""
        body, model = self._body, self._service.model
        choice = body.tool_choice
        options: dict[str, Any] = {
            "sampling": body.sampling(model.default_sampling),
            "max_tokens": body.max_tokens,
            "tool_choice": choice.value if choice is not None else "auto",
            "parallel_tool_calls": choice is None or not choice.disable_parallel_tool_use,
        }
        events = self._service.stream(self.conversation, **options)
        self._prompt_tokens = events.prompt_tokens
        return events

    def count_tokens(self) -> int:
        """The number of tokens in the prompt. It runs on a worker thread.

        Raises InvalidRequest, as /v1/messages does, if they are more than the context holds.
        """
        model = self._service.model
        return len(render(self.conversation, model.tokenizer, model.max_context))

    async def events(self, queue: EventQueue) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield batches of the API's events."""
        recorder = self._service.metrics.track_reply()
        try:
            yield self._writer.begin(self._prompt_tokens)
            async for batch in queue.batches():
                events: list[dict[str, Any]] = []
                for _, event in batch:
                    recorder.record(event)
                    events += self._writer.write(event)
                if events:
                    yield events
        finally:
            self._service.finish(queue)

    async def stream(self, queue: EventQueue) -> AsyncIterator[bytes]:
        """Yield server-sent events, each with its type as the event's name. An error becomes the last event."""
        try:
            async for events in self.events(queue):
                yield b"".join(encode_event(event, event["type"]) for event in events)
        except Exception as error:
            yield encode_event(error_body(from_exception(error), self.request_id), "error")

    async def full_response(self, queue: EventQueue) -> dict[str, Any]:
        """The message after its last event."""
        message: dict[str, Any] = {}
        async for events in self.events(queue):
            for event in events:
                message = fold_event(message, event)
        return message
