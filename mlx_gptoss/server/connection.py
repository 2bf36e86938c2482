"""Connections that cannot be held open for nothing: uvicorn's HTTP/1.1 protocol with deadlines."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


@dataclass(frozen=True)
class Patience:
    """Seconds that a client may take: for the head of a request, for all of it, and to read what it was sent."""

    head_s: float = 10.0
    request_s: float = 60.0
    reading_s: float = 60.0


def patient(patience: Patience) -> type[H11Protocol]:
    """The protocol with these deadlines. A client that misses one is cut off, which ends its generation, too."""

    class Connection(H11Protocol):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            self._arriving: asyncio.TimerHandle | None = None
            self._arriving_state: Any = None
            self._stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_arriving()
            self._end_stalled()
            self._unset_keepalive_if_required()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self.loop.call_later(patience.reading_s, self.transport.abort)

        def resume_writing(self) -> None:
            self._end_stalled()
            super().resume_writing()

        def _watch(self) -> None:
            """Start the deadline of what is arriving now, or end it when the request is there."""
            state = self.conn.their_state
            waiting = state is h11.IDLE and self.timeout_keep_alive_task is not None
            if state is self._arriving_state and not waiting and self._arriving is not None:
                return
            self._end_arriving()
            self._arriving_state = state
            if state in (h11.IDLE, h11.SEND_BODY) and not waiting and not self.transport.is_closing():
                seconds = patience.head_s if state is h11.IDLE else patience.request_s
                self._arriving = self.loop.call_later(seconds, self.transport.abort)

        def _end_arriving(self) -> None:
            if self._arriving is not None:
                self._arriving.cancel()
                self._arriving = None

        def _end_stalled(self) -> None:
            if self._stalled is not None:
                self._stalled.cancel()
                self._stalled = None

    return Connection
