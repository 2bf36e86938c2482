"""Signs of life between ranks that pass on to each other, neither of which is rank 0.

Where the way between two such ranks is cut, no collective ends, and rank 0, which reaches both, sees nothing.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from .. import machine
from ..errors import GptOssError
from .launch import JOIN_TIMEOUT_S, Launch
from .wire import HEARTBEAT_TIMEOUT_S, Channel, ConnectionLost, accept_rank


class Neighbours:
    """The rank before this one and the one behind it. port: where this one listens for the one before; 0 for rank 1,
    where that is rank 0."""

    def __init__(self, launch: Launch, host: str) -> None:
        """host: an address of this rank's, for where the launcher names none."""
        self._launch = launch
        self._channels: dict[int, Channel] = {}
        self._listener: socket.socket | None = None
        self.port = 0
        if launch.rank > 1:
            self._listener = machine.listen(launch.hosts[launch.rank] if launch.hosts else host, 0, 4)
            self.port = int(self._listener.getsockname()[1])

    def connect(self, next_address: Sequence[object] | None, on_lost: Callable[[int, ConnectionLost], None]) -> None:
        """next_address: host and port of the rank behind this one; None for the last one. on_lost: called, on a thread of its
        own, when a neighbour gives no more signs of life. Raises GptOssError if one cannot be reached."""
        rank = self._launch.rank
        if next_address is not None:
            host, port = str(next_address[0]), int(str(next_address[1]))
            try:
                self._channels[rank + 1] = Channel(socket.create_connection((host, port), timeout=JOIN_TIMEOUT_S))
                self._channels[rank + 1].send({"token": self._launch.token, "rank": rank})
            except (OSError, ConnectionLost) as error:
                raise GptOssError(f"it cannot reach rank {rank + 1} at {host}:{port} ({error})") from error
        if self._listener is not None:
            with self._listener:
                self._channels[rank - 1] = self._accept_previous(self._listener)
        for other, channel in self._channels.items():
            channel.start_heartbeats(lambda error, other=other: on_lost(other, error))  # type: ignore[misc]
            threading.Thread(
                target=self._watch, args=(other, channel, on_lost), name=f"mlx-gptoss rank {other}", daemon=True
            ).start()

    def all_loaded(self) -> None:
        """All ranks have: from now on nobody has a reason to be silent for long. A neighbour that has begun to wait
        before counts anew from the next sign of life; so that comes at once."""
        for channel in self._channels.values():
            channel.heartbeat_timeout_s = HEARTBEAT_TIMEOUT_S
            with suppress(ConnectionLost):  # whoever watches it says so
                channel.send_heartbeat()

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for channel in self._channels.values():
            channel.close()

    def _accept_previous(self, listener: socket.socket) -> Channel:
        before, until = self._launch.rank - 1, time.monotonic() + JOIN_TIMEOUT_S
        while True:
            try:
                hello, channel = accept_rank(listener, self._launch, until)
            except TimeoutError as error:
                raise GptOssError(f"rank {before} did not come to it within {JOIN_TIMEOUT_S:.0f} seconds") from error
            if hello["rank"] == before:
                return channel
            channel.close()

    def _watch(self, other: int, channel: Channel, on_lost: Callable[[int, ConnectionLost], None]) -> None:
        try:
            while True:
                channel.receive()
        except ConnectionLost as error:
            on_lost(other, error)
