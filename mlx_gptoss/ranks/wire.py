"""What two ranks send each other after the handshake: messages as lines of JSON, and an empty line every second as a
heartbeat."""

from __future__ import annotations

import json
import socket
import threading
from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import Any

from ..backends.base import Row
from ..sampling import Sampling

HEARTBEAT_S = 1.0
HEARTBEAT_TIMEOUT_S = 8.0  # a rank that sends nothing for this long is lost
LOADING_HEARTBEAT_TIMEOUT_S = 60.0  # while loading: copying a large weight from a slow disk blocks all Python threads


class ConnectionLost(Exception):
    """The connection to a rank is lost. The message continues a sentence that begins with the rank's name."""


class Channel:
    """One connection. Any thread may send; one thread receives.

    heartbeat_timeout_s: how long the other side may send nothing. LOADING_HEARTBEAT_TIMEOUT_S until it is changed.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._lines = connection.makefile("rb")
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.heartbeat_timeout_s = LOADING_HEARTBEAT_TIMEOUT_S

    @property
    def remote_address(self) -> str:
        """IP address of the other side."""
        return str(self._socket.getpeername()[0])

    @property
    def local_address(self) -> str:
        """IP address of this side."""
        return str(self._socket.getsockname()[0])

    def send(self, message: Any) -> None:
        """Send a message, any JSON value. Raises ConnectionLost."""
        self._write(json.dumps(message).encode() + b"\n")

    def receive(self) -> Any:
        """The next message. Raises ConnectionLost if the connection ends, nothing arrives for heartbeat_timeout_s, or a
        line is not JSON."""
        while True:
            timeout_s = self.heartbeat_timeout_s
            try:
                self._socket.settimeout(timeout_s)
                line = self._lines.readline()
            except TimeoutError as error:
                raise ConnectionLost(f"sent no heartbeat for {timeout_s:.0f} seconds") from error
            except ConnectionError as error:
                raise ConnectionLost("has ended") from error
            except (OSError, ValueError) as error:
                raise ConnectionLost(f"lost its connection ({error})") from error
            if not line.endswith(b"\n"):
                raise ConnectionLost("has ended" if not line else "has ended in the middle of a message")
            if line != b"\n":
                try:
                    return json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ConnectionLost("sent a line that is not JSON") from error

    def send_heartbeat(self) -> None:
        """Send one heartbeat. Raises ConnectionLost."""
        self._write(b"\n")

    def start_heartbeats(self, on_lost: Callable[[ConnectionLost], None]) -> None:
        """Send heartbeats from a background thread until close(). It calls `on_lost` if one cannot be sent."""

        def run() -> None:
            while not self._closed.wait(HEARTBEAT_S):
                try:
                    self.send_heartbeat()
                except ConnectionLost as error:
                    if not self._closed.is_set():
                        on_lost(error)
                    return

        threading.Thread(target=run, name="mlx-gptoss heartbeat", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other side has closed it already
        finally:
            self._socket.close()

    def _write(self, data: bytes) -> None:
        with self._lock:
            try:
                self._socket.sendall(data)
            except ConnectionError as error:
                raise ConnectionLost("has ended") from error
            except OSError as error:
                raise ConnectionLost(f"accepts no messages ({error})") from error


def bytes_to_json(data: bytes) -> str:
    return b64encode(data).decode()


def bytes_from_json(text: str) -> bytes:
    return b64decode(text)


def row_to_json(row: Row) -> dict[str, Any]:
    """A JSON object with the fields of a Row; its mask as base64."""
    mask = None if row.mask is None else bytes_to_json(row.mask)
    return vars(row) | {"sampling": row.sampling and vars(row.sampling), "mask": mask}


def row_from_json(data: dict[str, Any]) -> Row:
    """The Row that row_to_json wrote."""
    sampling, mask, tokens, prompt = (data[name] for name in ("sampling", "mask", "tokens", "prompt"))
    if sampling is not None:
        bias = sampling["logit_bias"]
        sampling["logit_bias"] = None if bias is None else {int(token): value for token, value in bias.items()}
        sampling = Sampling(**sampling)
    return Row(
        data["slot"],
        data["start"],
        None if tokens is None else tuple(tokens),
        sampling,
        None if prompt is None else tuple(prompt),
        tuple(data["drafts"]),
        None if mask is None else bytes_from_json(mask),
        data["stages"] and tuple(data["stages"]),
        data["adapter"],
        tuple(data["save_at"]),
    )
