"""Rank 0's side: accepts the other ranks, tells them what to load, sends them calls, and monitors them."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any, ClassVar

from .. import machine
from ..backends.base import Limits, Runner
from ..errors import GptOssError
from .handshake import Arrival, Reception
from .launch import BACKLOG, JOIN_TIMEOUT_S, SECRET_VARIABLE, Launch
from .runner import GroupRunner
from .wire import HEARTBEAT_TIMEOUT_S, Channel, ConnectionLost

END_TIMEOUT_S = 10.0  # how long the other ranks may take to end


class Leader:
    """Connections to all other ranks, in the order of their ranks.

    From the moment they load, a rank that is lost or fails ends this process, with one line on stderr and exit code 1.
    An exception would not do: the engine thread may be waiting for that rank in a collective, which nothing can
    interrupt. The other ranks end when they lose rank 0.
    """

    created: ClassVar[bool] = False  # whether this process has ever accepted (or waited for) the other ranks

    def __init__(self, launch: Launch, join_timeout_s: float | None = None) -> None:
        """Wait for all other ranks. Raises GptOssError if one does not connect in time.

        join_timeout_s: seconds to wait, JOIN_TIMEOUT_S by default.
        """
        Leader.created = True
        self._launch = launch
        self._ending = threading.Event()
        self._ready = threading.Semaphore(0)
        self._answers: list[SimpleQueue[Any]] = [SimpleQueue() for _ in range(1, launch.ranks)]
        self._readers: list[threading.Thread] = []
        timeout_s = JOIN_TIMEOUT_S if join_timeout_s is None else join_timeout_s
        self._channels, self._neighbour_addresses = self._accept_ranks(timeout_s)

    def exchange_options(self, options: Any) -> list[Any]:
        """Send the load options to every other rank and return their replies.

        Raises GptOssError if a rank cannot load with these options, or is lost.
        """
        for rank, channel in enumerate(self._channels, 1):
            next_address = self._neighbour_addresses[rank] if rank < len(self._channels) else None
            self._send(rank, channel, {"options": options, "next": next_address})
        replies = []
        for rank, channel in enumerate(self._channels, 1):
            try:
                reply = channel.receive()
            except ConnectionLost as lost:
                raise _rank_lost(rank, lost) from lost
            if "error" in reply:
                raise GptOssError(f"rank {rank}: {reply['error']}")
            replies.append(reply["reply"])
        return replies

    def load(self, limits: Limits, load: Callable[[], Runner], kv_ratio: float) -> GroupRunner:
        """Load on all ranks at the same time and return the runner of the group.

        load: loads this rank's part. kv_ratio: K/V bytes of the rank that holds most, divided by this rank's.
        """
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
        """Send the same messages to every other rank."""
        self.scatter([messages] * len(self._channels))

    def scatter(self, messages: Sequence[Sequence[Any]]) -> None:
        """Send every other rank its own messages: messages[0] to rank 1, and so on."""
        for rank, (channel, own) in enumerate(zip(self._channels, messages, strict=True), 1):
            for message in own:
                try:
                    channel.send(message)
                except ConnectionLost as lost:
                    self._abort(rank, lost)

    def gather(self) -> list[Any]:
        """The other ranks' answers to the last call that has one."""
        return [queue.get() for queue in self._answers]

    @property
    def count(self) -> int:
        """Number of other ranks."""
        return len(self._channels)

    def close(self) -> None:
        """End the other ranks and wait until they have ended."""
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

    def _accept_ranks(self, timeout_s: float) -> tuple[list[Channel], list[tuple[str, int]]]:
        """Listen until every other rank has connected and proved that it belongs to the launch.

        Returns their connections, and the addresses where they listen for the rank before them.
        """
        launch, found = self._launch, dict[int, Arrival]()
        wanted, deadline = set(range(1, launch.ranks)), time.monotonic() + timeout_s
        with Reception(_listen(launch.host, launch.port), launch) as reception:
            while wanted:
                try:
                    arrival = reception.next_rank(wanted, deadline)
                except TimeoutError as error:
                    for arrival in found.values():
                        arrival.channel.close()
                    raise self._missing(wanted, reception.refused, timeout_s) from error
                found[arrival.rank] = arrival
                wanted.remove(arrival.rank)
                arrival.channel.start_heartbeats(partial(self._abort, arrival.rank))
        arrivals = [found[rank] for rank in sorted(found)]
        hosts = launch.hosts[1:] or [arrival.channel.remote_address for arrival in arrivals]
        ports = [arrival.port for arrival in arrivals]
        return [arrival.channel for arrival in arrivals], list(zip(hosts, ports, strict=True))

    def _missing(self, ranks: set[int], refused: set[int], timeout_s: float) -> GptOssError:
        names, at = ", ".join(map(str, sorted(ranks))), f"{self._launch.host}:{self._launch.port}"
        advice = "check that this address can be reached"
        if refused & ranks:
            advice = (
                f"a process that has another secret or launch has tried: set the same {SECRET_VARIABLE} on all ranks"
            )
        return GptOssError(
            f"rank {names} did not connect to {at} within {timeout_s:.0f} seconds; {advice}, and start all ranks again"
        )

    def _send(self, rank: int, channel: Channel, message: Any) -> None:
        try:
            channel.send(message)
        except ConnectionLost as lost:
            raise _rank_lost(rank, lost) from lost

    def _read_messages(self, rank: int, channel: Channel) -> None:
        """Read one rank's messages until it ends."""
        while True:
            try:
                message = channel.receive()
            except ConnectionLost as lost:
                self._abort(rank, lost)
                return
            if "error" in message:
                self._abort(rank, ConnectionLost(f"failed: {message['error']}"))
            channel.heartbeat_timeout_s = HEARTBEAT_TIMEOUT_S
            if "answer" in message:
                self._answers[rank - 1].put(message["answer"])
            else:
                self._ready.release()

    def _abort(self, rank: int, lost: ConnectionLost) -> None:
        """End this process because a rank is lost, unless the ranks are being ended."""
        if self._ending.is_set():
            return
        text = f"error: rank {rank} {lost}; all ranks have stopped, start them again"
        os.write(2, (" ".join(text.split()) + "\n").encode())
        os._exit(1)


def _rank_lost(rank: int, lost: ConnectionLost) -> GptOssError:
    return GptOssError(f"rank {rank} {lost}; see its output for the reason, and start all ranks again")


def _listen(host: str, port: int) -> socket.socket:
    try:
        return machine.listen(host, port, BACKLOG)
    except OSError as error:
        raise GptOssError(
            f"rank 0 cannot listen on {host}:{port} for the other ranks ({error}); give the launcher another port"
        ) from error
