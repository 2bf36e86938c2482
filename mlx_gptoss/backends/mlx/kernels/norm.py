"""The residual stream after a product, and its RMSNorm.

Legend: D hidden.
"""

from __future__ import annotations

from math import prod

import mlx.core as mx

from .metal import SIMDGROUP, MetalKernel

MAX_THREADS = 1024
VALUES_PER_THREAD = 4


def add_norm(product: mx.array, residual: mx.array, weight: mx.array, epsilon: float) -> tuple[mx.array, mx.array]:
    """product, residual [..., D], weight [D] -> product + residual, and its RMSNorm, [..., D] each."""
    x = product + residual
    return x, mx.fast.rms_norm(x, weight, epsilon)


class AddNorm:
    """`add_norm` as one launch. epsilon: of the norm."""

    def __init__(self, epsilon: float) -> None:
        self._kernel = MetalKernel("norm", ["product", "residual", "weight", "epsilon"], ["out", "normed"])
        self._epsilon = mx.array([epsilon], dtype=mx.float32)
        mx.eval(self._epsilon)

    def __call__(self, product: mx.array, residual: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
        """As `add_norm`. All of one dtype; computed in float32 and rounded once for each result."""
        *rows, width = residual.shape
        threads = min(MAX_THREADS, -(-width // (VALUES_PER_THREAD * SIMDGROUP)) * SIMDGROUP)
        x, normed = self._kernel(
            [product, residual, weight, self._epsilon],
            template=[("T", residual.dtype), ("D", width), ("THREADS", threads)],
            groups=(prod(rows), 1, 1),
            threads=threads,
            shapes=[residual.shape] * 2,
            dtypes=[residual.dtype] * 2,
        )
        return x, normed
