"""Responses and conversations kept in memory for later requests, evicted in least-recently-used order."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from .conversation_items import ConversationItems

MAX_RESPONSES = 1000
MAX_CONVERSATIONS = 1000
MAX_BYTES = 256 << 20  # of each of the two
MAX_CONVERSATION_BYTES = 16 << 20  # a longer conversation is not continued: each request reads all of it
MAX_CONVERSATION_ITEMS = 10_000


class Entry(Protocol):
    """What a store needs to know of an entry: its approximate size in bytes, and its items by their ids."""

    def size(self) -> int: ...

    @property
    def items(self) -> Mapping[str, bytes]: ...


E = TypeVar("E", bound=Entry)


class BoundedStore(Generic[E]):
    """A map from ids to entries, limited in number and in bytes. Finds the items in them, too. Threads may share it."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._lock = threading.RLock()
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, tuple[E, int]] = OrderedDict()
        self._holders: dict[str, dict[str, None]] = {}  # item id -> the entries that have it, the latest one last
        self.bytes: int = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, id: str) -> E | None:
        """The entry, which becomes the most recently used; None if there is none."""
        with self._lock:
            if id not in self._entries:
                return None
            self._entries.move_to_end(id)
            return self._entries[id][0]

    def put(self, id: str, entry: E) -> bool:
        """Store an entry, evicting others as needed. Returns False, without storing it, if it exceeds max_bytes."""
        size = entry.size()
        if size > self._max_bytes:
            return False
        with self._lock:
            self.delete(id)
            self._entries[id] = (entry, size)
            self.bytes += size
            for item in entry.items:
                self._holders.setdefault(item, {})[id] = None
            while len(self._entries) > self._max_entries or self.bytes > self._max_bytes:
                self.delete(next(iter(self._entries)))
            return True

    def delete(self, id: str) -> bool:
        """Remove an entry. Returns False if there was none."""
        with self._lock:
            if id not in self._entries:
                return False
            entry, size = self._entries.pop(id)
            self.bytes -= size
            for item in entry.items:
                del self._holders[item][id]
                if not self._holders[item]:
                    del self._holders[item]
            return True

    def item(self, id: str) -> bytes | None:
        """The item of this id in any entry, as JSON; None if there is none. The entry counts as used."""
        with self._lock:
            if id not in self._holders:
                return None
            entry = self.get(next(reversed(self._holders[id])))
            return None if entry is None else entry.items[id]


@dataclass(frozen=True)
class StoredResponse:
    """One response. Objects are kept as JSON, which needs less memory.

    response: the response. input, output: its items, by their ids.
    history: the conversation that a next response continues; None if this response was cancelled or failed.
    events: the server-sent events of a background response.
    """

    response: bytes
    input: Mapping[str, bytes]
    output: Mapping[str, bytes]
    history: ConversationItems | None
    events: Sequence[bytes] = ()

    @property
    def items(self) -> Mapping[str, bytes]:
        """Input and output."""
        return {**self.input, **self.output}

    def size(self) -> int:
        """Its approximate size in bytes. Text shared with earlier responses of the conversation counts again."""
        messages = self.history.messages if self.history is not None else ()
        texts = (*self.input.values(), *self.output.values(), *self.events)
        return len(self.response) + sum(100 + len(text) for text in texts) + sum(200 + len(m.content) for m in messages)


@dataclass(frozen=True)
class StoredConversation:
    """A conversation of /v1/conversations. created: Unix time. items: as JSON, by their ids, oldest first."""

    created: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    items: Mapping[str, bytes] = field(default_factory=dict)

    def has_room(self, count: int) -> bool:
        """Whether it may be continued with `count` more items."""
        return self.size() <= MAX_CONVERSATION_BYTES and len(self.items) + count <= MAX_CONVERSATION_ITEMS

    def size(self) -> int:
        """Its approximate size in bytes."""
        metadata = sum(len(name) + len(value) for name, value in self.metadata.items())
        return 200 + metadata + sum(100 + len(item) for item in self.items.values())


class ResponseStore(BoundedStore[StoredResponse]):
    """Responses by their ids."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        super().__init__(max_responses, max_bytes)


class ConversationStore(BoundedStore[StoredConversation]):
    """Conversations by their ids."""

    def __init__(self, max_conversations: int = MAX_CONVERSATIONS, max_bytes: int = MAX_BYTES) -> None:
        super().__init__(max_conversations, max_bytes)

    def append(self, id: str, items: Mapping[str, bytes]) -> bool:
        """Add items to a conversation. Returns False if it is gone, or would exceed max_bytes."""
        found = self.get(id)
        return found is not None and self.put(id, replace(found, items={**found.items, **items}))
