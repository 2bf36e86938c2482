"""Responses that are kept for a later turn, the least recently used ones given up first. In memory alone."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from .items import ConversationItems

MAX_RESPONSES = 1000
MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class StoredResponse:
    """response, input: JSON as the interface shows it, which takes less than the objects. turns: what a next
    response goes on from; None if this one was cancelled or failed."""

    response: bytes
    input: bytes
    history: ConversationItems | None

    def size(self) -> int:
        """About its bytes. Turns share their text with those before them, which is counted again."""
        said = self.history.messages if self.history is not None else ()
        return len(self.response) + len(self.input) + sum(200 + len(m.content) for m in said)


class ResponseStore:
    """Bounded in items and in bytes."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, id: str) -> StoredResponse | None:
        if id not in self._entries:
            return None
        self._entries.move_to_end(id)
        return self._entries[id][0]

    def put(self, id: str, stored: StoredResponse) -> bool:
        """Whether it is kept: not if it alone is larger than the store."""
        size = stored.size()
        if size > self._max_bytes:
            return False
        self.delete(id)
        self._entries[id] = (stored, size)
        self.bytes += size
        while len(self._entries) > self._max_responses or self.bytes > self._max_bytes:
            self.delete(next(iter(self._entries)))
        return True

    def delete(self, id: str) -> bool:
        """Whether it was there."""
        if id not in self._entries:
            return False
        self.bytes -= self._entries.pop(id)[1]
        return True
