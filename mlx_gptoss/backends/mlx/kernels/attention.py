"""Attention of one new token a row with its cached keys.

Legend: B rows, H query heads, K kv heads, S slots, C places of a slot: a full layer's capacity, or the ring of a
sliding one, in which position p is at place p modulo C.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .metal import SIMDGROUP, MetalKernel

SIMDGROUPS = 4  # of a threadgroup
KEYS_PER_BLOCK = 256  # keys from which a second threadgroup takes a part of them: two tiles for each simdgroup
MAX_BLOCKS = 32
THREADGROUP_MEMORY = 32 << 10  # bytes, on every Apple GPU


def attend(
    vectors: mx.array,
    cached: Sequence[mx.array],
    slots: mx.array,
    positions: mx.array,
    window: int | None,
    sinks: mx.array,
    factor: float,
) -> mx.array:
    """Each row's queries over the keys up to its own token's, which the cache has already: [B, H, 1, 64].

    vectors: [B, H or more, 1, 64], of which the first H are the queries. cached: keys and values [2, S, K, C, 64], or
    in 8 bits codes uint32 [2, S, K, C, 16], scales and biases float32 [2, S, K, C, 1]. slots, positions: int32 [B], of
    each row in the cache and in its sequence. window: the positions that a query sees, up to its own; None is all.
    sinks [H]: one more score a head. factor: on scores."""
    q = vectors[:, : sinks.size]
    places = mx.arange(cached[0].shape[3])
    parts = [array[:, slots] for array in cached]  # [2, B, K, C, ...]
    kv = parts[0] if len(parts) == 1 else mx.dequantize(parts[0], parts[1], parts[2], group_size=64, bits=8)
    age = positions[:, None] - places
    seen = age >= 0
    if window is not None:
        seen = seen & (age % len(places) < window)
    keys, values = kv[0].astype(q.dtype), kv[1].astype(q.dtype)
    mask = seen[:, None, None]
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=factor, mask=mask, sinks=sinks)


class Attend:
    """`attend` as one launch, and a second one where the keys are split among threadgroups. factor: on scores."""

    def __init__(self, factor: float) -> None:
        inputs = ["q", "kv", "scales", "biases", "sinks", "slots", "positions", "factor"]
        self._attention = MetalKernel("attention", inputs, ["out", "states"])
        self._merge = MetalKernel("merge", ["partial", "states", "sinks"], ["out"])
        self._factor = mx.array([factor], dtype=mx.float32)
        mx.eval(self._factor)

    def __call__(
        self,
        vectors: mx.array,
        cached: Sequence[mx.array],
        slots: mx.array,
        positions: mx.array,
        window: int | None,
        sinks: mx.array,
        end: int,
    ) -> mx.array:
        """As `attend`. end: the largest of the positions, plus one. Computed in float32 and rounded once."""
        (B, count, _, dim), H = vectors.shape, sinks.size
        K, capacity = cached[0].shape[2:4]
        blocks = min(MAX_BLOCKS, -(-min(end, capacity) // KEYS_PER_BLOCK))
        split, dtype = blocks > 1, vectors.dtype
        bits = 8 if len(cached) == 3 else 16
        out, states = self._attention(
            [vectors, cached[0], *(cached[1:] if bits == 8 else (sinks, sinks)), sinks, slots, positions, self._factor],
            template=[
                *(("T", dtype), ("OUT", mx.float32 if split else dtype), ("VECTORS", count), ("GROUP", H // K)),
                *(("DIM", dim), ("WINDOW", window or 0), ("BITS", bits), ("SIMDGROUPS", SIMDGROUPS), ("SPLIT", split)),
            ],
            groups=(K, blocks, B),
            threads=SIMDGROUPS * SIMDGROUP,
            shapes=[(B, H, blocks, dim), (B, H, blocks, 2) if split else (1,)],
            dtypes=[mx.float32 if split else dtype, mx.float32],
        )
        if not split:
            return out
        (merged,) = self._merge(
            [out, states, sinks],
            template=[("T", dtype), ("DIM", dim)],
            groups=(H, B, 1),
            threads=dim,
            shapes=[(B, H, 1, dim)],
            dtypes=[dtype],
        )
        return merged


def can_attend(queries: int, kv_heads: int, dim: int) -> bool:
    """Whether the kernel takes these heads: a KV head's queries fit into a threadgroup's memory."""
    group = queries // kv_heads
    floats = group * (dim + 1 + SIMDGROUPS * (SIMDGROUP + dim + 2))
    return dim % SIMDGROUP == 0 and 4 * floats <= THREADGROUP_MEMORY
