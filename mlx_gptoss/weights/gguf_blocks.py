"""llama.cpp's block types as weights. Most are affine codes in groups of 32 or more of the same values.

Q4_0, Q4_1, Q5_0, Q5_1, Q2_0 and TQ2_0 keep their codes. IQ4_NL, IQ4_XS, IQ3_S, IQ3_XXS and IQ2_XXS, whose codes are
indices of a table, become the table's integers in 8 bits. IQ1_S, TQ1_0 and Q1_0, whose groups have two or three
different values, become codes of 2 bits. Q4_K and Q5_K keep their codes, with the products of their two scales in
float32. Q2_K, Q3_K, Q6_K, IQ1_M, IQ2_XS and IQ2_S have a scale per 16 values, which no kernel reads: they are decoded
to float32. Source: ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from . import codecs, gguf_codebooks
from .tensor import AFFINE, MXFP4, NVFP4, Array, Dense, Quantized, Spec, Weight

_STEP_VALUES = 2**18  # unpacked at a time, so that the blocks and their copies stay in the processor's cache
_MAX_F16 = 65504.0
_TABLE = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16)

Bytes = NDArray[Any]  # uint8
Parts = tuple[Bytes, Array, Array | None]  # codes [n, values], scales [n, groups], biases
FLOAT16, FLOAT32 = np.dtype("<f2"), np.dtype("<f4")


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types.

    values, size: values and bytes of a block.
    spec: how its numbers are stored in memory; None for float32.
    unpack: from blocks [n, size] to codes, scales and biases; without a spec to values, float32 [n, values].
    scale_dtype: of float scales in memory.
    scale_at: the offset of the float16 scale in a block, where scale_dtype is float16.
    """

    name: str
    values: int
    size: int
    spec: Spec | None
    unpack: Callable[[Bytes], Any]
    scale_dtype: np.dtype[Any] = FLOAT16
    scale_at: int = 0

    @property
    def bits_in_memory(self) -> float:
        """Bits per weight once loaded."""
        if self.spec is None:
            return 32.0
        scale_bits = 16 * self.scale_dtype.itemsize if self.spec.scale == "float" else 8
        return self.spec.bits + scale_bits / self.spec.group


def load(kind: BlockType, blocks: Array) -> Weight:
    """Blocks U8 [..., N, K / values, size] as a Weight of the same values.

    Float scales that are too large for float16 become float32. Raises CheckpointError for a value that is not finite
    in a type that is decoded; the scales of the others are checked by the reader.
    """
    *lead, count, size = blocks.shape
    flat, shape = blocks.reshape(-1, size), (*lead, count * kind.values)
    with np.errstate(over="ignore", invalid="ignore"):  # of scales that are not numbers
        return _decode(kind, flat, shape) if kind.spec is None else _repack(kind, kind.spec, flat, shape)


