"""Least-squares scales for affine weights: what `convert --search mse` quantizes 4-bit weights with, and where
calibration/rounding.py begins.

MLX's recipe spans a group from its smallest to its largest value. Two things lose less in the same storage: finer
steps that clip a few values, and steps that match the few distinct values of weights that came from MXFP4. On such
weights the relative error falls from 9.3% to about 7.1%. Each group takes the best of 16 candidates and then alternates
twice between the nearest codes and the least-squares line through them (Lloyd's algorithm). No group gets worse than
with the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from . import quantization
from .codecs import BFLOAT16, Bytes, Floats
from .tensor import Quantized, Spec, Weight

# Pairs of (step / amax * 192, -edge / amax * 48), for a group whose sign is chosen so that its value of the largest
# magnitude is negative. Picked greedily, each to lower the error most, over Gaussian and Student-t weights, both plain
# and rounded to MXFP4.
_CANDIDATES = (
    (24, 48), (18, 45), (27, 51), (21, 48), (17, 47), (24, 46), (21, 46), (25, 45),
    (20, 47), (23, 47), (24, 42), (24, 47), (26, 48), (22, 47), (28, 52), (19, 46),
)  # fmt: skip
_REFINEMENTS = 2
_BLOCK_GROUPS = 1024  # groups per block: three float32 arrays of that size fit in the processor's cache


def to_spec(weight: Weight, spec: Spec, scale_dtype: np.dtype[Any] = BFLOAT16) -> Quantized:
    """Like quantization.to_spec, but 4-bit affine weights get the scales and biases of the least squared error.

    scale_dtype: scales and biases are rounded to it before the codes are chosen, so the error includes that rounding.
    """
    is_stored_so = isinstance(weight, Quantized) and weight.spec == spec and weight.outer is None
    if is_stored_so or (spec.element, spec.bits) != ("uint", 4):
        return quantization.to_spec(weight, spec, scale_dtype)
    return quantize(weight, spec, scale_dtype)


def quantize(weight: Weight, spec: Spec, scale_dtype: np.dtype[Any] = BFLOAT16) -> Quantized:
    """The weight, decoded and quantized to affine codes of any width with scales and biases of the least error."""
    return quantization.quantize_with(weight, spec, partial(_encode, dtype=scale_dtype), scale_dtype)


def _encode(groups: Floats, spec: Spec, *, dtype: np.dtype[Any]) -> tuple[Bytes, Floats, Floats]:
    """Codes [n, g], scales [n] and biases [n] of groups [n, g]."""
    codes = np.empty(groups.shape, np.uint8)
    scale, bias = np.empty(len(groups), np.float32), np.empty(len(groups), np.float32)
    # Values near float32's largest overflow to an infinite error, which is never the least.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(groups), _BLOCK_GROUPS):
            part = slice(start, start + _BLOCK_GROUPS)
            scale[part], bias[part] = found = best_scales(groups[part], spec, dtype)
            codes[part] = nearest_codes(groups[part], *found, 2**spec.bits - 1)
    return codes, scale, bias


def best_scales(
    groups: Floats, spec: Spec, dtype: np.dtype[Any], weights: Floats | None = None
) -> tuple[Floats, Floats]:
    """The scale and bias [n] of groups [n, g]: those of the recipe, unless a proposal has a smaller error.

    weights: of the squared error of each place in a group, [g]; None weighs all alike.
    """
    _, scale, bias = quantization.encode_affine(groups.copy(), spec)
    top = 2**spec.bits - 1
    scale, bias = round_to(scale, dtype), round_to(bias, dtype)
    best_error = _squared_error(groups, scale, bias, top, weights)
    for proposed_scale, proposed_bias in _proposals(groups, top, dtype, weights):
        error = _squared_error(groups, proposed_scale, proposed_bias, top, weights)
        better = error < best_error
        scale, bias = np.where(better, proposed_scale, scale), np.where(better, proposed_bias, bias)
        best_error = np.where(better, error, best_error)
    return scale, bias


def _proposals(
    groups: Floats, top: int, dtype: np.dtype[Any], weights: Floats | None
) -> Iterator[tuple[Floats, Floats]]:
    """Scale and bias [n] of each group's best candidate, then of its refinements, all rounded to `dtype`."""
    scale, bias = _best_candidate(groups, top, weights)
    for refinements_left in reversed(range(_REFINEMENTS + 1)):
        scale, bias = round_scale(scale, dtype), round_to(bias, dtype)
        yield scale, bias
        if refinements_left:
            scale, bias = _least_squares(groups, nearest_codes(groups, scale, bias, top), scale, weights)


