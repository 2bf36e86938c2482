"""The KV cache: growing tensors for full layers, rings for sliding ones. Every layer holds all slots.

CUDA graphs need fixed addresses, so the full-attention layers are allocated whole there.

Legend: S slots, B rows in this step, K kv heads, L tokens, C capacity, W window.
A row's keys are stored rotated; positions are absolute from 0.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ...config import ModelConfig
from .transfer import to_device

GROWTH = 256  # full layers grow by multiples of this many tokens


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

    keys: Tensor
    values: Tensor
    mask: Tensor | None


class FullCache:
    """Keys and values of every position so far, [S, K, C, 64]; C grows from `capacity` in steps of GROWTH up to
    max_context."""

    def __init__(
        self,
        slots: int,
        heads: int,
        head_dim: int,
        max_context: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._max_context = max_context
        self.keys: Tensor = torch.zeros((slots, heads, capacity, head_dim), dtype=dtype, device=device)
        self.values: Tensor = torch.zeros((slots, heads, capacity, head_dim), dtype=dtype, device=device)

    def append(self, k: Tensor, v: Tensor, span: Span) -> Visible:
        """Store one token per row, k, v [B, K, 1, 64], and return all keys and values so far."""
        self._grow(span.end)
        slots = _indices(span)
        self.keys[slots, :, span.offsets] = k[:, :, 0]
        self.values[slots, :, span.offsets] = v[:, :, 0]
        rows = _slot_index(span)
        mask = None if len(set(span.starts)) == 1 else _causal_mask(span.offsets, span.end)
        return Visible(self.keys[rows, :, : span.end], self.values[rows, :, : span.end], mask)

    def extend(self, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Store one slot's next L tokens, k, v [1, K, L, 64], and return all up to them, [1, K, start + L, 64]."""
        self._grow(span.end)
        slot, start = span.slots[0], span.starts[0]
        self.keys[slot, :, start : span.end] = k[0]
        self.values[slot, :, start : span.end] = v[0]
        return self.keys[slot : slot + 1, :, : span.end], self.values[slot : slot + 1, :, : span.end]

    @staticmethod
    def snapshot_places(start: int, end: int) -> int:
        """The number of positions that a snapshot holds."""
        return end - start

    def part(self, slot: int, start: int, end: int) -> Part:
        """Copies of one slot's positions from start to end, [K, end - start, 64] each."""
        return self.keys[slot, :, start:end].clone(), self.values[slot, :, start:end].clone()

    def restore(self, slot: int, chain: Sequence[Part]) -> None:
        """Put consecutive parts, the first from position 0, into a slot."""
        self._grow(sum(keys.shape[1] for keys, _ in chain))
        start = 0
        for keys, values in chain:
            end = start + keys.shape[1]
            self.keys[slot, :, start:end], self.values[slot, :, start:end] = keys, values
            start = end

    def _grow(self, needed: int) -> None:
        slots, heads, capacity, dim = self.keys.shape
        if needed <= capacity:
            return
        # Growing by a quarter keeps the copies few; the memory plan counts max_context.
        wanted = max(needed, capacity + capacity // 4)
        more = min(-(-wanted // GROWTH) * GROWTH, max(self._max_context, needed)) - capacity
        pad = self.keys.new_zeros((slots, heads, more, dim))
        self.keys = torch.cat([self.keys, pad], dim=2)
        self.values = torch.cat([self.values, pad], dim=2)


Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SlotSnapshot:
    """A Snapshot of one slot. parts: keys and values of each layer, in order. A full-attention layer has the positions
    from start to end, [K, end - start, 64]; a ring its filled part at the end, [K, min(end, W), 64]."""

    start: int
    end: int
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for pair in self.parts for part in pair)


class RingCache:
    """The last W positions of each slot, [S, K, W, 64]; position p is at index p % W.

    kept: by slot, of a row whose inside may be saved: its first position, and keys and values of the W positions before
        it with its own, [1, K, W + L, 64] each.
    """

    kept: dict[int, tuple[int, tuple[Tensor, Tensor]]]

    def __init__(
        self, slots: int, heads: int, head_dim: int, window: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.window, self.kept = window, {}
        self.keys: Tensor = torch.zeros((slots, heads, window, head_dim), dtype=dtype, device=device)
        self.values: Tensor = torch.zeros((slots, heads, window, head_dim), dtype=dtype, device=device)

    def append(self, k: Tensor, v: Tensor, span: Span) -> Visible:
        """Store one token per row, k, v [B, K, 1, 64]. The order within a ring does not matter to softmax."""
        slots, places = _indices(span), span.offsets % self.window
        self.keys[slots, :, places] = k[:, :, 0]
        self.values[slots, :, places] = v[:, :, 0]
        filled = min(span.end, self.window)
        everywhere = min(span.starts) + 1 >= filled
        rows = _slot_index(span)
        mask = None if everywhere else _causal_mask(span.offsets, filled)
        return Visible(self.keys[rows, :, :filled], self.values[rows, :, :filled], mask)

    def extend(self, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Store one slot's next L tokens, k, v [1, K, L, 64], and return them after the W positions before them:
        [1, K, W + L, 64]. Entries for positions before 0 must be masked."""
        slot, start, w = span.slots[0], span.starts[0], self.window
        both = []
        for ring, new in ((self.keys, k), (self.values, v)):
            # Rolled so that the oldest position, start - W, comes first.
            past = torch.roll(ring[slot : slot + 1], -(start % w), 2)
            joined = torch.cat([past, new], dim=2)
            both.append(joined)
            ring[slot : slot + 1] = torch.roll(joined[:, :, -w:], span.end % w, 2)
        if span.saves_inside:
            self.kept[slot] = (start, (both[0], both[1]))
        return both[0], both[1]

    def snapshot_places(self, start: int, end: int) -> int:
        """The number of indices that are filled at the end of a snapshot."""
        return min(end, self.window)

    def part(self, slot: int, start: int, end: int) -> Part:
        """Copies of the filled part of one slot as of `end`, [K, min(end, W), 64] each, without remains of an earlier
        sequence."""
        filled, w = self.snapshot_places(start, end), self.window
        keys, values, turned = self.keys[slot, :, :filled], self.values[slot, :, :filled], 0
        if slot in self.kept:
            first, joined = self.kept[slot]
            stop = w + end - first  # of the positions before `end` in `joined`
            if w < stop < joined[0].shape[2]:
                keys, values = (each[0, :, stop - filled : stop] for each in joined)
                turned = end % w if filled == w else 0
        return torch.roll(keys, turned, 1), torch.roll(values, turned, 1)

    def restore(self, slot: int, chain: Sequence[Part]) -> None:
        """Put the last part into a slot."""
        keys, values = chain[-1]
        self.keys[slot, :, : keys.shape[1]], self.values[slot, :, : keys.shape[1]] = keys, values


LayerCache = FullCache | RingCache


class Cache:
    """One FullCache or RingCache per layer, for `slots` sequences of at most max_context tokens. whole: allocate all
    memory at once, at fixed addresses."""

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        max_context: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        whole: bool = False,
    ) -> None:
        heads, dim = config.num_key_value_heads, config.head_dim
        self.layers: list[LayerCache] = [
            FullCache(slots, heads, dim, max_context, max_context if whole else 0, dtype, device)
            if window is None
            else RingCache(slots, heads, dim, window, dtype, device)
            for window in config.windows
        ]
        self.rings: list[RingCache] = [layer for layer in self.layers if isinstance(layer, RingCache)]

    def save(self, slot: int, start: int, end: int) -> SlotSnapshot:
        """As Runner.save."""
        return SlotSnapshot(start, end, tuple(layer.part(slot, start, end) for layer in self.layers))

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
        places = [layer.snapshot_places(start, end) for layer in self.layers]
        keys = [layer.keys for layer in self.layers]
        shapes = [(2, k.shape[1], count, k.shape[3] * k.itemsize) for k, count in zip(keys, places, strict=True)]
        if len(data) != (size := sum(prod(shape) for shape in shapes)):
            raise ValueError(f"a snapshot of the positions {start} to {end} has {size} bytes, not {len(data)}")
        whole, parts, begin = torch.frombuffer(bytearray(data), dtype=torch.uint8), [], 0
        for shape, like in zip(shapes, keys, strict=True):
            piece = whole[begin : begin + prod(shape)].view(shape).clone().view(like.dtype).to(like.device)
            parts.append((piece[0], piece[1]))
            begin += prod(shape)
        return SlotSnapshot(start, end, tuple(parts))


def _indices(span: Span) -> Tensor:
    return to_device(torch.tensor(span.slots), span.offsets.device)


def _slot_index(span: Span) -> slice | Tensor:
    """An index of the slots: a slice (a view) if they are adjacent, otherwise a tensor (a copy)."""
    first, last = span.slots[0], span.slots[-1]
    return slice(first, last + 1) if last - first + 1 == len(span.slots) else _indices(span)


def _causal_mask(offsets: Tensor, end: int) -> Tensor:
    """Boolean [B, 1, 1, end]: row b sees positions up to and including offsets[b]."""
    return torch.arange(end, device=offsets.device) <= offsets[:, None, None, None]
