"""Timeouts against slow clients, and limits on heads and connections, on top of uvicorn's HTTP/1.1 protocol."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .error_forms import error_response
from .errors import ApiError

PIECE = 16 << 10  # bytes that are parsed at a time: as chunks of one byte, they take 40 ms of CPU time


@dataclass(frozen=True)
class Timeouts:
    """Seconds that a client may take to send the headers and the body of a request, and to read a stalled response."""

    header_s: float = 10.0
    body_s: float = 60.0
    send_s: float = 60.0


class HeadLimit(h11.Connection):
    """Refuses a request whose head is too long even if it arrives at once. h11 itself looks at incomplete heads only.

    refusal: why the last request was refused. path: of that request, if its head was too long.
    """

    def __init__(self, max_head_bytes: int) -> None:
        super().__init__(h11.SERVER, max_head_bytes)
        self._max_head_bytes = max_head_bytes
        self.refusal: ApiError | None = None
        self.path: str = ""

    def next_event(self) -> Any:
        try:
            event = super().next_event()
            if isinstance(event, h11.Request) and _head_bytes(event) > self._max_head_bytes:
                self._refuse_head(event.target)
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == 431 and self.refusal is None:  # the head is not complete yet
                self._refuse_head([*bytes(self.trailing_data[0][:200]).split(b" ", 2), b""][1])
            self.refusal = self.refusal or ApiError(400, "this is not an HTTP/1.1 request", code="invalid_http")
            raise
        return event

    def _refuse_head(self, target: bytes) -> None:
        message = f"request line and headers are longer than {self._max_head_bytes} bytes"
        self.refusal = ApiError(431, message, code="headers_too_large")
        self.path = target.partition(b"?")[0].decode("latin-1")
        raise h11.RemoteProtocolError(message, error_status_hint=431)


def _head_bytes(request: h11.Request) -> int:
    """The size of a request line and headers, without white space that h11 has dropped."""
    line = len(request.method) + len(request.target) + len(" HTTP/1.1\r\n") + 1
    return line + sum(len(name) + len(value) + len(": \r\n") for name, value in request.headers) + 2


def timeout_protocol(timeouts: Timeouts) -> type[H11Protocol]:
    """Return a protocol class that aborts a connection at the first missed timeout. That also ends its generation.

    An idle keep-alive connection is left to uvicorn's own timeout.
    """

    class TimeoutProtocol(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.conn: HeadLimit = HeadLimit(self.config.h11_max_incomplete_event_size or 0)
            self.limit_concurrency = None  # uvicorn's answer above the limit is plain text
            self._receive_timer: asyncio.TimerHandle | None = None
            self._receive_state: Any = None
            self._send_timer: asyncio.TimerHandle | None = None
            self._unparsed = bytearray()
            self._parsing = False

        @property
        def app(self) -> ASGIApp:
            """What answers the next request."""
            limit = self.config.limit_concurrency
            is_full = limit is not None and (len(self.connections) > limit or len(self.tasks) >= limit)
            return _refuse if is_full else self._app

        @app.setter
        def app(self, app: ASGIApp) -> None:
            self._app = app

        def send_400_response(self, msg: str) -> None:
            """Answer what is no request, or too long, in the form of its dialect, and close the connection."""
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # within a response
                self.transport.abort()
                return
            refusal = self.conn.refusal or ApiError(400, msg, code="invalid_http")
            response = error_response(refusal, {"path": self.conn.path})
            headers = [*response.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=response.status_code, headers=headers),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._update_receive_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unparsed.clear()
            self._cancel_receive_timer()
            self._cancel_send_timer()
            self._unset_keepalive_if_required()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._unparsed += data
            if not self._parsing:
                self._parse()

        def _parse(self) -> None:
            """Parse one piece of what has arrived. Other connections have their turn before the next one."""
            piece = bytes(self._unparsed[:PIECE])
            del self._unparsed[:PIECE]
            super().data_received(piece)
            self._update_receive_timer()
            self._parsing = bool(self._unparsed) and not self.transport.is_closing()
            if self._parsing:
                self.transport.pause_reading()
                self.loop.call_soon(self._parse)
            elif not self.flow.read_paused:
                self.transport.resume_reading()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._update_receive_timer()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._send_timer = self.loop.call_later(timeouts.send_s, self.transport.abort)

        def resume_writing(self) -> None:
            self._cancel_send_timer()
            super().resume_writing()

        def _update_receive_timer(self) -> None:
            """Start a timer when the client begins to send headers or a body; stop it when the request is complete.

            Further bytes of the same part do not extend the timer.
            """
            state = self.conn.their_state
            keep_alive = state is h11.IDLE and self.timeout_keep_alive_task is not None
            if state is self._receive_state and not keep_alive and self._receive_timer is not None:
                return
            self._cancel_receive_timer()
            self._receive_state = state
            if state in (h11.IDLE, h11.SEND_BODY) and not keep_alive and not self.transport.is_closing():
                seconds = timeouts.header_s if state is h11.IDLE else timeouts.body_s
                self._receive_timer = self.loop.call_later(seconds, self.transport.abort)

        def _cancel_receive_timer(self) -> None:
            if self._receive_timer is not None:
                self._receive_timer.cancel()
                self._receive_timer = None

        def _cancel_send_timer(self) -> None:
            if self._send_timer is not None:
                self._send_timer.cancel()
                self._send_timer = None

    return TimeoutProtocol


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request above the limit of connections."""
    headers = {"Retry-After": "1", "Connection": "close"}
    error = ApiError(
        503, "the server has as many connections as it takes; try again later", code="busy", headers=headers
    )
    await error_response(error, scope)(scope, receive, send)
