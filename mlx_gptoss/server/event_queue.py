"""The bridge between the engine thread and the event loop: the events of a request's replies, as an async iterator."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from ..chat.reply import Event, Finished
from ..chat.stream import Events
from .errors import ApiError


class EventQueue:
    """The events of all replies to one request. The event loop awaits them; no thread blocks on them.

    replies: one event iterator per choice, already submitted to the engine. Create the queue on the running event loop,
    and close it in the end.
    """

    def __init__(self, replies: Sequence[Events]) -> None:
        self._replies = replies
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._stop_reason: ApiError | None = None
        for reply in replies:
            reply.on_arrival(self._wake)

    def close(self) -> None:
        """Cancel the replies that still run."""
        for reply in self._replies:
            reply.close()

    def stop(self, reason: ApiError) -> None:
        """Make batches() raise `reason`. Its consumer then closes the queue."""
        self._stop_reason = reason
        self._ready.set()

    async def batches(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """Yield the events that have arrived since the last batch, as (index of the reply, event).

        Ends after the Finished event of the last reply. Raises the exception of the first reply that fails, and the
        reason given to stop().
        """
        running = dict(enumerate(self._replies))
        while running:
            await self._ready.wait()
            self._ready.clear()
            if self._stop_reason is not None:
                raise self._stop_reason
            batch: list[tuple[int, Event]] = []
            for index, reply in list(running.items()):
                while events := reply.ready():
                    batch += [(index, event) for event in events]
                    if isinstance(events[-1], Finished):
                        del running[index]
            if batch:
                yield batch

    def _wake(self) -> None:
        """Called on the engine thread when a reply has new events."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed, and nobody reads any more
            self._loop.call_soon_threadsafe(self._ready.set)
