"""The KV cache: growing arrays for full layers, rings for sliding ones. Every layer holds all slots.

Legend: S slots, B rows in this step, K kv heads, L tokens, C capacity, R ring, W window.
A row's keys are stored rotated; positions are absolute from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ...config import FULL, ModelConfig

GROWTH = 256  # full layers grow by multiples of this many tokens


@dataclass(frozen=True)
class Span:
    """Where this forward pass writes: either one slot and any number of tokens, or B slots and one token each.

    slots, starts: [B] host integers, ascending slots. length: tokens a row. offsets: starts on the device, int32 [B].
    """

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    length: int
    offsets: mx.array

    @staticmethod
    def of(slots: Sequence[int], starts: Sequence[int], length: int) -> Span:
        return Span(tuple(slots), tuple(starts), length, mx.array(list(starts), dtype=mx.int32))

    @property
    def end(self) -> int:
        """One past the last position that any row of this pass writes."""
        return max(self.starts) + self.length


@dataclass(frozen=True)
class Visible:
    """What the queries attend to: keys, values [B, K, C, 64]; mask as mx.fast.scaled_dot_product_attention takes it."""

    keys: mx.array
    values: mx.array
    mask: mx.array | str | None


class FullCache:
    """Keys and values of every position so far, [S, K, C, 64]; C grows in steps of GROWTH up to max_context."""

    def __init__(self, slots: int, heads: int, head_dim: int, max_context: int, dtype: mx.Dtype) -> None:
        self._max_context = max_context
        self._keys = mx.zeros((slots, heads, 0, head_dim), dtype=dtype)
        self._values = mx.zeros((slots, heads, 0, head_dim), dtype=dtype)

    @property
    def arrays(self) -> list[mx.array]:
        return [self._keys, self._values]

    def update(self, k: mx.array, v: mx.array, span: Span) -> Visible:
        """Store k, v [B, K, L, 64] and return all keys up to them."""
        self._grow(span.end)
        if len(span.slots) == 1:
            slot, start = span.slots[0], span.starts[0]
            self._keys[slot : slot + 1, :, start : span.end] = k
            self._values[slot : slot + 1, :, start : span.end] = v
            mask: mx.array | str | None = "causal" if span.length > 1 else None
        else:
            slots = mx.array(span.slots)
            self._keys[slots, :, span.offsets] = k[:, :, 0]
            self._values[slots, :, span.offsets] = v[:, :, 0]
            mask = None if len(set(span.starts)) == 1 else _until(span.offsets, span.end)
        rows = _rows(span.slots)
        return Visible(self._keys[rows, :, : span.end], self._values[rows, :, : span.end], mask)

    def _grow(self, needed: int) -> None:
        slots, heads, capacity, dim = self._keys.shape
        if needed <= capacity:
            return
        # Growing by a quarter keeps the copies few; the memory plan counts max_context.
        wanted = max(needed, capacity + capacity // 4)
        more = min(-(-wanted // GROWTH) * GROWTH, max(self._max_context, needed)) - capacity
        pad = mx.zeros((slots, heads, more, dim), dtype=self._keys.dtype)
        self._keys = mx.concatenate([self._keys, pad], axis=2)
        self._values = mx.concatenate([self._values, pad], axis=2)


class RingCache:
    """The last W positions of each slot, [S, K, W, 64]; position p stands at p % W."""

    def __init__(self, slots: int, heads: int, head_dim: int, window: int, dtype: mx.Dtype) -> None:
        self.window = window
        self._keys = mx.zeros((slots, heads, window, head_dim), dtype=dtype)
        self._values = mx.zeros((slots, heads, window, head_dim), dtype=dtype)

    @property
    def arrays(self) -> list[mx.array]:
        return [self._keys, self._values]

    def append(self, k: mx.array, v: mx.array, span: Span) -> Visible:
        """Store one token a row, k, v [B, K, 1, 64]; order within a ring does not matter to softmax."""
        if len(span.slots) == 1:
            slot, place = span.slots[0], span.starts[0] % self.window
            self._keys[slot : slot + 1, :, place : place + 1] = k
            self._values[slot : slot + 1, :, place : place + 1] = v
        else:
            slots = mx.array(span.slots)
            self._keys[slots, :, span.offsets % self.window] = k[:, :, 0]
            self._values[slots, :, span.offsets % self.window] = v[:, :, 0]
        filled = min(span.end, self.window)
        everywhere = min(span.starts) + 1 >= filled
        rows = _rows(span.slots)
        mask = None if everywhere else _until(span.offsets, filled)
        return Visible(self._keys[rows, :, :filled], self._values[rows, :, :filled], mask)

    def extend(self, k: mx.array, v: mx.array, span: Span) -> tuple[mx.array, mx.array]:
        """Store one slot's next L tokens, k, v [1, K, L, 64], and return them after the W positions before them:
        [1, K, W + L, 64]. Positions before 0 are zeros, to be masked."""
        slot, start, w = span.slots[0], span.starts[0], self.window
        both = []
        for ring, new in ((self._keys, k), (self._values, v)):
            # Rolled so that the oldest position, start - W, comes first.
            past = mx.roll(ring[slot : slot + 1], -(start % w), 2)
            joined = mx.concatenate([past, new], axis=2)
            both.append(joined)
            last = joined[:, :, -w:]
            ring[slot : slot + 1] = mx.roll(last, span.end % w, 2)
        return both[0], both[1]


LayerCache = FullCache | RingCache


class Cache:
    """One FullCache or RingCache a layer, for `slots` sequences of at most max_context tokens."""

    def __init__(self, config: ModelConfig, slots: int, max_context: int, dtype: mx.Dtype) -> None:
        heads, dim = config.num_key_value_heads, config.head_dim
        self.layers: list[LayerCache] = [
            FullCache(slots, heads, dim, max_context, dtype)
            if kind == FULL
            else RingCache(slots, heads, dim, config.sliding_window, dtype)
            for kind in config.layer_types
        ]

    @property
    def arrays(self) -> list[mx.array]:
        return [array for layer in self.layers for array in layer.arrays]


def _rows(slots: tuple[int, ...]) -> slice | mx.array:
    """Adjacent slots as a view; others have to be gathered."""
    first, last = slots[0], slots[-1]
    return slice(first, last + 1) if last - first + 1 == len(slots) else mx.array(slots)


def _until(offsets: mx.array, end: int) -> mx.array:
    """Boolean [B, 1, 1, end]: row b sees places up to and including offsets[b]."""
    return mx.arange(end)[None, None, None, :] <= offsets[:, None, None, None]
