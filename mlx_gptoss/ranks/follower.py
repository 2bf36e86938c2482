"""The side of every rank but 0: loads its part of the model and executes the calls that rank 0 sends."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from ..backends.base import Limits, Pending, Runner, Snapshot
from ..errors import GptOssError
from .handshake import BadGreeting, closing_on_error, introduce
from .launch import JOIN_TIMEOUT_S, Launch
from .neighbours import Neighbours
from .wire import HEARTBEAT_TIMEOUT_S, Channel, ConnectionLost, bytes_from_json, bytes_to_json, row_from_json

REPORT_DELAY_S = 2.0  # how long rank 0 may take to notice itself that a neighbour of this rank is lost

Load = Callable[[Limits], Runner]  # loads this rank's part of the model


class Follower:
    """The connection to rank 0.

    A background thread reads it and ends the process when rank 0 is lost, whatever the main thread is waiting for.
    Ctrl-C and SIGTERM are ignored: rank 0 handles them and ends the other ranks.
    """

    def __init__(self, launch: Launch) -> None:
        """Connect to rank 0. Raises GptOssError if it cannot be reached."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        self._ended = threading.Event()
        self._channel, self._neighbours = _join(launch)
        self._channel.start_heartbeats(self._on_leader_lost)
        self._messages: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._receive_messages, name="mlx-gptoss rank 0", daemon=True).start()

    def run(self, prepare: Callable[[Any], tuple[Any, Load]]) -> None:
        """Follow rank 0 until it ends.

        prepare: given rank 0's load options, returns the reply to them and the function that loads this rank's part.
        """
        try:
            self._run(prepare)
        except Exception as error:  # rank 0 prints it and ends; then this rank ends, too
            kind = "" if isinstance(error, GptOssError) else f"{type(error).__name__}: "
            self._channel.send({"error": f"{kind}{error}"})
            while not _is_end(self._messages.get()):
                continue
        finally:
            self._neighbours.close()
            self._channel.close()

    def _run(self, prepare: Callable[[Any], tuple[Any, Load]]) -> None:
        if _is_end(message := self._messages.get()):
            return
        self._neighbours.connect(message.get("next"), self._on_neighbour_lost)
        reply, load = prepare(message["options"])
        self._channel.send({"reply": reply})
        if _is_end(message := self._messages.get()):
            return
        runner = load(Limits(**message["load"]))
        self._channel.send({"ready": True})
        self._execute_calls(runner)

    def _execute_calls(self, runner: Runner) -> None:
        """Make the calls that rank 0 makes on its runner, until it ends. A call is a list: name, then arguments."""
        saved: dict[int, Snapshot] = {}  # by rank 0's number for it
        last: Pending | None = None
        while isinstance(message := self._messages.get(), list):
            match message:
                case ["loaded"]:
                    self._neighbours.all_loaded()
                case ["submit", rows]:
                    last = runner.submit([row_from_json(row) for row in rows])
                case ["release", slot]:
                    runner.release(slot)
                case ["save", slot, start, end, number]:
                    saved[number] = runner.save(slot, start, end)
                case ["restore", slot, numbers]:
                    runner.restore(slot, [saved[number] for number in numbers])
                case ["pack", number]:
                    self._channel.send({"answer": bytes_to_json(runner.pack(saved[number]))})
                case ["unpack", start, end, number, data]:
                    snapshot = _unpack(runner, start, end, data)
                    if snapshot is not None:
                        saved[number] = snapshot
                    self._channel.send({"answer": snapshot is not None})
                case ["drop", numbers]:
                    for number in numbers:
                        saved.pop(number, None)  # this rank's part may have been damaged
                case ["logits", ids, adapter]:
                    runner.logits(ids, adapter)
                case _:
                    raise GptOssError(f"rank 0 sent the call {message[:1]}, which this version does not know")
        if last is not None:
            last.wait()
        runner.close()

    def _receive_messages(self) -> None:
        """Read rank 0's messages until it ends."""
        while True:
            try:
                message = self._channel.receive()
            except ConnectionLost as lost:
                self._on_leader_lost(lost)
                return
            self._messages.put(message)
            if isinstance(message, list):  # a call, so all ranks have loaded
                self._channel.heartbeat_timeout_s = HEARTBEAT_TIMEOUT_S
            elif _is_end(message):
                self._ended.set()
                return

    def _on_neighbour_lost(self, other: int, lost: ConnectionLost) -> None:
        """Report a lost neighbour to rank 0, unless rank 0 ends all ranks first.

        It does so if the neighbour has ended; if only the link between the two is cut, rank 0 cannot see it.
        """
        if not self._ended.wait(REPORT_DELAY_S):
            with suppress(ConnectionLost):  # rank 0 has ended
                self._channel.send({"error": f"its neighbour rank {other} {lost}"})

    def _on_leader_lost(self, lost: ConnectionLost) -> None:
        if not self._ended.is_set():
            os._exit(1)


def _is_end(message: Any) -> bool:
    return isinstance(message, dict) and "end" in message


def _unpack(runner: Runner, start: int, end: int, data: str) -> Snapshot | None:
    """The snapshot from its bytes; None if they are damaged or do not fit into memory."""
    try:
        return runner.unpack(start, end, bytes_from_json(data))
    except Exception:  # rank 0 says so in its log
        return None


def _join(launch: Launch) -> tuple[Channel, Neighbours]:
    """Connect to rank 0, trying again for JOIN_TIMEOUT_S: it may not listen yet, or strangers may crowd its port."""
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while True:
        neighbours = None
        try:
            connection = socket.create_connection((launch.host, launch.port), timeout=JOIN_TIMEOUT_S)
            with closing_on_error(connection):
                neighbours = Neighbours(launch, str(connection.getsockname()[0]))
                return introduce(connection, launch, neighbours.port, deadline), neighbours
        except (OSError, BadGreeting) as error:
            if neighbours is not None:
                neighbours.close()
            if time.monotonic() > deadline:
                raise GptOssError(
                    f"rank {launch.rank} cannot reach rank 0 at {launch.host}:{launch.port} ({error}); start commands "
                    "that load no model without a launcher"
                ) from error
            time.sleep(0.05)
