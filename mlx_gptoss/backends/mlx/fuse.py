"""Weights in numpy arrays as matrices of MLX: several fused into one, or cut into parts.

Nothing is re-quantized: codes are concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import mlx.core as mx
import numpy as np

from ...errors import CheckpointError
from ...weights import codecs
from ...weights.tensor import FP8_ROW, MXFP8, Array, Dense, Quantized, Weight, same_storage
from .layers import MODES, DenseMatrix, QuantizedMatrix

UNIT_E8M0 = 127  # the e8m0 byte for 2^0


def storage_groups(weights: Sequence[Weight]) -> list[list[Weight]]:
    """All weights together if they are stored alike, else each alone."""
    return [list(weights)] if same_storage(weights) else [[weight] for weight in weights]


def split_rows(weights: Sequence[Weight], count: int) -> list[list[Weight]]:
    """All rows in order, split into `count` parts with equal numbers of rows, as views."""
    rows = [weight.shape[-2] for weight in weights]
    ends = list(accumulate(rows))
    edges = [ends[-1] * i // count for i in range(count + 1)]
    return [
        [
            weight.output_rows(max(first - (end - n), 0), min(last - (end - n), n))
            for weight, n, end in zip(weights, rows, ends, strict=True)
            if first < end and last > end - n
        ]
        for first, last in pairwise(edges)
    ]


def fuse(weights: Sequence[Weight], dtype: mx.Dtype | None = None) -> DenseMatrix | QuantizedMatrix:
    """One matrix with the rows of all weights, in order. They are stored alike, so concatenating codes is exact.

    dtype: of the activations, with which MLX can multiply by the matrix as it then is; None keeps it as stored."""
    first = weights[0]
    if isinstance(first, Dense):
        matrix = concatenate([w.values for w in weights if isinstance(w, Dense)], axis=-2)
        # A product would round it to narrower activations every time; wider ones have their own way (DenseMatrix).
        return DenseMatrix(matrix if dtype is None or matrix.dtype.size < dtype.size else matrix.astype(dtype))
    parts = [w for w in weights if isinstance(w, Quantized)]
    codes = concatenate([w.codes for w in parts], axis=-2).view(mx.uint32)
    if first.spec == FP8_ROW:
        scales = mx.full((*codes.shape[:-1], codes.shape[-1] // 8), UNIT_E8M0, dtype=mx.uint8)
        return QuantizedMatrix(codes, scales, None, _outer(parts), MXFP8)
    if first.spec not in MODES:
        raise CheckpointError(f"MLX has no kernel for {first.spec}; convert the checkpoint with --to mlx-4bit")
    found = [[w.scale for w in parts if w.scale is not None], [w.bias for w in parts if w.bias is not None]]
    joined = [part[0] if len(part) == 1 else np.concatenate(part, axis=-2) for part in found if part]
    scales, *biases = (_to_mlx(array) for array in (joined if dtype is None else _without_casts(joined, dtype)))
    return QuantizedMatrix(codes, scales, biases[0] if biases else None, _outer(parts), first.spec)


def _without_casts(arrays: list[Array], dtype: mx.Dtype) -> list[Array]:
    """The scales and biases of a matrix, float16 ones as bfloat16 if that is exact, else as float32, unless activations
    are float16: at every product MLX would cast those of all experts."""
    if arrays[0].dtype != np.float16 or dtype == mx.float16:
        return arrays
    if dtype == mx.bfloat16:
        narrow = [array.astype(codecs.BFLOAT16) for array in arrays]
        if all((short.astype(np.float32) == array).all() for short, array in zip(narrow, arrays, strict=True)):
            return narrow
    return [array.astype(np.float32) for array in arrays]


def _outer(parts: Sequence[Quantized]) -> mx.array | None:
    """The factors on the output rows, float32: [] for one factor, else [N], [E, 1] or [E, N]."""
    if all(part.outer is None for part in parts):
        return None
    factors = [np.float32(1.0) if part.outer is None else np.asarray(part.outer, dtype=np.float32) for part in parts]
    if all(np.ndim(f) == 0 for f in factors) and len({float(f) for f in factors}) == 1:
        return mx.array(float(factors[0]))
    rows = [np.broadcast_to(f, (*p.codes.shape[:-1], 1))[..., 0] for f, p in zip(factors, parts, strict=True)]
    return mx.array(np.concatenate(rows, axis=-1))


def concatenate(arrays: Sequence[Array], axis: int) -> mx.array:
    """Mapped numpy arrays, concatenated, as one MLX array."""
    return _to_mlx(arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=axis))


def _to_mlx(values: Array) -> mx.array:
    """A numpy array as an MLX array; bfloat16, which numpy lacks, by its bits."""
    values = np.ascontiguousarray(values)
    if values.dtype.name == "bfloat16":
        return mx.array(values.view(np.uint16)).view(mx.bfloat16)
    return mx.array(values)
