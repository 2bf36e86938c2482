"""Decode stored weights in registers: `w = (value(code) * scale + bias) * outer`, one formula for every Spec.

`weight_args` turns a matrix into kernel arguments; `weight_tile` and `outer_factor` are what the kernels call. `outer`
belongs to output rows, so kernels apply it to finished sums.

Precision: with bfloat16 activations, weights are decoded in bfloat16. Codes times e8m0 or e4m3 scales are exact there;
codes with a bfloat16 scale and bias are rounded once, as they would be from float32. Everything else is decoded in
float32 and then rounded to the activations' dtype, as layers.py does.

How codes become floats without a table: a small float's fields are moved to where a bigger float has them. The exponent
is then too small by the difference of the two biases, which one multiplication by a power of two corrects:

    e2m1 (bias 1) in bfloat16 (bias 127):  sign at bit 15, the other 3 bits at bits 6 to 8;   * 2^126
    e2m1          in float16  (bias 15):   sign at bit 15, the other 3 bits at bits 9 to 11;  * 2^14
    e4m3 (bias 7) in bfloat16:             sign at bit 15, the other 7 bits at bits 4 to 10;  * 2^120
    e4m3          in float16:              sign at bit 15, the other 7 bits at bits 7 to 13;  * 2^8

An integer is or-ed into the mantissa of a power of two, which is then subtracted: 128 for 4 bits in bfloat16, 2^23 in
float32.

Legend: N output rows, K columns; BN and BK of them in a tile.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..layers import DenseMatrix, Matrix
from .interpreter import plus, times, times_plus

# ELEMENT, what a code means: nothing but a float, 4-bit floats and integers (two in a byte), 8-bit ones.
DENSE, E2M1, UINT4, E4M3, UINT8 = (tl.constexpr(name) for name in ("dense", "e2m1", "uint4", "e4m3", "uint8"))
# SCALE, how a group's scale is stored: none, a power of two, an 8-bit float, or bfloat16, float16 or float32.
NO_SCALE, E8M0_SCALE, E4M3_SCALE, FLOAT_SCALE = (tl.constexpr(name) for name in ("none", "e8m0", "e4m3", "float"))
# OUTER, what a factor of `outer` belongs to.
NO_OUTER, OUTER_OF_MATRIX, OUTER_OF_ROW = (tl.constexpr(name) for name in ("none", "matrix", "row"))

ELEMENTS = {("e2m1", 4): E2M1, ("uint", 4): UINT4, ("e4m3", 8): E4M3, ("uint", 8): UINT8}  # by Spec's element and bits


def weight_args(matrix: Matrix) -> dict[str, Any]:
    """A matrix [N, K] or [E, N, K] as the arguments that every kernel with weights takes.

    w: codes uint8 [..., N, K] or, of 4 bits, [..., N, K / 2]; a dense matrix's values in its own dtype
    w_scale, w_bias: [..., N, K / GROUP] as stored, or None. w_outer: float32 [] or [..., N, 1], or None
    ELEMENT, SCALE, OUTER: the constants above. GROUP: columns that share a scale, 0 without scales
    """
    if isinstance(matrix, DenseMatrix):
        tensors: dict[str, Any] = {"w": matrix.weight, "w_scale": None, "w_bias": None, "w_outer": None}
        return tensors | {"ELEMENT": DENSE.value, "SCALE": NO_SCALE.value, "GROUP": 0, "OUTER": NO_OUTER.value}
    spec, outer = matrix.spec, NO_OUTER
    if matrix.outer is not None:
        outer = OUTER_OF_MATRIX if matrix.outer.ndim == 0 else OUTER_OF_ROW
    return {
        "w": matrix.codes,
        "w_scale": matrix.scale,
        "w_bias": matrix.bias,
        "w_outer": matrix.outer,
        "ELEMENT": ELEMENTS[spec.element, spec.bits].value,
        "SCALE": spec.scale,
        "GROUP": spec.group,
        "OUTER": outer.value,
    }


@triton.jit
def weight_tile(
    w,
    w_scale,
    w_bias,
    rows,
    row_mask,
    k0,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    dtype: tl.constexpr,
):
    """[BN, BK] of `dtype`: the weights of some rows, columns k0 to k0 + BK, before `outer`.

    w, w_scale, w_bias, ELEMENT, SCALE, GROUP: see `weight_args`
    rows: int64 [BN], counted over all experts of a bank
    row_mask: bool [BN], or None if every row exists. Weights of masked rows and of columns past K are 0.
    """
    k = k0 + tl.arange(0, BK)
    if ELEMENT == DENSE:
        values = tl.load(w + rows[:, None] * K + k[None, :], mask=_tile_mask(row_mask, k < K), other=0)
    else:
        IN_BF16: tl.constexpr = dtype == tl.bfloat16 and (
            SCALE != FLOAT_SCALE or w_scale.dtype.element_ty == tl.bfloat16
        )
        if ELEMENT != E2M1 and ELEMENT != UINT4:
            codes = tl.load(w + rows[:, None] * K + k[None, :], mask=_tile_mask(row_mask, k < K), other=0)
            values = _decode_8bit(codes, ELEMENT, IN_BF16)
        else:
            j = k0 // 2 + tl.arange(0, BK // 2)  # bytes, each of two columns
            codes = tl.load(w + rows[:, None] * (K // 2) + j[None, :], mask=_tile_mask(row_mask, j < K // 2), other=0)
            values = _decode_4bit(codes, ELEMENT, IN_BF16, BN, BK)
        if GROUP > 0:
            values = _scale_groups(
                values, w_scale, w_bias, rows, row_mask, k0 // GROUP, K // GROUP, SCALE, GROUP, IN_BF16, BN, BK // GROUP
            )
    return values.to(dtype)


@triton.jit
def outer_factor(w_outer, rows, row_mask, OUTER: tl.constexpr, BN: tl.constexpr):
    """float32 [BN]: what the finished sums of these rows are multiplied by. rows and row_mask: see `weight_tile`."""
    factor = tl.full((BN,), 1.0, tl.float32)
    if OUTER == OUTER_OF_MATRIX:
        factor *= tl.load(w_outer)
    elif OUTER == OUTER_OF_ROW:
        factor = load_rows(w_outer, rows, row_mask)
    return factor


@triton.jit
def load_rows(values, rows, row_mask):
    """values[rows], and 0 for masked rows. rows and row_mask: see `weight_tile`."""
    if row_mask is None:
        y = tl.load(values + rows)
    else:
        y = tl.load(values + rows, mask=row_mask, other=0)
    return y


@triton.jit
def _tile_mask(row_mask, column_mask):
    """bool [BN, BK], or [1, BK] if row_mask is None."""
    if row_mask is None:
        mask = column_mask[None, :]
    else:
        mask = row_mask[:, None] & column_mask[None, :]
    return mask


@triton.jit
def _scale_groups(
    values,
    w_scale,
    w_bias,
    rows,
    row_mask,
    g0,
    GROUPS: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    IN_BF16: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
):
    """values [BN, BG * GROUP] times their groups' scales, plus their biases. A row has GROUPS groups; these are g0 to
    g0 + BG."""
    g = g0 + tl.arange(0, BG)
    offsets, mask = rows[:, None] * GROUPS + g[None, :], _tile_mask(row_mask, g < GROUPS)
    scale = _decode_scales(tl.load(w_scale + offsets, mask=mask, other=0), SCALE, IN_BF16)[:, :, None]
    values = values.reshape(BN, BG, GROUP)
    if w_bias is None:
        values = times(values, scale)
    else:
        bias = tl.load(w_bias + offsets, mask=mask, other=0)[:, :, None]
        values = times_plus(values, scale, bias if IN_BF16 else bias.to(tl.float32))
    return values.reshape(BN, BG * GROUP)


@triton.jit
def _decode_4bit(codes, ELEMENT: tl.constexpr, IN_BF16: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """uint8 [BN, BK / 2] to values [BN, BK], low nibble first; bfloat16 if IN_BF16, else float32.

    In bfloat16 both nibbles of a byte are decoded at once. b * 0x1001 = b | b << 12 has the low nibble at the bottom of
    the lower 16 bits and the high nibble at the bottom of the upper ones (with other bits, which are masked off):

        byte       ........ ........ ........ hhhhllll
        * 0x1001   ........ ....hhhh llll.... hhhhllll
                                ^^^^              ^^^^
    """
    if IN_BF16:
        pair = codes.to(tl.uint32) * 0x1001
        if ELEMENT == E2M1:
            pair = ((pair << 12) & 0x80008000) | ((pair << 6) & 0x01C001C0)
        else:
            pair = (pair & 0x000F000F) | 0x43004300  # 128 + code
        values = tl.join(_low_bfloat16(pair), _low_bfloat16(pair >> 16)).reshape(BN, BK)
        if ELEMENT == E2M1:
            values = times(values, tl.full((1, 1), 2.0**126, tl.bfloat16))
        else:
            values = plus(values, tl.full((1, 1), -128.0, tl.bfloat16))
    else:
        both = tl.join(codes & 15, codes >> 4).reshape(BN, BK)
        if ELEMENT == E2M1:
            bits = ((both & 8).to(tl.uint16) << 12) | ((both & 7).to(tl.uint16) << 9)
            values = bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
        else:
            values = _uint8_to_float32(both)
    return values


@triton.jit
def _decode_8bit(codes, ELEMENT: tl.constexpr, IN_BF16: tl.constexpr):
    """uint8 to values of the same shape; bfloat16 if IN_BF16, else float32."""
    if ELEMENT == E4M3:
        values = _decode_e4m3(codes, IN_BF16)
    elif IN_BF16:
        values = _uint8_to_float32(codes).to(tl.bfloat16)
    else:
        values = _uint8_to_float32(codes)
    return values


@triton.jit
def _decode_scales(scale, SCALE: tl.constexpr, IN_BF16: tl.constexpr):
    """Scales as stored to bfloat16 if IN_BF16, else float32. Code 0 of e8m0 is 2^-127, a subnormal of both."""
    if SCALE == E4M3_SCALE:
        values = _decode_e4m3(scale, IN_BF16)
    elif SCALE == E8M0_SCALE:
        if IN_BF16:
            values = tl.maximum(scale.to(tl.uint32) << 7, 0x40).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            values = tl.maximum(scale.to(tl.uint32) << 23, 0x400000).to(tl.float32, bitcast=True)
    elif IN_BF16:
        values = scale
    else:
        values = scale.to(tl.float32)
    return values


@triton.jit
def _decode_e4m3(codes, IN_BF16: tl.constexpr):
    """uint8 e4m3 to bfloat16 if IN_BF16, else float32. NaN is not handled: its two codes decode to numbers."""
    codes = codes.to(tl.uint16)
    sign = (codes & 0x80) << 8
    if IN_BF16:
        values = (sign | ((codes & 0x7F) << 4)).to(tl.bfloat16, bitcast=True)
        values = times(values, tl.full((1, 1), 2.0**120, tl.bfloat16))
    else:
        values = (sign | ((codes & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return values


@triton.jit
def _uint8_to_float32(codes):
    """uint8 to float32: the code in the mantissa of 2^23, which is subtracted again."""
    return (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _low_bfloat16(word):
    """The low 16 bits of a uint32 as a bfloat16."""
    return word.to(tl.uint16).to(tl.bfloat16, bitcast=True)
