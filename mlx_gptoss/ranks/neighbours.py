"""Heartbeats between two ranks next to each other in the ring, neither of which is rank 0.

If the link between two such ranks is cut, no collective ever finishes, and rank 0, which reaches both, sees nothing.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from .. import machine
from ..errors import GptOssError
from .handshake import BadGreeting, Reception, closing_on_error, introduce
from .launch import BACKLOG, JOIN_TIMEOUT_S, Launch
from .wire import HEARTBEAT_TIMEOUT_S, Channel, ConnectionLost


class Neighbours:
    """Connections to the previous rank and the next one.

    port: where this rank listens for the previous one; 0 on rank 1, whose previous rank is rank 0.
    """

    def __init__(self, launch: Launch, host: str) -> None:
        """host: an address of this rank, used if the launcher gives none."""
        self._launch = launch
        self._channels: dict[int, Channel] = {}
        self._listener: socket.socket | None = None
        self.port: int = 0
        if launch.rank > 1:
            self._listener = machine.listen(launch.hosts[launch.rank] if launch.hosts else host, 0, BACKLOG)
            self.port = int(self._listener.getsockname()[1])

    def connect(self, next_address: Sequence[object] | None, on_lost: Callable[[int, ConnectionLost], None]) -> None:
        """Connect to both neighbours and exchange heartbeats from now on.

        next_address: host and port of the next rank; None on the last one. on_lost: called on a background thread with
        the rank of a neighbour that is lost. Raises GptOssError if a neighbour cannot be reached.
        """
        rank = self._launch.rank
        if next_address is not None:
            host, port = str(next_address[0]), int(str(next_address[1]))
            try:
                connection = socket.create_connection((host, port), timeout=JOIN_TIMEOUT_S)
                with closing_on_error(connection):
                    deadline = time.monotonic() + JOIN_TIMEOUT_S
                    self._channels[rank + 1] = introduce(connection, self._launch, 0, deadline)
            except (OSError, BadGreeting) as error:
                raise GptOssError(f"cannot reach rank {rank + 1} at {host}:{port} ({error})") from error
        if self._listener is not None:
            self._channels[rank - 1] = self._accept_previous(self._listener)
        for other, channel in self._channels.items():
            channel.start_heartbeats(lambda error, other=other: on_lost(other, error))  # type: ignore[misc]
            threading.Thread(
                target=self._watch, args=(other, channel, on_lost), name=f"mlx-gptoss rank {other}", daemon=True
            ).start()

    def all_loaded(self) -> None:
        """Apply the short heartbeat timeout from now on, because all ranks have loaded.

        A neighbour that is already waiting in receive() applies its shorter timeout only after the next heartbeat, so
        send one at once.
        """
        for channel in self._channels.values():
            channel.heartbeat_timeout_s = HEARTBEAT_TIMEOUT_S
            with suppress(ConnectionLost):  # reported by the thread that watches the channel
                channel.send_heartbeat()

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for channel in self._channels.values():
            channel.close()

    def _accept_previous(self, listener: socket.socket) -> Channel:
        previous = self._launch.rank - 1
        with Reception(listener, self._launch) as reception:
            try:
                return reception.next_rank({previous}, time.monotonic() + JOIN_TIMEOUT_S).channel
            except TimeoutError as error:
                raise GptOssError(
                    f"rank {previous} did not connect to it within {JOIN_TIMEOUT_S:.0f} seconds"
                ) from error

    def _watch(self, other: int, channel: Channel, on_lost: Callable[[int, ConnectionLost], None]) -> None:
        try:
            while True:
                channel.receive()
        except ConnectionLost as error:
            on_lost(other, error)
