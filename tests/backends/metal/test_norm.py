"""Residual stream and RMSNorm in one launch, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from metal_numbers import narrow, wide

from mlx_gptoss.backends.mlx.kernels.norm import AddNorm, add_norm

WIDTHS = [(2880, mx.bfloat16), (192, mx.float32), (33, mx.float32), (5000, mx.float16)]
MORE = [
    pytest.param(width, dtype, marks=pytest.mark.slow)
    for width in (1, 31, 32, 129, 2879, 2880, 2881, 4096, 4097)
    for dtype in (mx.float32, mx.bfloat16)
]


def arrays(rows: tuple[int, ...], width: int, dtype: mx.Dtype, size: float, seed: int) -> list[mx.array]:
    """product, residual, weight"""
    rng = np.random.default_rng(seed)
    shapes = [((*rows, width), size), ((*rows, width), size), ((width,), 2.0)]
    return [narrow(rng.normal(size=shape) * scale, dtype) for shape, scale in shapes]


def exact(product, residual, weight, dtype: mx.Dtype, epsilon: float) -> list[np.ndarray]:
    """The stream, and the norm of the stream as rounded"""
    x = wide(product) + wide(residual)
    rounded = wide(narrow(x, dtype))
    mean = np.mean(np.square(rounded), axis=-1, keepdims=True)
    return [x, rounded / np.sqrt(mean + epsilon) * wide(weight)]


@pytest.mark.parametrize(("width", "dtype"), [*WIDTHS, *MORE])
def test_stream_and_norm(run, close, width, dtype):
    large, small = (100.0, 1e-3) if dtype == mx.float16 else (1e14, 1e-12)
    for rows in ((1, 1), (3, 1), (2, 3)):
        for size in (1.0, large, small):
            given = arrays(rows, width, dtype, size, seed=width)
            found = run(AddNorm(1e-5), *given)
            for a, b in zip(found, exact(*given, dtype, 1e-5), strict=True):
                close("norm", a, b, dtype)


def test_a_row_of_zeros_and_one_with_nan(run):
    product, residual, weight = arrays((3,), 192, mx.float32, 1.0, seed=1)
    product, residual = product * mx.array([[0.0], [1.0], [mx.nan]]), residual * mx.array([[0], [1], [1]])
    x, normed = run(AddNorm(1e-5), product, residual, weight)
    assert not x[0].any() and not normed[0].any()
    assert np.isfinite(normed[1]).all() and np.isnan(normed[2]).all()


def test_the_twin_computes_the_same(close):
    given = arrays((2, 1), 2880, mx.float32, 3.0, seed=3)
    for a, b in zip(add_norm(*given, 1e-5), exact(*given, mx.float32, 1e-5), strict=True):
        close("norm (twin)", wide(a), b, mx.float32)
