"""The bridge between the engine thread and an event loop: replies whose events are awaited. No thread blocks on them.

The Python API (AsyncEvents) and the server (EventQueue) share it.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType

from ..untrusted.cancel import cancellable
from .reply import Event, Finished
from .stream import Events


class EventQueue:
    """The events of all replies to one request. The event loop awaits them; no thread blocks on them.

    replies: one event iterator per choice, already submitted to the engine. Create the queue on the running event loop,
    and close it in the end. Dropping it closes it, too, and so does the first event after the event loop has closed.

    A reply does not wait for a slow consumer: its events stay in memory until they are read, as many as the context
    holds.
    """

    def __init__(self, replies: Sequence[Events]) -> None:
        self._replies = replies
        self._running = dict(enumerate(replies))
        self._ready = asyncio.Event()
        self._stop_reason: Exception | None = None
        loop = asyncio.get_running_loop()
        for reply in replies:  # the engine keeps the callback, which must not keep a reply that nobody reads
            reply.on_arrival(partial(_wake, loop, self._ready, weakref.ref(reply)))

    def close(self) -> None:
        """Cancel the replies that still run."""
        for reply in self._replies:
            reply.close()

    def stop(self, reason: Exception) -> None:
        """Make batches() raise `reason`. Its consumer then closes the queue."""
        self._stop_reason = reason
        self._ready.set()

    async def batches(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """Yield the events that have arrived since the last batch, as (index of the reply, event).

        Ends after the Finished event of the last reply. Raises the exception of the first reply that fails, and the
        reason given to stop().
        """
        while batch := await self.next_batch():
            yield batch

    async def next_batch(self) -> list[tuple[int, Event]]:
        """Return what batches() yields next; an empty list at the end."""
        while self._running:
            await self._ready.wait()
            self._ready.clear()
            if self._stop_reason is not None:
                raise self._stop_reason
            batch: list[tuple[int, Event]] = []
            for index, reply in list(self._running.items()):
                while events := reply.ready():
                    batch += [(index, event) for event in events]
                    if isinstance(events[-1], Finished):
                        del self._running[index]
            if batch:
                return batch
        return []


class _Closed(Exception):
    """Ends the wait of a task that reads events which another one has closed."""


class AsyncEvents(AsyncIterator[Event]):
    """An asynchronous iterator over the events of one reply, for one consumer. It raises the error that failed the
    request.

    The prompt is rendered and submitted on a worker thread when the first event is awaited. Leaving the iteration ends
    the generation within one step: `break`, an exception, cancelling the task, aclose() or the end of `async with`.
    """

    def __init__(self, submit: Callable[[], Events]) -> None:
        self._submit: Callable[[], Events] | None = submit
        self._queue: EventQueue | None = None
        self._pending: deque[Event] = deque()
        self._reading = False
        self._closed = False

    async def __anext__(self) -> Event:
        if self._reading:
            raise RuntimeError("the events of one reply are read by two tasks; let one read them")
        if not self._pending and not self._closed:
            self._reading = True
            try:
                await self._read()
            except BaseException:
                self._close()
                raise
            finally:
                self._reading = False
        if not self._pending:
            raise StopAsyncIteration
        return self._pending.popleft()

    async def aclose(self) -> None:
        """End the generation; no more events follow."""
        self._close()

    async def __aenter__(self) -> AsyncEvents:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._close()

    async def _read(self) -> None:
        if self._submit is not None:
            submit, self._submit = self._submit, None
            self._queue = EventQueue(await start_replies([submit]))
        if self._closed:  # while the prompt was being submitted
            self._close()
        elif self._queue is not None:
            with suppress(_Closed):
                self._pending += [event for _, event in await self._queue.next_batch()]

    def _close(self) -> None:
        self._closed, self._submit = True, None
        self._pending.clear()
        if self._queue is not None:
            self._queue.close()
            self._queue.stop(_Closed())


async def start_replies(replies: Sequence[Callable[[], Events]]) -> list[Events]:
    """Submit all replies on a worker thread, since rendering and tokenizing a long conversation takes time.

    If one cannot be submitted, the others are cancelled. If the caller is cancelled meanwhile, so are the replies.
    """
    with cancellable() as cancelled:
        starting = asyncio.ensure_future(asyncio.to_thread(_start_all, replies))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            cancelled.set()
            starting.add_done_callback(_close_started)
            raise


def _close_started(starting: asyncio.Future[list[Events]]) -> None:
    if not starting.cancelled() and starting.exception() is None:
        for events in starting.result():
            events.close()


def _start_all(replies: Sequence[Callable[[], Events]]) -> list[Events]:
    """Submit all replies, or none: if one cannot be submitted, the others are cancelled."""
    started: list[Events] = []
    try:
        for reply in replies:
            started.append(reply())
    except BaseException:
        for events in started:
            events.close()
        raise
    return started


def _wake(loop: asyncio.AbstractEventLoop, ready: asyncio.Event, reply: weakref.ref[Events]) -> None:
    """Called on the engine thread when a reply has new events."""
    try:
        loop.call_soon_threadsafe(ready.set)
    except RuntimeError:  # the event loop is closed, and nobody reads any more
        if (events := reply()) is not None:
            events.close()
