"""Products and attention on a CPU, in numpy's memory instead of MLX's graph.

MLX's wheel for Linux has the reference BLAS, about half a billion multiply-adds per second; cpu/ has two hundred times
that. A product here waits for its input, which costs nothing on a CPU, and runs at once on all cores. A Mac's CPU
needs none of this, because MLX has Accelerate there.

Legend: P rows, N outputs, D inputs, E experts; in attention B slots, H heads, K KV heads, L queries, S keys, D a head's
64.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ...weights import codecs
from ...weights.tensor import Quantized
from .cpu.attention import attend_rows
from .cpu.pool import Pool
from .cpu.products import Products, Stored
from .elementwise import UNCOMPILED
from .layers import Attend, DenseMatrix, ExpertLinear, Mask, QuantizedMatrix, fused

Floats = NDArray[np.float32]
MIN_FLOPS = 1 << 16  # multiply-adds from which a product is worth waiting for its input
MIN_ROWS_PER_EXPERT = 10  # rows per expert from which decoding it once is faster; MLX's kernel decodes for every row
MAX_SCORES = 1 << 18  # attention scores at once, 1 MB


def enabled(*, on_cpu: bool, dtype: mx.Dtype) -> bool:
    """Whether products with activations of `dtype` use this module."""
    return on_cpu and dtype == mx.float32 and sys.platform != "darwin"


def to_numpy(x: mx.array) -> NDArray[Any]:
    """x as a view, once it is computed."""
    mx.eval(x)  # releases the GIL while waiting, which numpy does not
    return np.asarray(x)


@dataclass(frozen=True)
class HostMatrix:
    """A matrix in numpy arrays, [N, D] or of all experts [E, N, D], by which `products` multiplies float32."""

    stored: Stored
    products: Products

    def matmul(self, x: mx.array, bias: mx.array | None = None) -> mx.array:
        """x float32 [..., D] -> [..., N]"""
        y = mx.array(self.products.multiply(self.stored, to_numpy(x.reshape(-1, x.shape[-1]))))
        y = y.reshape(*x.shape[:-1], -1)
        return y if bias is None else y + bias

    def gather(self, x: mx.array, experts: mx.array, tokens: mx.array | None) -> mx.array:
        """As ExpertLinear, whether experts are in ascending order or not."""
        mx.eval(x, experts)
        chosen = np.asarray(experts)
        rows = np.broadcast_to(np.asarray(x), (*chosen.shape, 1, x.shape[-1])).reshape(chosen.size, -1)
        order = np.argsort(chosen, axis=None, kind="stable")
        y = np.empty((len(rows), self.stored.shape[-2]), np.float32)
        y[order] = self.products.gather(self.stored, rows[order], chosen.ravel()[order])
        return mx.array(y.reshape(*chosen.shape, 1, -1))

    def rows(self, ids: mx.array, dtype: mx.Dtype) -> mx.array:
        """ids [...] -> [..., D]"""
        numbers = to_numpy(ids)
        rows = codecs.dequantize(self.stored.weight[numbers.ravel()])
        return mx.array(rows.reshape(*numbers.shape, -1)).astype(dtype)


@dataclass(frozen=True)
class NarrowMatrix(DenseMatrix):
    """A DenseMatrix for a CPU with narrow activations: MLX's gather_mm takes only float32 there."""

    def gather(self, x: mx.array, experts: mx.array, tokens: mx.array | None) -> mx.array:
        """As ExpertLinear."""
        return self.matmul_each_expert(x, experts)


def dense_kind(*, on_cpu: bool, dtype: mx.Dtype) -> type[DenseMatrix]:
    """The class of MLX's dense matrices for activations of `dtype`."""
    return NarrowMatrix if on_cpu and dtype != mx.float32 else DenseMatrix


@dataclass(frozen=True)
class HostExperts(ExpertLinear):
    """Experts in a storage that no kernel reads: one with many rows is decoded once for all of them."""

    products: Products | None = None

    def __call__(self, x: mx.array, experts: mx.array, tokens: mx.array | None) -> mx.array:
        quantized = [matrix for matrix in self.matrices if isinstance(matrix, QuantizedMatrix)]
        if self.products is None or tokens is not None or len(quantized) < len(self.matrices):
            return super().__call__(x, experts, tokens)
        chosen = to_numpy(experts)
        if len(chosen) < MIN_ROWS_PER_EXPERT * len(np.unique(chosen)):
            return super().__call__(x, experts, tokens)
        rows = to_numpy(x.reshape(-1, x.shape[-1]))
        parts = [self.products.gather(Stored(as_weight(matrix)), rows, chosen) for matrix in quantized]
        return mx.array(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1))[:, None]


