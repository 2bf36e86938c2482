"""Codes to numbers: value tables, packing, and `dequantize` for every Spec. quantization.py goes the other way.

All work goes block by block. A block is small enough for its float32 copy to stay in the processor's cache, so a
[32, 5760, 2880] tensor needs only a few MB in addition to its input and output. Source of e2m1, e4m3 and e8m0: OCP
Microscaling v1.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from itertools import product
from operator import getitem
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from .tensor import Array, Dense, Element, ScaleKind, Spec, Weight

Floats = NDArray[Any]  # float32
Bytes = NDArray[Any]  # uint8
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

BLOCK_VALUES = 2**18  # values per block: 1 MB of float32

E2M1: Floats = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E4M3: Floats = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
E8M0: Floats = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan)).astype(np.float32)


def _pairs(nibbles: Floats) -> NDArray[np.complex64]:
    """A table from a byte to its two values, low nibble first. A complex64 is two adjacent float32."""
    byte = np.arange(256)
    return np.stack([nibbles[byte & 15], nibbles[byte >> 4]], axis=-1).view(np.complex64)[:, 0]


_VALUES: Mapping[tuple[Element, int], Array] = {  # the one or two values of each byte
    ("e2m1", 4): _pairs(E2M1),
    ("uint", 4): _pairs(np.arange(16, dtype=np.float32)),
    ("uint", 8): np.arange(256, dtype=np.float32),
    ("e4m3", 8): E4M3,
}
_SCALES: Mapping[ScaleKind, Callable[[Array], Floats]] = {
    "e8m0": lambda scale: E8M0.take(scale),
    "e4m3": lambda scale: E4M3.take(scale),
    "float": lambda scale: scale.astype(np.float32),
}


def unpack(codes: Bytes, bits: int) -> Bytes:
    """One code per byte, [..., n] -> [..., n * 8 / bits], lowest bits first. n: a multiple of `bits`, unless bits is 4
    or 8."""
    if bits == 8:
        return codes
    if bits == 4:
        return np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    words = np.zeros((codes.size // bits, 8), np.uint8)  # eight codes each, in `bits` bytes
    words[:, :bits] = codes.reshape(-1, bits)
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    eight: Bytes = (words.view("<u8") >> shifts & np.uint64(2**bits - 1)).astype(np.uint8)
    return eight.reshape(*codes.shape[:-1], -1)


def pack(codes: Bytes, bits: int) -> Bytes:
    """The inverse of `unpack`: [..., n] -> [..., n * bits / 8]. n: even, or a multiple of 8 unless bits is 4 or 8."""
    if bits == 8:
        return codes
    if bits == 4:
        pair = np.ascontiguousarray(codes).view("<u2")
        packed: Bytes = (pair | pair >> 4).astype(np.uint8)
        return packed
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    words = np.bitwise_or.reduce(codes.reshape(-1, 8).astype(np.uint64) << shifts, axis=1).astype("<u8")
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, 8)[:, :bits]).reshape(*codes.shape[:-1], -1)


def widen(weight: Weight, spec: Spec) -> Weight:
    """The same values with codes of more bits, for a kernel that reads those. spec: as the weight's, but for bits."""
    if isinstance(weight, Dense) or weight.spec == spec:
        return weight
    out = np.empty((*weight.codes.shape[:-1], weight.shape[-1] * spec.bits // 8), np.uint8)
    rows, wide = weight.codes.reshape(-1, weight.codes.shape[-1]), out.reshape(-1, out.shape[-1])
    step = max(1, BLOCK_VALUES // weight.shape[-1])
    for start in range(0, len(rows), step):
        wide[start : start + step] = pack(unpack(rows[start : start + step], weight.spec.bits), spec.bits)
    return replace(weight, spec=spec, codes=out)


def dequantize(weight: Weight, out: Floats | None = None) -> Floats:
    """float32 [..., N, K]: `(value(code) * scale + bias) * outer`, with no further rounding.

    out: a C-contiguous array for the result. Reusing one saves the system from zeroing fresh memory, which takes longer
    than decoding.
    """
    out = np.empty(weight.shape, np.float32) if out is None else out
    for index, block in blocks(weight):
        decode_block(block, out[index])
    return out


def to_bfloat16(weight: Weight) -> Array:
    """bfloat16 [..., N, K], rounded to nearest, ties to even. Returns the stored array if it is bfloat16 already."""
    if isinstance(weight, Dense) and weight.values.dtype == BFLOAT16:
        return weight.values
    out = np.empty(weight.shape, BFLOAT16)
    with np.errstate(invalid="ignore"):  # a dense value that is not a number stays one
        for index, block in blocks(weight):
            out[index] = decode_block(block)
    return out


def check_scales(weight: Weight, name: str) -> None:
    """Raise CheckpointError if a scale, bias or outer scale is NaN or infinite. Reads the scales, not the codes."""
    if isinstance(weight, Dense):
        return
    kind, scale = weight.spec.scale, weight.scale
    if scale is not None and kind == "e8m0":
        bad = scale.size > 0 and int(scale.max()) == 255
    elif scale is not None and kind == "e4m3":
        bad = bool(((scale & 127) == 127).any())
    else:
        bad = scale is not None and not _is_finite(scale)
    if bad or any(array is not None and not _is_finite(array) for array in (weight.bias, weight.outer)):
        raise CheckpointError(f"{name} has a scale that is not a number; the checkpoint is damaged, download it again")


def _is_finite(array: Array) -> bool:
    rows = np.atleast_1d(array)
    return all(bool(np.isfinite(rows[at : at + 64].astype(np.float32)).all()) for at in range(0, len(rows), 64))


def blocks(weight: Weight) -> Iterator[tuple[tuple[int | slice, ...], Weight]]:
    """Cut a weight into matrices of about BLOCK_VALUES values; yields (index of the block, block).

    A vector is one block.
    """
    if len(weight.shape) < 2:
        yield (slice(None),), weight
        return
    *lead, count, width = weight.shape
    step = max(1, BLOCK_VALUES // max(width, 1))
    for index in product(*(range(length) for length in lead)):
        matrix = reduce(getitem, index, weight)
        for start in range(0, count, step):
            rows = slice(start, start + step)
            yield (*index, rows), matrix[rows]


def decode_block(weight: Weight, out: Floats | None = None) -> Floats:
    """`dequantize` of one block, in one pass. out: as there."""
    values = np.empty(weight.shape, np.float32) if out is None else out
    if isinstance(weight, Dense):
        values[...] = contiguous_rows(weight.values)
        return values
    spec = weight.spec
    table = _VALUES.get((spec.element, spec.bits))
    if table is None:
        values[...] = unpack(np.ascontiguousarray(weight.codes), spec.bits)
    else:  # A byte is never out of range. With mode="clip" numpy skips that check and writes straight into `out`.
        np.take(table, np.ascontiguousarray(weight.codes), out=values.view(table.dtype), mode="clip")
    if weight.scale is not None:
        grouped = values.reshape(*values.shape[:-1], -1, spec.group)
        grouped *= _SCALES[spec.scale](weight.scale)[..., None]
        if weight.bias is not None:
            grouped += weight.bias.astype(np.float32)[..., None]
    if weight.outer is not None:
        values *= weight.outer.astype(np.float32)
    return values


def contiguous_rows(values: Array) -> Array:
    """The array [..., R, C] with contiguous rows; returned as it is if they are contiguous already.

    A transposed matrix is copied tile by tile, so that each cache line is fetched once.
    """
    if values.ndim < 2 or values.strides[-1] == values.itemsize:
        return values
    out = np.empty(values.shape, values.dtype)
    words = np.dtype(f"u{values.itemsize}")  # numpy copies bfloat16 value by value, integers in runs
    source, target = values.view(words), out.view(words)
    for row in range(0, values.shape[-2], 64):
        for column in range(0, values.shape[-1], 64):
            tile = (..., slice(row, row + 64), slice(column, column + 64))
            target[tile] = source[tile]
    return out
