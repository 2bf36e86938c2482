"""One response with tools that the server runs: replies and results in turns, until the model answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from ...chat.reply import Finished, FinishReason, ToolCall
from ...chat.stream import Events, with_reply
from ...errors import Busy, InvalidRequest
from ...harmony.messages import Conversation
from ..disconnect import cancel_and_wait
from ..errors import ApiError
from ..event_queue import EventQueue
from .events import AnyEvent, ApprovalRequest, HostedResult
from .rounds import Round, Turn
from .sessions import Session

BUSY_S = 60.0  # how long the reply after a result may wait for a place in the queue
NO_MORE_CALLS = "error: the limit on tool calls is reached; answer with what you have"

T = TypeVar("T")
ToolChoice = str | dict[str, Any]
Reply = Callable[[Conversation, ToolChoice, "int | None"], Events]


class Starter(Protocol):
    """What the loop needs of the Service."""

    async def start(self, *replies: Callable[[], Events]) -> EventQueue: ...

    def finish(self, queue: EventQueue) -> None: ...

    @property
    def open_queues(self) -> set[EventQueue]: ...


class HostedReply(EventQueue):
    """One turn of the model as an EventQueue: all its replies, and the calls between them.

    Make it with start(), and pass it to Service.finish() in the end: a tool that is still running ends then.
    """

    def __init__(
        self,
        service: Starter,
        session: Session,
        conversation: Conversation,
        reply: Reply,
        *,
        tool_choice: ToolChoice = "auto",
        max_tokens: int | None = None,
        max_tool_calls: int | None = None,
        approved: Sequence[ToolCall] = (),
    ) -> None:
        super().__init__(())
        self._service, self._session, self._reply = service, session, reply
        self._conversation = conversation
        self._choice = session.tool_choice(tool_choice)
        self._max_tokens = max_tokens
        self._calls_left = session.max_tool_calls if max_tool_calls is None else max_tool_calls
        self._refused = False  # a call over the limit has been answered with NO_MORE_CALLS
        self._approved = approved
        self._queue: EventQueue | None = None  # of the reply in progress
        self._closed = False
        self._turn = Turn()

    @classmethod
    async def start(
        cls, service: Starter, session: Session, conversation: Conversation, reply: Reply, **options: Any
    ) -> HostedReply:
        """Submit the first reply, and return the queue of everything that follows.

        conversation: with the declarations, from session.declare().
        reply: submits a reply to a conversation, given the tool choice and the maximum of tokens.
        tool_choice: of the request; after the first reply a required call counts as made.
        max_tokens: over all replies. max_tool_calls: by default that of the settings.
        approved: calls that the conversation ends with and that the client has approved; they run first.

        Raises what `reply` raises.
        """
        self = cls(service, session, conversation, reply, **options)
        service.open_queues.add(self)  # so that stopping the server stops a tool, too
        try:
            if not self._approved:
                await self._next_reply()
        except BaseException:
            service.finish(self)
            raise
        return self

    def close(self) -> None:
        """Cancel the reply and the tool that still run."""
        self._closed = True
        self._ready.set()
        self._drop_queue()
        self._session.release()

    def stop(self, reason: Exception) -> None:
        """Make batches() raise `reason`, also while a tool runs."""
        super().stop(reason)
        if self._queue is not None:
            self._queue.stop(reason)

    async def batches(self) -> AsyncIterator[list[tuple[int, Any]]]:
        """Yield the events that have arrived since the last batch, as (0, event), up to the only Finished.

        Its messages are those of the whole turn, results included, and its counts those of all replies.
        """
        if self._session.tool_lists:
            yield [(0, tools) for tools in self._session.tool_lists]
        async for event in self._run_calls(self._approved):
            yield [(0, event)]
        reason: FinishReason | None = None
        while reason is None:
            if self._queue is None and not await self._replied():
                reason = "length"  # no room is left for another reply
                break
            assert self._queue is not None
            this = Round(self._session)
            async for batch in self._queue.batches():
                events = [(0, event) for _, one in batch for event in this.read(one)]
                if events:
                    yield events
            assert this.end is not None
            self._end_reply(this.end)
            reason = "tool_calls" if this.client_called else None if this.calls else this.end.finish_reason
            async for event in self._run_calls(this.calls):
                yield [(0, event)]
                if isinstance(event, ApprovalRequest):
                    reason = reason or "stop"
        yield [(0, self._turn.finished(reason))]

    async def _run_calls(self, calls: Sequence[ToolCall]) -> AsyncIterator[AnyEvent]:
        """Run the calls of one reply, one after the other, and append their results to the conversation."""
        for call in calls:
            hosted = self._session.hosted_call(call)
            approved = call in self._approved
            must_approve = not approved and self._session.must_approve(hosted)
            if not must_approve:
                yield hosted
            if self._calls_left <= 0:
                self._refused = True
                self._append_result(call, NO_MORE_CALLS)
                if not must_approve:
                    yield HostedResult(hosted, NO_MORE_CALLS, "the limit on tool calls is reached")
            elif must_approve:
                yield ApprovalRequest(hosted)
            else:
                self._calls_left -= 1
                result = await self._unless_stopped(self._session.run(hosted))
                self._append_result(call, result.text)
                yield result

    def _append_result(self, call: ToolCall, text: str) -> None:
        self._conversation = self._conversation.with_result(call.name, text)
        self._turn.messages += self._conversation.messages[-1:]

    async def _replied(self) -> bool:
        """Submit the next reply. False if no token is left for it."""
        if self._tokens_left is not None and self._tokens_left <= 0:
            return False
        deadline = time.monotonic() + BUSY_S
        while True:
            try:
                await self._unless_stopped(self._next_reply())
                return True
            except Busy as error:
                if time.monotonic() > deadline:
                    raise
                await self._unless_stopped(asyncio.sleep(error.retry_after_s))
            except (InvalidRequest, ApiError) as error:
                if self._turn.replies and "context holds" in str(error):
                    return False
                raise

    async def _next_reply(self) -> None:
        """Submit a reply to the conversation as it is now."""
        choice = "auto" if self._turn.replies and self._choice != "none" else self._choice
        if self._calls_left <= 0 and (self._refused or not self._session.has_client_tools):
            choice = "none"
        conversation, tokens = self._conversation, self._tokens_left
        queue = await self._service.start(lambda: self._reply(conversation, choice, tokens))
        if self._closed:
            self._service.finish(queue)
        else:
            self._queue = queue

    @property
    def _tokens_left(self) -> int | None:
        return None if self._max_tokens is None else self._max_tokens - self._turn.completion_tokens

    def _end_reply(self, end: Finished) -> None:
        """Take the finished reply into the conversation and the counts."""
        self._drop_queue()
        self._conversation = with_reply(self._conversation, end.messages)
        self._turn.add(end)

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled if the queue is stopped or closed first."""
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._until_stopped())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                raise self._stop_reason or ApiError(499, "the client disconnected")
            return task.result()
        finally:
            await cancel_and_wait(task, stopped)

    async def _until_stopped(self) -> None:
        while self._stop_reason is None and not self._closed:
            await self._ready.wait()
            self._ready.clear()

    def _drop_queue(self) -> None:
        if self._queue is not None:
            self._service.finish(self._queue)
        self._queue = None
