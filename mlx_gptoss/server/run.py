"""Serving until a signal: the first one lets what runs come to its end, the second one does not wait."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Sequence
from types import FrameType

import uvicorn

from .. import machine
from ..errors import GptOssError
from .app import build_app
from .connection import Timeouts, timeout_protocol
from .errors import ApiError
from .guard import LOOPBACK
from .service import Service

DRAIN_TIMEOUT_S = 30.0
MAX_CONNECTIONS = 1024
MAX_HEADER_BYTES = 32 << 10  # bytes of a request's line and headers

log = logging.getLogger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, so that a port in use is known before a model is loaded. Raises GptOssError."""
    try:
        return machine.listen(host, port, 2048)
    except (OSError, OverflowError) as error:
        raise GptOssError(f"cannot listen on {host}:{port} ({error}); choose another --port or --host") from error


def allowed_hosts(host: str) -> Sequence[str] | None:
    """Names that a browser may call a server by that listens on `host`; None for any, where others can reach it."""
    return LOOPBACK if host in LOOPBACK else None


class Server(uvicorn.Server):
    """One service on one socket. A signal, or drain(), ends run()."""

    def __init__(self, service: Service, *, timeouts: Timeouts | None = None, drain_s: float = DRAIN_TIMEOUT_S) -> None:
        super().__init__(
            uvicorn.Config(
                build_app(service),
                http=timeout_protocol(timeouts or Timeouts()),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                limit_concurrency=MAX_CONNECTIONS,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_graceful_shutdown=2,
            )
        )
        self.service = service
        self.interrupted = False
        self._drain_s = drain_s
        self._deadline: float | None = None

    def drain(self) -> None:
        """Take no more requests, and end when the running ones have, or after drain_s."""
        self.service.gate.draining = True
        self._deadline = time.monotonic() + self._drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.interrupted = self.interrupted or sig == signal.SIGINT
        if self._deadline is None:
            self.drain()
        else:
            self._deadline = 0.0

    async def on_tick(self, counter: int) -> bool:
        ended = await super().on_tick(counter)
        if self._deadline is None or ended:
            return ended
        timed_out = time.monotonic() >= self._deadline
        if timed_out:
            for queue in list(self.service.open_queues):
                queue.stop(ApiError(503, "the server has been stopped", code="draining"))
            self.force_exit = True
        return timed_out or not self.server_state.tasks

    def serve_on(self, listener: socket.socket) -> None:
        """Answer requests until the end. Raises KeyboardInterrupt if Ctrl-C was it."""
        asyncio.run(self.serve(sockets=[listener]))
        if self.interrupted:
            raise KeyboardInterrupt
