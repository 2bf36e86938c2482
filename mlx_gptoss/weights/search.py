"""4-bit affine scales of least squared error: what `convert --search mse` quantizes with.

MLX's recipe spans a group from its least to its largest value. Fewer, finer steps that cut off a few values, or steps
that meet the few distinct values which weights from MXFP4 have, lose less: on such weights about 7.1% relative error
instead of 9.3%, in the same bits. Each group takes the best of 16 candidates, then alternates twice between the nearest
codes and the line of least squares through them (Lloyd's algorithm), and never does worse than the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from . import quantization
from .codecs import BFLOAT16, Bytes, Floats
from .tensor import Quantized, Spec, Weight

# (step / amax * 192, -edge / amax * 48) of a group turned so that its largest magnitude is negative. Chosen one after
# the other, each to lower the error most, over Gaussian and Student-t weights, plain and through MXFP4.
_CANDIDATES = (
    (24, 48), (18, 45), (27, 51), (21, 48), (17, 47), (24, 46), (21, 46), (25, 45),
    (20, 47), (23, 47), (24, 42), (24, 47), (26, 48), (22, 47), (28, 52), (19, 46),
)  # fmt: skip
_REFINEMENTS = 2
_BLOCK_GROUPS = 1024  # worked on at once: three float32 arrays of these stay in the processor's cache


def to_spec(weight: Weight, spec: Spec, scale_dtype: np.dtype[Any] = BFLOAT16) -> Quantized:
    """As quantization.to_spec, but 4-bit affine gets the scales and biases of least squared error.

    `scale_dtype` is what they are rounded to before codes are chosen, so that the error counts that too.
    """
    stored_so = isinstance(weight, Quantized) and weight.spec == spec and weight.outer is None
    if stored_so or (spec.element, spec.bits) != ("uint", 4):
        return quantization.to_spec(weight, spec, scale_dtype)
    return quantization.quantize_with(weight, spec, partial(_search, dtype=scale_dtype), scale_dtype)


def _search(groups: Floats, spec: Spec, *, dtype: np.dtype[Any]) -> tuple[Bytes, Floats, Floats]:
    codes = np.empty(groups.shape, np.uint8)
    scale, bias = np.empty(len(groups), np.float32), np.empty(len(groups), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # of values near float32's largest; no such error is least
        for start in range(0, len(groups), _BLOCK_GROUPS):
            part = slice(start, start + _BLOCK_GROUPS)
            best = _search_block(groups[part], spec, dtype)
            codes[part] = _nearest_codes(groups[part], *best)
            scale[part], bias[part] = best
    return codes, scale, bias


def _search_block(groups: Floats, spec: Spec, dtype: np.dtype[Any]) -> tuple[Floats, Floats]:
    """Scale and bias [n] of groups [n, g]."""
    _, scale, bias = quantization.encode_affine(groups.copy(), spec)
    scale, bias = _round_scale(scale, dtype), _round(bias, dtype)
    least = _squared_error(groups, scale, bias)
    for found_scale, found_bias in _proposals(groups, dtype):
        error = _squared_error(groups, found_scale, found_bias)
        better = error < least
        scale, bias = np.where(better, found_scale, scale), np.where(better, found_bias, bias)
        least = np.where(better, error, least)
    return scale, bias


def _proposals(groups: Floats, dtype: np.dtype[Any]) -> Iterator[tuple[Floats, Floats]]:
    """The best candidate of each group, then its refinements; scale and bias [n], as `dtype` holds them."""
    scale, bias = _best_candidate(groups)
    for left in reversed(range(_REFINEMENTS + 1)):
        scale, bias = _round_scale(scale, dtype), _round(bias, dtype)
        yield scale, bias
        if left:
            scale, bias = _least_squares(groups, _nearest_codes(groups, scale, bias), scale)


def _best_candidate(groups: Floats) -> tuple[Floats, Floats]:
    low, high = groups.min(axis=1), groups.max(axis=1)
    amax = np.where(-low >= high, -low, -high)  # negative where the group is turned
    whole = groups * np.divide(1, amax, out=np.zeros_like(amax), where=amax != 0)[:, None]
    least = np.full(len(groups), np.inf, np.float32)
    best = np.zeros(len(groups), np.intp)
    steps, work = np.empty_like(whole), np.empty_like(whole)
    for index, (step, edge) in enumerate(_CANDIDATES):
        np.multiply(whole, np.float32(192 / step), out=steps)
        steps += np.float32(4 * edge / step)
        np.rint(steps, out=work)
        np.clip(work, 0, 15, out=work)
        work -= steps
        error = np.einsum("ng,ng->n", work, work) * np.float32(step**2)
        better = error < least
        best[better] = index
        np.minimum(least, error, out=least)
    step, edge = np.array(_CANDIDATES, np.float32).T
    return step[best] / 192 * amax, -edge[best] / 48 * amax


def _least_squares(groups: Floats, codes: Floats, scale: Floats) -> tuple[Floats, Floats]:
    """Scale and bias of least squares for given codes; `scale` where these are all the same."""
    size = np.float32(groups.shape[1])
    mean_code, mean = codes.sum(axis=1) / size, groups.sum(axis=1) / size
    codes -= mean_code[:, None]
    spread = np.einsum("ng,ng->n", codes, codes)
    found = np.divide(np.einsum("ng,ng->n", codes, groups), spread, out=scale.copy(), where=spread > 0)
    return found, mean - found * mean_code


def _nearest_codes(groups: Floats, scale: Floats, bias: Floats) -> Floats:
    """The nearest codes [n, g], as float32."""
    codes = groups - bias[:, None]
    codes /= scale[:, None]
    np.rint(codes, out=codes)
    return np.clip(codes, 0, 15, out=codes)


def _squared_error(groups: Floats, scale: Floats, bias: Floats) -> Floats:
    """Squared error [n] of each group with its nearest codes."""
    values = _nearest_codes(groups, scale, bias)
    values *= scale[:, None]
    values += bias[:, None]
    values -= groups
    found: Floats = np.einsum("ng,ng->n", values, values)
    return found


def _round_scale(scale: Floats, dtype: np.dtype[Any]) -> Floats:
    """The scale as stored, of a magnitude of at least 1e-7, as MLX's are."""
    return _round(np.where(np.abs(scale) < 1e-7, np.float32(1e-7), scale), dtype)


def _round(values: Floats, dtype: np.dtype[Any]) -> Floats:
    return values.astype(dtype).astype(np.float32)
