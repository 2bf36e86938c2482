"""Signed integers as the unsigned codes of AFFINE: w = (q - zero) * scale, as Quark, torchao and bitsandbytes store it.

A scale per row goes to `outer`, with group scales of 1 and biases of whole numbers, so that no float is rounded. A
scale per group becomes `scale` and `bias = (low - zero) * scale`, which float32 holds exactly for scales of 8 or 11
significant bits, and to a rounding of the largest value of the group otherwise.
"""

from __future__ import annotations

import numpy as np

from ...errors import CheckpointError
from .. import codecs
from ..tensor import AFFINE, Array, Dense, Quantized, Weight

_GROUPS = (128, 64, 32)
_CODE_BITS = {1: 2, 7: 8}  # widths that have no codes of their own


def code_bits(bits: int) -> int:
    """The bits of the codes that hold integers of `bits` bits."""
    return _CODE_BITS.get(bits, bits)


def affine_group(width: int) -> int:
    """The largest group of AFFINE that divides `width`, the values that share a scale or a row; 0 if there is none."""
    return next((group for group in _GROUPS if width % group == 0), 0)


def from_rows(q: Array, zero: Array, scale: Array, bits: int) -> Weight:
    """(q - zero) * scale with a scale per row.

    q: int8 [..., N, K]. zero: int8, broadcastable to [..., N, 1]. scale: floats [..., N, 1]. bits: of q, 1 to 8.
    Dense float32 where no group of AFFINE divides K. Raises CheckpointError if q exceeds `bits`.
    """
    group = affine_group(q.shape[-1])
    low = -(1 << (bits - 1))
    if not group:
        return Dense((q.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32))
    shape = (*q.shape[:-1], q.shape[-1] // group)
    bias = np.broadcast_to((low - zero.astype(np.float32)).astype(codecs.BFLOAT16), shape).copy()  # at most 256: exact
    ones = np.ones(shape, codecs.BFLOAT16)
    return Quantized(AFFINE[code_bits(bits), group], _codes(q, bits), ones, bias, scale.astype(np.float32))


def from_groups(q: Array, zero: Array, scale: Array, bits: int) -> Weight:
    """(q - zero) * scale with a scale per group of K // G values.

    q: int8 [..., N, K]. zero: int8 [..., N, G]. scale: floats [..., N, G]. bits: of q, 1 to 8.
    Dense float32 where the groups have no form in AFFINE, or float32 scales would round codes of more than 4 bits.
    Raises CheckpointError if q exceeds `bits`.
    """
    span = q.shape[-1] // scale.shape[-1]
    low = -(1 << (bits - 1))
    scale32 = scale.astype(np.float32)
    if not grouped_bits(span, bits, scale.dtype.itemsize):
        grouped = q.reshape(*scale.shape, span).astype(np.float32) - zero.astype(np.float32)[..., None]
        return Dense((grouped * scale32[..., None]).reshape(q.shape))
    group = affine_group(span)
    with np.errstate(over="ignore", invalid="ignore"):  # Checkpoint.read refuses what is not finite
        bias = (low - zero.astype(np.float32)) * scale32
    scale32, bias = (np.repeat(part, span // group, axis=-1) for part in (scale32, bias))
    return Quantized(AFFINE[code_bits(bits), group], _codes(q, bits), scale32, bias)


def grouped_bits(span: int, bits: int, scale_bytes: int) -> float:
    """Bits per weight of what `from_groups` returns as codes; 0 where it decodes to float32."""
    group = affine_group(span)
    return 0 if not group or (scale_bytes > 2 and bits > 4) else code_bits(bits) + 64 / group


def row_bits(width: int, bits: int) -> float:
    """Bits per weight of what `from_rows` returns as codes; 0 where it decodes to float32."""
    group = affine_group(width)
    return code_bits(bits) + 32 / group + 32 / width if group else 0


def _codes(q: Array, bits: int) -> Array:
    """q - low in codes of `code_bits(bits)` bits."""
    low = -(1 << (bits - 1))
    if bits == 8:
        codes: Array = np.ascontiguousarray(q).view(np.uint8) ^ np.uint8(128)
        return codes
    if q.size and (int(q.min()) < low or int(q.max()) > -1 - low):
        raise CheckpointError(f"an integer does not fit {bits} bits; the checkpoint is damaged, download it again")
    return codecs.pack((np.ascontiguousarray(q).astype(np.int16) - low).astype(np.uint8), code_bits(bits))