def _steps(kind: BlockType, flat: Bytes) -> Iterator[tuple[slice, Any]]:
    step = max(1, _STEP_VALUES // kind.values)
    for start in range(0, len(flat), step):
        yield slice(start, start + step), kind.unpack(np.ascontiguousarray(flat[start : start + step]))


def _decode(kind: BlockType, flat: Bytes, shape: tuple[int, ...]) -> Dense:
    values = np.empty((len(flat), kind.values), np.float32)
    for rows, part in _steps(kind, flat):
        values[rows] = part
        if not np.isfinite(part).all():
            raise CheckpointError(f"a {kind.name} tensor has a scale that is not a number; download the file again")
    return Dense(values.reshape(shape))


def _repack(kind: BlockType, spec: Spec, flat: Bytes, shape: tuple[int, ...]) -> Quantized:
    groups = kind.values // spec.group
    dtype = kind.scale_dtype if spec.scale == "float" else np.dtype(np.uint8)
    if dtype == FLOAT16 and _overflows(kind, flat):
        dtype = FLOAT32
    codes = np.empty((len(flat), kind.values * spec.bits // 8), np.uint8)
    scale, bias = np.empty((len(flat), groups), dtype), None
    for rows, (values, scales, biases) in _steps(kind, flat):
        codes[rows], scale[rows] = codecs.pack(values, spec.bits), scales
        if biases is not None:
            bias = np.empty_like(scale) if bias is None else bias
            bias[rows] = biases
    lead = shape[:-1]
    if bias is not None:
        bias = bias.reshape(*lead, -1)
    return Quantized(spec, codes.reshape(*lead, -1), scale.reshape(*lead, -1), bias)


def _overflows(kind: BlockType, flat: Bytes) -> bool:
    """Whether a finite scale has a bias beyond float16."""
    scale = np.ascontiguousarray(flat[:, kind.scale_at : kind.scale_at + 2]).view(FLOAT16)
    largest = float(np.abs(scale).max(initial=0))
    return bool(largest <= _MAX_F16 and largest * 128 > _MAX_F16)


def _f16(data: Bytes) -> Array:
    """Float16 fields [n, 2 * k] in float32, [n, k]."""
    return np.ascontiguousarray(data).view(FLOAT16).astype(np.float32)


def _halves(data: Bytes) -> Bytes:
    """Nibbles of runs of 16 bytes: the low ones of a run, then its high ones."""
    runs = data.reshape(len(data), -1, 1, 16)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(data), -1)


def _bits(data: Bytes) -> Bytes:
    return np.unpackbits(data, axis=-1, bitorder="little")


def _q4_0(b: Bytes) -> Parts:
    d = _f16(b[:, :2])
    return _halves(b[:, 2:]), d, d * -8


def _q4_1(b: Bytes) -> Parts:
    return _halves(b[:, 4:]), _f16(b[:, :2]), _f16(b[:, 2:4])


def _q5_0(b: Bytes) -> Parts:
    d = _f16(b[:, :2])
    return _halves(b[:, 6:]) | _bits(b[:, 2:6]) << 4, d, d * -16


def _q5_1(b: Bytes) -> Parts:
    return _halves(b[:, 8:]) | _bits(b[:, 4:8]) << 4, _f16(b[:, :2]), _f16(b[:, 2:4])


def _q8_0(b: Bytes) -> Parts:
    d = _f16(b[:, :2])
    return b[:, 2:] ^ 128, d, d * -128


def _mxfp4(b: Bytes) -> Parts:
    return _halves(b[:, 1:]), b[:, :1], None


def _mxfp4_neighbours(b: Bytes) -> Parts:
    """Ollama's first files: the nibbles in order, as OpenAI stores them."""
    return codecs.unpack(b[:, 1:], 4), b[:, :1], None


def _nvfp4(b: Bytes) -> Parts:
    """Four scales, then 8 bytes for each 16 values. The scale 0x7F is 0, and the sign bit is not used."""
    runs = b[:, 4:].reshape(len(b), 4, 8)
    scale = np.where(b[:, :4] & 127 == 127, 0, b[:, :4] & 127).astype(np.uint8)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(b), -1), scale, None


def _table_codes(data: Bytes) -> Bytes:
    return (_TABLE[_halves(data)] + 128).astype(np.uint8)


def _iq4_nl(b: Bytes) -> Parts:
    d = _f16(b[:, :2])
    return _table_codes(b[:, 2:]), d, d * -128


def _iq4_xs(b: Bytes) -> Parts:
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = codecs.unpack(b[:, 4:8], 4)
    d = _f16(b[:, :2]) * (low.astype(np.float32) + 16 * high.astype(np.float32) - 32)
    return _table_codes(b[:, 8:]), d, d * -128


def _scales_and_mins(b: Bytes) -> tuple[Array, Array]:
    """Scales and offsets of the eight groups of Q4_K and Q5_K, of 6 bits each in 12 bytes."""
    s, m, mixed = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = np.concatenate([s & 63, mixed & 15 | s >> 2 & 48], axis=-1)
    mins = np.concatenate([m & 63, mixed >> 4 | m >> 2 & 48], axis=-1)
    return _f16(b[:, :2]) * scales, -(_f16(b[:, 2:4]) * mins)


def _nibbles_by_32(data: Bytes) -> Bytes:
    runs = data.reshape(len(data), -1, 1, 32)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(data), -1)


def _q4_k(b: Bytes) -> Parts:
    return _nibbles_by_32(b[:, 16:]), *_scales_and_mins(b)


def _q5_k(b: Bytes) -> Parts:
    high = b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # bit i of byte j: element 32 * i + j
    return _nibbles_by_32(b[:, 48:]) | high.reshape(len(b), -1) << 4, *_scales_and_mins(b)


def _crumbs(data: Bytes) -> Bytes:
    """Pairs of bits of runs of 32 bytes: the lowest pair of each byte of a run, then the next."""
    runs = data.reshape(len(data), -1, 1, 32)
    return (runs >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3).reshape(len(data), -1)


def _by_16(codes: Array, scale: Array, offset: Array | None = None) -> Array:
    values = codes.reshape(len(codes), 16, 16).astype(np.float32) * scale[..., None]
    if offset is not None:
        values -= offset[..., None]
    return values.reshape(len(codes), -1)


def _q2_k(b: Bytes) -> Array:
    scales = b[:, :16]
    return _by_16(_crumbs(b[:, 16:80]), _f16(b[:, 80:82]) * (scales & 15), _f16(b[:, 82:84]) * (scales >> 4))


