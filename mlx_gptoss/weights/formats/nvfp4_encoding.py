"""Turning weights that share one second scale into ModelOpt's NVFP4: w = e2m1 * e4m3 * outer.

Codes are kept wherever that is exact. NVFP4 stays as it is, and MXFP4 keeps its codes when its exponents fit e4m3.
Everything else is quantized as ModelOpt does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .. import quantization
from ..tensor import MXFP4, NVFP4, Quantized, Weight

MAX_VALUE = np.float32(6 * 448)  # the largest e2m1 times the largest e4m3

_POWERS_OF_TWO = np.array([1, 2, 4, *range(8, 128, 8)], np.uint8)  # the e4m3 codes of 2^-9 to 2^8
_MIN_POWER, _MAX_POWER = -9, 8
_MIN_NORMAL_EXPONENT = -126  # of float32

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Nvfp4Encoding:
    """How to write some weights as NVFP4.

    outer: the second scale, float32, that all of them share.
    encode: converts rows of any of them to NVFP4 under that scale.
    """

    outer: np.float32
    encode: Callable[[Weight], Quantized]


def choose_encoding(weights: Sequence[Weight], name: str) -> Nvfp4Encoding:
    """The encoding of weights that share a second scale, chosen from all of their values.

    name: of the tensor to write, for a warning about MXFP4 blocks that have to be rounded.
    """
    specs = {weight.spec if isinstance(weight, Quantized) else None for weight in weights}
    outers = {value for weight in weights for value in _outer_scales(weight)}
    if specs == {NVFP4} and len(outers) == 1:
        return Nvfp4Encoding(outers.pop(), _as_quantized)
    if specs == {MXFP4} and outers == {1}:
        encoding = _mxfp4_encoding([_as_quantized(weight) for weight in weights], name)
        if encoding is not None:
            return encoding
    outer = np.float32(max(quantization.max_abs(weight) for weight in weights) / MAX_VALUE) or np.float32(1)
    return Nvfp4Encoding(outer, lambda part: quantization.quantize_nvfp4(part, np.asarray(outer)))


def _mxfp4_encoding(weights: Sequence[Quantized], name: str) -> Nvfp4Encoding | None:
    """The encoding that keeps MXFP4's codes; None if it needs a subnormal outer scale, which some kernels flush to
    zero."""
    ranges = [exponents for weight in weights if (exponents := _exponent_range(weight))]
    smallest, largest = min((low for low, _ in ranges), default=0), max((high for _, high in ranges), default=0)
    if largest - _MAX_POWER < _MIN_NORMAL_EXPONENT:
        return None
    octaves = _MAX_POWER - _MIN_POWER
    if smallest < largest - octaves:
        _log.warning("%s: blocks more than %d octaves below the largest are rounded to NVFP4's range", name, octaves)
    outer = np.ldexp(np.float32(1), largest - _MAX_POWER)
    return Nvfp4Encoding(outer, lambda part: from_mxfp4(_as_quantized(part), outer))


def from_mxfp4(weight: Quantized, outer: np.float32) -> Quantized:
    """MXFP4 as NVFP4 with the same codes; each e8m0 scale becomes two e4m3 scales.

    outer: the second scale, a power of two. The result is exact for blocks whose scale is 2^-9 to 2^8 times `outer`,
    and for blocks of zeros. Blocks with smaller scales are rounded.
    """
    assert weight.scale is not None
    exponent = np.repeat(weight.scale.astype(np.int16) - 127 - _log2(outer), 2, axis=-1)
    scale = _POWERS_OF_TWO.take(np.clip(exponent, _MIN_POWER, _MAX_POWER) - _MIN_POWER)
    codes = weight.codes
    too_small = exponent < _MIN_POWER
    if too_small.any():
        rounded = quantization.quantize_nvfp4(weight, np.asarray(outer))
        assert rounded.scale is not None
        scale = np.where(too_small, rounded.scale, scale)
        codes = np.where(np.repeat(too_small, NVFP4.group // 2, axis=-1), rounded.codes, codes)
    return Quantized(NVFP4, codes, scale, outer=np.asarray(outer))


def _outer_scales(weight: Weight) -> list[np.float32]:
    """The distinct outer scales of a weight; [1] if it has none."""
    outer = weight.outer if isinstance(weight, Quantized) else None
    return [np.float32(value) for value in np.unique(1 if outer is None else outer)]


def _as_quantized(weight: Weight) -> Quantized:
    assert isinstance(weight, Quantized)
    return weight


def _log2(power: np.float32) -> int:
    """log2 of a power of two."""
    return int(np.frexp(power)[1]) - 1


def _exponent_range(weight: Quantized) -> tuple[int, int] | None:
    """log2 of the smallest and the largest scale among MXFP4 blocks that are not all zeros; None if all are."""
    smallest, largest = 255, -1
    for codes, scale in zip(weight.codes, np.asarray(weight.scale), strict=True):
        words = np.ascontiguousarray(codes).view("<u8").reshape(*scale.shape, 2)
        magnitudes = (words[..., 0] | words[..., 1]) & np.uint64(0x7777_7777_7777_7777)
        nonzero = scale[magnitudes != 0]
        if nonzero.size:
            smallest, largest = min(smallest, int(nonzero.min())), max(largest, int(nonzero.max()))
    return None if largest < 0 else (smallest - 127, largest - 127)
