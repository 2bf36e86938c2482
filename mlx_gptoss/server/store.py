"""Responses that are kept for a later turn, the least recently used ones given up first. In memory alone."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from .items import Turns

MOST_RESPONSES = 1000
MOST_BYTES = 256 << 20


@dataclass(frozen=True)
class Stored:
    """response, input: JSON as the interface shows it, which takes less than the objects. turns: what a next
    response goes on from; None if this one was cancelled or failed."""

    response: bytes
    input: bytes
    turns: Turns | None

    def size(self) -> int:
        """About its bytes. Turns share their text with those before them, which is counted again."""
        said = self.turns.messages if self.turns is not None else ()
        return len(self.response) + len(self.input) + sum(200 + len(m.content) for m in said)


class Store:
    """Bounded in items and in bytes."""

    def __init__(self, most: int = MOST_RESPONSES, most_bytes: int = MOST_BYTES) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._kept: OrderedDict[str, tuple[Stored, int]] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, id: str) -> Stored | None:
        if id not in self._kept:
            return None
        self._kept.move_to_end(id)
        return self._kept[id][0]

    def put(self, id: str, stored: Stored) -> bool:
        """Whether it is kept: not if it alone is larger than the store."""
        size = stored.size()
        if size > self._most_bytes:
            return False
        self.delete(id)
        self._kept[id] = (stored, size)
        self.bytes += size
        while len(self._kept) > self._most or self.bytes > self._most_bytes:
            self.delete(next(iter(self._kept)))
        return True

    def delete(self, id: str) -> bool:
        """Whether it was there."""
        if id not in self._kept:
            return False
        self.bytes -= self._kept.pop(id)[1]
        return True
