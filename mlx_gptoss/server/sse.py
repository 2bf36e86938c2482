"""Server-sent events: a response that streams, stays alive through a long silence, and ends when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .arrivals import disconnected, ended
from .errors import dump

KEEP_ALIVE_S = 15.0  # proxies cut what is silent for a minute
DONE = b"data: [DONE]\n\n"
EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
}
ANSWERS: dict[int | str, dict[str, Any]] = {  # of an endpoint that streams where it is asked to
    200: {"content": {"application/json": {}, "text/event-stream": {"schema": EVENT}}}
}
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def frame(data: Any, event: str | None = None) -> bytes:
    """One event. JSON has no line breaks, so that it is one line of data."""
    name = b"" if event is None else b"event: " + event.encode() + b"\n"
    return name + b"data: " + dump(data) + b"\n\n"


def frames(data: Iterable[Any]) -> bytes:
    return b"".join(map(frame, data))


class EventStream(Response):
    """Sends the pieces as they come, each whole frames. close() is called at the end, whatever ended it."""

    def __init__(self, pieces: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(headers=HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self._pieces = pieces
        self._close = close
        self._silent = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(disconnected(receive))
        living = asyncio.ensure_future(self._keep_alive(send))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._close()
            await ended(sending, gone, living)

    async def _send(self, send: Send) -> None:
        async for piece in self._pieces:
            self._silent = False
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        while True:
            self._silent = True
            await asyncio.sleep(KEEP_ALIVE_S)
            if self._silent:
                await send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})
