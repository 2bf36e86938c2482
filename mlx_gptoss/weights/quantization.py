"""Numbers to codes: quantization to every Spec, and the recipes of other tools, whose files are reproduced bit for bit.

All work goes block by block, as in codecs.py. Each recipe is an encoder: a function from groups of float32 values that
share a scale to their codes, scales and biases. Sources: OCP Microscaling v1.0 for MXFP4; MLX's `quantize` for affine,
mxfp8 and nvfp4; ModelOpt, compressed-tensors and AutoRound for the formats of those tools.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from ..errors import CheckpointError
from .codecs import BFLOAT16, E4M3, E8M0, Bytes, Floats, blocks, decode_block, pack
from .tensor import AFFINE4, FP8_ROW, NVFP4, Array, Dense, Element, Quantized, ScaleKind, Spec, Weight


def quantize(values: Array, spec: Spec, scale_dtype: np.dtype[np.generic] = BFLOAT16) -> Quantized:
    """Quantize floats [..., N, K] to `spec`. Arguments and errors as in `to_spec`."""
    return to_spec(Dense(values), spec, scale_dtype)


def to_spec(weight: Weight, spec: Spec, scale_dtype: np.dtype[np.generic] = BFLOAT16) -> Quantized:
    """The weight itself if it is stored as `spec` already, else the decoded weight quantized to `spec`.

    scale_dtype: the dtype of affine scales and biases.
    Raises CheckpointError if K is not a multiple of the group, or if a value is NaN or infinite.
    """
    if isinstance(weight, Quantized) and weight.spec == spec and weight.outer is None:
        return weight
    return quantize_with(weight, spec, _ENCODERS[spec.element, spec.scale], scale_dtype)


def quantize_nvfp4(weight: Weight, outer: Array) -> Quantized:
    """Quantize to NVFP4 under one second scale, `outer` float32 [], bit for bit as ModelOpt does.

    ModelOpt chooses `outer` = amax / 2688, so that the largest value is 6 (e2m1) * 448 (e4m3) * outer.
    """

    def encode(groups: Floats, spec: Spec) -> tuple[Bytes, Bytes, None]:
        return _encode_nvfp4_scaled(groups, outer)

    return replace(quantize_with(weight, NVFP4, encode, BFLOAT16), outer=outer)


def quantize_fp8_rows(weight: Weight) -> Quantized:
    """Quantize to e4m3 with one bfloat16 scale per row (in `outer`), bit for bit as compressed-tensors does."""
    row_spec = replace(FP8_ROW, group=weight.shape[-1], scale="float")
    rows = quantize_with(weight, row_spec, _encode_fp8_row, BFLOAT16)
    return Quantized(FP8_ROW, rows.codes, outer=rows.scale)


def quantize_symmetric(weight: Weight) -> Quantized:
    """Quantize to 4-bit integers around 8, bit for bit as AutoRound's round-to-nearest does.

    Each group of 64 has a float16 scale. Raises CheckpointError if a value is too large for one.
    """
    return quantize_with(weight, AFFINE4, _encode_symmetric, np.dtype(np.float16))


def symmetric_bias(scale: Array, zero: int = 8) -> Array:
    """-zero * scale: the value of code 0 where the code `zero`, a power of two, means zero. Exact in the scale's dtype.

    Raises CheckpointError on overflow. NaN and infinite scales pass.
    """
    with np.errstate(over="ignore"):
        bias: Array = scale * scale.dtype.type(-zero)
    if np.any(np.isinf(bias) & np.isfinite(scale)):
        raise CheckpointError(
            f"a scale is too large: {zero} times it overflows {scale.dtype.name}; the checkpoint is damaged, or needs "
            "a format with wider scales, such as mlx-4bit"
        )
    return bias


def max_abs(weight: Weight) -> np.float32:
    """The largest magnitude of a weight. Raises CheckpointError if a value is NaN or infinite."""
    found: np.float32 = np.float32(0)
    for _, block in blocks(weight):
        found = max(found, _reduce_groups(np.abs(decode_block(block)).reshape(1, -1), np.maximum)[0])
    return found


def quantize_with(weight: Weight, spec: Spec, encode: GroupEncoder, scale_dtype: np.dtype[np.generic]) -> Quantized:
    """Decode the weight and encode it again, block by block.

    encode: gets float32 groups [n, group], which it may overwrite; returns codes [n, group] as uint8, scales [n] and
        biases [n] or None.
    Raises CheckpointError if K is not a multiple of the group.
    """
    *lead, width = weight.shape
    if width % spec.group:
        raise CheckpointError(f"rows of {width} values cannot be cut into groups of {spec.group}")
    has_floats = spec.scale == "float"
    codes = np.empty((*lead, width * spec.bits // 8), np.uint8)
    scale = np.empty((*lead, width // spec.group), scale_dtype if has_floats else np.uint8)
    bias = np.empty_like(scale) if has_floats else None
    for index, block in blocks(weight):
        groups = decode_block(block).reshape(-1, spec.group)
        block_codes, block_scale, block_bias = encode(groups, spec)
        codes[index] = pack(block_codes, spec.bits).reshape(codes[index].shape)
        scale[index] = block_scale.reshape(scale[index].shape)
        if bias is not None and block_bias is not None:
            bias[index] = block_bias.reshape(bias[index].shape)
    return Quantized(spec, codes, scale, bias)


# ------------------------------------------------------------- the encoders: groups [n, g] -> codes, scales, biases


def encode_affine(groups: Floats, spec: Spec) -> tuple[Bytes, Floats, Floats]:
    """MLX's affine recipe: bias and scale span the group from its smallest to its largest value.

    The end of larger magnitude is made a multiple of the scale, so that zero is exact.
    """
    top = np.float32(2**spec.bits - 1)
    low, high = _reduce_groups(groups, np.minimum), _reduce_groups(groups, np.maximum)
    low_is_larger = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / top, np.float32(1e-7))
    scale = np.where(low_is_larger, scale, -scale)
    edge = np.where(low_is_larger, low, high)
    steps = np.rint(edge / scale)
    scale = np.divide(edge, steps, out=scale, where=steps != 0)
    bias = np.where(steps != 0, edge, np.float32(0))
    groups -= bias[:, None]
    groups /= scale[:, None]
    np.rint(groups, out=groups)
    np.clip(groups, 0, top, out=groups)
    return groups.astype(np.uint8), scale, bias


def _encode_mxfp4(groups: Floats, spec: Spec) -> tuple[Bytes, Bytes, None]:
    """OCP MX: scale 2^(floor(log2(amax)) - 2), so that the largest code of a group is 6 or 7 (4.0 or 6.0).

    Values decoded from MXFP4 are encoded exactly, and -0 stays code 8. A group of zeros gets scale 1.
    """
    sign = np.signbit(groups).view(np.uint8)
    magnitude = np.abs(groups, out=groups)
    amax = _reduce_groups(magnitude, np.maximum)
    exponent = np.frexp(amax)[1] - 3
    scale = np.where(amax > 0, np.clip(exponent + 127, 0, 254), 127).astype(np.uint8)
    magnitude *= E8M0.take(254 - scale)[:, None]
    code = _e2m1_codes(magnitude, _TIES_TO_EVEN)
    code |= sign << 3
    return code, scale, None


def _encode_nvfp4(groups: Floats, spec: Spec) -> tuple[Bytes, Bytes, None]:
    """MLX's nvfp4 without a per-tensor scale: the scale is e4m3(amax / 6).

    Ties go to the smaller magnitude, and what rounds to zero becomes +0, as in MLX's CPU code (files written by mlx-lm
    show it).
    """
    sign = np.signbit(groups)
    magnitude = np.abs(groups, out=groups)
    scale = _e4m3_codes(_reduce_groups(magnitude, np.maximum) / np.float32(6))
    step = E4M3.take(scale)
    step[step == 0] = np.inf
    magnitude /= step[:, None]
    code = _e2m1_codes(magnitude, _TIES_DOWN)
    code |= (sign & (code != 0)).view(np.uint8) << 3
    return code, scale, None


def _encode_nvfp4_scaled(groups: Floats, outer: Array) -> tuple[Bytes, Bytes, None]:
    """ModelOpt's nvfp4 (0.47, nvfp4_tensor.py): the scale is e4m3(amax / (6 outer)).

    The scale is at least 2^-9, and 1 for a group of zeros. Ties go to the even code, and what rounds to zero keeps its
    sign.
    """
    magnitude = np.abs(groups)
    ratio = _reduce_groups(magnitude, np.maximum) / (np.float32(6) * outer)
    ratio[ratio == 0] = 1
    scale = _e4m3_codes(np.maximum(ratio, np.float32(2**-9)))
    step = (E4M3.take(scale) * outer)[:, None]
    magnitude /= step
    code = _e2m1_codes(magnitude, _TIES_TO_EVEN)
    code |= (groups < 0).view(np.uint8) << 3
    return code, scale, None


def _encode_fp8_row(groups: Floats, spec: Spec) -> tuple[Bytes, Array, None]:
    """compressed-tensors 0.19 on bfloat16 weights: the scale is bf16(amax / 448), and 2^-7 for a row of zeros.

    The quotient is rounded to bfloat16 before it is rounded to e4m3, and -0 becomes +0.
    """
    scale = (_reduce_groups(np.abs(groups), np.maximum) / np.float32(448)).astype(BFLOAT16)
    scale[scale == 0] = 2**-7
    quotient = (groups / scale.astype(np.float32)[:, None]).astype(BFLOAT16)
    return _BFLOAT16_TO_E4M3.take(quotient.view(np.uint16)), scale, None


def _encode_symmetric(groups: Floats, spec: Spec) -> tuple[Bytes, Array, Array]:
    """AutoRound 0.16's int_sym: the element of the largest magnitude gets code 0, so the scale has the opposite sign.

    The magnitude of a scale is at least float16(1e-5).
    """
    low = np.minimum(_reduce_groups(groups, np.minimum), 0)
    high = np.maximum(_reduce_groups(groups, np.maximum), 0)
    min_scale = np.float16(1e-5)
    with np.errstate(over="ignore"):
        scale = (np.where(high < -low, -low, -high) / np.float32(8)).astype(np.float16)
    if not np.isfinite(scale).all():
        raise CheckpointError("a weight is too large for the float16 scales of int4-autoround; choose another format")
    scale = np.where(scale < 0, np.minimum(scale, -min_scale), np.maximum(scale, min_scale))
    codes = groups / scale.astype(np.float32)[:, None]
    np.rint(codes, out=codes)
    codes += np.float32(8)
    np.clip(codes, 0, 15, out=codes)
    return codes.astype(np.uint8), scale, symmetric_bias(scale)


def _encode_mxfp8(groups: Floats, spec: Spec) -> tuple[Bytes, Bytes, None]:
    """MLX's mxfp8: scale 2^ceil(log2(amax / 448)), so that nothing saturates. A group of zeros gets scale 1."""
    sign = np.signbit(groups).view(np.uint8)
    magnitude = np.abs(groups, out=groups)
    amax = _reduce_groups(magnitude, np.maximum)
    mantissa, exponent = np.frexp(amax / np.float32(448))
    power = exponent - (mantissa == 0.5)
    scale = np.where(amax > 0, np.clip(power + 127, 0, 254), 127).astype(np.uint8)
    magnitude *= E8M0.take(254 - scale)[:, None]
    code = _e4m3_codes(magnitude)
    code |= sign << 7
    return code, scale, None


