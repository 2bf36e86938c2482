"""What goes between two ranks: a line that says who calls, lines of JSON, and an empty line every second as a sign of
life."""

from __future__ import annotations

import hmac
import json
import socket
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import Any

from ..backends.base import Row
from ..sampling import Sampling
from .launch import Launch

HEARTBEAT_S = 1.0
HEARTBEAT_TIMEOUT_S = 8.0  # without a sign of life a rank counts as lost
HELLO_TIMEOUT_S = 2.0  # how long one that has connected may take to say who it is
LOADING_HEARTBEAT_TIMEOUT_S = 60.0  # while it loads: copying a large weight from a slow disk holds up all of Python


class ConnectionLost(Exception):
    """The other side is gone; the message says how, as the end of a sentence."""


class Channel:
    """One connection. Any thread may send; one receives.

    heartbeat_timeout_s: how long the other side may give no sign of life. LOADING_HEARTBEAT_TIMEOUT_S until somebody sets it.
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
        """The other side's address."""
        return str(self._socket.getpeername()[0])

    @property
    def local_address(self) -> str:
        """This side's address."""
        return str(self._socket.getsockname()[0])

    def send(self, message: Any) -> None:
        """Raises ConnectionLost."""
        self._write(json.dumps(message).encode() + b"\n")

    def receive(self) -> Any:
        """The next message. Raises ConnectionLost at the end of the connection, after silence, and for what is no JSON."""
        while True:
            try:
                timeout_s = self.heartbeat_timeout_s
                self._socket.settimeout(timeout_s)
                line = self._lines.readline()
            except TimeoutError as error:
                raise ConnectionLost(f"has given no sign of life for {timeout_s:.0f} seconds") from error
            except ConnectionError as error:
                raise ConnectionLost("has ended") from error
            except (OSError, ValueError) as error:
                raise ConnectionLost(f"has lost its connection ({error})") from error
            if not line.endswith(b"\n"):
                raise ConnectionLost("has ended" if not line else "has broken off")
            if line != b"\n":
                try:
                    return json.loads(line)
                except ValueError as error:
                    raise ConnectionLost("does not speak as a rank does") from error

    def send_heartbeat(self) -> None:
        """Send one sign of life. Raises ConnectionLost."""
        self._write(b"\n")

    def start_heartbeats(self, on_lost: Callable[[ConnectionLost], None]) -> None:
        """Send signs of life from now on, on a thread of their own. `on_lost` is called there if they do not go out."""

        def run() -> None:
            while not self._closed.wait(HEARTBEAT_S):
                try:
                    self.send_heartbeat()
                except ConnectionLost as error:
                    if not self._closed.is_set():
                        on_lost(error)
                    return

        threading.Thread(target=run, name="mlx-gptoss sign of life", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other side was faster
        finally:
            self._socket.close()

    def _write(self, data: bytes) -> None:
        with self._lock:
            try:
                self._socket.sendall(data)
            except ConnectionError as error:
                raise ConnectionLost("has ended") from error
            except OSError as error:
                raise ConnectionLost(f"takes no messages ({error})") from error


def accept_rank(listener: socket.socket, launch: Launch, until: float) -> tuple[dict[str, Any], Channel]:
    """The next rank that connects, and what it says of itself; whoever else does is hung up on. Raises TimeoutError
    when time.monotonic() comes to `until`."""
    while True:
        listener.settimeout(max(0.01, until - time.monotonic()))
        connection, _ = listener.accept()
        hello = _read_hello(connection, launch)
        if hello is not None:
            return hello, Channel(connection)
        connection.close()


def _read_hello(connection: socket.socket, launch: Launch) -> dict[str, Any] | None:
    """What a rank says of itself first; None of whoever is none, or has not the token."""
    try:
        hello = json.loads(_read_hello_line(connection))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(hello, dict) or not isinstance(hello.get("token"), str):
        return None
    known = hmac.compare_digest(hello["token"].encode(), launch.token.encode())
    return hello if known and hello.get("rank") in range(1, launch.ranks) else None


def _read_hello_line(connection: socket.socket) -> bytes:
    """At most 1000 bytes, within HELLO_TIMEOUT_S all in all: a stranger must not hold up the others."""
    line, until = b"", time.monotonic() + HELLO_TIMEOUT_S
    while not line.endswith(b"\n") and len(line) < 1000:
        connection.settimeout(max(0.01, until - time.monotonic()))
        piece = connection.recv(1)
        if not piece:
            break
        line += piece
    return line


def bytes_to_json(data: bytes) -> str:
    return b64encode(data).decode()


def bytes_from_json(text: str) -> bytes:
    return b64decode(text)


def row_to_json(row: Row) -> dict[str, Any]:
    mask = None if row.mask is None else bytes_to_json(row.mask)
    return vars(row) | {"sampling": row.sampling and vars(row.sampling), "mask": mask}


def row_from_json(data: dict[str, Any]) -> Row:
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
    )
