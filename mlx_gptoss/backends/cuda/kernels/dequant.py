"""Codes to numbers in registers: the one formula `w = (value(code) * scale + bias) * outer` for every Spec.

Device functions for the kernels beside this file, and how a stored matrix becomes their arguments. `outer` belongs to
output rows and is applied to finished sums. Where activations are bfloat16, values are made in bfloat16: codes times
e8m0 and e4m3 scales are exact there, codes with bfloat16 scale and bias are rounded once, as from float32. Everything
else is decoded in float32 and then rounded to the activations' dtype, as layers.py does.

Legend: N rows, K columns, BN and BK of a tile.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..layers import DenseMatrix, Matrix
from .launch import INTERPRETED


def weight_args(matrix: Matrix) -> dict[str, Any]:
    """A matrix [N, K] or [E, N, K] as the arguments that every kernel with weights takes."""
    if isinstance(matrix, DenseMatrix):
        return {
            "w": matrix.weight,
            "w_scale": None,
            "w_bias": None,
            "w_outer": None,
            "ELEMENT": "dense",
            "SCALE": "none",
            "GROUP": 0,
            "OUTER": 0,
        }
    outer = 0 if matrix.outer is None else 1 if matrix.outer.ndim == 0 else 2  # none, for all rows, a row
    return {
        "w": matrix.codes,
        "w_scale": matrix.scale,
        "w_bias": matrix.bias,
        "w_outer": matrix.outer,
        "ELEMENT": matrix.spec.element + str(matrix.spec.bits),
        "SCALE": matrix.spec.scale,
        "GROUP": matrix.spec.group,
        "OUTER": outer,
    }


@triton.jit
def weight_tile(
    w,
    w_scale,
    w_bias,
    rows,
    fits,
    k0,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    dtype: tl.constexpr,
):
    """[BN, BK] of `dtype`: columns k0.. of the rows `rows`, int64 [BN]; zeros where `fits` is false or K ends.

    Adjacent columns of a 4-bit matrix are the two nibbles of a byte: `b * 0x1001` puts them into the halves of a word,
    where a mask and a shift make both into bfloat16 at once.
    """
    k = k0 + tl.arange(0, BK)
    if ELEMENT == "dense":
        values = tl.load(w + rows[:, None] * K + k[None, :], mask=fits[:, None] & (k < K)[None, :], other=0)
    else:
        narrow: tl.constexpr = dtype == tl.bfloat16 and (SCALE != "float" or w_scale.dtype.element_ty == tl.bfloat16)
        if ELEMENT == "e4m38" or ELEMENT == "uint8":
            codes = tl.load(w + rows[:, None] * K + k[None, :], mask=fits[:, None] & (k < K)[None, :], other=0)
            values = _bytes(codes, ELEMENT, narrow)
        else:
            j = k0 // 2 + tl.arange(0, BK // 2)
            at = rows[:, None] * (K // 2) + j[None, :]
            codes = tl.load(w + at, mask=fits[:, None] & (j < K // 2)[None, :], other=0)
            values = _nibbles(codes, ELEMENT, narrow, BN, BK)
        if GROUP > 0:
            values = _scaled(
                values, w_scale, w_bias, rows, fits, k0 // GROUP, K // GROUP, SCALE, GROUP, narrow, BN, BK // GROUP
            )
    return values.to(dtype)


@triton.jit
def _scaled(
    values,
    w_scale,
    w_bias,
    rows,
    fits,
    g0,
    GROUPS: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    narrow: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
):
    """[BN, BG * GROUP] times the groups' scales, plus their biases; the groups are g0.. of a row's GROUPS."""
    g = g0 + tl.arange(0, BG)
    at = rows[:, None] * GROUPS + g[None, :]
    mask = fits[:, None] & (g < GROUPS)[None, :]
    scale = _scales(tl.load(w_scale + at, mask=mask, other=0), SCALE, narrow)[:, :, None]
    values = values.reshape(BN, BG, GROUP)
    if w_bias is None:
        values = _times(values, scale)
    else:
        bias = tl.load(w_bias + at, mask=mask, other=0)[:, :, None]
        values = _times_plus(values, scale, bias if narrow else bias.to(tl.float32))
    return values.reshape(BN, BG * GROUP)


@triton.jit
def outer_factor(w_outer, rows, fits, OUTER: tl.constexpr, BN: tl.constexpr):
    """float32 [BN]: what finished sums of these rows are multiplied by."""
    factor = tl.full((BN,), 1.0, tl.float32)
    if OUTER == 1:
        factor *= tl.load(w_outer)
    elif OUTER == 2:
        factor = tl.load(w_outer + rows, mask=fits, other=0)
    return factor


@triton.jit
def _nibbles(codes, ELEMENT: tl.constexpr, narrow: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """uint8 [BN, BK / 2] -> values [BN, BK], low nibble first; bfloat16 if narrow, else float32."""
    if narrow:
        pair = codes.to(tl.uint32) * 0x1001
        if ELEMENT == "e2m14":  # sign, two bits of exponent and one of mantissa: as bfloat16, 2**126 too small
            pair = ((pair << 12) & 0x80008000) | ((pair << 6) & 0x01C001C0)
        else:
            pair = (pair & 0x000F000F) | 0x43004300  # 128 + code
        values = tl.join(_bfloat16(pair), _bfloat16(pair >> 16)).reshape(BN, BK)
        if ELEMENT == "e2m14":
            values = _times(values, tl.full((1, 1), 2.0**126, tl.bfloat16))
        else:
            values = _plus(values, tl.full((1, 1), -128.0, tl.bfloat16))
    else:
        both = tl.join(codes & 15, codes >> 4).reshape(BN, BK)
        if ELEMENT == "e2m14":  # as float16, 2**14 too small
            bits = ((both & 8).to(tl.uint16) << 12) | ((both & 7).to(tl.uint16) << 9)
            values = bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
        else:
            values = _small(both)
    return values


@triton.jit
def _bytes(codes, ELEMENT: tl.constexpr, narrow: tl.constexpr):
    """uint8 -> values of the same shape; bfloat16 if narrow, else float32."""
    if ELEMENT == "e4m38":
        values = _e4m3(codes, narrow)
    elif narrow:
        values = _small(codes).to(tl.bfloat16)
    else:
        values = _small(codes)
    return values


@triton.jit
def _small(codes):
    """uint8 -> float32: or-ed into the mantissa of 2**23, which is subtracted again"""
    return (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _e4m3(codes, narrow: tl.constexpr):
    """Every code but NaN's: moved into place, bfloat16 is 2**120 too small and float16 2**8."""
    codes = codes.to(tl.uint16)
    sign = (codes & 0x80) << 8
    if narrow:
        values = (sign | ((codes & 0x7F) << 4)).to(tl.bfloat16, bitcast=True)
        values = _times(values, tl.full((1, 1), 2.0**120, tl.bfloat16))
    else:
        values = (sign | ((codes & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return values


@triton.jit
def _scales(scale, SCALE: tl.constexpr, narrow: tl.constexpr):
    """As stored -> bfloat16 if narrow, else float32. Code 0 of e8m0 is 2**-127, a subnormal."""
    if SCALE == "e4m3":
        values = _e4m3(scale, narrow)
    elif SCALE == "e8m0":
        if narrow:
            values = tl.maximum(scale.to(tl.uint32) << 7, 0x40).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            values = tl.maximum(scale.to(tl.uint32) << 23, 0x400000).to(tl.float32, bitcast=True)
    elif narrow:
        values = scale
    else:
        values = scale.to(tl.float32)
    return values


@triton.jit
def _bfloat16(word):
    """The low half of 32 bits, as they stand"""
    return word.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _times(a, b):
    if INTERPRETED and a.dtype == tl.bfloat16:
        y = round_bfloat16(widen(a) * widen(b))
    else:
        y = a * b
    return y


@triton.jit
def _plus(a, b):
    if INTERPRETED and a.dtype == tl.bfloat16:
        y = round_bfloat16(widen(a) + widen(b))
    else:
        y = a + b
    return y


@triton.jit
def _times_plus(a, b, c):
    """a * b + c, rounded once"""
    if INTERPRETED:
        y = widen(a) * widen(b) + widen(c)
        if a.dtype == tl.bfloat16:
            y = round_bfloat16(y)
    else:
        y = tl.fma(a, b, c)
    return y


# What the interpreter needs in their place: its own conversions are wrong for subnormals.


@triton.jit
def widen(x):
    """bfloat16 -> float32, exactly; others by their own conversion"""
    if INTERPRETED and x.dtype == tl.bfloat16:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def round_bfloat16(x):
    """float32 -> bfloat16, to nearest even"""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
