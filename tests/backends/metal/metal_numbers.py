"""Numbers in and out of kernels."""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def wide(array: mx.array) -> np.ndarray:
    """Its values in float64; integers as they are."""
    if array.dtype in (mx.bfloat16, mx.float16):
        array = array.astype(mx.float32)
    values = np.array(array)
    return values.astype(np.float64) if array.dtype == mx.float32 else values


def narrow(values: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """float64 values rounded to the dtype."""
    return mx.array(values.astype(np.float32)).astype(dtype)
