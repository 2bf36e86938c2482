"""Moments of a linear layer's input, and the weights that fit them: what rounding.py then rounds.

The layer sees x' in the model that is being made, where the original model has x at the same token. It should give
W x + b for x', so its weights before rounding are W + W C (G + ridge)^-1, where G is the covariance of x' and C that of
x - x' with x'. The bias then takes up the mean of what rounding changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import MatMul
from ..weights.tensor import Quantized, Spec
from .rounding import Rounder

Floats = NDArray[Any]  # float32
Doubles = NDArray[Any]  # float64

RIDGE = 0.02  # added to the diagonal of G for the fit, as a part of its mean


@dataclass(frozen=True)
class Moments:
    """Of inputs of width K, with each token's weight.

    original, actual [K]: the means of x and x', or 0 for a layer without a bias. covariance [K, K]: of x'. fit [K, K]:
    (G + ridge)^-1 C^T; None where x and x' are equal. All float64. matmul: computes the large products, in float32.
    """

    original: Doubles
    actual: Doubles
    covariance: Doubles
    fit: Doubles | None
    matmul: MatMul = np.matmul

    def target(self, weight: Floats) -> Floats:
        """The weights [N, K] that, given x', come closest to what `weight` gives for x."""
        if self.fit is None:
            return weight
        return np.asarray(weight + self.matmul(weight, self.fit.T.astype(np.float32)))

    @cached_property
    def rounder(self) -> Rounder:
        """Rounds weights for these inputs."""
        return Rounder(self.covariance, self.matmul)

    def quantize(self, weight: Floats, spec: Spec, dtype: np.dtype[Any], *, symmetric: bool = False) -> Quantized:
        """The weight [N, K] fitted to these inputs and rounded. dtype, symmetric: as in Rounder.quantize."""
        return self.rounder.quantize(self.target(weight), spec, dtype, symmetric=symmetric)

    def bias(self, bias: Floats, weight: Floats, stored: Floats) -> Floats:
        """The bias [N] with which the stored weights [N, K] give the same mean as `weight` with `bias`."""
        return np.asarray(bias + (weight @ self.original - stored @ self.actual), np.float32)


class MomentSums:
    """Adds up moments, some tokens at a time.

    with_mean: the layer has a bias, which takes up the means. matmul: as in Moments.
    """

    def __init__(self, width: int, *, with_mean: bool = True, matmul: MatMul = np.matmul) -> None:
        self._with_mean, self._matmul = with_mean, matmul
        self._total = 0.0
        self._original, self._actual = np.zeros(width), np.zeros(width)
        self._square, self._cross = np.zeros((width, width)), np.zeros((width, width))
        self._differs = False

    def add(self, original: Floats, actual: Floats, weights: Floats | None = None) -> None:
        """x and x' of some tokens [n, K]; weights [n], or None for 1."""
        if weights is None:
            weights = np.ones(len(actual), np.float32)
        self._total += float(weights.sum(dtype=np.float64))
        self._original += weights @ original
        self._actual += weights @ actual
        root = np.sqrt(weights)[:, None]
        scaled = actual * root
        self._square += self._matmul(scaled.T, scaled)
        difference = original - actual
        if difference.any():
            self._differs = True
            difference *= root
            self._cross += self._matmul(difference.T, scaled)

    def moments(self) -> Moments:
        """The moments of all tokens added, of which there is at least one."""
        original, actual = self._original / self._total, self._actual / self._total
        covariance, cross = self._square / self._total, self._cross / self._total
        if self._with_mean:
            covariance -= np.outer(actual, actual)
            cross -= np.outer(original - actual, actual)
        else:
            original, actual = np.zeros_like(original), np.zeros_like(actual)
        fit = None
        if self._differs:
            ridge = RIDGE * np.mean(np.diag(covariance)) + 1e-30
            fit = np.linalg.solve(covariance + ridge * np.eye(len(covariance)), cross.T)
        return Moments(original, actual, covariance, fit, self._matmul)
