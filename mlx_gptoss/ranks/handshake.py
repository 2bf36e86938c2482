"""How a rank proves to another that it knows the launch's key, and how strangers are kept from delaying it.

The key never crosses the wire. Each side sends a random challenge and gets an HMAC of both challenges back:

    listening rank                                  connecting rank
    {"mlx-gptoss": PROTOCOL, "challenge": A}   ->
                                               <-   {"mlx-gptoss": PROTOCOL, "challenge": B, "rank": ..., "port": ...,
                                                     "proof": HMAC(key, connecting, A, B, rank, port)}
    {"proof": HMAC(key, listening, A, B, rank, port)}  ->

or {"error": REASON} in place of the last line. Until a connection has proved that, it costs one descriptor and at most
MAX_LINE_BYTES of memory, it has HELLO_TIMEOUT_S, and at most MAX_WAITING such connections are open.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from ..errors import GptOssError
from .launch import SECRET_VARIABLE, Launch
from .wire import Channel

PROTOCOL = 2  # 1 sent the key itself
MAX_LINE_BYTES = 1000
MAX_WAITING = 64  # connections without a proof; the oldest is closed for one more
HELLO_TIMEOUT_S = 10.0  # how long a connection may take to send its proof
POLL_S = 0.25  # how often late connections are looked for
RETRY_S = 0.05  # how long a listener rests when the process has no descriptor left

OTHER_SECRET, OTHER_PROTOCOL, DUPLICATE = "secret", "protocol", "duplicate"  # the reasons of an error


class BadGreeting(Exception):
    """What listens there did not greet as a rank does."""


@dataclass(frozen=True)
class Arrival:
    """A rank that has proved itself. port: where it listens for the rank before it; 0 for nowhere."""

    rank: int
    port: int
    channel: Channel


@dataclass(eq=False)
class _Stranger:
    """A connection without a proof."""

    connection: socket.socket
    deadline: float
    challenge: str = field(default_factory=lambda: secrets.token_hex(32))
    received: bytes = b""


class Reception:
    """Accepts ranks on a listening socket, among strangers. Use it as a context manager; it closes the listener.

    refused: the ranks whose proof was wrong.
    """

    def __init__(self, listener: socket.socket, launch: Launch) -> None:
        self.refused: set[int] = set()
        self._launch = launch
        self._listener = listener
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._strangers: dict[_Stranger, None] = {}  # the oldest first

    def __enter__(self) -> Reception:
        return self

    def __exit__(self, *error: object) -> None:
        for stranger in list(self._strangers):
            self._dismiss(stranger)
        self._selector.close()
        self._listener.close()

    def next_rank(self, wanted: set[int], deadline: float) -> Arrival:
        """The next rank, one of `wanted`. Others are told so and disconnected.

        deadline: in time.monotonic() seconds; TimeoutError is raised when it has passed.
        """
        while (now := time.monotonic()) < deadline:
            for key, _ in self._selector.select(min(POLL_S, deadline - now)):
                if key.fileobj is self._listener:
                    self._accept_all()
                elif key.data in self._strangers and (arrival := self._receive(key.data, wanted)):
                    return arrival
            for stranger in [one for one in self._strangers if one.deadline < time.monotonic()]:
                self._dismiss(stranger)
        raise TimeoutError

    def _accept_all(self) -> None:
        """Greet the connections that wait, at most MAX_WAITING, so that ranks among them are heard in between."""
        for _ in range(MAX_WAITING):
            try:
                connection, _address = self._listener.accept()
            except (BlockingIOError, ConnectionError, InterruptedError):
                return
            except OSError:  # no descriptor left: the oldest strangers have to go
                if self._strangers:
                    self._dismiss(next(iter(self._strangers)))
                time.sleep(RETRY_S)
                return
            if len(self._strangers) == MAX_WAITING:
                self._dismiss(next(iter(self._strangers)))
            connection.setblocking(False)
            stranger = _Stranger(connection, time.monotonic() + HELLO_TIMEOUT_S)
            self._strangers[stranger] = None
            self._selector.register(connection, selectors.EVENT_READ, stranger)
            if not self._send(stranger, {"mlx-gptoss": PROTOCOL, "challenge": stranger.challenge}):
                self._dismiss(stranger)

    def _receive(self, stranger: _Stranger, wanted: set[int]) -> Arrival | None:
        """Read what a stranger has sent. Returns its arrival once it has proved that it is a wanted rank."""
        try:
            piece = stranger.connection.recv(MAX_LINE_BYTES)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            piece = b""
        stranger.received += piece
        if piece and b"\n" not in stranger.received and len(stranger.received) < MAX_LINE_BYTES:
            return None
        hello = self._check_hello(stranger)
        if isinstance(hello, str):
            self._dismiss(stranger, hello)
            return None
        if hello["rank"] not in wanted:
            self._dismiss(stranger, DUPLICATE)
            return None
        if not self._send(stranger, {"proof": _proof(self._launch, "listening", stranger.challenge, hello)}):
            self._dismiss(stranger)
            return None
        self._release(stranger)
        stranger.connection.setblocking(True)
        return Arrival(hello["rank"], hello["port"], Channel(stranger.connection))

    def _check_hello(self, stranger: _Stranger) -> dict[str, Any] | str:
        """The hello that a stranger has sent, or why it is refused; "" for what is no hello."""
        hello = _parse_line(stranger.received)
        if hello is None:
            return ""
        if hello.get("mlx-gptoss") != PROTOCOL:
            return OTHER_PROTOCOL if type(hello.get("mlx-gptoss")) is int else ""
        rank, port, proof, challenge = (hello.get(name) for name in ("rank", "port", "proof", "challenge"))
        ranks = range(1, self._launch.ranks)
        if type(rank) is not int or rank not in ranks or type(port) is not int or not 0 <= port < 1 << 16:
            return ""
        if not isinstance(proof, str) or not isinstance(challenge, str):
            return ""
        if not _is_equal(proof, _proof(self._launch, "connecting", stranger.challenge, hello)):
            self.refused.add(rank)
            return OTHER_SECRET
        return hello

    def _send(self, stranger: _Stranger, message: dict[str, Any]) -> bool:
        """Whether the message, one line, was sent: without waiting, as it fits into any send buffer."""
        data = json.dumps(message).encode() + b"\n"
        try:
            return stranger.connection.send(data) == len(data)
        except OSError:
            return False

    def _dismiss(self, stranger: _Stranger, reason: str = "") -> None:
        if reason:
            self._send(stranger, {"error": reason})
        self._release(stranger)
        stranger.connection.close()

    def _release(self, stranger: _Stranger) -> None:
        del self._strangers[stranger]
        with suppress(KeyError, ValueError, OSError):
            self._selector.unregister(stranger.connection)


def introduce(connection: socket.socket, launch: Launch, port: int, deadline: float) -> Channel:
    """Prove to the rank that listens at the other end of a connection who this is, and have it prove the same.

    port: where this rank listens for the rank before it. deadline: in time.monotonic() seconds.

    Raises GptOssError if that rank refuses this one, OSError if the connection fails or ends, and BadGreeting if what
    listens there is no rank.
    """
    greeting = _read_message(connection, deadline)
    protocol, challenge = greeting.get("mlx-gptoss"), greeting.get("challenge")
    if type(protocol) is int and protocol != PROTOCOL:
        raise _refusal(launch, OTHER_PROTOCOL)
    if protocol != PROTOCOL or not isinstance(challenge, str):
        raise BadGreeting("it does not greet as a rank of mlx-gptoss does")
    hello = {"mlx-gptoss": PROTOCOL, "challenge": secrets.token_hex(32), "rank": launch.rank, "port": port}
    hello["proof"] = _proof(launch, "connecting", challenge, hello)
    connection.sendall(json.dumps(hello).encode() + b"\n")
    reply = _read_message(connection, deadline)
    if isinstance(reason := reply.get("error"), str):
        raise _refusal(launch, reason)
    proof = reply.get("proof")
    if not isinstance(proof, str) or not _is_equal(proof, _proof(launch, "listening", challenge, hello)):
        raise _refusal(launch, OTHER_SECRET)
    connection.settimeout(None)
    return Channel(connection)


@contextmanager
def closing_on_error(connection: socket.socket) -> Iterator[None]:
    """Close the connection if the body raises."""
    try:
        yield
    except BaseException:
        connection.close()
        raise


def _refusal(launch: Launch, reason: str) -> GptOssError:
    if reason == DUPLICATE:
        text = "another process has connected under that number; end it, and start all ranks again"
    elif reason == OTHER_PROTOCOL:
        text = "the other side speaks another version of the protocol; install the same mlx-gptoss on all machines"
    else:
        text = f"the other side has another secret or another launch; set the same {SECRET_VARIABLE} on all ranks"
    return GptOssError(f"rank {launch.rank} was refused: {text}")


def _proof(launch: Launch, side: str, challenge: str, hello: dict[str, Any]) -> str:
    """The HMAC of one side. challenge: the listening rank's; the other is in the hello."""
    fields = [side, PROTOCOL, challenge, hello["challenge"], hello["rank"], hello["port"]]
    return hmac.new(launch.key.encode(), json.dumps(fields).encode(), hashlib.sha256).hexdigest()


def _is_equal(received: str, expected: str) -> bool:
    return hmac.compare_digest(received.encode(errors="backslashreplace"), expected.encode())


def _read_message(connection: socket.socket, deadline: float) -> dict[str, Any]:
    """The next line, and nothing beyond it. Raises OSError, and BadGreeting if it is not a JSON object."""
    line = b""
    while not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        piece = connection.recv(1)
        if not piece:
            raise ConnectionResetError("it closed the connection")
        line += piece
    message = _parse_line(line)
    if message is None:
        raise BadGreeting("it does not greet as a rank of mlx-gptoss does")
    return message


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object that is exactly this line; None if it is anything else."""
    if line.find(b"\n") != len(line) - 1:
        return None
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