def attention_on(pool: Pool) -> Attend:
    """As layers.fused, on the threads of a pool: one KV head at a time, with so few queries at once that their scores
    stay in the cache. Keys that none of these queries sees are skipped."""

    def attend(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask, sinks: mx.array) -> mx.array:
        (B, H, L, D), (_, K, S, _) = q.shape, k.shape
        if q.size * S < MIN_FLOPS:
            return fused(q, k, v, scale, mask, sinks)
        queries, keys, values = (to_numpy(a) for a in (q * scale, k, v))
        seen = np.broadcast_to(to_numpy(mask), (B, 1, L, S))[:, 0] if isinstance(mask, mx.array) else None
        sink = to_numpy(sinks).reshape(K, H // K, 1, 1)
        out = np.empty((B, K, H // K, L, D), np.float32)
        step = max(1, min(MAX_SCORES // (H // K * S), L))
        pieces = []
        for b, head, start in product(range(B), range(K), range(0, L, step)):
            query = queries[b].reshape(K, H // K, L, D)[head, :, start : start + step]
            visible = mask if seen is None else seen[b, start : start + step]
            found = out[b, head, :, start : start + step]
            last = S - L + start + query.shape[1] if isinstance(mask, str) else S
            key, value = keys[b, head, :last], values[b, head, :last]
            pieces.append(partial(_attend, query, key, value, sink[head], visible, found))
        pool.each(pieces)
        return mx.array(out.reshape(B, H, L, D))

    return attend


def _attend(
    query: Floats, keys: Floats, values: Floats, sink: Floats, seen: NDArray[np.bool_] | Mask, out: Floats
) -> None:
    """Queries [H / K, L, D], scaled, over keys and values [S, D] of their KV head -> out [H / K, L, D]. sink:
    [H / K, 1, 1]. seen: bool [L, S], None for all, or "causal"."""
    each, rows, dim = query.shape
    if isinstance(seen, str):
        seen = np.arange(len(keys)) <= np.arange(len(keys) - rows, len(keys))[:, None]
    visible = (
        None if seen is None else np.broadcast_to(np.asarray(seen), (each, rows, len(keys))).reshape(-1, len(keys))
    )
    sinks = np.broadcast_to(sink, (each, rows, 1)).reshape(-1, 1)
    found = np.empty((each * rows, dim), np.float32)
    attend_rows(query.reshape(-1, dim), keys, values, sinks, visible, found)
    out[...] = found.reshape(query.shape)


def logsumexp(logits: mx.array) -> mx.array:
    """As of Elementwise: over 201,088 tokens, numpy's exponentials take a twentieth of the time of MLX's on a CPU."""
    values = to_numpy(logits)
    top = values.max(axis=-1, keepdims=True)
    return mx.array(np.log(np.exp(values - top).sum(axis=-1)) + top[:, 0])


def add_gumbel_noise(logits: mx.array, temperature: mx.array, keys: mx.array) -> mx.array:
    """As of Elementwise, with the same random numbers."""
    values, degrees = to_numpy(logits), to_numpy(temperature)[:, 0]
    drawn = values.copy()
    for row in np.flatnonzero(degrees > 0):
        uniform = to_numpy(mx.random.uniform(shape=logits.shape[-1:], key=keys[int(row)]))
        with np.errstate(divide="ignore"):  # of 0 it is -inf: a token that is not drawn
            drawn[row] = values[row] / degrees[row] - np.log(-np.log(uniform))
    return mx.array(drawn)


ELEMENTWISE = replace(UNCOMPILED, logsumexp=logsumexp, add_gumbel_noise=add_gumbel_noise)


def as_weight(matrix: QuantizedMatrix) -> Quantized:
    """The matrix as numpy views of the same memory; FP8_ROW stays MXFP8."""
    scale, bias = _as_stored(matrix.scales), None if matrix.biases is None else _as_stored(matrix.biases)
    outer = None if matrix.outer is None else to_numpy(matrix.outer)[..., None]
    return Quantized(matrix.spec, to_numpy(matrix.codes).view(np.uint8), scale, bias, outer)


def _as_stored(values: mx.array) -> NDArray[Any]:
    return to_numpy(values.view(mx.uint16)).view(codecs.BFLOAT16) if values.dtype == mx.bfloat16 else to_numpy(values)
