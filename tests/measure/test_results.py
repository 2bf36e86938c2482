"""Means of an evaluation with their standard errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlx_gptoss.measure.evaluation import Divergence, Evaluation
from mlx_gptoss.measure.results import Places, mean_of


def test_the_standard_error_is_that_of_resampled_documents():
    """Against the spread of the mean over 2000 resamplings of whole documents."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(5, 60, 80)
    window = np.repeat(np.arange(80), sizes)
    values = rng.exponential(1, len(window)) * np.repeat(rng.exponential(1, 80), sizes)
    found = mean_of(values, window)
    sums, counts = np.bincount(window, values), np.bincount(window)
    drawn = rng.integers(0, 80, (2000, 80))
    spread = (sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)).std()
    assert found.mean == pytest.approx(values.mean())
    assert found.error == pytest.approx(spread, rel=0.1)
    assert mean_of(values, None).error == pytest.approx(values.std(ddof=1) / len(values) ** 0.5)
    assert math.isnan(mean_of(values, np.zeros(len(values), int)).error)


def test_a_difference_is_that_of_pairs():
    rng = np.random.default_rng(2)
    hard = np.repeat(rng.exponential(1, 40), 25)
    places = Places(np.repeat(np.arange(40), 25), np.full(1000, ""), np.full(1000, -1))
    reference = Evaluation("a", "bf16", 1, 16.0, 64, hard)
    first, second = (
        Divergence(reference, hard * factor + rng.normal(0, 0.01, 1000), hard > 0, places) for factor in (1.0, 1.1)
    )
    found = second.difference(first)
    assert found.mean == pytest.approx(second.kl_mean - first.kl_mean)
    assert found.error < 0.2 * (first.kl_error**2 + second.kl_error**2) ** 0.5
