"""The weights before rounding are those of ridge regression, and the bias keeps the mean of the outputs."""

from __future__ import annotations

import numpy as np

from mlx_gptoss.calibration.moments import RIDGE, MomentSums
from mlx_gptoss.weights import codecs
from mlx_gptoss.weights.codecs import BFLOAT16
from mlx_gptoss.weights.tensor import AFFINE4

RNG = np.random.default_rng(3)
ACTUAL = RNG.standard_normal((500, 64), np.float32) + np.float32(0.5)
ORIGINAL = ACTUAL + np.float32(0.1) * RNG.standard_normal((500, 64), np.float32) + 0.2 * ACTUAL[:, ::-1]
WEIGHT = RNG.standard_normal((10, 64), np.float32)
TOKENS = RNG.uniform(0.1, 1, 500).astype(np.float32)


def moments(*, with_mean: bool = True, chunk: int = 500, weights: np.ndarray | None = TOKENS):
    sums = MomentSums(64, with_mean=with_mean)
    for start in range(0, 500, chunk):
        rows = slice(start, start + chunk)
        sums.add(ORIGINAL[rows], ACTUAL[rows], None if weights is None else weights[rows])
    return sums.moments()


def regression(*, with_mean: bool) -> np.ndarray:
    """The weights V that minimize sum of t |W x + b - V x' - c|^2 + ridge |V - W|^2, by least squares in float64."""
    share = (TOKENS / TOKENS.sum()).astype(np.float64)
    x, y = ACTUAL.astype(np.float64), ORIGINAL.astype(np.float64)
    if with_mean:
        x, y = x - share @ x, y - share @ y
    ridge = RIDGE * np.mean(share @ x**2)
    rows = np.concatenate([x * np.sqrt(share)[:, None], np.sqrt(ridge) * np.eye(64)])
    wanted = np.concatenate([(y * np.sqrt(share)[:, None]) @ WEIGHT.T, np.sqrt(ridge) * WEIGHT.T])
    return np.linalg.lstsq(rows, wanted, rcond=None)[0].T


def test_the_target_is_that_of_ridge_regression():
    for with_mean in (True, False):
        assert np.allclose(moments(with_mean=with_mean).target(WEIGHT), regression(with_mean=with_mean), atol=1e-4)


def test_chunks_do_not_matter():
    whole, parts = moments(), moments(chunk=37)
    assert np.allclose(whole.covariance, parts.covariance, atol=1e-6)
    assert np.allclose(whole.target(WEIGHT), parts.target(WEIGHT), atol=1e-5)


def test_equal_inputs_leave_the_weights():
    sums = MomentSums(64)
    sums.add(ACTUAL, ACTUAL.copy())
    assert sums.moments().target(WEIGHT) is WEIGHT


def test_the_bias_keeps_the_mean():
    found = moments(weights=None)
    bias = RNG.standard_normal(10).astype(np.float32)
    stored = codecs.dequantize(found.quantize(WEIGHT, AFFINE4, BFLOAT16))
    wanted = (ORIGINAL @ WEIGHT.T + bias).mean(axis=0)
    assert np.allclose((ACTUAL @ stored.T + found.bias(bias, WEIGHT, stored)).mean(axis=0), wanted, atol=1e-4)
    assert not np.allclose((ACTUAL @ stored.T + bias).mean(axis=0), wanted, atol=1e-2)
