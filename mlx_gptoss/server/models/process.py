"""One run of a model's process, as the server sees it."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, TimeoutError
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

from ...chat.reply import Event, Finished
from ...chat.stream import Events
from ...errors import ModelUnavailable
from ...loading.memory import MemoryPlan
from ...loading.plan import LoadRequest
from ...untrusted.cancel import check_cancelled
from .messages import Arrived, Cancel, Failed, FromModel, FromServer, Load, Loaded, Planned, Proceed, Start, Started

WORKER = "mlx_gptoss.server.models.worker"
CHECK_S = 0.05  # between two looks at whether anybody waits for a reply that starts
CLOSE_TIMEOUT_S = 10.0  # for the step in progress and for writing the prompt cache

Answer = TypeVar("Answer", Planned, Loaded)
LogOptions = tuple[str, str]


class ModelProcess:
    """A process that loads one model and runs its replies: plan(), load(), then start() for each reply.

    name: for messages. log: the level and the format of its log. on_exit: called on a thread of its own when the
    process has ended by itself.
    prefix_bytes: device memory held by the prefix cache. memory: the plan of the loaded model.

    Any thread may call any method.
    """

    def __init__(self, name: str, on_exit: Callable[[ModelProcess], None], log: LogOptions) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", WORKER, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd="/",  # `-m` looks for modules here first
            )
        self.name = name
        self.pid: int = self._process.pid
        self.prefix_bytes: int = 0
        self.memory: MemoryPlan | None = None
        self._socket = ours
        self._connection = Connection(os.dup(ours.fileno()))
        self._on_exit = on_exit
        self._log = log
        self._closing = False
        self._ended = False
        self._failure: Exception | None = None
        self._ids = itertools.count()
        self._lock = threading.Lock()  # of the dictionaries below, and of _ended
        self._send_lock = threading.Lock()
        self._starting: dict[int, Future[int]] = {}
        self._replies: dict[int, RemoteEvents] = {}

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._ended

    def plan(self, request: LoadRequest) -> MemoryPlan:
        """The memory that the model takes by itself. Raises what planning raised, and ModelUnavailable."""
        self._send(Load(request, *self._log))
        return self._answer(Planned).memory

    def load(self, available_bytes: int) -> Loaded:
        """Load the model. Raises what loading raised, and ModelUnavailable."""
        self._send(Proceed(available_bytes))
        loaded = self._answer(Loaded)
        self.memory = loaded.memory
        threading.Thread(target=self._receive, name=f"{self.name} events", daemon=True).start()
        return loaded

    def start(self, kind: Literal["stream", "stream_raw"], prompt: Any, options: Mapping[str, Any]) -> RemoteEvents:
        """Submit a reply and wait until the engine has it. Raises what Model.stream raises, and ModelUnavailable."""
        id, started = next(self._ids), Future[int]()
        events = RemoteEvents(self, id)
        with self._lock:
            if self._ended:
                raise self._stopped()
            self._starting[id], self._replies[id] = started, events
        try:
            self._send(Start(id, kind, prompt, options))
            events.started(_result(started))
        except BaseException:
            self.cancel(id)
            raise
        return events

    def cancel(self, id: int) -> None:
        """End a reply, unless it has ended."""
        if self.forget(id):
            with suppress(ModelUnavailable):
                self._send(Cancel(id))

    def forget(self, id: int) -> bool:
        """Drop what still arrives of a reply. Returns whether it was known."""
        with self._lock:
            self._starting.pop(id, None)
            return self._replies.pop(id, None) is not None

    def close(self) -> None:
        """End the process and wait for it. Its replies fail."""
        self._closing = True
        if self.memory is None:  # it is still loading
            self._process.kill()
        with suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_WR)  # what it still says can be read
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._end()

    def _send(self, message: FromServer) -> None:
        try:
            with self._send_lock:
                self._connection.send(message)
        except OSError as error:
            raise self._stopped() from error

    def _answer(self, kind: type[Answer]) -> Answer:
        """The process's answer while it loads."""
        try:
            answer: FromModel = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.wait()
            raise self._stopped() from error
        if isinstance(answer, Failed):
            raise answer.error
        assert isinstance(answer, kind)
        return answer

    def _receive(self) -> None:
        """Body of the receiving thread."""
        try:
            while True:
                self._take(self._connection.recv())
        except (EOFError, OSError):
            pass
        self._process.wait()
        self._end()
        if not self._closing:
            self._on_exit(self)

    def _take(self, message: FromModel) -> None:
        match message:
            case Started(id, prompt_tokens):
                with self._lock:
                    started = self._starting.pop(id, None)
                if started is not None:
                    started.set_result(prompt_tokens)
            case Arrived(arrived, prefix_bytes):
                self.prefix_bytes = prefix_bytes
                for id, events in arrived:
                    with self._lock:
                        reply = self._replies.get(id)
                    if reply is not None:
                        reply.put(events)
            case Failed(None, error):
                self._failure = error
            case Failed(int() as id, error):
                with self._lock:
                    started, reply = self._starting.pop(id, None), self._replies.pop(id, None)
                if started is not None:
                    started.set_exception(error)
                elif reply is not None:
                    reply.put(error)

    def _end(self) -> None:
        """Fail everything that waits for the process, which has ended."""
        with self._lock:
            self._ended = True
            starting, replies = list(self._starting.values()), list(self._replies.values())
            self._starting.clear()
            self._replies.clear()
            self._socket.close()
        for started in starting:
            started.set_exception(self._stopped())
        for reply in replies:
            reply.put(self._stopped())

    def _stopped(self) -> ModelUnavailable:
        """Why the process cannot be used."""
        if self._closing:
            return ModelUnavailable(f"{self.name} was unloaded; send the request again")
        why = f"after an error ({self._failure})" if self._failure else _exit_reason(self._process.poll())
        return ModelUnavailable(f"the process of {self.name} ended {why}; send the request again: it is started anew")


