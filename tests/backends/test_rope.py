"""YaRN as OpenAI's reference computes it: the correction range is not rounded."""

from __future__ import annotations

import math

import numpy as np

from mlx_gptoss.backends.rope import _correction_range, yarn_frequencies
from mlx_gptoss.config import Yarn


def test_correction_range_of_gpt_oss():
    low, high = _correction_range(Yarn(), 64)
    assert (round(low, 2), round(high, 2)) == (8.09, 17.40)
    assert _correction_range(Yarn(truncate=True), 64) == (8, 18)


def test_ends_are_kept_and_divided():
    yarn = Yarn()
    frequencies = yarn_frequencies(yarn, 64)
    plain = yarn.theta ** -(np.arange(0, 64, 2) / 64)
    assert np.allclose(frequencies[:9], plain[:9], rtol=1e-15)
    assert np.allclose(frequencies[18:], plain[18:] / 32, rtol=1e-15)
    assert ((frequencies[9:18] < plain[9:18]) & (frequencies[9:18] > plain[9:18] / 32)).all()


def test_rounding_the_range_is_a_large_error():
    exact, rounded = yarn_frequencies(Yarn(), 64), yarn_frequencies(Yarn(truncate=True), 64)
    assert 0.5 < np.abs((exact - rounded) * 4096).max() < 2.0  # radians at position 4096


def test_concentration():
    assert math.isclose(Yarn().concentration, 0.1 * math.log(32) + 1)
    assert Yarn(factor=1.0).concentration == 1.0


def test_factor_one_is_plain_rope():
    assert np.allclose(yarn_frequencies(Yarn(theta=100.0, factor=1.0), 4), [1.0, 0.1])
