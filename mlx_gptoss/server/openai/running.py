"""Responses in progress, and the events of those that are made in the background."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..event_queue import EventQueue


class EventLog:
    """Encoded events, in the order of their sequence numbers, which begin at 0. Any number of clients may read them."""

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self._closed = False
        self._changed = asyncio.Event()

    def append(self, events: list[bytes]) -> None:
        """Add events, and wake the readers."""
        self.events += events
        self._wake()

    def close(self) -> None:
        """No more events will follow."""
        self._closed = True
        self._wake()

    async def follow(self, after: int = -1) -> AsyncIterator[bytes]:
        """Yield the events with sequence numbers over `after`, several at once, as they are written."""
        begin = after + 1
        while True:
            changed = self._changed
            if begin < len(self.events):
                end = len(self.events)
                yield b"".join(self.events[begin:end])
                begin = end
            elif self._closed:
                return
            else:
                await changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


@dataclass(frozen=True)
class RunningResponse:
    """A response in progress. response: as written so far. log: the events of a background response."""

    response: Mapping[str, Any]
    queue: EventQueue
    log: EventLog | None = None
