"""The runner of a model that several ranks share, as rank 0's engine sees it."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Pending, Row, Runner, Snapshot
from ..errors import GptOssError
from .wire import row_to_json


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


class GroupRunner:
    """Tells every call to the other ranks, then makes it on this one's own runner. What they compute together, they
    compute in the same order, and they draw the same tokens: from the same logits, with the same seeds."""

    def __init__(
        self, own: Runner, tell: Callable[[Sequence[Any]], None], end: Callable[[], None], largest: float
    ) -> None:
        """tell: sends messages to the other ranks. end: ends them. largest: bytes of the largest part of a snapshot to
        a byte of this rank's."""
        self.config, self.limits = own.config, own.limits
        self._own = own
        self._send = tell
        self._end = end
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
        own = self._own.save(slot, start, end)
        return Held(own, number, ceil(own.nbytes * self._largest), self._dropped)

    def restore(self, slot: int, chain: Sequence[Snapshot]) -> None:
        held = [snapshot for snapshot in chain if isinstance(snapshot, Held)]
        self._tell("restore", slot, [snapshot.number for snapshot in held])
        self._own.restore(slot, [snapshot.own for snapshot in held])

    def pack(self, snapshot: Snapshot) -> bytes:
        raise GptOssError("snapshots of several ranks cannot be kept in files; leave the prompt cache out")

    def unpack(self, start: int, end: int, data: bytes) -> Held:
        raise GptOssError("snapshots of several ranks cannot be kept in files; leave the prompt cache out")

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self._tell("logits", list(ids))
        return self._own.logits(ids)

    def peak_memory(self) -> int:
        """Of this rank."""
        return self._own.peak_memory()

    def close(self) -> None:
        self._end()
        self._own.close()

    def _tell(self, *call: Any) -> None:
        drops = [self._dropped.popleft() for _ in range(len(self._dropped))]
        self._send(([["drop", drops]] if drops else []) + [list(call)])


def _seeded(row: Row) -> Row:
    """With a seed where the row begins a random stream and has none of its own: every rank must draw alike."""
    if row.prompt is None or row.sampling is None or row.sampling.seed is not None:
        return row
    return replace(row, sampling=replace(row.sampling, seed=secrets.randbits(64)))
