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
    4-bit integer in bfloat16:             the 4 bits at bits 4 to 7;                         * 2^129

An integer of 8 bits is or-ed into the mantissa of 2^23, which is then subtracted. If all scales of a matrix are small
(PackedMatrix.small_scales), the scales are multiplied by that power of two instead of the values, which saves an
instruction for two weights; the products are the same, bit for bit.

Legend: N output rows, K columns; BN and BK of them in a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..matrices import DenseMatrix, Matrix, PackedMatrix
from .interpreter import times, times_plus

# ELEMENT, what a code means: nothing but a float, 4-bit floats and integers (two in a byte), 8-bit ones.
DENSE, E2M1, UINT4, E4M3, UINT8 = (tl.constexpr(name) for name in ("dense", "e2m1", "uint4", "e4m3", "uint8"))
# SCALE, how a group's scale is stored: none, a power of two, an 8-bit float, or bfloat16, float16 or float32.
NO_SCALE, E8M0_SCALE, E4M3_SCALE = (tl.constexpr(name) for name in ("none", "e8m0", "e4m3"))
BF16_SCALE, FP16_SCALE, FP32_SCALE = (tl.constexpr(name) for name in ("bfloat16", "float16", "float32"))
SMALL_E8M0, SMALL_BF16 = tl.constexpr("small e8m0"), tl.constexpr("small bfloat16")  # see PackedMatrix.small_scales
# OUTER, what a factor of `outer` belongs to.
NO_OUTER, OUTER_OF_MATRIX, OUTER_OF_ROW = (tl.constexpr(name) for name in ("none", "matrix", "row"))
E2M1_BITS, UINT4_BITS = tl.constexpr(0x81C081C0), tl.constexpr(0x00F000F0)  # of two codes, where bfloat16 needs them

ELEMENTS = {("e2m1", 4): E2M1, ("uint", 4): UINT4, ("e4m3", 8): E4M3, ("uint", 8): UINT8}  # by Spec's element and bits


