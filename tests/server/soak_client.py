"""A small HTTP/1.1 client for soak.py: several thousand requests a minute from one process, bodies read as slowly as a
test likes, and connections dropped at any point."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any


class Connection:
    """One connection to the server, opened when it is first used, kept for further requests."""

    def __init__(self, port: int, receive_buffer: int | None = None) -> None:
        self.port = port
        self.receive_buffer = receive_buffer
        self.status = 0
        self.headers: dict[str, str] = {}
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._reader is None or self._writer is None:
            connection = socket.socket()
            connection.setblocking(False)
            if self.receive_buffer is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer)
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.port))
            limit = self.receive_buffer or 1 << 16
            self._reader, self._writer = await asyncio.open_connection(sock=connection, limit=max(limit, 8192))
        return self._reader, self._writer

    def close(self) -> None:
        """Drop the connection, whatever is under way."""
        if self._writer is not None:
            with suppress(RuntimeError):
                self._writer.transport.abort()
        self._reader = self._writer = None

    async def start(self, method: str, path: str, content: bytes = b"") -> None:
        """Send a request and read the head of its response. A connection that the server has closed is opened anew."""
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
        if content:
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        reused = self._reader is not None
        try:
            reader, writer = await self.open()
            writer.write(head.encode() + b"\r\n" + content)
            received = await reader.readuntil(b"\r\n\r\n")
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            self.close()
            if not reused or (isinstance(error, asyncio.IncompleteReadError) and error.partial):
                raise
            await self.start(method, path, content)
            return
        lines = received.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split(" ", 2)[1])
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body, as it arrives."""
        reader, _ = await self.open()
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(await reader.readuntil(b"\r\n"), 16):
                yield await reader.readexactly(size)
                await reader.readexactly(2)
            await reader.readexactly(2)
        elif length := int(self.headers.get("content-length", 0)):
            yield await reader.readexactly(length)
        if self.headers.get("connection") == "close":
            self.close()

    async def request(self, method: str, path: str, body: Any = None) -> bytes:
        """Send a request and return the body of its response; `status` has its status."""
        content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        await self.start(method, path, content)
        return b"".join([chunk async for chunk in self.chunks()])


async def lines(connection: Connection) -> AsyncIterator[bytes]:
    """The lines of a response's body."""
    left = b""
    async for chunk in connection.chunks():
        *whole, left = (left + chunk).split(b"\n")
        for line in whole:
            yield line
    if left:
        yield left
