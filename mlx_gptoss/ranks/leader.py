"""Rank 0's side: it lets the others in, tells them what to load, and watches over them from then on."""

from __future__ import annotations

import hmac
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from .. import machine
from ..backends.base import Limits, Runner
from ..errors import GptOssError
from .launch import Launch
from .runner import GroupRunner
from .wire import LOADING_SILENCE_S, SILENCE_S, Channel, Lost

JOIN_S = 60.0  # how long rank 0 waits for the others, and they for it
HELLO_S = 2.0  # how long one that has connected may take to say who it is
END_S = 10.0  # how long the others may take to end


class Leader:
    """Connections to all other ranks, in their order.

    Once they load, a rank that is lost or fails ends this process, by one line on stderr and exit code 1: the engine's
    thread may wait for that rank in a collective, which nothing else can interrupt. The other ranks end when this one
    does.
    """

    def __init__(self, launch: Launch) -> None:
        """Raises GptOssError if not all ranks come."""
        self._launch = launch
        self._channels = self._meet()
        self._ready = threading.Semaphore(0)
        self._ending = threading.Event()
        self._readers: list[threading.Thread] = []

    def ask(self, order: Any) -> list[Any]:
        """What every other rank answers to the order. Raises GptOssError if one cannot do it."""
        for rank, channel in enumerate(self._channels, 1):
            self._send(rank, channel, {"order": order})
        answers = []
        for rank, channel in enumerate(self._channels, 1):
            try:
                answer = channel.receive(LOADING_SILENCE_S)
            except Lost as lost:
                raise GptOssError(f"rank {rank} {lost}; see what it printed, and start all ranks again") from lost
            if "error" in answer:
                raise GptOssError(f"rank {rank}: {answer['error']}")
            answers.append(answer["answer"])
        return answers

    def load(self, limits: Limits, load: Callable[[], Runner], largest: float) -> GroupRunner:
        """Have all ranks load at once; `load` is this one's. largest: bytes of the largest rank's K/V to a byte of
        this one's."""
        for rank, channel in enumerate(self._channels, 1):
            self._send(rank, channel, {"load": vars(limits)})
            reader = threading.Thread(
                target=self._watch, args=(rank, channel), daemon=True, name=f"mlx-gptoss rank {rank}"
            )
            reader.start()
            self._readers.append(reader)
        own = load()
        for _ in self._channels:
            self._ready.acquire()
        return GroupRunner(own, self.tell, self.close, largest)

    def tell(self, messages: Sequence[Any]) -> None:
        """Send messages to every other rank."""
        for rank, channel in enumerate(self._channels, 1):
            for message in messages:
                try:
                    channel.send(message)
                except Lost as lost:
                    self._die(rank, lost)

    def close(self) -> None:
        """End the other ranks, and wait until they have."""
        self._ending.set()
        for channel in self._channels:
            try:
                channel.send({"end": True})
            except Lost:
                continue
        for reader in self._readers:
            reader.join(END_S)
        for channel in self._channels:
            channel.close()

    def _meet(self) -> list[Channel]:
        """Listen until every other rank has come and shown the token; whoever else connects is hung up on."""
        launch, found = self._launch, dict[int, Channel]()
        until = time.monotonic() + JOIN_S
        with _listen(launch.host, launch.port) as listener:
            while len(found) < launch.ranks - 1:
                listener.settimeout(max(0.01, until - time.monotonic()))
                try:
                    connection, _ = listener.accept()
                except TimeoutError as error:
                    missing = sorted(set(range(1, launch.ranks)) - set(found))
                    for channel in found.values():
                        channel.close()
                    raise GptOssError(
                        f"rank {', '.join(map(str, missing))} did not come within {JOIN_S:.0f} seconds to "
                        f"{launch.host}:{launch.port}; see whether that can be reached, and start all ranks again"
                    ) from error
                rank, channel = self._greet(connection)
                if rank is None or rank in found:
                    channel.close()
                else:
                    found[rank] = channel
                    channel.beat(lambda lost, rank=rank: self._die(rank, lost))  # type: ignore[misc]
        return [found[rank] for rank in sorted(found)]

    def _greet(self, connection: socket.socket) -> tuple[int | None, Channel]:
        """The rank that has connected; None if it is none."""
        channel = Channel(connection)
        try:
            hello = json.loads(_first_line(connection))
        except (OSError, ValueError):
            return None, channel
        if not isinstance(hello, dict) or not isinstance(hello.get("token"), str):
            return None, channel
        known = hmac.compare_digest(hello["token"].encode(), self._launch.token.encode())
        rank = hello.get("rank")
        return (rank if known and rank in range(1, self._launch.ranks) else None), channel

    def _send(self, rank: int, channel: Channel, message: Any) -> None:
        try:
            channel.send(message)
        except Lost as lost:
            raise GptOssError(f"rank {rank} {lost}; see what it printed, and start all ranks again") from lost

    def _watch(self, rank: int, channel: Channel) -> None:
        """Read what one rank says until the end."""
        silence = LOADING_SILENCE_S
        while True:
            try:
                message = channel.receive(silence)
            except Lost as lost:
                self._die(rank, lost)
                return
            if "error" in message:
                self._die(rank, Lost(f"failed: {message['error']}"))
            silence = SILENCE_S
            self._ready.release()

    def _die(self, rank: int, lost: Lost) -> None:
        if self._ending.is_set():
            return
        text = f"error: rank {rank} {lost}; all ranks have ended, start them again"
        os.write(2, (" ".join(text.split()) + "\n").encode())
        os._exit(1)


def _first_line(connection: socket.socket) -> bytes:
    """At most 1000 bytes, within HELLO_S all in all: a stranger must not hold up the others."""
    line, until = b"", time.monotonic() + HELLO_S
    while not line.endswith(b"\n") and len(line) < 1000:
        connection.settimeout(max(0.01, until - time.monotonic()))
        piece = connection.recv(1)
        if not piece:
            break
        line += piece
    return line


def _listen(host: str, port: int) -> socket.socket:
    try:
        return machine.listen(host, port, 64)
    except OSError as error:
        raise GptOssError(
            f"rank 0 cannot listen on {host}:{port} for the others ({error}); give the launcher another port"
        ) from error