def _q3_k(b: Bytes) -> Array:
    low, high = b[:, 96:104], b[:, 104:108]
    high = (high[:, None] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3).reshape(len(b), 16)
    scales = np.concatenate([low & 15, low >> 4], axis=-1).astype(np.int8) + 16 * high.astype(np.int8) - 32
    top = b[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # set: no 4 is subtracted
    codes = _crumbs(b[:, 32:96]).astype(np.int8) + 4 * top.reshape(len(b), -1).astype(np.int8) - 4
    return _by_16(codes, _f16(b[:, 108:110]) * scales)


def _q6_k(b: Bytes) -> Array:
    runs = b[:, :128].reshape(len(b), 2, 1, 64)
    low = np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(b), -1)
    codes = (low | _crumbs(b[:, 128:192]) << 4).astype(np.int8) - 32
    return _by_16(codes, _f16(b[:, 208:210]) * np.ascontiguousarray(b[:, 192:208]).view(np.int8))


def _ternary(codes: Bytes, d: Array, groups: int) -> Parts:
    """Codes 0 to 3 for -d, 0, d and 2 * d, with the scale of the block for each group."""
    scale = np.repeat(d, groups, axis=1)
    return codes, scale, -scale


def _q1_0(b: Bytes) -> Parts:
    return _ternary(_bits(b[:, 2:]) << 1, _f16(b[:, :2]), 1)


def _q2_0(b: Bytes) -> Parts:
    return _ternary(codecs.unpack(np.ascontiguousarray(b[:, 2:]), 2), _f16(b[:, :2]), 1)


def _tq1_0(b: Bytes) -> Parts:
    """Five digits of base 3 in a byte, as fractions of 256: runs of 32, of 16, and of 4 bytes with four digits each."""
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
    runs = [(b[:, None, at:end] * powers[:digits]) for at, end, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4))]
    fractions = np.concatenate([run.reshape(len(b), -1) for run in runs], axis=1)  # modulo 256, which drops digits
    return _ternary((fractions.astype(np.uint16) * 3 >> 8).astype(np.uint8), _f16(b[:, 52:54]), 2)


def _tq2_0(b: Bytes) -> Parts:
    return _ternary(_crumbs(b[:, :64]), _f16(b[:, 64:66]), 2)


_A2, _A4, _A5, _A8 = (AFFINE[bits, 32] for bits in (2, 4, 5, 8))
BLOCK_TYPES: Mapping[int, BlockType] = {
    2: BlockType("Q4_0", 32, 18, _A4, _q4_0),
    3: BlockType("Q4_1", 32, 20, _A4, _q4_1),
    4: BlockType("MXFP4 (Ollama)", 32, 17, MXFP4, _mxfp4_neighbours),
    6: BlockType("Q5_0", 32, 22, _A5, _q5_0),
    7: BlockType("Q5_1", 32, 24, _A5, _q5_1),
    8: BlockType("Q8_0", 32, 34, _A8, _q8_0),
    10: BlockType("Q2_K", 256, 84, None, _q2_k),
    11: BlockType("Q3_K", 256, 110, None, _q3_k),
    12: BlockType("Q4_K", 256, 144, _A4, _q4_k, FLOAT32),
    13: BlockType("Q5_K", 256, 176, _A5, _q5_k, FLOAT32),
    14: BlockType("Q6_K", 256, 210, None, _q6_k),
    16: BlockType("IQ2_XXS", 256, 66, _A8, gguf_codebooks.iq2_xxs, FLOAT32),
    17: BlockType("IQ2_XS", 256, 74, None, gguf_codebooks.iq2_xs),
    18: BlockType("IQ3_XXS", 256, 98, _A8, gguf_codebooks.iq3_xxs, FLOAT32),
    21: BlockType("IQ3_S", 256, 110, _A8, gguf_codebooks.iq3_s, FLOAT32),
    22: BlockType("IQ2_S", 256, 82, None, gguf_codebooks.iq2_s),
    19: BlockType("IQ1_S", 256, 50, _A2, gguf_codebooks.iq1_s, FLOAT32),
    20: BlockType("IQ4_NL", 32, 18, _A8, _iq4_nl),
    23: BlockType("IQ4_XS", 256, 136, _A8, _iq4_xs, FLOAT32),
    29: BlockType("IQ1_M", 256, 56, None, gguf_codebooks.iq1_m),
    34: BlockType("TQ1_0", 256, 54, AFFINE[2, 128], _tq1_0, scale_at=52),
    35: BlockType("TQ2_0", 256, 66, AFFINE[2, 128], _tq2_0, scale_at=64),
    39: BlockType("MXFP4", 32, 17, MXFP4, _mxfp4),
    40: BlockType("NVFP4", 64, 36, NVFP4, _nvfp4),
    41: BlockType("Q1_0", 128, 18, AFFINE[2, 128], _q1_0),
    42: BlockType("Q2_0", 64, 18, AFFINE[2, 64], _q2_0),
}
BY_NAME: Mapping[str, BlockType] = {kind.name: kind for kind in BLOCK_TYPES.values()}
# The codes in memory are others than those of the file.
RENUMBERED = ("IQ1_S", "IQ2_XXS", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "Q1_0")
