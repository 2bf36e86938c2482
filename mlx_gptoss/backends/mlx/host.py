"""Products on a CPU through numpy's BLAS.

MLX's wheel for Linux has the reference BLAS, about half a billion multiply-adds per second; numpy has OpenBLAS, tens of
billions. A product here waits for its input, which costs nothing on a CPU, and runs at once on all cores. A Mac's CPU
needs none of this, because MLX has Accelerate there.

Legend: P rows, N outputs, D inputs, E experts; in attention B slots, H heads, K KV heads, L queries, S keys, D a head's
64.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ...weights import codecs
from ...weights.tensor import Quantized
from .layers import UPCAST_ELEMENTS, DenseMatrix, ExpertLinear, Mask, QuantizedMatrix, fused

Floats = NDArray[np.float32]
MIN_FLOPS_FOR_BLAS = 1 << 20  # multiply-adds from which a product is worth waiting for its input
MIN_ROWS_PER_EXPERT = 10  # rows per expert from which decoding it once is faster; MLX's kernel decodes for every row
MAX_SCORES = 1 << 20  # attention scores at once, 4 MB
MIN_EXPONENT = -87.0  # below it exp() is no normal float32, and products with such numbers take up to 40 times as long
MAX_DECODED = 1 << 21  # weights decoded at once, 8 MB; with fewer, BLAS starts its threads too often


def enabled(*, on_cpu: bool, dtype: mx.Dtype) -> bool:
    """Whether products with activations of `dtype` use this module."""
    return on_cpu and dtype == mx.float32 and sys.platform != "darwin"


def to_numpy(x: mx.array) -> NDArray[Any]:
    """x as a view, once it is computed."""
    mx.eval(x)  # releases the GIL while waiting, which numpy does not
    return np.asarray(x)


@dataclass(frozen=True)
class HostMatrix(DenseMatrix):
    """A DenseMatrix whose larger products with float32 activations are computed by numpy."""

    def matmul(self, x: mx.array, bias: mx.array | None = None) -> mx.array:
        """x float32 [..., D] -> [..., N]"""
        if x.size * self.weight.shape[-2] < MIN_FLOPS_FOR_BLAS:
            return super().matmul(x, bias)
        rows = to_numpy(x.reshape(-1, x.shape[-1]))
        y = mx.array(np.concatenate([rows @ block.T for block in self._blocks()], axis=-1))
        y = y.reshape(*x.shape[:-1], -1)
        return y if bias is None else y + bias

    def gather(self, x: mx.array, experts: mx.array, tokens: mx.array | None) -> mx.array:
        """As ExpertLinear."""
        return self.matmul_each_expert(x, experts)

    def _blocks(self) -> Iterator[Floats]:
        """The rows in float32: all at once, or in blocks if they are stored in another dtype."""
        if self.weight.dtype == mx.float32:
            yield to_numpy(self.weight)
            return
        step = max(1, UPCAST_ELEMENTS // self.weight.shape[-1])
        for start in range(0, len(self.weight), step):
            yield to_numpy(self.weight[start : start + step].astype(mx.float32))


@dataclass(frozen=True)
class NarrowMatrix(DenseMatrix):
    """A DenseMatrix for a CPU with narrow activations: MLX's gather_mm takes only float32 there."""

    def gather(self, x: mx.array, experts: mx.array, tokens: mx.array | None) -> mx.array:
        """As ExpertLinear."""
        return self.matmul_each_expert(x, experts)


def dense_kind(*, on_cpu: bool, dtype: mx.Dtype) -> type[DenseMatrix]:
    """The class of dense matrices for activations of `dtype`."""
    if enabled(on_cpu=on_cpu, dtype=dtype):
        return HostMatrix
    return NarrowMatrix if on_cpu and dtype != mx.float32 else DenseMatrix


