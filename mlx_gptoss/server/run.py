"""Run the server until a signal. The first signal drains it, the second one stops it at once."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import uvicorn

from .. import machine
from ..errors import GptOssError
from .app import build_app
from .connection import Timeouts, timeout_protocol
from .errors import ApiError
from .guard import LOCAL_HOSTS, LOOPBACK
from .service import Service

DRAIN_TIMEOUT_S = 30.0
THREADS = 32  # that read, render and tokenize requests; asyncio's default is six on two cores
TURN_S = 0.0005  # of a thread that runs Python, such as one that parses a large body: after each of its calls into C, a
# step of the engine waits for such a turn, and Python's 5 ms stopped streams for 0.2 s
MAX_CONNECTIONS = 1024
MAX_HEADER_BYTES = 32 << 10  # request line and headers


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket. Raises GptOssError, so that a port in use is reported before a model is loaded."""
    try:
        return machine.listen(host, port, 2048)
    except (OSError, OverflowError) as error:
        raise GptOssError(f"cannot listen on {host}:{port} ({error}); choose another --port or --host") from error


def allowed_hosts(host: str, keyed: bool) -> Sequence[str] | None:
    """The Host headers to accept for a server on `host`: names of this machine, or None for any if it has a key."""
    if host in LOOPBACK:
        return LOCAL_HOSTS
    name = socket.gethostname().lower()
    return None if keyed else (*LOCAL_HOSTS, name, name.partition(".")[0], f"{name.partition('.')[0]}.local")


class Server(uvicorn.Server):
    """A uvicorn server for one Service. A signal or drain() ends serve_on().

    drain_s: seconds that running requests get to finish.
    """

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
        self.interrupted: bool = False
        self._drain_s = drain_s
        self._deadline: float | None = None

    def drain(self) -> None:
        """Refuse new requests, and end the server when the running ones have finished, or after drain_s seconds."""
        self.service.gate.draining = True
        self._deadline = time.monotonic() + self._drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler: drain at the first signal, stop waiting at the second."""
        self.interrupted = self.interrupted or sig == signal.SIGINT
        if self._deadline is None:
            self.drain()
        else:
            self._deadline = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called when the server starts. Begins to load the first model, if it has a process of its own."""
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "mlx-gptoss request"))
        if self.service.pool is not None:
            self.service.pool.start()
        await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second. Returns True when the server should end."""
        ended = await super().on_tick(counter)
        if self._deadline is None and self.service.model.failure is not None:
            self.drain()
        if self._deadline is None or ended:
            return ended
        timed_out = time.monotonic() >= self._deadline
        if timed_out:
            for queue in list(self.service.open_queues):
                queue.stop(ApiError(503, "the server was stopped", code="draining"))
            self.force_exit = True
        return timed_out or not (self.server_state.tasks or self.service.background_tasks)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called when the server ends. Ends the processes of its models and tools, too."""
        await super().shutdown(sockets)
        if self.service.pool is not None:
            await self.service.pool.close()
        if self.service.hosted is not None:
            await self.service.hosted.close()

    def serve_on(self, listener: socket.socket) -> None:
        """Serve requests until drained, with as many open files as the hard limit allows, up to machine.OPEN_FILES, and
        with turns of TURN_S for the threads of this process.

        Raises KeyboardInterrupt if Ctrl-C ended it, and GptOssError if the engine failed: a server that could only
        answer 500 exits, so that its supervisor can restart it.
        """
        machine.raise_open_files()
        sys.setswitchinterval(TURN_S)
        asyncio.run(self.serve(sockets=[listener]))
        if (failure := self.service.model.failure) is not None:
            raise GptOssError(f"the engine stopped after an error ({failure!r}); start the server again") from failure
        if self.interrupted:
            raise KeyboardInterrupt
