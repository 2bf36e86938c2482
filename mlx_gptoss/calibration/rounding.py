"""Codes, scales and biases of affine weights, chosen by the error of the layer's output instead of the weights'.

For weights W [N, K], what is stored Q, and the covariance G [K, K] of the layer's input, the mean squared error of the
output is tr((W - Q) G (W - Q)^T). Two steps make it small:

1. Error feedback (GPTQ: Frantar et al. 2022; in the order of LDLQ, Chee et al. 2023). The columns of W are rounded one
   after the other, and what each loses is made up for by those that follow. Each group's scale is searched when its
   turn comes, with the columns weighted by what cannot be made up for.
2. Descent. Code by code, the best value given all others; then each group's best scale and bias given its codes. A
   scale is only changed if the error falls.

Arrays of the work are [K, N], so that the values of one column of W lie side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import MatMul
from ..weights import codecs, search
from ..weights.quantization import quantize_symmetric, symmetric_bias
from ..weights.tensor import Dense, Quantized, Spec

Floats = NDArray[Any]  # float32
Doubles = NDArray[Any]  # float64

DAMPING = 0.005  # added to the diagonal of G, as a part of its mean
SWEEPS = 2  # of descent: a third one lowers the error by less than 2%
_SHRINK = np.linspace(0.75, 1.2, 10)  # of a symmetric scale, tried for the least error
_MIN_SCALE = 1e-7
_ROWS = 1024  # of groups at once in the search for scales, so that its arrays stay in the processor's cache


def is_rounded(spec: Spec | None) -> bool:
    """Whether this module chooses codes for a spec: integers with float scales."""
    return spec is not None and spec.element == "uint" and spec.scale == "float"


class Rounder:
    """Rounds weights for inputs of one covariance G [K, K]: what all of them share is computed once.

    matmul: computes the products of whole columns. What is done column by column, and Cholesky's factorization in
    float64, stay in numpy.
    """

    def __init__(self, covariance: Doubles, matmul: MatMul = np.matmul) -> None:
        self.matmul = matmul
        damped = covariance + np.eye(len(covariance)) * (DAMPING * np.mean(np.diag(covariance)) + 1e-30)
        self.covariance: Floats = damped.astype(np.float32)
        # G = U D U^T with U upper triangular and 1 on its diagonal: Cholesky from the last column to the first.
        upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        diagonal = np.diag(upper)
        self.feedback: Floats = np.ascontiguousarray((upper / diagonal).T, np.float32)  # U^T
        self.left_over: Floats = (diagonal**2).astype(np.float32)  # D: what later columns cannot make up for

    def quantize(self, weight: Floats, spec: Spec, dtype: np.dtype[Any], *, symmetric: bool = False) -> Quantized:
        """Quantize W [N, K].

        dtype: of scales and biases, in which the codes are chosen.
        symmetric: the bias is that of a code in the middle which stands for 0, as in AutoRound's int4.
        """
        rounding = _Rounding(self, weight, spec, dtype, symmetric)
        rounding.feed_back()
        for _ in range(SWEEPS):
            rounding.descend()
        return rounding.result()


class _Rounding:
    """One matrix in the making. weight, values [K, N]; codes [K, N] as float32; scale, bias [K / g, N]."""

    def __init__(self, rounder: Rounder, weight: Floats, spec: Spec, dtype: np.dtype[Any], symmetric: bool) -> None:
        self.spec, self.dtype, self.symmetric = spec, dtype, symmetric
        self.top = np.float32(2**spec.bits - 1)
        self.weight: Floats = np.ascontiguousarray(weight.T, np.float32)
        self.covariance, self.feedback, self.left_over = rounder.covariance, rounder.feedback, rounder.left_over
        self.matmul = rounder.matmul
        groups, rows = len(self.weight) // spec.group, self.weight.shape[1]
        self.codes: Floats = np.empty_like(self.weight)
        self.values: Floats = np.empty_like(self.weight)
        self.scale: Floats = np.empty((groups, rows), np.float32)
        self.bias: Floats = np.empty((groups, rows), np.float32)

    def feed_back(self) -> None:
        """Round the columns in order, each with the errors of those before it made up for."""
        errors = np.empty_like(self.weight)  # W - Q of the columns that are done
        for group, part in enumerate(self._parts()):
            wanted = self.weight[part] + self.matmul(self.feedback[part, : part.start], errors[: part.start])
            scale, bias = self._search(wanted, self.left_over[part])
            self.scale[group], self.bias[group] = scale, bias
            for column in range(part.start, part.stop):
                here = column - part.start
                codes = self.codes[column] = self._nearest(wanted[here], scale, bias)
                self.values[column] = codes * scale + bias
                errors[column] = self.weight[column] - self.values[column]
                wanted[here + 1 :] += self.feedback[column + 1 : part.stop, column, None] * errors[column]

    def descend(self) -> None:
        """One sweep over all groups. The error of no row grows."""
        gradient = self.matmul(self.covariance, self.values - self.weight)  # half the derivative of the error by Q
        for group, part in enumerate(self._parts()):
            before = self.values[part].copy()
            inner = self.covariance[part, part]
            slope = gradient[part]
            self._better_codes(group, part, inner, slope)
            self._better_scale(group, part, inner, slope)
            change = self.values[part] - before
            gradient[part.stop :] += self.matmul(self.covariance[part.stop :, part], change)

    def result(self) -> Quantized:
        """The weight as stored."""
        codes = codecs.pack(np.ascontiguousarray(self.codes.T).astype(np.uint8), self.spec.bits)
        scale = np.ascontiguousarray(self.scale.T).astype(self.dtype)
        bias = symmetric_bias(scale) if self.symmetric else np.ascontiguousarray(self.bias.T).astype(self.dtype)
        return Quantized(self.spec, codes, scale, bias)

    def _parts(self) -> list[slice]:
        """The columns of each group."""
        return [slice(start, start + self.spec.group) for start in range(0, len(self.weight), self.spec.group)]

    def _nearest(self, values: Floats, scale: Floats, bias: Floats) -> Floats:
        codes = values - bias
        codes /= scale
        np.rint(codes, out=codes)
        return np.clip(codes, 0, self.top, out=codes)

    def _search(self, wanted: Floats, weights: Floats) -> tuple[Floats, Floats]:
        """Scale and bias [N] of one group's values [g, N]; weights [g]: of the squared error of each column."""
        groups, weights = np.ascontiguousarray(wanted.T), weights / weights.max()
        scale, bias = np.empty(len(groups), np.float32), np.empty(len(groups), np.float32)
        for start in range(0, len(groups), _ROWS):
            rows = slice(start, start + _ROWS)
            if self.symmetric:
                scale[rows], bias[rows] = self._search_symmetric(groups[rows], weights)
            else:
                scale[rows], bias[rows] = search.best_scales(groups[rows], self.spec, self.dtype, weights)
        return scale, bias

    def _search_symmetric(self, groups: Floats, weights: Floats) -> tuple[Floats, Floats]:
        """As _search, of groups [n, g]: AutoRound's own scale, made smaller or larger."""
        own = np.asarray(quantize_symmetric(Dense(groups)).scale).astype(np.float32)[:, 0]
        best, best_error = own, np.full(len(groups), np.inf, np.float32)
        for factor in _SHRINK:
            scale = search.round_scale(own * np.float32(factor), self.dtype)
            codes = search.nearest_codes(groups, scale, -8 * scale, int(self.top))
            error = np.einsum("ng,g->n", ((codes - 8) * scale[:, None] - groups) ** 2, weights)
            best, best_error = np.where(error < best_error, scale, best), np.minimum(error, best_error)
        return best, -8 * best

    def _better_codes(self, group: int, part: slice, inner: Floats, slope: Floats) -> None:
        """The best code of each column in turn. slope [g, N] follows the changes."""
        scale, bias = self.scale[group], self.bias[group]
        for here, column in enumerate(range(part.start, part.stop)):
            wanted = self.values[column] - slope[here] / inner[here, here]
            self.codes[column] = self._nearest(wanted, scale, bias)
            change = self.codes[column] * scale + bias - self.values[column]
            self.values[column] += change
            slope += inner[:, here, None] * change

    def _better_scale(self, group: int, part: slice, inner: Floats, slope: Floats) -> None:
        """The best scale and bias for these codes, in the rows where that lowers the error. slope: as above."""
        codes, scale, bias = self.codes[part], self.scale[group], self.bias[group]
        if self.symmetric:
            centered = codes - 8
            size = np.einsum("gn,gn->n", centered, inner @ centered)
            step = -np.einsum("gn,gn->n", centered, slope) / np.maximum(size, 1e-30)
            new_scale = search.round_to(scale + step, self.dtype)
            new_bias = -8 * new_scale
        else:
            sums = inner.sum(axis=1)
            a, b, c = np.einsum("gn,gn->n", codes, inner @ codes), sums @ codes, sums.sum()
            by_scale, by_bias = np.einsum("gn,gn->n", codes, slope), slope.sum(axis=0)
            determinant = a * c - b * b
            usable = determinant > 1e-6 * a * c
            step = np.divide(b * by_bias - c * by_scale, determinant, out=np.zeros_like(a), where=usable)
            new_scale = search.round_to(scale + step, self.dtype)
            new_bias = search.round_to(bias - (by_bias + (new_scale - scale) * b) / c, self.dtype)
        change = codes * new_scale + new_bias - self.values[part]
        gain = np.einsum("gn,gn->n", change, 2 * slope + inner @ change)
        better = (gain < 0) & (np.abs(new_scale) >= _MIN_SCALE) & np.isfinite(new_scale) & np.isfinite(new_bias)
        self.scale[group], self.bias[group] = np.where(better, new_scale, scale), np.where(better, new_bias, bias)
        change *= better
        self.values[part] = np.where(better, codes * new_scale + new_bias, self.values[part])
        slope += inner @ change
