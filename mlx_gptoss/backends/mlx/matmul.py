"""Products of numpy arrays on MLX's device, for calibration."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..base import MatMul

Floats = NDArray[np.float32]

CACHE_BYTES = 2**28  # of freed buffers that MLX keeps


def matmul_on(device: mx.Device) -> MatMul:
    """As Backend.matmul. All products run on one thread of their own, because MLX's streams belong to threads."""
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # read at the first product: an M5 multiplies float32 in TF32 else
    thread = ThreadPoolExecutor(1, "matmul")

    def product(a: Floats, b: Floats) -> Floats:
        found = np.array(mx.matmul(mx.array(a), mx.array(b), stream=device))
        if mx.get_cache_memory() > CACHE_BYTES:
            mx.clear_cache()
        return found

    def matmul(a: Floats, b: Floats) -> Floats:
        return thread.submit(product, a, b).result()

    return matmul
