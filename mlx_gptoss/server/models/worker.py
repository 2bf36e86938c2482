"""The process of one model: loads it, runs replies for the server, and ends when the server closes the connection."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue

from ...api import load_request
from ...chat.reply import Event, Finished
from ...chat.stream import Events
from ...errors import GptOssError
from ...harmony import grammar
from ...loading.plan import open_source, plan_load
from ...model import Model
from ...untrusted.cancel import cancellable
from ..log_output import configure_logging
from .messages import Arrived, Cancel, Failed, FromModel, FromServer, Load, Loaded, Planned, Proceed, Start, Started

STARTING_THREADS = 8  # render and tokenize prompts side by side

_log = logging.getLogger(__name__)


def main(connection: Connection) -> int:
    """Run the process. Returns its exit status: 0 after the server has closed the connection.

    The signals that end a server reach its whole process group. The server drains then, and ends this process itself;
    if it is gone, the connection is closed.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        model = _load(connection)
    except (EOFError, BrokenPipeError):
        return 0
    except Exception as error:
        _log.debug("loading failed", exc_info=error)
        connection.send(Failed(None, sendable(error)))
        return 1
    gc.collect()
    gc.freeze()  # a collection of all that was loaded takes 50 ms, and every stream would wait for it
    with model:
        return Worker(model, connection).run()


def _load(connection: Connection) -> Model:
    """Plan and load the model that the server names. Raises EOFError if the server gives it up."""
    message: FromServer = connection.recv()
    assert isinstance(message, Load)
    configure_logging(message.log_level, message.log_format)
    request = message.request
    connection.send(Planned(plan_load(request, open_source(request)).memory))
    proceed: FromServer = connection.recv()
    assert isinstance(proceed, Proceed)
    model = load_request(replace(request, available_bytes=proceed.available_bytes))
    if model.has_tokenizer:
        grammar.warm_up(model.tokenizer)
    return model


class Worker:
    """Runs replies of a loaded model for a server.

    Replies start on threads of their own, since rendering and tokenizing take time. One thread sends their events: the
    engine's thread only tells it which reply has new ones.
    """

    def __init__(self, model: Model, connection: Connection) -> None:
        self._model = model
        self._connection = connection
        self._send_lock = threading.Lock()
        self._replies: dict[int, Events] = {}
        self._starting: dict[int, threading.Event] = {}  # replies that have not started yet -> set if cancelled
        self._lock = threading.Lock()  # of the two above
        self._arrivals: SimpleQueue[int | None] = SimpleQueue()  # ids of replies with new events; None at the end

    def run(self) -> int:
        """Answer messages until the server closes the connection. Returns the exit status."""
        model = self._model
        sender = threading.Thread(target=self._send_events, name="mlx-gptoss events", daemon=True)
        sender.start()
        self._send(Loaded(model.backend, model.format, model.plan, model.status.slots, model.load_s))
        with ThreadPoolExecutor(STARTING_THREADS, "mlx-gptoss start") as threads:
            try:
                while True:
                    message: FromServer = self._connection.recv()
                    if isinstance(message, Start):
                        with self._lock:
                            self._starting[message.id] = threading.Event()
                        threads.submit(self._start, message)
                    elif isinstance(message, Cancel):
                        self._cancel(message.id)
            except (EOFError, OSError):  # the server has closed the connection, or is gone
                threads.shutdown(cancel_futures=True)
        self._arrivals.put(None)
        sender.join()
        return 0

    def _start(self, message: Start) -> None:
        stream = self._model.stream if message.kind == "stream" else self._model.stream_raw
        try:
            with cancellable(self._starting[message.id]):
                events = stream(message.prompt, **message.options)
        except Exception as error:
            with self._lock:
                del self._starting[message.id]
            self._send(Failed(message.id, sendable(error)))
            return
        with self._lock:
            cancelled = self._starting.pop(message.id).is_set()
            if not cancelled:
                self._replies[message.id] = events
        if cancelled:
            events.close()
            return
        self._send(Started(message.id, events.prompt_tokens))
        events.on_arrival(partial(self._arrivals.put, message.id))

    def _cancel(self, id: int) -> None:
        with self._lock:
            if id in self._starting:
                self._starting[id].set()
            events = self._replies.pop(id, None)
        if events is not None:
            events.close()

    def _send_events(self) -> None:
        """Body of the sending thread. A model whose engine has failed ends the process: the server starts a new one."""
        while (id := self._arrivals.get()) is not None:
            ids = {id}
            while not self._arrivals.empty():
                if (more := self._arrivals.get()) is None:
                    return
                ids.add(more)
            if self._model.failure is not None:
                self._send(Failed(None, sendable(self._model.failure)))
                os._exit(1)
            if arrived := tuple((id, events) for id in ids if (events := self._new_events(id))):
                self._send(Arrived(arrived, self._model.status.prefix_bytes))

    def _new_events(self, id: int) -> list[Event]:
        """The events of a reply that have arrived. Forgets the reply at its end."""
        with self._lock:
            reply = self._replies.get(id)
        if reply is None:
            return []
        events: list[Event] = []
        try:
            while ready := reply.ready():
                events += ready
        except Exception as error:
            if events:
                self._send(Arrived(((id, events),), 0))
            self._forget(id)
            self._send(Failed(id, sendable(error)))
            return []
        if events and isinstance(events[-1], Finished):
            self._forget(id)
        return events

    def _forget(self, id: int) -> None:
        with self._lock:
            self._replies.pop(id, None)

    def _send(self, message: FromModel) -> None:
        """Send a message, unless the server has closed the connection: run() then ends."""
        try:
            with self._send_lock:
                self._connection.send(message)
        except OSError:
            pass


def sendable(error: BaseException) -> Exception:
    """The error as the server can receive it: its own errors as they are, others by their text."""
    if isinstance(error, GptOssError):
        error.__cause__ = None  # it need not be one that pickle knows
        return error
    _log.error("unexpected error", exc_info=error)
    return RuntimeError(f"{type(error).__name__}: {error}")


def _arguments(values: Iterable[str]) -> Connection:
    descriptor, *_ = values
    return Connection(int(descriptor))


if __name__ == "__main__":
    sys.exit(main(_arguments(sys.argv[1:])))
