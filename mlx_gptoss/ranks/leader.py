"""Rank 0's side: it lets the others in, tells them what to load, and watches over them from then on."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, ClassVar

from .. import machine
from ..backends.base import Limits, Runner
from ..errors import GptOssError
from .launch import JOIN_TIMEOUT_S, Launch
from .runner import GroupRunner
from .wire import HEARTBEAT_TIMEOUT_S, Channel, ConnectionLost, accept_rank, bytes_from_json

END_TIMEOUT_S = 10.0  # how long the others may take to end


class Leader:
    """Connections to all other ranks, in their order.

    Once they load, a rank that is lost or fails ends this process, by one line on stderr and exit code 1: the engine's
    thread may wait for that rank in a collective, which nothing else can interrupt. The other ranks end when this one
    does.
    """

    created: ClassVar[bool] = False  # whether this process has ever met the others

    def __init__(self, launch: Launch, join_timeout_s: float | None = None) -> None:
        """Raises GptOssError if not all ranks come within join_timeout_s seconds, by default JOIN_TIMEOUT_S."""
        Leader.created = True
        self._launch = launch
        self._ending = threading.Event()
        self._ready = threading.Semaphore(0)
        self._packed: list[SimpleQueue[bytes]] = [SimpleQueue() for _ in range(1, launch.ranks)]
        self._readers: list[threading.Thread] = []
        self._channels, self._neighbour_addresses = self._accept_ranks(
            JOIN_TIMEOUT_S if join_timeout_s is None else join_timeout_s
        )

    def exchange_options(self, options: Any) -> list[Any]:
        """What every other rank answers to rank 0's load options. Raises GptOssError if one cannot do it."""
        for rank, channel in enumerate(self._channels, 1):
            behind = self._neighbour_addresses[rank] if rank < len(self._channels) else None
            self._send(rank, channel, {"options": options, "next": behind})
        answers = []
        for rank, channel in enumerate(self._channels, 1):
            try:
                answer = channel.receive()
            except ConnectionLost as lost:
                raise GptOssError(f"rank {rank} {lost}; see what it printed, and start all ranks again") from lost
            if "error" in answer:
                raise GptOssError(f"rank {rank}: {answer['error']}")
            answers.append(answer["answer"])
        return answers

    def load(self, limits: Limits, load: Callable[[], Runner], kv_ratio: float) -> GroupRunner:
        """Have all ranks load at once; `load` is this one's. kv_ratio: bytes of the largest rank's K/V to a byte of
        this one's."""
        for rank, channel in enumerate(self._channels, 1):
            self._send(rank, channel, {"load": vars(limits)})
            reader = threading.Thread(
                target=self._read_messages, args=(rank, channel), daemon=True, name=f"mlx-gptoss rank {rank}"
            )
            reader.start()
            self._readers.append(reader)
        local = load()
        for _ in self._channels:
            self._ready.acquire()
        self.broadcast(["loaded"])
        return GroupRunner(local, self, kv_ratio)

    def broadcast(self, *messages: Any) -> None:
        """Send messages to every other rank."""
        self.scatter([messages] * len(self._channels))

    def scatter(self, messages: Sequence[Sequence[Any]]) -> None:
        """Send each other rank its own messages."""
        for rank, (channel, its) in enumerate(zip(self._channels, messages, strict=True), 1):
            for message in its:
                try:
                    channel.send(message)
                except ConnectionLost as lost:
                    self._abort(rank, lost)

    def gather_packed(self) -> list[bytes]:
        """What each other rank has packed, as it was told to."""
        return [queue.get() for queue in self._packed]

    def close(self) -> None:
        """End the other ranks, and wait until they have."""
        self._ending.set()
        for channel in self._channels:
            try:
                channel.send({"end": True})
            except ConnectionLost:
                continue
        for reader in self._readers:
            reader.join(END_TIMEOUT_S)
        for channel in self._channels:
            channel.close()

    def _accept_ranks(self, join_timeout_s: float) -> tuple[list[Channel], list[tuple[str, int]]]:
        """Listen until every other rank has come and shown the token: connections, and where each rank listens for the
        one before it."""
        launch, found = self._launch, dict[int, tuple[Channel, int]]()
        until = time.monotonic() + join_timeout_s
        with _listen(launch.host, launch.port) as listener:
            while len(found) < launch.ranks - 1:
                try:
                    hello, channel = accept_rank(listener, launch, until)
                except TimeoutError as error:
                    missing = sorted(set(range(1, launch.ranks)) - set(found))
                    for channel, _ in found.values():
                        channel.close()
                    raise GptOssError(
                        f"rank {', '.join(map(str, missing))} did not come within {join_timeout_s:.0f} seconds to "
                        f"{launch.host}:{launch.port}; see whether that can be reached, and start all ranks again"
                    ) from error
                rank = hello["rank"]
                if rank in found:
                    channel.close()
                else:
                    found[rank] = channel, int(hello.get("port") or 0)
                    channel.start_heartbeats(lambda lost, rank=rank: self._abort(rank, lost))  # type: ignore[misc]
        channels = [found[rank][0] for rank in sorted(found)]
        hosts = launch.hosts[1:] or [channel.remote_address for channel in channels]
        return channels, [(host, found[rank][1]) for rank, host in enumerate(hosts, 1)]

    def _send(self, rank: int, channel: Channel, message: Any) -> None:
        try:
            channel.send(message)
        except ConnectionLost as lost:
            raise GptOssError(f"rank {rank} {lost}; see what it printed, and start all ranks again") from lost

    def _read_messages(self, rank: int, channel: Channel) -> None:
        """Read what one rank says until the end."""
        while True:
            try:
                message = channel.receive()
            except ConnectionLost as lost:
                self._abort(rank, lost)
                return
            if "error" in message:
                self._abort(rank, ConnectionLost(f"failed: {message['error']}"))
            channel.heartbeat_timeout_s = HEARTBEAT_TIMEOUT_S
            if "packed" in message:
                self._packed[rank - 1].put(bytes_from_json(message["packed"]))
            else:
                self._ready.release()

    def _abort(self, rank: int, lost: ConnectionLost) -> None:
        if self._ending.is_set():
            return
        text = f"error: rank {rank} {lost}; all ranks have ended, start them again"
        os.write(2, (" ".join(text.split()) + "\n").encode())
        os._exit(1)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return machine.listen(host, port, 64)
    except OSError as error:
        raise GptOssError(
            f"rank 0 cannot listen on {host}:{port} for the others ({error}); give the launcher another port"
        ) from error
