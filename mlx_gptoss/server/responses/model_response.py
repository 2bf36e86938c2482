"""One response of the Responses API while it is being made: its events, and what is stored of it in the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from ...chat.stream import Events
from ...harmony.messages import Conversation
from ..errors import ApiError, dump_json, from_exception
from ..event_queue import EventQueue
from ..hosted.loop import HostedReply
from ..hosted.sessions import Session
from ..service import Service
from ..sse import encode_event
from .context import RequestContext, read_context, submitter
from .events import ResponseWriter, WriterOptions
from .items import item_objects, new_id
from .request import INCLUDE_REASONING, ResponsesRequest
from .running import EventLog, RunningResponse
from .store import StoredResponse


class ModelResponse:
    """One request: the conversation that it continues, the response being written, and its storage.

    Raises ApiError if the request is invalid. context: what the model sees. failure: the error that ended the response
    early.
    """

    def __init__(self, body: ResponsesRequest, service: Service) -> None:
        self.context: RequestContext = read_context(body, service)
        self.failure: ApiError | None = None
        self._body = body
        self._service = service
        self._id = new_id("resp")
        self._session: Session | None = None  # of the tools that the server runs
        alternatives = body.top_logprobs if body.logprobs else None
        self._sampling = body.sampling(service.model.default_sampling, alternatives or 0)
        options = WriterOptions(body.logprobs, body.summary is not None, INCLUDE_REASONING in (body.include or ()))
        self._writer = ResponseWriter(
            self._initial_response(), service.model.tokenizer, self.context.tools.client_tool, options
        )

    async def start(self) -> EventQueue:
        """Submit the request to the engine, and return the queue of its events: all that the response consists of.

        The queue ends with the only Finished event, whose messages are those of the whole turn.
        """
        body, context = self._body, self.context
        if context.hosted:
            return await self._start_hosted()
        choice = context.tools.choice(body.tool_choice or "auto")
        return await self._service.start(self._submitter(context.conversation, choice, body.max_output_tokens))

    async def _start_hosted(self) -> EventQueue:
        """start() of a response with tools that the server runs."""
        body, context, hosted = self._body, self.context, self._service.hosted
        assert hosted is not None
        previous = body.conversation_id or body.previous_response_id
        names = [function.name for function in context.tools.functions]
        session = self._session = await hosted.session(context.hosted, previous=previous, client_names=names)
        approved = [
            session.approved_call(one.id, one.server_label, one.name, one.arguments) for one in context.approved
        ]
        return await HostedReply.start(
            self._service,
            session,
            session.declare(context.conversation),
            lambda conversation, choice, tokens: self._submitter(conversation, choice, tokens)(),
            tool_choice=context.tools.choice(session.tool_choice(body.tool_choice or "auto")),
            max_tokens=body.max_output_tokens,
            max_tool_calls=body.max_tool_calls,
            approved=approved,
        )

    def _submitter(self, conversation: Conversation, choice: Any, max_tokens: int | None) -> Callable[[], Events]:
        """A callable that submits a conversation to the engine, with the options of the request."""
        return submitter(
            self._service,
            conversation,
            truncate=self._body.truncation == "auto",
            sampling=self._sampling,
            max_tokens=max_tokens,
            tool_choice=choice,
            parallel_tool_calls=self._body.parallel_tool_calls is not False,
        )

    async def events(self, queue: EventQueue, log: EventLog | None = None) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield batches of the API's events. An error becomes the last event; it is not raised."""
        writer, service = self._writer, self._service
        recorder = service.metrics.track_reply()
        service.running_responses[self._id] = RunningResponse(writer.response, queue, log)
        try:
            try:
                yield writer.begin()
                async for batch in queue.batches():
                    events: list[dict[str, Any]] = writer.start()
                    for _, event in batch:
                        recorder.record(event)
                        events += writer.write(event)
                    yield events
                last = writer.end()
            except Exception as error:
                self.failure = from_exception(error)
                last = writer.fail(self.failure)
            finally:
                service.finish(queue)
            given = await asyncio.to_thread(lambda: _by_id(item_objects(self.context.items)))
            self._store_response(last, given, log)
        finally:
            service.running_responses.pop(self._id, None)  # only now, so that a client finds it at any time
        yield [last]

    def run_in_background(self, queue: EventQueue) -> EventLog:
        """Make the response without a client. Returns the log of its events."""
        log, service = EventLog(), self._service
        service.running_responses[self._id] = RunningResponse(self._writer.response, queue, log)
        task = asyncio.create_task(self._fill(log, queue))
        service.background_tasks.add(task)
        task.add_done_callback(service.background_tasks.discard)
        return log

    async def _fill(self, log: EventLog, queue: EventQueue) -> None:
        try:
            async for events in self.events(queue, log):
                log.append([encode_event(event, event["type"]) for event in events])
        finally:
            log.close()

    @property
    def response(self) -> dict[str, Any]:
        """The response object as written so far."""
        return self._writer.response

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

    def _store_response(self, last: dict[str, Any], given: dict[str, bytes], log: EventLog | None) -> None:
        """Store the response unless the request says not to, and continue its conversation.

        last: its last event. given: the items of its input.
        """
        writer, body, service = self._writer, self._body, self._service
        made = _by_id(writer.response["output"])
        if body.conversation_id is not None and writer.finished is not None:
            service.conversations.append(body.conversation_id, {**given, **made})
            self._keep_session(body.conversation_id)
        if body.store is False:
            return
        self._keep_session(self._id)
        history = None
        if writer.finished is not None:
            recipient = self.context.tools.function_recipient
            calls = [(id, recipient(function)) for id, function in writer.calls]
            history = self.context.history.with_reply(writer.finished.messages, calls)
        events = () if log is None else (*log.events, encode_event(last, last["type"]))
        stored = StoredResponse(dump_json(writer.response), given, made, history, events)
        last["response"]["store"] = writer.response["store"] = service.store.put(self._id, stored)

    def _keep_session(self, id: str) -> None:
        """Keep the state of the tools for what continues the conversation under this id."""
        if self._service.hosted is not None and self._session is not None:
            self._service.hosted.keep(id, self._session)

    def _initial_response(self) -> dict[str, Any]:
        """The response object before any output."""
        body, sampling = self._body, self._sampling
        return {
            "id": self._id,
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "queued" if body.background else "in_progress",
            "background": bool(body.background),
            "conversation": None if body.conversation_id is None else {"id": body.conversation_id},
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "model": self._service.model_id,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.effort, "summary": body.summary},
            "service_tier": "default",
            "store": body.store is not False,
            "temperature": sampling.temperature,
            "text": {"format": body.format},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None,
            "user": body.user,
        }


def _by_id(items: list[dict[str, Any]]) -> dict[str, bytes]:
    return {item["id"]: dump_json(item) for item in items}
