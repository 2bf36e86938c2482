"""Replies that the engine's thread makes, read on the event loop. No thread waits for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request

from ..chat.reply import Event, Finished
from ..chat.stream import Events
from .errors import ApiError

T = TypeVar("T")


class Arrivals:
    """The events of one request's replies, in batches of (index of the reply, event): what was there together comes
    together. Ends after the last reply's Finished; raises what failed any of them. To be closed."""

    def __init__(self, replies: Sequence[Events]) -> None:
        self._replies = replies
        self._loop = asyncio.get_running_loop()
        self._more = asyncio.Event()
        self._stopped: ApiError | None = None
        for reply in replies:
            reply.on_arrival(self._tell)

    def close(self) -> None:
        """End the generations that still run."""
        for reply in self._replies:
            reply.close()

    def stop(self, reason: ApiError) -> None:
        """End the generations that still run; whoever reads the batches is told why."""
        self._stopped = reason
        self._more.set()

    async def batches(self) -> AsyncIterator[list[tuple[int, Event]]]:
        running = dict(enumerate(self._replies))
        while running:
            await self._more.wait()
            self._more.clear()
            if self._stopped is not None:
                raise self._stopped
            batch: list[tuple[int, Event]] = []
            for index, reply in list(running.items()):
                while events := reply.ready():
                    batch += [(index, event) for event in events]
                    if isinstance(events[-1], Finished):
                        del running[index]
            if batch:
                yield batch

    def _tell(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
            self._loop.call_soon_threadsafe(self._more.set)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client has left")
    finally:
        await ended(task, gone)


async def disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what still runs, and wait until it has cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