def _best_candidate(groups: Floats, top: int, weights: Floats | None) -> tuple[Floats, Floats]:
    """Scale and bias [n] of the candidate with the smallest error in each group [n, g]. Codes are from 0 to `top`."""
    low, high = groups.min(axis=1), groups.max(axis=1)
    amax = np.where(-low >= high, -low, -high)  # negative where the sign of the group is turned
    normalized = groups * np.divide(1, amax, out=np.zeros_like(amax), where=amax != 0)[:, None]
    best_error = np.full(len(groups), np.inf, np.float32)
    best = np.zeros(len(groups), np.intp)
    steps, work = np.empty_like(normalized), np.empty_like(normalized)
    root = None if weights is None else np.sqrt(weights)
    for index, (step, edge) in enumerate(_CANDIDATES):
        width = step * 15 / top
        np.multiply(normalized, np.float32(192 / width), out=steps)
        steps += np.float32(4 * edge / width)
        np.rint(steps, out=work)
        np.clip(work, 0, top, out=work)
        work -= steps
        if root is not None:
            work *= root
        error = np.einsum("ng,ng->n", work, work) * np.float32(width**2)
        best[error < best_error] = index
        np.minimum(best_error, error, out=best_error)
    step, edge = np.array(_CANDIDATES, np.float32).T
    step *= np.float32(15 / top)
    return step[best] / 192 * amax, -edge[best] / 48 * amax


def _least_squares(groups: Floats, codes: Floats, scale: Floats, weights: Floats | None) -> tuple[Floats, Floats]:
    """Scale and bias [n] of least squares for these codes [n, g], which are overwritten; `scale` if all are equal."""
    total = np.float32(groups.shape[1]) if weights is None else weights.sum()
    mean_code = (codes if weights is None else codes * weights).sum(axis=1) / total
    mean = (groups if weights is None else groups * weights).sum(axis=1) / total
    codes -= mean_code[:, None]
    weighted = codes if weights is None else codes * weights
    variance = np.einsum("ng,ng->n", codes, weighted)
    covariance = np.einsum("ng,ng->n", weighted, groups)
    found = np.divide(covariance, variance, out=scale.copy(), where=variance > 0)
    return found, mean - found * mean_code


def nearest_codes(groups: Floats, scale: Floats, bias: Floats, top: int) -> Floats:
    """The nearest codes [n, g] from 0 to `top`, as float32."""
    codes = groups - bias[:, None]
    codes /= scale[:, None]
    np.rint(codes, out=codes)
    return np.clip(codes, 0, top, out=codes)


def _squared_error(groups: Floats, scale: Floats, bias: Floats, top: int, weights: Floats | None) -> Floats:
    """The squared error [n] of each group with its nearest codes."""
    values = nearest_codes(groups, scale, bias, top)
    values *= scale[:, None]
    values += bias[:, None]
    values -= groups
    weighted = values if weights is None else values * weights
    found: Floats = np.einsum("ng,ng->n", values, weighted)
    return found


def round_scale(scale: Floats, dtype: np.dtype[Any]) -> Floats:
    """The scale as stored. Its magnitude is at least 1e-7, as in MLX."""
    return round_to(np.where(np.abs(scale) < 1e-7, np.float32(1e-7), scale), dtype)


def round_to(values: Floats, dtype: np.dtype[Any]) -> Floats:
    """The values as `dtype` holds them, in float32."""
    return values.astype(dtype).astype(np.float32)