def weight_args(matrix: Matrix) -> dict[str, Any]:
    """A matrix [N, K] or [E, N, K] as the arguments that every kernel with weights takes.

    w: codes uint8 [..., N, K] or, of 4 bits, int32 [..., N, K / 8]; a dense matrix's values in its own dtype
    w_scale, w_bias: what is stored for each group, in words: int32 [..., N, row_words(K / GROUP)], or None
    w_outer: float32 [] or [..., N, 1], or None
    ELEMENT, SCALE, OUTER: the constants above. GROUP: columns that share a scale, 0 without scales
    """
    if isinstance(matrix, DenseMatrix):
        tensors: dict[str, Any] = {"w": matrix.weight, "w_scale": None, "w_bias": None, "w_outer": None}
        return tensors | {"ELEMENT": DENSE.value, "SCALE": NO_SCALE.value, "GROUP": 0, "OUTER": NO_OUTER.value}
    assert isinstance(matrix, PackedMatrix), "the kernels read packed matrices"
    spec, outer = matrix.spec, NO_OUTER
    if matrix.outer is not None:
        outer = OUTER_OF_MATRIX if matrix.outer.ndim == 0 else OUTER_OF_ROW
    scale: str = spec.scale
    if matrix.scale is not None and scale == "float":
        scale = str(matrix.scale.dtype).removeprefix("torch.")
    if matrix.small_scales and scale in ("e8m0", "bfloat16"):
        scale = f"small {scale}"
    return {
        "w": matrix.codes,
        "w_scale": None if matrix.scale is None else matrix.scale.view(torch.int32),
        "w_bias": None if matrix.bias is None else matrix.bias.view(torch.int32),
        "w_outer": matrix.outer,
        "ELEMENT": ELEMENTS[spec.element, spec.bits].value,
        "SCALE": scale,
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
    k0: a multiple of BK, or int32 [BN, 1], one for each row
    """
    k = k0 + tl.arange(0, BK)[None, :]
    if ELEMENT == DENSE:
        values = tl.load(w + rows[:, None] * K + k, mask=_tile_mask(row_mask, k < K), other=0)
    else:
        IN_BF16: tl.constexpr = dtype == tl.bfloat16 and SCALE != FP16_SCALE and SCALE != FP32_SCALE
        FOLDED: tl.constexpr = IN_BF16 and (SCALE == SMALL_E8M0 or SCALE == SMALL_BF16)  # noqa: SIM109
        if ELEMENT != E2M1 and ELEMENT != UINT4:
            codes = tl.load(w + rows[:, None] * K + k, mask=_tile_mask(row_mask, k < K), other=0)
            values = _decode_8bit(codes, ELEMENT, IN_BF16)
        else:
            j = k0 // 8 + tl.arange(0, BK // 8)[None, :]
            words = tl.load(w + rows[:, None] * (K // 8) + j, mask=_tile_mask(row_mask, j < K // 8), other=0)
            values = _decode_4bit(words.to(tl.uint32, bitcast=True), ELEMENT, FOLDED, IN_BF16, BN, BK)
        if GROUP > 0:
            values = _scale_groups(
                values, w_scale, w_bias, rows, row_mask, k0, K, ELEMENT, SCALE, GROUP, FOLDED, IN_BF16, BN, BK
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
    """bool [BN, BK], or column_mask if row_mask is None. column_mask: [BN or 1, BK]"""
    if row_mask is None:
        mask = column_mask
    else:
        mask = row_mask[:, None] & column_mask
    return mask


@triton.jit
def _scale_groups(
    values,
    w_scale,
    w_bias,
    rows,
    row_mask,
    k0,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    FOLDED: tl.constexpr,
    IN_BF16: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """values [BN, BK], columns from k0 on, times their groups' scales, plus their biases."""
    PER_WORD: tl.constexpr = _scales_in_a_word(SCALE)
    COLUMNS: tl.constexpr = PER_WORD * GROUP  # of a word
    WORDS: tl.constexpr = (K // GROUP + 4 * PER_WORD - 1) // (4 * PER_WORD) * 4  # of a row
    BW: tl.constexpr = BK // COLUMNS
    tl.static_assert(BW * COLUMNS == BK, "a step takes whole words of scales")
    j = k0 // COLUMNS + tl.arange(0, BW)[None, :]
    offsets, mask = rows[:, None] * WORDS + j, _tile_mask(row_mask, j < WORDS)
    words = tl.load(w_scale + offsets, mask=mask, other=0).to(tl.uint32, bitcast=True)
    if SCALE == SMALL_E8M0 and FOLDED and ELEMENT == E2M1:
        words += 0x7E7E7E7E  # 126 to every code, up to 254
    scale = _decode_scales(_parts(words, PER_WORD), ELEMENT, SCALE, FOLDED, IN_BF16)
    values = values.reshape(BN, BK // GROUP, GROUP)
    if w_bias is None:
        values = times(values, scale)
    else:
        words = tl.load(w_bias + offsets, mask=mask, other=0).to(tl.uint32, bitcast=True)
        bias = _floats(_parts(words, PER_WORD), SCALE, IN_BF16)
        values = times_plus(values, scale, bias)
    return values.reshape(BN, BK)


@triton.constexpr_function
def _scales_in_a_word(SCALE):
    return {"float32": 1, "float16": 2, "bfloat16": 2, "small bfloat16": 2}.get(SCALE, 4)


@triton.jit
def _parts(words, COUNT: tl.constexpr):
    """uint32 [BN, BW], words of COUNT numbers each, lowest first, to [BN, BW * COUNT, 1]; what is above a number's bits
    is not cleared."""
    if COUNT == 4:
        parts = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24))
    elif COUNT == 2:
        parts = tl.join(words, words >> 16)
    else:
        parts = words
    return parts.reshape(words.shape[0], words.shape[1] * COUNT, 1)


@triton.jit
def _decode_4bit(
    words, ELEMENT: tl.constexpr, FOLDED: tl.constexpr, IN_BF16: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """uint32 [BN, BK / 8], words of eight codes as matrices.WORD_BITS has them, to values [BN, BK]; bfloat16 if
    IN_BF16, else float32. FOLDED: they still have to be multiplied by a power of two, see above.

    A pair is two columns in a word's halves, each code with its bits where bfloat16 has them.
    """
    if ELEMENT == E2M1:
        a, b, c = words & E2M1_BITS, (words << 3) & E2M1_BITS, (words << 6) & E2M1_BITS
        d = ((words << 1) & 0x80008000) | ((words >> 3) & 0x01800180) | ((words >> 7) & 0x00400040)
    else:
        a, b, c, d = words << 4, words, words >> 4, words >> 8
        a, b, c, d = a & UINT4_BITS, b & UINT4_BITS, c & UINT4_BITS, d & UINT4_BITS
    pairs = tl.join(tl.join(a, c), tl.join(b, d))  # [BN, BK / 8, 2, 2]
    pairs = pairs.reshape(BN, BK // 32, 4, 2, 2).permute(0, 1, 3, 2, 4)
    halves = tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16)).reshape(BN, BK)
    if IN_BF16:
        values = halves.to(tl.bfloat16, bitcast=True)
        if not FOLDED:
            values = times(values, tl.full((1, 1), 2.0**126, tl.bfloat16))
            if ELEMENT == UINT4:
                values = times(values, tl.full((1, 1), 8.0, tl.bfloat16))
    elif ELEMENT == E2M1:
        bits = (halves & 0x8000) | ((halves & 0x01C0) << 3)
        values = bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    else:
        values = _uint8_to_float32(halves >> 4)
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
def _decode_scales(scale, ELEMENT: tl.constexpr, SCALE: tl.constexpr, FOLDED: tl.constexpr, IN_BF16: tl.constexpr):
    """Scales, uint32 with the bits stored at the bottom, to bfloat16 if IN_BF16, else float32, with FOLDED times the
    power of two that belongs to the codes. Code 0 of e8m0 is 2^-127, a subnormal of both types."""
    if SCALE == E4M3_SCALE:
        values = _decode_e4m3(scale.to(tl.uint8), IN_BF16)
    elif SCALE == E8M0_SCALE or SCALE == SMALL_E8M0:  # noqa: SIM109
        if FOLDED and ELEMENT == E2M1:
            values = _low_bfloat16((scale << 7) & 0x7F80)
        elif IN_BF16:
            values = _low_bfloat16(tl.maximum((scale << 7) & 0x7F80, 0x40))
        else:
            values = tl.maximum((scale << 23) & 0x7F800000, 0x400000).to(tl.float32, bitcast=True)
    else:
        values = _floats(scale, SCALE, IN_BF16)
        if FOLDED and ELEMENT == UINT4:
            values = times(values, tl.full((1,), 2.0**127, tl.bfloat16))
            values = times(values, tl.full((1,), 4.0, tl.bfloat16))
    return values


@triton.jit
def _floats(bits, SCALE: tl.constexpr, IN_BF16: tl.constexpr):
    """uint32, the bits of bfloat16, float16 or float32 at the bottom, to bfloat16 if IN_BF16, else float32."""
    if SCALE == FP32_SCALE:
        values = bits.to(tl.float32, bitcast=True)
    elif SCALE == FP16_SCALE:
        values = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    elif IN_BF16:
        values = _low_bfloat16(bits)
    else:
        values = (bits << 16).to(tl.float32, bitcast=True)
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
    """Integers below 2^23 to float32: the code in the mantissa of 2^23, which is subtracted again."""
    return (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _low_bfloat16(word):
    """The low 16 bits of a uint32 as a bfloat16."""
    return word.to(tl.uint16).to(tl.bfloat16, bitcast=True)
