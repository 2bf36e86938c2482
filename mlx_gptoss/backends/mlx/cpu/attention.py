"""Attention in numpy's memory, on the threads of a pool. With llvmlite, attention_kernel.py computes that of one token.

Legend: B rows, H query heads, K KV heads, G = H / K, D dimensions of a head, S slots, C places of a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from .products import Products, address
from .storages import Heads

Floats = NDArray[np.float32]
MIN_KEYS_TO_SHARE = 1024  # from which numpy divides the heads of a row among threads
MIN_EXPONENT = -87.0  # below it exp() is no normal float32, and products with such numbers take up to 40 times as long


@dataclass(frozen=True)
class Tokens:
    """One of each row: its slot and position, and the cosines and sines of that, turns [2, B, 1, D / 2]."""

    slots: Sequence[int]
    starts: Sequence[int]
    turns: Floats


class TokenAttention:
    """Attention of one token of each of several rows."""

    def __init__(self, products: Products, sinks: Floats, scale: float, dim: int) -> None:
        """sinks: [K, G, 1]. scale: of the scores. dim: D"""
        self._products, self._sinks, self._scale = products, np.ascontiguousarray(sinks), np.float32(scale)
        self._heads = Heads(sinks.shape[1], dim)
        self._compiles = products.prepare_attention(self._heads)
        self._constants = address(self._sinks), int(self._scale.view(np.int32))  # in the kernel's table

    def __call__(self, qkv: Floats, kept: Floats, window: int | None, tokens: Tokens) -> Floats:
        """Rotate queries and keys, write keys and values into the cache and attend to what each row sees there.

        qkv [B, (H + 2 K) * D] -> [B, H * D]. kept [2, S, K, C, D]: keys and values of all slots, those of position p at
        p % C. window: positions that a row sees; None for all.
        """
        if self._compiles:
            return self._compiled(qkv, kept, window, tokens)
        return self._attend(self._write(qkv, kept, tokens), kept, window, tokens)

    def _compiled(self, qkv: Floats, kept: Floats, window: int | None, tokens: Tokens) -> Floats:
        (heads, group, _), places, size = self._sinks.shape, kept.shape[3], 4 * self._heads.dim
        assert kept.strides[3:] == (size, 4)
        out = np.empty((len(qkv), heads * group * self._heads.dim), np.float32)
        values = kept.strides[0]
        qkv_at, cos, sin, cache, out_at = (address(a) for a in (qkv, *tokens.turns, kept, out))
        table = [0, len(qkv), heads, kept.strides[2], *self._constants]
        seen = 0
        for b, (slot, start) in enumerate(zip(tokens.slots, tokens.starts, strict=True)):
            visible = min(start + 1, places, places if window is None else window)
            first = (start + 1 - visible) % places
            count = min(visible, places - first)
            keys = cache + slot * kept.strides[1]
            table += (qkv_at + b * qkv.strides[0], cos + b * size // 2, sin + b * size // 2, keys, keys + values)
            table += (start % places, first, count, visible - count, out_at + b * out.strides[0])
            seen += visible
        self._products.attend(self._heads, table, 2 * seen * heads * group * self._heads.dim)
        return out

    def _write(self, qkv: Floats, kept: Floats, tokens: Tokens) -> Floats:
        """The queries [B, H, D], rotated, by numpy."""
        (K, group, _), dim = self._sinks.shape, self._heads.dim
        H = K * group
        vectors = qkv.reshape(len(qkv), H + 2 * K, dim)
        cos, sin = tokens.turns
        low, high = vectors[:, : H + K, : dim // 2], vectors[:, : H + K, dim // 2 :]
        turned = np.empty((len(qkv), H + K, dim), np.float32)
        np.subtract(low * cos, high * sin, out=turned[..., : dim // 2])
        np.add(low * sin, high * cos, out=turned[..., dim // 2 :])
        for b, (slot, start) in enumerate(zip(tokens.slots, tokens.starts, strict=True)):
            place = start % kept.shape[3]
            kept[0, slot, :, place], kept[1, slot, :, place] = turned[b, H:], vectors[b, H + K :]
        return turned[:, :H]

    def _attend(self, queries: Floats, kept: Floats, window: int | None, tokens: Tokens) -> Floats:
        """queries [B, H, D] over the cache -> [B, H * D], by numpy."""
        K = self._sinks.shape[0]
        grouped = (queries * self._scale).reshape(len(queries), K, -1, self._heads.dim)
        out, ring = np.empty_like(grouped), kept.shape[3]
        for b, (slot, start) in enumerate(zip(tokens.slots, tokens.starts, strict=True)):
            end, seen = min(start + 1, ring), None
            if window is not None and window < end:
                seen = (start - np.arange(end)) % ring < window
            keys, values = kept[0, slot, :, :end], kept[1, slot, :, :end]
            if end < MIN_KEYS_TO_SHARE:
                attend_rows(grouped[b], keys, values, self._sinks, seen, out[b])
                continue
            q, k, v, s = grouped[b], keys, values, self._sinks
            self._products.pool.each([partial(attend_rows, q[h], k[h], v[h], s[h], seen, out[b, h]) for h in range(K)])
        found: Floats = out.reshape(len(queries), -1)
        return found


def attend_rows(
    query: Floats, keys: Floats, values: Floats, sink: Floats, seen: NDArray[np.bool_] | None, out: Floats
) -> None:
    """Queries [..., R, D], scaled, over keys and values [..., S, D] -> out [..., R, D]. sink: [..., R, 1]. seen: bool
    [R, S] or [S]; None for all."""
    scores = query @ keys.swapaxes(-1, -2)
    if seen is not None:
        np.copyto(scores, -np.inf, where=~seen)
    top = np.maximum(scores.max(axis=-1, keepdims=True), sink)
    np.subtract(scores, top, out=scores)
    np.copyto(scores, -np.inf, where=scores < MIN_EXPONENT)
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True) + np.exp(sink - top)
    np.divide(scores @ values, total, out=out)
