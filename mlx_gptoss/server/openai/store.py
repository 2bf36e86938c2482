"""Responses kept in memory for later requests, evicted in least-recently-used order."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from .items import ConversationItems

MAX_RESPONSES = 1000
MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class StoredResponse:
    """One response.

    response, input: the response and its input items as JSON, which needs less memory than the objects.
    history: the conversation that a next response continues; None if this response was cancelled or failed.
    """

    response: bytes
    input: bytes
    history: ConversationItems | None

    def size(self) -> int:
        """Its approximate size in bytes. Text shared with earlier responses of the conversation counts again."""
        messages = self.history.messages if self.history is not None else ()
        return len(self.response) + len(self.input) + sum(200 + len(m.content) for m in messages)


class ResponseStore:
    """A map from response ids to responses, limited in number and in bytes."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self.bytes: int = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, id: str) -> StoredResponse | None:
        """The response, which becomes the most recently used; None if there is none."""
        if id not in self._entries:
            return None
        self._entries.move_to_end(id)
        return self._entries[id][0]

    def put(self, id: str, stored: StoredResponse) -> bool:
        """Store a response, evicting others as needed. Returns False, without storing it, if it exceeds max_bytes."""
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
        """Remove a response. Returns False if there was none."""
        if id not in self._entries:
            return False
        self.bytes -= self._entries.pop(id)[1]
        return True