GroupEncoder = Callable[[Floats, Spec], tuple[Bytes, Array, Array | None]]
_ENCODERS: Mapping[tuple[Element, ScaleKind], GroupEncoder] = {
    ("uint", "float"): encode_affine,
    ("e2m1", "e8m0"): _encode_mxfp4,
    ("e2m1", "e4m3"): _encode_nvfp4,
    ("e4m3", "e8m0"): _encode_mxfp8,
}


# ------------------------------------------------------------------------------------------- parts of the encoders


def _reduce_groups(groups: Floats, reduction: np.ufunc) -> Floats:
    """The maximum or minimum of each group, [n, g] -> [n]. Raises CheckpointError for NaN or infinity."""
    found: Floats = reduction.reduceat(groups.reshape(-1), np.arange(0, groups.size, groups.shape[1]))
    if not np.isfinite(found).all():
        raise CheckpointError("a weight is NaN or infinite and cannot be quantized; the checkpoint is damaged")
    return found


_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between neighbours of the e2m1 grid
_TIES_DOWN = tuple((np.greater, midpoint) for midpoint in _MIDPOINTS)
_TIES_TO_EVEN = tuple(((np.greater, np.greater_equal)[i % 2], midpoint) for i, midpoint in enumerate(_MIDPOINTS))


