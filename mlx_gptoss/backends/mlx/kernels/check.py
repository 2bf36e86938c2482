"""Custom kernels against their twins: the kernel on the GPU in the activations' dtype, the twin on the CPU in float32,
with the same numbers.

Legend: T tokens, D hidden, E experts, A active experts per token, H query heads, K kv heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..layers import QuantizedMatrix
from ..quantized_kv import pack
from .attention import Attend, attend
from .experts import ExpertLayer, Experts, mixture
from .norm import AddNorm, add_norm
from .router import Router, route

# Largest errors, relative to the largest value: a few roundings of the result and of what is rounded in between.
LIMITS = {mx.float32: 1e-4, mx.bfloat16: 2.0**-6, mx.float16: 2.0**-9}

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """A kernel's result and its twin's: it passes if error <= limit."""

    name: str
    error: float
    limit: float


def router_cases(router: Router, experts: int, active: int, dtype: mx.Dtype) -> Iterator[Case]:
    """Logits of every size from 1/4 on, no two of a token the same: of equal ones the twin chooses any."""
    rng = np.random.default_rng(1)
    for tokens in (1, 5):
        order = rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=-1)
        logits = mx.array((order - experts // 2) * np.float32(0.25)).astype(dtype)
        found = _dense(*router(logits, active), experts)
        with mx.stream(mx.cpu):
            wanted = _dense(*route(_float32(logits), active), experts)
        yield _case(f"{tokens} tokens", found, wanted, dtype)


def norm_cases(add: AddNorm, width: int, epsilon: float, dtype: mx.Dtype) -> Iterator[Case]:
    """Few rows."""
    weight = _normal(1, (width,), dtype)
    for rows in (1, 4):
        product, residual = _normal(2, (rows, width), dtype), _normal(3, (rows, width), dtype)
        found = [_numpy(array) for array in add(product, residual, weight)]
        with mx.stream(mx.cpu):
            twins = add_norm(_float32(product), _float32(residual), _float32(weight), epsilon)
            wanted = [_numpy(array) for array in twins]
        for name, a, b in zip(("residual", "norm"), found, wanted, strict=True):
            yield _case(f"{rows} rows, {name}", a, b, dtype)


def expert_cases(experts: Experts, layer: ExpertLayer, active: int, dtype: mx.Dtype) -> Iterator[Case]:
    """With the layer's own weights, of which the twin reads copies of the experts that it needs."""
    count, width = layer.down.codes.shape[:2]
    for tokens in (1, 3):
        x, residual = _normal(1, (tokens, width), dtype), _normal(2, (tokens, width), dtype)
        bias = _normal(3, (width,), dtype)
        numbers = np.arange(tokens * active) * 7 % count
        chosen = mx.array(numbers.astype(np.uint32).reshape(tokens, active))
        shares = np.linspace(0.1, 0.4, tokens * active, dtype=np.float32).reshape(tokens, active)
        weights = mx.array(shares).astype(dtype)
        found = [_numpy(array) for array in experts(x, residual, chosen, weights, layer, bias) if array is not None]
        with mx.stream(mx.cpu):
            used, places = np.unique(numbers, return_inverse=True)
            again = mx.array(places.astype(np.uint32).reshape(tokens, active))
            part = _part(layer, mx.array(used.astype(np.uint32)))
            given = _float32(x), _float32(residual), again, _float32(weights), part, _float32(bias)
            wanted = [_numpy(array) for array in mixture(*given) if array is not None]
        for name, a, b in zip(("stream", "stream and next bias"), found, wanted, strict=True):
            yield _case(f"{tokens} tokens, {name}", a, b, dtype)


def attention_cases(
    kernel: Attend, queries: int, kv_heads: int, dim: int, window: int | None, bits: int, factor: float, dtype: mx.Dtype
) -> Iterator[Case]:
    """Contexts within a tile, in one part and in several; rows of unequal length; rings before and after their end."""
    for positions in ((5,), (200,), (1100, 2, 300)):
        rows, size = len(positions), 3 + (max(positions) if window is None else window)
        slots = mx.array(np.arange(rows, dtype=np.int32)[::-1].copy())
        places = mx.array(np.array(positions, np.int32))
        vectors, sinks = _normal(1, (rows, queries, 1, dim), dtype), _normal(2, (queries,), dtype)
        cached: Sequence[mx.array] = [_normal(3, (2, rows, kv_heads, size, dim), dtype)]
        if bits == 8:
            cached = pack(cached[0])
        found = _numpy(kernel(vectors, cached, slots, places, window, sinks, max(positions) + 1))
        with mx.stream(mx.cpu):
            wide = [array if array.dtype == mx.uint32 else _float32(array) for array in cached]
            twin = attend(_float32(vectors), wide, slots, places, window, _float32(sinks), factor)
            wanted = _numpy(twin)
        yield _case(f"positions {', '.join(map(str, positions))}", found, wanted, dtype)


def _part(layer: ExpertLayer, experts: mx.array) -> ExpertLayer:
    """Some of the layer's experts, with scales, biases and bias in float32, which products on a CPU want."""

    def part(matrix: QuantizedMatrix) -> QuantizedMatrix:
        codes, scales = matrix.codes[experts], matrix.scales[experts]
        if matrix.biases is None:
            return replace(matrix, codes=codes, scales=scales)
        return replace(matrix, codes=codes, scales=_float32(scales), biases=_float32(matrix.biases[experts]))

    return replace(layer, gate_up=part(layer.gate_up), down=part(layer.down), bias=_float32(layer.bias[experts]))


def _case(name: str, found: Floats, wanted: Floats, dtype: mx.Dtype) -> Case:
    error = float(np.abs(found - wanted).max() / max(float(np.abs(wanted).max()), 1e-30))
    return Case(name, error if np.isfinite(found).all() else float("inf"), LIMITS[dtype])


def _dense(experts: mx.array, weights: mx.array, count: int) -> Floats:
    """Each expert's weight, [T, E]; those that were not chosen have none."""
    numbers, values = np.array(experts), _numpy(weights)
    out = np.zeros((len(numbers), count), np.float32)
    np.put_along_axis(out, np.minimum(numbers, count - 1).astype(np.int64), values, axis=-1)
    return out


def _normal(seed: int, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def _float32(x: mx.array) -> mx.array:
    return x.astype(mx.float32)


def _numpy(x: mx.array) -> Floats:
    return np.array(x.astype(mx.float32))
