"""Router logits to experts and weights, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from metal_numbers import narrow, wide

from mlx_gptoss.backends.mlx.kernels.router import Router, can_route, route

SIZES = [  # experts, active, dtype: below, at and above a simdgroup; all active; one
    (32, 4, mx.bfloat16),
    (128, 4, mx.bfloat16),
    (33, 4, mx.float32),
    (8, 4, mx.float16),
    (4, 4, mx.float32),
    (1, 1, mx.float32),
]
MORE = [(e, a, d) for e in (2, 31, 64, 65, 100, 1024) for a in (1, 2, 8, 32) for d in (mx.float32, mx.bfloat16)]
MORE = [pytest.param(e, a, d, marks=pytest.mark.slow) for e, a, d in MORE if a <= e]


def logits(kind: str, tokens: int, experts: int) -> np.ndarray:
    rng = np.random.default_rng(experts)
    x = rng.normal(size=(tokens, experts))
    if kind == "ties":
        return np.round(x) + 0.0  # without -0
    if kind == "equal":
        return np.full_like(x, -0.5)
    if kind == "large":
        return x * 8000
    if kind == "tiny":
        return x * 1e-4
    if kind == "descending":
        return -np.sort(-x, axis=-1)
    if kind == "signed zeros":
        return np.where(x > 0, 0.0, -0.0)
    return x


def chosen(x: np.ndarray, active: int) -> tuple[np.ndarray, np.ndarray]:
    """x [T, E]: the largest first, of equal ones the first"""
    experts = np.argsort(-x, axis=-1, kind="stable")[:, :active]
    best = np.take_along_axis(x, experts, axis=-1)
    share = np.exp(best - best[:, :1])
    return experts, share / share.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(("experts", "active", "dtype"), [*SIZES, *MORE])
def test_experts_and_weights(run, close, experts, active, dtype):
    for tokens in (1, 7):
        for kind in ("normal", "ties", "equal", "large", "tiny", "descending"):
            x = narrow(logits(kind, tokens, experts), dtype)
            numbers, weights = run(Router(), x, active)
            wanted, share = chosen(wide(x), active)
            assert np.array_equal(numbers, wanted)
            close("router", weights, share, dtype)


def test_equal_zeros_are_chosen_once_each(run):
    numbers, weights = run(Router(), narrow(logits("signed zeros", 5, 8), mx.float32), 4)
    assert all(len(set(row)) == 4 for row in numbers.tolist()) and numbers.max() < 8
    assert np.allclose(weights, 0.25)


def test_infinities_and_nan_choose_experts_that_exist(run):
    x = np.array([[np.nan, 1, 2, 3, -np.inf, 5, 6, 7], [-np.inf] * 8, [np.nan] * 8, [-np.nan] * 8, [0] * 7 + [np.inf]])
    numbers, weights = run(Router(), narrow(x, mx.float32), 4)
    assert all(len(set(row)) == 4 for row in numbers.tolist()) and numbers.max() < 8
    assert numbers[0].tolist() == [0, 7, 6, 5] and np.isnan(weights[0]).all()
    one = np.full((1, 8), -np.inf)
    one[0, 5] = 3
    numbers, weights = run(Router(), narrow(one, mx.float32), 4)
    assert numbers[0, 0] == 5 and weights[0].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_twin_chooses_the_same(run, dtype):
    """Without ties at the border, where the twin's choice is not defined."""
    order = np.random.default_rng(1).permuted(np.tile(np.arange(32.0) / 4, (9, 1)), axis=-1)
    x = narrow(order, dtype)
    numbers, weights = run(Router(), x, 4)
    twins, shares = (np.array(a) for a in route(x.astype(mx.float32), 4))
    for row in range(9):
        assert dict(zip(numbers[row].tolist(), weights[row].tolist(), strict=True)) == pytest.approx(
            dict(zip(twins[row].tolist(), shares[row].tolist(), strict=True)), rel=2**-8
        )


def test_sizes_that_the_kernel_takes():
    assert can_route(32, 4) and can_route(128, 4) and can_route(4, 4)
    assert not can_route(64, 33) and not can_route(3, 4)
