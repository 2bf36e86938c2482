"""The side of every rank but 0: it loads what it is told, then makes the calls that rank 0 makes, until that ends."""

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
from .launch import JOIN_TIMEOUT_S, Launch
from .neighbours import Neighbours
from .wire import HEARTBEAT_TIMEOUT_S, Channel, ConnectionLost, bytes_from_json, bytes_to_json, row_from_json

REPORT_DELAY_S = 2.0  # how long rank 0 may take to see what a neighbour sees


class Follower:
    """The connection to rank 0. It is read on a thread of its own, which ends the process when rank 0 is gone, whatever
    the main thread waits for. Ctrl-C and SIGTERM are for rank 0 to answer: it ends the others."""

    def __init__(self, launch: Launch) -> None:
        """Raises GptOssError if rank 0 cannot be reached."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        self._ended = threading.Event()
        self._channel = Channel(_connect(launch))
        self._neighbours = Neighbours(launch, self._channel.local_address)
        self._channel.send({"token": launch.token, "rank": launch.rank, "port": self._neighbours.port})
        self._channel.start_heartbeats(self._on_leader_lost)
        self._messages: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._receive_messages, name="mlx-gptoss rank 0", daemon=True).start()

    def run(self, prepare: Callable[[Any], tuple[Any, Callable[[Limits], Runner]]]) -> None:
        """Until rank 0 ends. prepare: what to answer to its load options, and what then loads this rank's part."""
        try:
            self._run(prepare)
        except Exception as error:  # rank 0 says it, and ends; so does this one then
            kind = "" if isinstance(error, GptOssError) else f"{type(error).__name__}: "
            self._channel.send({"error": f"{kind}{error}"})
            while not _is_end(self._messages.get()):
                continue
        finally:
            self._neighbours.close()
            self._channel.close()

    def _run(self, prepare: Callable[[Any], tuple[Any, Callable[[Limits], Runner]]]) -> None:
        if _is_end(message := self._messages.get()):
            return
        self._neighbours.connect(message.get("next"), self._on_neighbour_lost)
        reply, load = prepare(message["options"])
        self._channel.send({"answer": reply})
        if _is_end(message := self._messages.get()):
            return
        runner = load(Limits(**message["load"]))
        self._channel.send({"ready": True})
        self._execute_calls(runner)

    def _execute_calls(self, runner: Runner) -> None:
        saved: dict[int, Snapshot] = {}
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
                    self._channel.send({"packed": bytes_to_json(runner.pack(saved[number]))})
                case ["unpack", start, end, number, data]:
                    saved[number] = runner.unpack(start, end, bytes_from_json(data))
                case ["drop", numbers]:
                    for number in numbers:
                        del saved[number]
                case ["logits", ids]:
                    runner.logits(ids)
                case _:
                    raise GptOssError(f"rank 0 asks for {message[:1]}, which this version does not know")
        if last is not None:
            last.wait()
        runner.close()

    def _receive_messages(self) -> None:
        while True:
            try:
                message = self._channel.receive()
            except ConnectionLost as lost:
                self._on_leader_lost(lost)
                return
            self._messages.put(message)
            if isinstance(message, list):  # a call: all have loaded
                self._channel.heartbeat_timeout_s = HEARTBEAT_TIMEOUT_S
            elif _is_end(message):
                self._ended.set()
                return

    def _on_neighbour_lost(self, other: int, lost: ConnectionLost) -> None:
        """A neighbour is lost. Rank 0 sees that itself, or is ending all, unless it is only the way to it that is."""
        if not self._ended.wait(REPORT_DELAY_S):
            with suppress(ConnectionLost):  # then rank 0 has ended
                self._channel.send({"error": f"for it rank {other} {lost}"})

    def _on_leader_lost(self, lost: ConnectionLost) -> None:
        if not self._ended.is_set():
            os._exit(1)


def _is_end(message: Any) -> bool:
    return isinstance(message, dict) and "end" in message


def _connect(launch: Launch) -> socket.socket:
    """Rank 0 may begin to listen later than this one calls."""
    until = time.monotonic() + JOIN_TIMEOUT_S
    while True:
        try:
            return socket.create_connection((launch.host, launch.port), timeout=JOIN_TIMEOUT_S)
        except OSError as error:
            if time.monotonic() > until:
                raise GptOssError(
                    f"rank {launch.rank} cannot reach rank 0 at {launch.host}:{launch.port} ({error}); commands that "
                    "load no model are for one process"
                ) from error
            time.sleep(0.05)
