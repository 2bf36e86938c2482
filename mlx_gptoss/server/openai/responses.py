"""/v1/responses: create a response, streamed or not; retrieve, cancel and delete responses that are stored."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response

from ...harmony.messages import Conversation, without_old_reasoning
from ...harmony.openai_tools import functions_from_tools
from ...sampling import MAX_LOGPROBS
from ..disconnect import cancel_on_disconnect
from ..errors import ApiError, JsonResponse, dump_json, from_exception, invalid_field
from ..event_queue import EventQueue
from ..fields import MAX_MESSAGES, MAX_TOOLS, MaxTokens, RequestModel, SamplingFields, StreamOptions, check_schema
from ..ignored import ignore
from ..service import Service, ServiceDep
from ..sse import STREAMING_RESPONSES, EventStream, encode_event
from .items import ConversationItems, Item, MessageItem, item_objects, new_id
from .response_events import ResponseWriter
from .store import StoredResponse

INCLUDE_LOGPROBS = "message.output_text.logprobs"

router: APIRouter = APIRouter()


class Reasoning(RequestModel):
    """summary: "auto" gives no summary, since the reasoning item contains the complete reasoning text."""

    effort: Literal["low", "medium", "high"] | None = None
    summary: Literal["auto"] | None = None


class TextOptions(RequestModel):
    """format: text, json_object, or json_schema with a name and a schema."""

    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(SamplingFields):
    """The fields of OpenAI that this model supports.

    include: reasoning.encrypted_content has no effect, since reasoning items hold their text and can be sent back.
    """

    model: str | None = None
    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: MaxTokens = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: list[Literal["reasoning.encrypted_content", "message.output_text.logprobs"]] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None

    @property
    def items(self) -> Sequence[Item]:
        """The input as items."""
        return [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    @property
    def effort(self) -> Literal["low", "medium", "high"]:
        """The reasoning effort, medium by default."""
        return (self.reasoning.effort if self.reasoning else None) or "medium"

    @property
    def format(self) -> dict[str, Any]:
        """The response format, text by default."""
        return (self.text.format if self.text else None) or {"type": "text"}

    def check(self) -> None:
        """Raise ApiError for fields that contradict each other, and for schemas over the limits."""
        if self.top_logprobs and INCLUDE_LOGPROBS not in (self.include or ()):
            raise invalid_field("top_logprobs", f"needs include: [{INCLUDE_LOGPROBS!r}]")
        if self.stream_options is not None and (not self.stream or self.stream_options.include_usage):
            raise invalid_field("stream_options", "needs stream: true, without include_usage: usage is always included")
        for index, tool in enumerate(self.tools or ()):
            check_schema(tool, f"tools[{index}]")
        check_schema(self.format, "text.format")


@router.post("/v1/responses", responses=STREAMING_RESPONSES)
async def create(body: ResponsesRequest, request: Request, service: ServiceDep) -> Response:
    """Generate the next response, from input items and optionally a previous response."""
    response = _ModelResponse(body, service)
    ignore(request, body.ignored_fields())
    queue = await cancel_on_disconnect(request, service.start(response.reply()))
    if body.stream:
        return EventStream(response.stream(queue), partial(service.finish, queue))
    return JsonResponse(await cancel_on_disconnect(request, response.full_response(queue)))


async def full_response(body: ResponsesRequest, service: Service) -> dict[str, Any]:
    """Generate a full response, for one line of a batch file."""
    response = _ModelResponse(body, service)
    return await response.full_response(await service.start(response.reply()))


@router.get("/v1/responses/{id}")
async def retrieve(id: str, service: ServiceDep, stream: bool = False) -> Response:
    """Return a stored response, or one in progress as written so far."""
    if stream:
        raise invalid_field("stream", "needs a background response, and background is not supported")
    if id in service.running_responses:
        return JsonResponse(service.running_responses[id][0])
    return Response(_get_stored(service, id).response, media_type=JsonResponse.media_type)


@router.delete("/v1/responses/{id}")
async def delete(id: str, service: ServiceDep) -> Response:
    """Delete a stored response."""
    if not service.store.delete(id):
        raise _not_found(id)
    return JsonResponse({"id": id, "object": "response", "deleted": True})


@router.post("/v1/responses/{id}/cancel")
async def cancel(id: str, service: ServiceDep) -> Response:
    """Cancel a response in progress. One that has ended is returned unchanged."""
    if id not in service.running_responses:
        return Response(_get_stored(service, id).response, media_type=JsonResponse.media_type)
    response, queue = service.running_responses[id]
    queue.stop(ApiError(409, "the response was cancelled", code="cancelled"))
    return JsonResponse({**response, "status": "cancelled"})


@router.get("/v1/responses/{id}/input_items")
async def input_items(
    id: str,
    service: ServiceDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> Response:
    """List the input items of a stored response, one page at a time."""
    items = json.loads(_get_stored(service, id).input)
    items = items if order == "asc" else items[::-1]
    found = [index for index, item in enumerate(items) if item["id"] == after]
    if after is not None and not found:
        raise invalid_field("after", f"is {after!r}, which is not an item of this response")
    start = found[0] + 1 if found else 0
    page = items[start : start + limit]
    return JsonResponse(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": start + limit < len(items),
        }
    )


class _ModelResponse:
    """One request: the conversation that it continues, the response being written, and its storage.

    Raises ApiError if the request is invalid. failure: the error that ended the response early.
    """

    def __init__(self, body: ResponsesRequest, service: Service) -> None:
        service.check_model(body.model)
        body.check()
        self._body = body
        self._service = service
        self._id = new_id("resp")
        self.failure: ApiError | None = None
        self._history = _previous_history(body, service).with_items(body.items)
        self._sampling = body.sampling(service.model.default_sampling, body.top_logprobs or 0)
        self._writer = ResponseWriter(
            self._initial_response(), service.model.tokenizer, INCLUDE_LOGPROBS in (body.include or ())
        )

    def reply(self) -> partial[Any]:
        """A callable that submits the request to the engine, for Service.start()."""
        body, history = self._body, self._history
        instructions = [] if body.instructions is None else [body.instructions]
        conversation = Conversation(
            messages=without_old_reasoning(history.messages),
            reasoning=body.effort,
            instructions="\n\n".join([*instructions, *history.instructions]) or None,
            functions=functions_from_tools(body.tools or ()),
            date=datetime.date.today().isoformat(),
        )
        options: dict[str, Any] = {
            "max_tokens": body.max_output_tokens,
            "response_format": body.format,
            "tool_choice": body.tool_choice or "auto",
            "parallel_tool_calls": body.parallel_tool_calls is not False,
        }
        return partial(self._service.model.stream, conversation, sampling=self._sampling, **options)

    async def events(self, queue: EventQueue) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield batches of the API's events. An error becomes the last event; it is not raised."""
        writer, service = self._writer, self._service
        recorder = service.metrics.track_reply()
        service.running_responses[self._id] = (writer.response, queue)
        try:
            yield writer.begin()
            async for batch in queue.batches():
                events: list[dict[str, Any]] = []
                for _, event in batch:
                    recorder.record(event)
                    events += writer.write(event)
                yield events
            self._store_response()
            yield [writer.end()]
        except Exception as error:
            self.failure = from_exception(error)
            failed = writer.fail(self.failure)
            self._store_response()
            yield [failed]
        finally:
            service.running_responses.pop(self._id, None)
            service.finish(queue)

    async def stream(self, queue: EventQueue) -> AsyncIterator[bytes]:
        """Yield server-sent events, each with its type as the event's name."""
        async for events in self.events(queue):
            yield b"".join(encode_event(event, event["type"]) for event in events)

    async def full_response(self, queue: EventQueue) -> dict[str, Any]:
        """The response object after its last event. Raises ApiError if it failed; a cancelled one is returned."""
        async for _ in self.events(queue):
            pass
        if self.failure is not None and self.failure.code != "cancelled":
            raise self.failure
        return self._writer.response

    def _store_response(self) -> None:
        """Store the response, unless the request says `"store": false`."""
        writer = self._writer
        if self._body.store is False:
            return
        history = None
        if writer.finished is not None:
            history = self._history.with_reply(writer.finished.messages, writer.call_ids)
        stored = StoredResponse(dump_json(writer.response), dump_json(item_objects(self._body.items)), history)
        writer.response["store"] = self._service.store.put(self._id, stored)

    def _initial_response(self) -> dict[str, Any]:
        """The response object before any output."""
        body, sampling = self._body, self._sampling
        return {
            "id": self._id,
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._service.model_id,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.effort, "summary": None},
            "service_tier": "default",
            "store": body.store is not False,
            "temperature": sampling.temperature,
            "text": {"format": body.format},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }


def _previous_history(body: ResponsesRequest, service: Service) -> ConversationItems:
    """The conversation to continue, empty without previous_response_id. Raises ApiError if it is not available."""
    if body.previous_response_id is None:
        return ConversationItems()
    stored = service.store.get(body.previous_response_id)
    if stored is None or stored.history is None:
        message = f"is {body.previous_response_id!r}: that response is not stored, or it did not complete"
        raise invalid_field("previous_response_id", message, "previous_response_not_found")
    return stored.history


def _get_stored(service: Service, id: str) -> StoredResponse:
    stored = service.store.get(id)
    if stored is None:
        raise _not_found(id)
    return stored


def _not_found(id: str) -> ApiError:
    return ApiError(404, f"the response {id!r} is not stored", param="id", code="not_found")
