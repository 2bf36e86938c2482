"""Keys and values in 8 bits: what --kv-bits 8 keeps of full-attention layers.

Legend: B rows, K kv heads, C positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

GROUP, BITS = 64, 8  # values of a head that share a scale and a bias; bits of a code

Packed = tuple[mx.array, mx.array, mx.array]


@dataclass(frozen=True)
class QuantizedKV:
    """Keys and values in 8 bits, with a scale and a bias per vector of 64: three arrays each, codes uint32
    [B, K, C, 16], scales and biases float32 [B, K, C, 1]. 72 bytes instead of 128 in bfloat16."""

    keys: Packed
    values: Packed

    def scores(self, q: mx.array) -> mx.array:
        """Queries float32 [B, K, n, 64] times the keys -> [B, K, n, C]"""
        return mx.quantized_matmul(q, *self.keys, transpose=True, group_size=GROUP, bits=BITS)

    def weighted(self, p: mx.array, *, by_row: bool) -> mx.array:
        """Weights float32 [B, K, n, C] times the values -> [B, K, n, 64].

        by_row: n products of one row each. Metal splits their C over many threadgroups; with 4 rows or more it goes
        through C in a few. A CPU would copy the values for each."""
        if not by_row:
            return mx.quantized_matmul(p, *self.values, transpose=False, group_size=GROUP, bits=BITS)
        codes, scales, biases = (array[:, :, None] for array in self.values)
        rows = p[..., None, :]
        y = mx.quantized_matmul(rows, codes, scales, biases, transpose=False, group_size=GROUP, bits=BITS)
        return y.squeeze(-2)

    def dequantized(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Keys and values, [B, K, C, 64] each"""
        keys, values = (
            mx.dequantize(*part, group_size=GROUP, bits=BITS).astype(dtype) for part in (self.keys, self.values)
        )
        return keys, values


def pack(kv: mx.array) -> Packed:
    """kv [..., 64] quantized as in QuantizedKV."""
    codes, scales, biases = mx.quantize(kv.astype(mx.float32), group_size=GROUP, bits=BITS)
    return codes, scales, biases


def empty(shape: tuple[int, ...]) -> Packed:
    """What pack gives for an array of this shape without elements, for which a GPU has nothing to launch."""
    *rows, dim = shape
    codes = mx.zeros((*rows, dim // 4), dtype=mx.uint32)
    scales, biases = (mx.zeros((*rows, dim // GROUP), dtype=mx.float32) for _ in range(2))
    return codes, scales, biases
