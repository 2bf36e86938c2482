"""Server-sent events: a streaming response with keep-alive comments, which ends when the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, ClassVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .disconnect import cancel_and_wait, wait_for_disconnect
from .errors import dump_json

KEEP_ALIVE = b": keep-alive\n\n"  # a comment, which clients skip
KEEP_ALIVE_S = 15.0  # many proxies close a connection after a minute of silence
DONE = b"data: [DONE]\n\n"
EVENT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
}
STREAMING_RESPONSES: dict[int | str, dict[str, Any]] = {  # OpenAPI: JSON, or events with "stream": true
    200: {"content": {"application/json": {}, "text/event-stream": {"schema": EVENT_SCHEMA}}}
}
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def encode_event(data: Any, event: str | None = None) -> bytes:
    """Encode one event. The JSON has no line break, so it fits into one `data:` line."""
    name = b"" if event is None else b"event: " + event.encode() + b"\n"
    return name + b"data: " + dump_json(data) + b"\n\n"


def encode_events(data: Iterable[Any]) -> bytes:
    """Encode several events without names."""
    return b"".join(map(encode_event, data))


class EventStream(Response):
    """A response that sends chunks as they arrive, each one or more complete events.

    close: called once in the end, also after a disconnect or an error; it cancels the generation.
    keep_alive: what a silent stream sends every KEEP_ALIVE_S seconds; None for nothing.
    """

    media_type = "text/event-stream"
    keep_alive: ClassVar[bytes | None] = KEEP_ALIVE

    def __init__(
        self, chunks: AsyncIterator[bytes], close: Callable[[], None], headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(headers={**HEADERS, **(headers or {})})
        del self.headers["content-length"]
        self._chunks = chunks
        self._close = close
        self._idle = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sending = asyncio.ensure_future(self._send(send))
        disconnect = asyncio.ensure_future(wait_for_disconnect(receive))
        keep_alive = asyncio.ensure_future(self._keep_alive(send))
        try:
            await asyncio.wait({sending, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._close()
            await cancel_and_wait(sending, disconnect, keep_alive)

    async def _send(self, send: Send) -> None:
        async for chunk in self._chunks:
            self._idle = False
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        while self.keep_alive is not None:
            self._idle = True
            await asyncio.sleep(KEEP_ALIVE_S)
            if self._idle:
                await send({"type": "http.response.body", "body": self.keep_alive, "more_body": True})