def _e2m1_codes(magnitude: Floats, thresholds: tuple[tuple[np.ufunc, float], ...]) -> Bytes:
    """The code 0..7 of each magnitude: the number of thresholds that it passes."""
    code = np.zeros(magnitude.shape, np.uint8)
    for passes, midpoint in thresholds:
        code += passes(magnitude, np.float32(midpoint)).view(np.uint8)
    return code


def _e4m3_codes(magnitude: Floats) -> Bytes:
    """The nearest code 0..126 of non-negative values; ties to even, saturating at 448."""
    bits = np.minimum(magnitude, np.float32(448)).view(np.int32)
    even = bits >> 20
    even &= 1
    bits += even
    bits += 0x7FFFF - (120 << 23)  # round to 3 bits of mantissa; the exponent's bias becomes 7
    bits >>= 20
    subnormal = np.rint(np.minimum(magnitude, np.float32(1)) * np.float32(512)).astype(np.int32)
    code: Bytes = np.where(magnitude < np.float32(2**-6), subnormal, bits).astype(np.uint8)
    return code


def _bfloat16_to_e4m3() -> Bytes:
    """The table [65536] from a bfloat16's bits to its nearest e4m3 code: saturating, +0 for both zeros."""
    values = np.arange(2**15, dtype=np.uint16).view(BFLOAT16).astype(np.float32)
    codes = _e4m3_codes(np.nan_to_num(values, nan=448))
    return np.concatenate([codes, codes[:1], codes[1:] | 128])


_BFLOAT16_TO_E4M3 = _bfloat16_to_e4m3()
