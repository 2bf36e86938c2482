"""Timeouts against slow clients, on top of uvicorn's HTTP/1.1 protocol."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


@dataclass(frozen=True)
class Timeouts:
    """Seconds that a client may take to send the headers and the body of a request, and to read a stalled response."""

    header_s: float = 10.0
    body_s: float = 60.0
    send_s: float = 60.0


def timeout_protocol(timeouts: Timeouts) -> type[H11Protocol]:
    """Return a protocol class that aborts a connection at the first missed timeout. That also ends its generation.

    An idle keep-alive connection is left to uvicorn's own timeout.
    """

    class TimeoutProtocol(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._receive_timer: asyncio.TimerHandle | None = None
            self._receive_state: Any = None
            self._send_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._update_receive_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_receive_timer()
            self._cancel_send_timer()
            self._unset_keepalive_if_required()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._update_receive_timer()

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