@dataclass(frozen=True)
class HostExperts(ExpertLinear):
    """Experts; one with many rows is decoded once for all of them."""

    def __call__(self, x: mx.array, experts: mx.array, tokens: mx.array | None) -> mx.array:
        quantized = [matrix for matrix in self.matrices if isinstance(matrix, QuantizedMatrix)]
        if tokens is not None or len(quantized) < len(self.matrices):
            return super().__call__(x, experts, tokens)
        found, starts = np.unique(to_numpy(experts), return_index=True)
        if len(experts) < MIN_ROWS_PER_EXPERT * len(found):
            return super().__call__(x, experts, tokens)
        banks = [as_quantized(matrix) for matrix in quantized]
        rows = to_numpy(x.reshape(-1, x.shape[-1]))
        y = np.empty((len(rows), sum(bank.codes.shape[-2] for bank in banks)), np.float32)
        step = max(1, MAX_DECODED // rows.shape[-1])
        memory = np.empty((step, rows.shape[-1]), np.float32)
        for expert, first, last in zip(found.tolist(), starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True):
            at = 0
            for part in (part for bank in banks for part in _blocks(_expert(bank, expert), step)):
                decoded = codecs.dequantize(part, memory[: len(part.codes)])
                np.matmul(rows[first:last], decoded.T, out=y[first:last, at : at + len(decoded)])
                at += len(decoded)
        return mx.array(y)[:, None]


def attend(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask, sinks: mx.array) -> mx.array:
    """As layers.fused: one KV head at a time, with so few queries at once that their scores stay in the cache. Keys
    that none of these queries sees are skipped."""
    (B, H, L, D), (_, K, S, _) = q.shape, k.shape
    if q.size * S < MIN_FLOPS_FOR_BLAS:
        return fused(q, k, v, scale, mask, sinks)
    queries, keys, values = (to_numpy(a) for a in (q * scale, k, v))
    seen = np.broadcast_to(to_numpy(mask), (B, 1, L, S))[:, 0] if isinstance(mask, mx.array) else None
    sink = to_numpy(sinks).reshape(K, H // K, 1, 1)
    out = np.empty((B, K, H // K, L, D), np.float32)
    step = max(1, MAX_SCORES // (H // K * S))
    for b, head, start in product(range(B), range(K), range(0, L, step)):
        query = queries[b].reshape(K, H // K, L, D)[head, :, start : start + step]
        rows = query.shape[1]
        last = S - L + start + rows if mask == "causal" else S
        scores = (query.reshape(-1, D) @ keys[b, head, :last].T).reshape(H // K, rows, last)
        if mask == "causal":
            np.copyto(scores[..., last - rows :], -np.inf, where=np.triu(np.ones((rows, rows), np.bool_), 1))
        elif seen is not None:
            np.copyto(scores, -np.inf, where=~seen[b, start : start + rows])
        top = np.maximum(scores.max(axis=-1, keepdims=True), sink[head])
        np.subtract(scores, top, out=scores)
        np.copyto(scores, -np.inf, where=scores < MIN_EXPONENT)
        np.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True) + np.exp(sink[head] - top)
        found = (scores.reshape(-1, last) @ values[b, head, :last]).reshape(H // K, rows, D)
        np.divide(found, total, out=out[b, head, :, start : start + rows])
    return mx.array(out.reshape(B, H, L, D))


def as_quantized(matrix: QuantizedMatrix) -> Quantized:
    """The matrix as numpy views of the same memory; FP8_ROW stays MXFP8."""
    scale, bias = _scale_to_numpy(matrix.scales), None if matrix.biases is None else _scale_to_numpy(matrix.biases)
    outer = None if matrix.outer is None else to_numpy(matrix.outer)[..., None]
    return Quantized(matrix.spec, to_numpy(matrix.codes).view(np.uint8), scale, bias, outer)


def _scale_to_numpy(scales: mx.array) -> NDArray[Any]:
    return to_numpy(scales.view(mx.uint16)).view(codecs.BFLOAT16) if scales.dtype == mx.bfloat16 else to_numpy(scales)


def _expert(bank: Quantized, expert: int) -> Quantized:
    """One expert, [N, D], of [E, N, D]."""
    scale, bias = (None if array is None else array[expert] for array in (bank.scale, bank.bias))
    outer = bank.outer[expert] if bank.outer is not None and bank.outer.ndim == 3 else bank.outer
    return Quantized(bank.spec, bank.codes[expert], scale, bias, outer)


def _blocks(matrix: Quantized, step: int) -> Iterator[Quantized]:
    """`step` rows at a time, as views."""
    for start in range(0, len(matrix.codes), step):
        part = matrix.output_rows(start, start + step)
        assert isinstance(part, Quantized)
        yield part
