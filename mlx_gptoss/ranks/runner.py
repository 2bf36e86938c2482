"""The runner of a model that several ranks share, as rank 0's engine sees it."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from math import ceil
from struct import Struct
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Pending, Row, Runner, Snapshot
from .wire import bytes_to_json, row_to_json

LENGTH = Struct("<Q")  # before each rank's part of a packed snapshot


class Held:
    """A Snapshot of which every rank has its part, by the same number. nbytes: of the largest part."""

    def __init__(self, own: Snapshot, number: int, nbytes: int, dropped: deque[int]) -> None:
        self.own, self.number, self.nbytes = own, number, nbytes
        self._dropped = dropped

    @property
    def start(self) -> int:
        return self.own.start

    @property
    def end(self) -> int:
        return self.own.end

    def __del__(self) -> None:
        self._dropped.append(self.number)


class Others(Protocol):
    """The other ranks, as a Leader reaches them."""

    def tell(self, *messages: Any) -> None: ...
    def tell_each(self, messages: Sequence[Sequence[Any]]) -> None: ...
    def packed(self) -> list[bytes]: ...
    def close(self) -> None: ...


class GroupRunner:
    """Tells every call to the other ranks, then makes it on this one's own runner. What they compute together, they
    compute in the same order, and they draw the same tokens: from the same logits, with the same seeds."""

    def __init__(self, own: Runner, others: Others, largest: float) -> None:
        """largest: bytes of the largest part of a snapshot to a byte of this rank's."""
        self.config, self.limits = own.config, own.limits
        self._own = own
        self._others = others
        self._largest = largest
        self._numbers = count()
        self._dropped: deque[int] = deque()  # snapshots that nobody holds any more

    def submit(self, rows: Sequence[Row]) -> Pending:
        rows = [_seeded(row) for row in rows]
        self._tell("submit", [row_to_json(row) for row in rows])
        return self._own.submit(rows)

    def release(self, slot: int) -> None:
        self._tell("release", slot)
        self._own.release(slot)

    def save(self, slot: int, start: int, end: int) -> Held:
        number = next(self._numbers)
        self._tell("save", slot, start, end, number)
        return self._held(self._own.save(slot, start, end), number)

    def restore(self, slot: int, chain: Sequence[Snapshot]) -> None:
        held = [snapshot for snapshot in chain if isinstance(snapshot, Held)]
        self._tell("restore", slot, [snapshot.number for snapshot in held])
        self._own.restore(slot, [snapshot.own for snapshot in held])

    def pack(self, snapshot: Snapshot) -> bytes:
        """The parts of all ranks, each behind its length."""
        assert isinstance(snapshot, Held)
        self._tell("pack", snapshot.number)
        parts = [self._own.pack(snapshot.own), *self._others.packed()]
        return b"".join(LENGTH.pack(len(part)) + part for part in parts)

    def unpack(self, start: int, end: int, data: bytes) -> Held:
        own, *parts = _parts(data)
        number = next(self._numbers)
        self._others.tell_each([[["unpack", start, end, number, bytes_to_json(part)]] for part in parts])
        return self._held(self._own.unpack(start, end, own), number)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self._tell("logits", list(ids))
        return self._own.logits(ids)

    def peak_memory(self) -> int:
        """Of this rank."""
        return self._own.peak_memory()

    def close(self) -> None:
        self._others.close()
        self._own.close()

    def _tell(self, *call: Any) -> None:
        drops = [self._dropped.popleft() for _ in range(len(self._dropped))]
        self._others.tell(*([["drop", drops]] if drops else []), list(call))

    def _held(self, own: Snapshot, number: int) -> Held:
        return Held(own, number, ceil(own.nbytes * self._largest), self._dropped)


def _parts(data: bytes) -> list[bytes]:
    """Raises ValueError if it is not made of whole parts."""
    parts, at = [], 0
    while at < len(data):
        if at + LENGTH.size > len(data):
            raise ValueError("the ranks' snapshot is cut off")
        start = at + LENGTH.size
        at = start + LENGTH.unpack_from(data, at)[0]
        if at > len(data):
            raise ValueError("the ranks' snapshot is cut off")
        parts.append(data[start:at])
    return parts


def _seeded(row: Row) -> Row:
    """With a seed where the row begins a random stream and has none of its own: every rank must draw alike."""
    if row.prompt is None or row.sampling is None or row.sampling.seed is not None:
        return row
    return replace(row, sampling=replace(row.sampling, seed=secrets.randbits(64)))
