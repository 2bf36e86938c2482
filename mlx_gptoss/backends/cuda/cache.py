"""The KV cache: growing tensors for full layers, rings for sliding ones. Every layer holds all slots.

Keys and values of a layer are one tensor, so that one kernel can write both. CUDA graphs need fixed addresses, so the
full-attention layers are allocated whole there.

Legend: S slots, B rows in this step, K kv heads, L tokens, C capacity, W window.
A row's keys are stored rotated; positions are absolute from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ...config import ModelConfig
from .quantized_kv import KeysOrValues, Packed
from .transfer import to_device

GROWTH = 256  # full layers grow by multiples of this many tokens
Pack = Callable[[Tensor], Packed]  # keys or values [..., 64] in 8 bits


@dataclass(frozen=True)
class Span:
    """Where this forward pass writes: either one slot and any number of tokens, or B slots and one token each.

    slots, starts: [B] host integers, ascending slots. length: tokens per row. offsets: starts on the device, int64 [B].
    adapters: of the rows: each one's index, and bool [B], the rows that use it; None if all do.
    saves_inside: keep what the one row overwrites in the rings, for snapshots of positions inside of it.
    """

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    length: int
    offsets: Tensor
    adapters: tuple[tuple[int, Tensor | None], ...] = ()
    saves_inside: bool = False

    @staticmethod
    def of(
        slots: Sequence[int],
        starts: Sequence[int],
        length: int,
        device: torch.device,
        adapters: Sequence[tuple[int, list[bool] | None]] = (),
        saves_inside: bool = False,
    ) -> Span:
        offsets = to_device(torch.tensor(starts, dtype=torch.int64), device)
        uses = [(index, None if rows is None else to_device(torch.tensor(rows), device)) for index, rows in adapters]
        return Span(tuple(slots), tuple(starts), length, offsets, tuple(uses), saves_inside)

    @property
    def end(self) -> int:
        """One past the last position that any row of this pass writes."""
        return max(self.starts) + self.length

    @property
    def positions(self) -> Tensor:
        """int64 [B, L]"""
        return self.offsets[:, None] + torch.arange(self.length, device=self.offsets.device)


@dataclass(frozen=True)
class Visible:
    """What one-token queries attend to: keys, values [B, K, C, 64]; mask bool [B, 1, 1, C], or None for all of them."""

    keys: KeysOrValues
    values: KeysOrValues
    mask: Tensor | None


class FullCache:
    """Keys and values of every position so far, [2, S, K, C, 64]; C grows from `capacity` in steps of GROWTH up to
    max_context. pack: turns them into 8 bits, of which the arrays are codes and scales (Packed); None keeps them."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        max_context: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        pack: Pack | None = None,
    ) -> None:
        """shape: S, K and 64."""
        slots, heads, dim = shape
        self._max_context, self._pack = max_context, pack
        kinds = [(dim, dtype)] if pack is None else [(dim, torch.uint8), (2, torch.float32)]
        self.arrays: list[Tensor] = [
            torch.zeros((2, slots, heads, capacity, width), dtype=kind, device=device) for width, kind in kinds
        ]

    @property
    def packed(self) -> bool:
        return self._pack is not None

    @property
    def keys(self) -> KeysOrValues:
        """[S, K, C, 64]"""
        return self._part(0)

    @property
    def values(self) -> KeysOrValues:
        """[S, K, C, 64]"""
        return self._part(1)

    def append(self, k: Tensor, v: Tensor, span: Span) -> Visible:
        """Store one token per row, k, v [B, K, 1, 64], and return all keys and values so far."""
        self._grow(span.end)
        slots = _indices(span)
        for array, new in self._stored(k, v):
            array[slots, :, span.offsets] = new[:, :, 0]
        rows = _slot_index(span)
        mask = None if len(set(span.starts)) == 1 else _causal_mask(span.offsets, span.end)
        return Visible(self.keys[rows, :, : span.end], self.values[rows, :, : span.end], mask)

    def extend(self, k: Tensor, v: Tensor, span: Span) -> tuple[KeysOrValues, KeysOrValues]:
        """Store one slot's next L tokens, k, v [1, K, L, 64], and return all up to them, [1, K, start + L, 64]."""
        self._grow(span.end)
        slot, start = span.slots[0], span.starts[0]
        for array, new in self._stored(k, v):
            array[slot, :, start : span.end] = new[0]
        return self.keys[slot : slot + 1, :, : span.end], self.values[slot : slot + 1, :, : span.end]

    @staticmethod
    def snapshot_places(start: int, end: int) -> int:
        """The number of positions that a snapshot holds."""
        return end - start

    def part(self, slot: int, start: int, end: int) -> list[Tensor]:
        """Copies of one slot's positions from start to end, [2, K, end - start, ...] each."""
        return [array[:, slot, :, start:end].clone() for array in self.arrays]

    def restore(self, slot: int, chain: Sequence[Sequence[Tensor]]) -> None:
        """Put consecutive parts, the first from position 0, into a slot."""
        self._grow(sum(part[0].shape[2] for part in chain))
        start = 0
        for part in chain:
            end = start + part[0].shape[2]
            for array, values in zip(self.arrays, part, strict=True):
                array[:, slot, :, start:end] = values
            start = end

    def _part(self, which: int) -> KeysOrValues:
        parts = [array[which] for array in self.arrays]
        return Packed(parts[0], parts[1]) if self.packed else parts[0]

    def _stored(self, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each array of the keys and of the values, [S, K, C, ...], with what it stores of k or v, [B, K, L, ...]."""
        for which, new in enumerate((k, v)):
            parts = [new] if self._pack is None else vars(self._pack(new)).values()
            yield from zip((array[which] for array in self.arrays), parts, strict=True)

    def _grow(self, needed: int) -> None:
        capacity = self.arrays[0].shape[3]
        if needed <= capacity:
            return
        # Growing by a quarter keeps the copies few; the memory plan counts max_context.
        wanted = max(needed, capacity + capacity // 4)
        more = min(-(-wanted // GROWTH) * GROWTH, max(self._max_context, needed)) - capacity
        for i, array in enumerate(self.arrays):
            pad = array.new_zeros((*array.shape[:3], more, array.shape[4]))
            self.arrays[i] = torch.cat([array, pad], dim=3)


@dataclass(frozen=True)
class SlotSnapshot:
    """A Snapshot of one slot. parts: of each layer's arrays, in order. A full-attention layer has the positions from
    start to end, [2, K, end - start, ...]; a ring its filled part at the end, [2, K, min(end, R), 64]."""

    start: int
    end: int
    parts: tuple[tuple[Tensor, ...], ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for parts in self.parts for part in parts)


class RingCache:
    """The last R positions of each slot, [2, S, K, R, 64]; position p is at index p % R.

    R is the window plus the slack: up to slack tokens may be written and taken back, because what they overwrote is
    outside every remaining window. Nothing has to be undone: attention masks by position.

    kept: by slot, of a row whose inside may be saved: its first position, and keys and values of the R positions before
        it with its own, [2, K, R + L, 64].
    """

    kept: dict[int, tuple[int, Tensor]]

    def __init__(
        self, shape: tuple[int, int, int], window: int, slack: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """shape: S, K and 64."""
        slots, heads, dim = shape
        self.window, self.slack, self.kept = window, slack, {}
        self._kv = torch.zeros((2, slots, heads, window + slack, dim), dtype=dtype, device=device)

    @property
    def arrays(self) -> list[Tensor]:
        return [self._kv]

    @property
    def keys(self) -> Tensor:
        """[S, K, R, 64]"""
        return self._kv[0]

    @property
    def values(self) -> Tensor:
        """[S, K, R, 64]"""
        return self._kv[1]

    def append(self, k: Tensor, v: Tensor, span: Span) -> Visible:
        """Store one token per row, k, v [B, K, 1, 64]. The order within a ring does not matter to softmax."""
        size = self.window + self.slack
        slots, places = _indices(span), span.offsets % size
        for ring, new in ((self.keys, k), (self.values, v)):
            ring[slots, :, places] = new[:, :, 0]
        filled = min(span.end, size)
        everywhere = min(span.starts) + 1 >= filled <= self.window
        rows = _slot_index(span)
        mask = None if everywhere else _window_mask(span.offsets, filled, self.window, size)
        return Visible(self.keys[rows, :, :filled], self.values[rows, :, :filled], mask)

    def extend(self, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Store one slot's next L tokens, k, v [1, K, L, 64], and return them after the W positions before them:
        [1, K, W + L, 64]. Entries for positions before 0 must be masked."""
        slot, start, size = span.slots[0], span.starts[0], self.window + self.slack
        ring = self._kv[:, slot]  # [2, K, R, 64]
        joined = ring.new_empty((*ring.shape[:2], size + span.length, ring.shape[3]))
        # Rolled so that the oldest position, start - R, comes first.
        joined[:, :, :size] = torch.roll(ring, -(start % size), 2)
        joined[0, :, size:], joined[1, :, size:] = k[0], v[0]
        ring.copy_(torch.roll(joined[:, :, -size:], span.end % size, 2))
        if span.saves_inside:
            self.kept[slot] = (start, joined)
        return joined[:1, :, self.slack :], joined[1:, :, self.slack :]

    def snapshot_places(self, start: int, end: int) -> int:
        """The number of indices that are filled at the end of a snapshot."""
        return min(end, self.window + self.slack)

    def part(self, slot: int, start: int, end: int) -> list[Tensor]:
        """A copy of the filled part of one slot as of `end`, [2, K, min(end, R), 64], without remains of an earlier
        sequence."""
        filled, size = self.snapshot_places(start, end), self.window + self.slack
        latest, turned = self._kv[:, slot, :, :filled], 0
        if slot in self.kept:
            first, joined = self.kept[slot]
            stop = size + end - first  # of the positions before `end` in `joined`
            if size < stop < joined.shape[2]:
                latest = joined[:, :, stop - filled : stop]
                turned = end % size if filled == size else 0
        return [torch.roll(latest, turned, 2)]

    def restore(self, slot: int, chain: Sequence[Sequence[Tensor]]) -> None:
        """Put the last part into a slot."""
        (part,) = chain[-1]
        self._kv[:, slot, :, : part.shape[2]] = part


LayerCache = FullCache | RingCache


class Cache:
    """One FullCache or RingCache per layer, for `slots` sequences of at most max_context tokens. whole: allocate all
    memory at once, at fixed addresses. pack: as in FullCache; rings are small and stay as they are. slack: tokens that
    can be taken back."""

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        max_context: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        whole: bool = False,
        pack: Pack | None = None,
        slack: int = 0,
    ) -> None:
        shape, capacity = (slots, config.num_key_value_heads, config.head_dim), max_context if whole else 0
        self.layers: list[LayerCache] = [
            FullCache(shape, max_context, capacity, dtype, device, pack)
            if window is None
            else RingCache(shape, window, slack, dtype, device)
            for window in config.windows
        ]
        self.rings: list[RingCache] = [layer for layer in self.layers if isinstance(layer, RingCache)]
        self.pack: Pack | None = pack

    def save(self, slot: int, start: int, end: int) -> SlotSnapshot:
        """As Runner.save."""
        return SlotSnapshot(start, end, tuple(tuple(layer.part(slot, start, end)) for layer in self.layers))

    def drop_kept(self, unless: Container[int]) -> None:
        """Free what is kept for snapshots inside of rows, except for these slots."""
        for ring in self.rings:
            if ring.kept:
                ring.kept = {slot: kept for slot, kept in ring.kept.items() if slot in unless}

    def release(self, slot: int) -> None:
        """Free what is kept for snapshots inside of the slot's last row."""
        for ring in self.rings:
            ring.kept.pop(slot, None)

    def restore(self, slot: int, chain: Sequence[SlotSnapshot]) -> None:
        """As Runner.restore."""
        for i, layer in enumerate(self.layers):
            layer.restore(slot, [saved.parts[i] for saved in chain])

    def unpack(self, start: int, end: int, data: bytes) -> SlotSnapshot:
        """As Runner.unpack: the concatenated bytes of all parts."""
        kinds = [
            [
                (array, (2, array.shape[2], layer.snapshot_places(start, end), array.shape[4] * array.itemsize))
                for array in layer.arrays
            ]
            for layer in self.layers
        ]
        if len(data) != (size := sum(prod(shape) for layer in kinds for _, shape in layer)):
            raise ValueError(f"a snapshot of the positions {start} to {end} has {size} bytes, not {len(data)}")
        whole, parts, begin = torch.frombuffer(bytearray(data), dtype=torch.uint8), [], 0
        for layer in kinds:
            found = []
            for like, shape in layer:
                piece = whole[begin : begin + prod(shape)].view(shape).clone()
                found.append(piece.view(like.dtype).to(like.device))
                begin += prod(shape)
            parts.append(tuple(found))
        return SlotSnapshot(start, end, tuple(parts))


def _indices(span: Span) -> Tensor:
    return to_device(torch.tensor(span.slots), span.offsets.device)


def _slot_index(span: Span) -> slice | Tensor:
    """An index of the slots: a slice (a view) if they are adjacent, otherwise a tensor (a copy)."""
    first, last = span.slots[0], span.slots[-1]
    return slice(first, last + 1) if last - first + 1 == len(span.slots) else _indices(span)


def _window_mask(offsets: Tensor, filled: int, window: int, ring: int) -> Tensor:
    """Boolean [B, 1, 1, filled]: whether row b, at position offsets[b], sees a place of a ring, which holds the latest
    position that fell on it up to the row's, or one taken back."""
    age = (offsets[:, None, None, None] - torch.arange(filled, device=offsets.device)) % ring
    return (age < window) & (age <= offsets[:, None, None, None])


def _causal_mask(offsets: Tensor, end: int) -> Tensor:
    """Boolean [B, 1, 1, end]: row b sees positions up to and including offsets[b]."""
    return torch.arange(end, device=offsets.device) <= offsets[:, None, None, None]