class RemoteEvents(Events):
    """The events of a reply in another process."""

    def __init__(self, process: ModelProcess, id: int) -> None:
        self._process = process
        self._id = id
        self._arrived: SimpleQueue[list[Event] | Exception] = SimpleQueue()
        self._notify: Callable[[], None] | None = None
        self._prompt_tokens = 0
        self._pending: deque[Event] = deque()
        self._closed = False
        self._failed: Exception | None = None  # why the reply failed; every further call raises it

    def started(self, prompt_tokens: int) -> None:
        """The engine has the reply."""
        self._prompt_tokens = prompt_tokens

    def put(self, item: list[Event] | Exception) -> None:
        """Take what has arrived. Called on the receiving thread."""
        if not isinstance(item, list) or isinstance(item[-1], Finished):
            self._process.forget(self._id)
        self._arrived.put(item)
        if self._notify is not None:
            self._notify()

    @property
    def prompt_tokens(self) -> int:
        return self._prompt_tokens

    def ready(self) -> list[Event]:
        events = list(self._pending)
        self._pending.clear()
        while not self._closed and not self._failed and not self._arrived.empty():
            events += self._next_item()
        if self._failed and not events:
            raise self._failed
        return events

    def on_arrival(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        notify()

    def close(self) -> None:
        self._closed = True
        self._pending.clear()
        self._process.cancel(self._id)

    def __next__(self) -> Event:
        while not self._pending:
            if self._closed:
                raise StopIteration
            if self._failed:
                raise self._failed
            self._pending.extend(self._next_item())
        return self._pending.popleft()

    def _next_item(self) -> list[Event]:
        """Wait for the next events and return them; none if the reply has failed."""
        item = self._arrived.get()
        if isinstance(item, Exception):
            self._failed = item
            return []
        if isinstance(item[-1], Finished):
            self._closed = True
        return item


def _result(started: Future[int]) -> int:
    """What the process answers. Raises Cancelled if nobody waits for it any more."""
    while True:
        check_cancelled()
        with suppress(TimeoutError):
            return started.result(CHECK_S)


def _exit_reason(status: int | None) -> str:
    if status is None:
        return "unexpectedly"
    return f"by signal {-status}" if status < 0 else f"with status {status}"
