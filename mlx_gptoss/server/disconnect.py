"""Detect that a client has disconnected, and cancel the work done for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from ..untrusted.cancel import cancellable
from .errors import ApiError

P = ParamSpec("P")
T = TypeVar("T")


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, or cancel it when the client disconnects first.

    Threads that `work` has started end at their next check_cancelled(). Raises whatever `work` raises, and ApiError 499
    on a disconnect. Call it only after the request body has been read: the next message is then the disconnect.
    """
    with cancellable() as cancelled:
        task = asyncio.ensure_future(work)
        disconnect = asyncio.ensure_future(wait_for_disconnect(request.receive))
        try:
            await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ApiError(499, "the client disconnected")
        finally:
            if not task.done():
                cancelled.set()
            await cancel_and_wait(task, disconnect)


async def on_thread(request: Request, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return the result of a function that runs on a worker thread, or end it when the client disconnects first.

    Raises as cancel_on_disconnect does.
    """
    return await cancel_on_disconnect(request, asyncio.to_thread(function, *args, **kwargs))


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel_and_wait(*tasks: asyncio.Future[Any]) -> None:
    """Cancel the tasks that still run, and wait until every task has cleaned up. Their exceptions are dropped."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
