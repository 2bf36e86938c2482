"""The runner of a model that is split over several ranks, as rank 0's engine sees it."""

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

from ..backends.base import Limits, Pending, Row, Runner, Snapshot
from ..config import ModelConfig
from .wire import bytes_from_json, bytes_to_json, row_to_json

PART_LENGTH = Struct("<Q")  # precedes each rank's part of a packed snapshot


class GroupSnapshot:
    """A Snapshot of which every rank holds its part under the same number.

    local: this rank's part. nbytes: size of the largest part. dropped: receives the number when the snapshot is
    garbage-collected.
    """

    local: Snapshot
    number: int
    nbytes: int

    def __init__(self, local: Snapshot, number: int, nbytes: int, dropped: deque[int]) -> None:
        self.local, self.number, self.nbytes = local, number, nbytes
        self._dropped = dropped

    @property
    def start(self) -> int:
        return self.local.start

    @property
    def end(self) -> int:
        return self.local.end

    def __del__(self) -> None:
        self._dropped.append(self.number)


class OtherRanks(Protocol):
    """The methods of a Leader that GroupRunner calls."""

    def broadcast(self, *messages: Any) -> None: ...
    def scatter(self, messages: Sequence[Sequence[Any]]) -> None: ...
    def gather(self) -> list[Any]: ...
    @property
    def count(self) -> int: ...
    def close(self) -> None: ...


class GroupRunner:
    """Sends every call to the other ranks, then makes it on this rank's own runner.

    So all ranks run the same collectives in the same order, and sample the same tokens: from the same logits, with the
    same seeds.
    """

    config: ModelConfig
    limits: Limits

    def __init__(self, local: Runner, other_ranks: OtherRanks, kv_ratio: float) -> None:
        """kv_ratio: size of the largest part of a snapshot, divided by the size of this rank's."""
        self.config, self.limits = local.config, local.limits
        self._local = local
        self._other_ranks = other_ranks
        self._kv_ratio = kv_ratio
        self._numbers = count()
        self._dropped: deque[int] = deque()  # numbers of garbage-collected snapshots that the others still hold

    def submit(self, rows: Sequence[Row]) -> Pending:
        rows = [_with_seed(row) for row in rows]
        self._broadcast("submit", [row_to_json(row) for row in rows])
        return self._local.submit(rows)

    def release(self, slot: int) -> None:
        self._broadcast("release", slot)
        self._local.release(slot)

    def save(self, slot: int, start: int, end: int) -> GroupSnapshot:
        number = next(self._numbers)
        self._broadcast("save", slot, start, end, number)
        return self._group_snapshot(self._local.save(slot, start, end), number)

    def restore(self, slot: int, chain: Sequence[Snapshot]) -> None:
        snapshots = [snapshot for snapshot in chain if isinstance(snapshot, GroupSnapshot)]
        self._broadcast("restore", slot, [snapshot.number for snapshot in snapshots])
        self._local.restore(slot, [snapshot.local for snapshot in snapshots])

    def pack(self, snapshot: Snapshot) -> bytes:
        """The parts of all ranks, each preceded by its length."""
        assert isinstance(snapshot, GroupSnapshot)
        self._broadcast("pack", snapshot.number)
        parts = [self._local.pack(snapshot.local), *map(bytes_from_json, self._other_ranks.gather())]
        return b"".join(PART_LENGTH.pack(len(part)) + part for part in parts)

    def unpack(self, start: int, end: int, data: bytes) -> GroupSnapshot:
        """Also raises ValueError if another rank cannot use its part."""
        own, *parts = _split_parts(data, 1 + self._other_ranks.count)
        snapshot = self._group_snapshot(self._local.unpack(start, end, own), next(self._numbers))
        messages = [[["unpack", start, end, snapshot.number, bytes_to_json(part)]] for part in parts]
        self._other_ranks.scatter(messages)
        damaged = [rank for rank, used in enumerate(self._other_ranks.gather(), 1) if not used]
        if damaged:  # the others drop theirs with the snapshot
            raise ValueError(f"rank {damaged[0]} cannot use its part of the packed snapshot")
        return snapshot

    def logits(self, ids: Sequence[int], adapter: int | None = None) -> NDArray[np.float32]:
        self._broadcast("logits", list(ids), adapter)
        return self._local.logits(ids, adapter)

    def peak_memory(self) -> int:
        """Peak memory of this rank, in bytes."""
        return self._local.peak_memory()

    def close(self) -> None:
        self._other_ranks.close()
        self._local.close()

    def _broadcast(self, *call: Any) -> None:
        """Send a call, and before it the numbers of snapshots to drop."""
        drops = [self._dropped.popleft() for _ in range(len(self._dropped))]
        self._other_ranks.broadcast(*([["drop", drops]] if drops else []), list(call))

    def _group_snapshot(self, local: Snapshot, number: int) -> GroupSnapshot:
        return GroupSnapshot(local, number, ceil(local.nbytes * self._kv_ratio), self._dropped)


def _split_parts(data: bytes, count: int) -> list[bytes]:
    """The parts of `count` ranks in a packed snapshot. Raises ValueError if one is truncated or missing."""
    parts, position = [], 0
    while position < len(data):
        if position + PART_LENGTH.size > len(data):
            raise ValueError("the packed snapshot is truncated")
        start = position + PART_LENGTH.size
        position = start + PART_LENGTH.unpack_from(data, position)[0]
        if position > len(data):
            raise ValueError("the packed snapshot is truncated")
        parts.append(data[start:position])
    if len(parts) != count:
        raise ValueError(f"the packed snapshot has the parts of {len(parts)} ranks, not {count}")
    return parts


def _with_seed(row: Row) -> Row:
    """The row with a random seed, if it starts a random stream without one: every rank must sample the same tokens."""
    if row.prompt is None or row.sampling is None or row.sampling.seed is not None:
        return row
    return replace(row, sampling=replace(row.sampling, seed=secrets.randbits(64)))
