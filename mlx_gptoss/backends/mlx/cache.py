"""The KV cache: growing arrays for full layers, rings for sliding ones. Every layer holds all slots.

Legend: S slots, B rows in this step, H query heads, K kv heads, L tokens, T = B * L, A active experts, C capacity,
W window.
Keys and values of a layer are one array, so that a step writes both at once. A row's keys are stored rotated;
positions are absolute from 0.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ...config import ModelConfig
from .quantized_kv import QuantizedKV, empty, pack

GROWTH = 256  # full layers hold multiples of this many tokens


@dataclass(frozen=True)
class RingSpan:
    """What a pass sees in the rings of one window.

    size: R, the window plus the slack. seen: bool [B, 1 or H, L, min(end, R)], the filled places that each query sees;
    None is all.
    """

    size: int
    seen: mx.array | None

    @staticmethod
    def of(positions: NDArray[np.int64], window: int, slack: int, mask_heads: int) -> RingSpan:
        """positions: [B, L]"""
        size = window + slack
        few = positions.shape[1] <= slack + 1
        return RingSpan(size, _in_window(positions, window, size, mask_heads) if few else None)


@dataclass(frozen=True)
class Span:
    """Where this forward pass writes, either one slot and any number of tokens, or B slots and one token each, with
    the index arrays that every layer needs, made once on the host.

    slots, starts: [B] host integers, ascending slots. length: tokens per row. rings: by window.
    rows, offsets: slots and starts on the device, int32 [B].
    rotations: by how many positions each head of a one-token row's queries, keys and values is rotated, int32
        [B * (H + 2 K)]; a value by 0, which leaves it unchanged.
    tokens, pairs: indices of the activation rows that each token's experts read, uint32 [T, 1], and of the rows that
        they produce, uint32 [T, A]; both count up from 0.
    seen: bool [B, 1 or H, 1, end], the positions visible to each of several rows of unequal length; None is all.
    flat_rows: by S, K and C of a cache, the indices of what the rows write in it (flat_rows_of).
    adapters: of the rows: each one's index, and bool [B], the rows that use it; None if all do.
    saves_inside: keep what the one row overwrites in the rings, for snapshots of positions inside of it.
    """

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    length: int
    rings: Mapping[int, RingSpan]
    rows: mx.array
    offsets: mx.array
    rotations: mx.array
    tokens: mx.array
    pairs: mx.array
    seen: mx.array | None
    adapters: tuple[tuple[int, mx.array | None], ...] = ()
    saves_inside: bool = False
    flat_rows: dict[tuple[int, ...], mx.array] = field(default_factory=dict)

    @staticmethod
    def of(
        config: ModelConfig,
        slots: Sequence[int],
        starts: Sequence[int],
        length: int,
        slack: int = 0,
        adapters: Sequence[tuple[int, list[bool] | None]] = (),
        mask_heads: int = 1,
        saves_inside: bool = False,
    ) -> Span:
        """mask_heads: heads of the masks of several rows: H where attention needs them all, so that they are copied
        once a step and not in every layer; otherwise 1."""
        kv_heads = config.num_key_value_heads
        positions = np.add.outer(starts, np.arange(length))  # [B, L]
        rows, offsets = mx.array(np.array([slots, starts], np.int32))
        turned = [1] * (config.num_attention_heads + kv_heads) + [0] * kv_heads
        return Span(
            slots=tuple(slots),
            starts=tuple(starts),
            length=length,
            rings={w: RingSpan.of(positions, w, slack, mask_heads) for w in set(config.windows) if w is not None},
            rows=rows,
            offsets=offsets,
            rotations=mx.array(np.outer(starts, turned).ravel().astype(np.int32)),
            tokens=_count_up(len(slots) * length, 1),
            pairs=_count_up(len(slots) * length, config.num_experts_per_tok),
            seen=_causal_mask(starts, max(starts) + length, mask_heads) if len(set(starts)) > 1 else None,
            adapters=tuple((index, None if uses is None else mx.array(uses)) for index, uses in adapters),
            saves_inside=saves_inside,
        )

    @property
    def end(self) -> int:
        """One past the last position that any row of this pass writes."""
        return max(self.starts) + self.length

    def flat_rows_of(self, cache: mx.array) -> mx.array:
        """Where each row's token goes in a cache [2, S, K, C, ...] with its first four axes flattened, uint32
        [2 * B * K]: place start % C, which in a cache of all positions is start."""
        _, S, K, C, _ = cache.shape
        if (S, K, C) not in self.flat_rows:
            heads = np.arange(2 * S * K, dtype=np.uint32).reshape(2, S, K)[:, list(self.slots)]  # [2, B, K]
            places = np.array(self.starts, np.uint32)[:, None] % C
            self.flat_rows[S, K, C] = mx.array((heads * np.uint32(C) + places).ravel())
        return self.flat_rows[S, K, C]


class FullCache:
    """Keys and values of all positions so far, [2, S, K, C, 64], or 8-bit as in QuantizedKV. C grows up to max_context.

    phase: from 0 to 1. Layers of different phases grow at different times, so that one is copied at a time; growing by
    a quarter keeps the copies few.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: mx.Dtype, max_context: int, phase: float = 0.0, packed: bool = False
    ) -> None:
        """shape: S, K and 64."""
        nothing = (2, *shape[:2], 0, shape[2])
        self._max_context, self._phase, self._packed = max_context, phase, packed
        self.arrays: list[mx.array] = list(empty(nothing)) if packed else [mx.zeros(nothing, dtype=dtype)]

    def update(self, kv: mx.array, span: Span) -> tuple[mx.array, mx.array] | QuantizedKV:
        """Store kv [2, B, K, L, 64] and return all keys and values so far, [B, K, end, 64] each."""
        self.write(kv, span)
        rows = _slot_index(span)
        # One indexing operation, because a separate [0] would copy.
        keys, values = ([array[i, rows, :, : span.end] for array in self.arrays] for i in (0, 1))
        if self._packed:
            return QuantizedKV((keys[0], keys[1], keys[2]), (values[0], values[1], values[2]))
        return keys[0], values[0]

    def write(self, kv: mx.array, span: Span) -> list[mx.array]:
        """Store kv [2, B, K, L, 64] and return the arrays of all slots."""
        self.reserve(span.end)
        parts = pack(kv) if self._packed else (kv,)
        self.arrays = [_write(a, p, span) for a, p in zip(self.arrays, parts, strict=True)]
        return self.arrays

    @staticmethod
    def snapshot_places(start: int, end: int) -> int:
        """The number of positions that a snapshot holds."""
        return end - start

    def part(self, slot: int, start: int, end: int) -> list[mx.array]:
        """Positions start to end of one slot, [2, 1, K, end - start, ...] each."""
        return [array[:, slot : slot + 1, :, start:end] for array in self.arrays]

    def restore(self, slot: int, chain: Sequence[Sequence[mx.array]]) -> None:
        """Put consecutive parts, the first from position 0, into a slot."""
        whole = [
            parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=3) for parts in zip(*chain, strict=True)
        ]
        end = whole[0].shape[3]
        self.reserve(end)
        for array, part in zip(self.arrays, whole, strict=True):
            array[:, slot : slot + 1, :, :end] = part

    def reserve(self, needed: int) -> None:
        """Have room for so many positions."""
        capacity = self.arrays[0].shape[3]
        if needed <= capacity:
            return
        size = GROWTH * 1.25**self._phase
        while size < needed:
            size *= 1.25
        more = min(-(-int(size) // GROWTH) * GROWTH, max(self._max_context, needed)) - capacity
        for i, array in enumerate(self.arrays):
            pad = mx.zeros((*array.shape[:3], more, array.shape[4]), dtype=array.dtype)
            self.arrays[i] = mx.concatenate([array, pad], axis=3)


@dataclass(frozen=True)
class SlotSnapshot:
    """A Snapshot of one slot. arrays: those of each layer's cache, in order. A full-attention layer has the positions
    from start to end, [2, 1, K, end - start, ...]; a ring its filled part at the end, [2, 1, K, min(end, R), 64].
    """

    start: int
    end: int
    arrays: tuple[mx.array, ...]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


class RingCache:
    """The last R positions of each slot, [2, S, K, R, 64]; position p is at index p % R.

    R is the window plus the slack: up to slack tokens may be written and taken back, because what they overwrote is
    outside every remaining window. Nothing has to be undone: attention masks by position.

    kept: by slot, of a row whose inside may be saved: its first position, and the R positions before it with its own,
        [2, 1, K, R + L, 64].
    """

    window: int
    slack: int
    kept: dict[int, tuple[int, mx.array]]

    def __init__(self, shape: tuple[int, int, int], dtype: mx.Dtype, window: int, slack: int) -> None:
        """shape: S, K and 64."""
        self.window, self.slack, self.kept = window, slack, {}
        self._kv = mx.zeros((2, *shape[:2], window + slack, shape[2]), dtype=dtype)

    @property
    def arrays(self) -> list[mx.array]:
        return [self._kv]

    def snapshot_places(self, start: int, end: int) -> int:
        """The number of indices that are filled at the end of a snapshot."""
        return min(end, self._kv.shape[3])

    def part(self, slot: int, start: int, end: int) -> list[mx.array]:
        """The filled part of one slot as of `end`, [2, 1, K, min(end, R), 64], without remains of an earlier
        sequence."""
        filled, ring = self.snapshot_places(start, end), self._kv.shape[3]
        if slot in self.kept:
            first, joined = self.kept[slot]
            stop = ring + end - first  # of the positions before `end` in `joined`
            if ring < stop < joined.shape[3]:
                latest = joined[..., stop - filled : stop, :]
                return [latest if filled < ring else mx.roll(latest, end % ring, 3)]
        return [self._kv[:, slot : slot + 1, :, :filled]]

    def restore(self, slot: int, chain: Sequence[Sequence[mx.array]]) -> None:
        """Put the last part into a slot."""
        (part,) = chain[-1]
        self._kv[:, slot : slot + 1, :, : part.shape[3]] = part

    def update(self, kv: mx.array, span: Span) -> tuple[mx.array, mx.array]:
        """Store kv [2, B, K, L, 64], one token per row, or up to 1 + slack of one slot, and return the ring's contents,
        [B, K, min(end, R), 64] each. Their order does not matter to softmax."""
        rows, filled = _slot_index(span), min(span.end, self._kv.shape[3])
        self.write(kv, span)
        return self._kv[0, rows, :, :filled], self._kv[1, rows, :, :filled]

    def write(self, kv: mx.array, span: Span) -> list[mx.array]:
        """Store kv [2, B, K, L, 64], as `update`, and return the array of all slots."""
        self._kv = _write(self._kv, kv, span)
        return [self._kv]

    def extend(self, kv: mx.array, span: Span) -> tuple[mx.array, mx.array]:
        """Store one slot's next L tokens, kv [2, 1, K, L, 64], and return keys and values after the W positions
        before them: [1, K, W + L, 64] each. Positions before 0 are zeros, to be masked."""
        slot, ring = span.slots[0], self.window + self.slack
        # Rolled so that the oldest position, start - R, comes first.
        past = mx.roll(self._kv[:, slot : slot + 1], -(span.starts[0] % ring), 3)
        joined = mx.concatenate([past, kv], axis=3)
        if span.saves_inside:
            self.kept[slot] = (span.starts[0], joined)
        self._kv[:, slot : slot + 1] = mx.roll(joined[..., -ring:, :], span.end % ring, 3)
        return joined[0, ..., self.slack :, :], joined[1, ..., self.slack :, :]


LayerCache = FullCache | RingCache


class Cache:
    """One FullCache or RingCache per layer, for `slots` sequences of at most max_context tokens. kv_bits: 8 quantizes
    the full-attention layers; rings are small and stay as they are. slack: tokens that can be taken back."""

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        max_context: int,
        dtype: mx.Dtype,
        kv_bits: int | None = None,
        slack: int = 0,
    ) -> None:
        shape = (slots, config.num_key_value_heads, config.head_dim)
        full = [layer for layer, window in enumerate(config.windows) if window is None]
        self.layers: list[LayerCache] = [
            FullCache(shape, dtype, max_context, full.index(layer) / len(full), packed=kv_bits == 8)
            if window is None
            else RingCache(shape, dtype, window, slack)
            for layer, window in enumerate(config.windows)
        ]
        self.rings: list[RingCache] = [layer for layer in self.layers if isinstance(layer, RingCache)]

    @property
    def arrays(self) -> list[mx.array]:
        return [array for layer in self.layers for array in layer.arrays]

    def drop_kept(self, unless: Container[int]) -> None:
        """Free what is kept for snapshots inside of rows, except for these slots."""
        for ring in self.rings:
            if ring.kept:
                ring.kept = {slot: kept for slot, kept in ring.kept.items() if slot in unless}

    def release(self, slot: int) -> None:
        """Free what is kept for snapshots inside of the slot's last row."""
        for ring in self.rings:
            ring.kept.pop(slot, None)

    def save(self, slot: int, start: int, end: int) -> SlotSnapshot:
        """As Runner.save. Waits for the steps in flight: while a copy is pending, a step could not write in place."""
        parts = [array for layer in self.layers for array in layer.part(slot, start, end)]
        copies = tuple(mx.contiguous(part) for part in parts)
        mx.eval(copies)
        return SlotSnapshot(start, end, copies)

    def restore(self, slot: int, chain: Sequence[SlotSnapshot]) -> None:
        """As Runner.restore."""
        at = 0
        for layer in self.layers:
            count = len(layer.arrays)
            layer.restore(slot, [saved.arrays[at : at + count] for saved in chain])
            at += count

    def unpack(self, start: int, end: int, data: bytes) -> SlotSnapshot:
        """As Runner.unpack: the concatenated bytes of SlotSnapshot's arrays."""
        kinds = [
            (array.dtype, (2, 1, array.shape[2], layer.snapshot_places(start, end), array.shape[4] * array.dtype.size))
            for layer in self.layers
            for array in layer.arrays
        ]
        if len(data) != (size := sum(prod(shape) for _, shape in kinds)):
            raise ValueError(f"a snapshot of the positions {start} to {end} has {size} bytes, not {len(data)}")
        whole, arrays, at = np.frombuffer(data, np.uint8), [], 0
        for dtype, shape in kinds:
            arrays.append(mx.array(whole[at : at + prod(shape)].reshape(shape)).view(dtype))
            at += prod(shape)
        return SlotSnapshot(start, end, tuple(arrays))


def _write(cache: mx.array, kv: mx.array, span: Span) -> mx.array:
    """cache [2, S, K, C, 64] with kv [2, B, K, L, 64] written from each row's place on: of one slot, around the end of
    a ring if need be, or one token of each of several."""
    if len(span.slots) > 1:
        flat = cache.reshape(-1, cache.shape[-1])
        flat[span.flat_rows_of(cache)] = kv.reshape(-1, kv.shape[-1])
        return flat.reshape(cache.shape)
    slot, size = span.slots[0], cache.shape[3]
    place = span.starts[0] % size
    if place + span.length <= size:
        cache[:, slot : slot + 1, :, place : place + span.length] = kv
    else:
        cache[:, slot : slot + 1, :, place:] = kv[..., : size - place, :]
        cache[:, slot : slot + 1, :, : place + span.length - size] = kv[..., size - place :, :]
    return cache


def _slot_index(span: Span) -> slice | mx.array:
    """An index of the slots: a slice (a view) if they are adjacent, otherwise an array (a copy)."""
    first, last = span.slots[0], span.slots[-1]
    return slice(first, last + 1) if last - first + 1 == len(span.slots) else span.rows


def _count_up(rows: int, columns: int) -> mx.array:
    """0, 1, 2, ... in row-major order, made on the host."""
    return mx.array(np.arange(rows * columns, dtype=np.uint32).reshape(rows, columns))


def _in_window(positions: NDArray[np.int64], window: int, ring: int, heads: int) -> mx.array | None:
    """Boolean [B, heads, L, filled]: whether the query at each of positions [B, L] sees a place of a ring, which holds
    the latest position that fell on it up to the query, or one taken back. None if each sees all that are filled."""
    age = (positions[..., None] - np.arange(min(positions.max() + 1, ring))) % ring
    seen = (age < window) & (age <= positions[..., None])
    return None if seen.all() else mx.array(_of_heads(seen[:, None], heads))


def _causal_mask(starts: Sequence[int], end: int, heads: int) -> mx.array:
    """Boolean [B, heads, 1, end]: row b sees positions up to and including starts[b]."""
    last = np.array(starts, np.int32).reshape(-1, 1, 1, 1)
    return mx.arange(end) <= mx.array(_of_heads(last, heads))


def _of_heads(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """values [B, 1, ...], repeated for all heads where there are several rows: one row's are read as they are."""
    return values if len(values) == 1 else np.repeat(values, heads, axis=1)
