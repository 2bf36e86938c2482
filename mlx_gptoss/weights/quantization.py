"""Numbers to codes: `quantize` for every Spec, and the recipes of the tools whose files are matched bit for bit.

All work goes block by block, as in codecs.py. Sources: OCP Microscaling v1.0 for e2m1, e4m3 and e8m0; MLX's `quantize`
for affine, mxfp8 and nvfp4; ModelOpt, compressed-tensors and AutoRound for theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from ..errors import CheckpointError
from .codecs import BFLOAT16, E4M3, E8M0, Bytes, Floats, blocks, decode_block, pack
from .tensor import AFFINE4, FP8_ROW, NVFP4, Array, Dense, Element, Quantized, ScaleKind, Spec, Weight


def quantize(values: Array, spec: Spec, scale_dtype: np.dtype[np.generic] = BFLOAT16) -> Quantized:
    """Floats [..., N, K] as `spec` stores them, K a multiple of the group. `scale_dtype` is that of affine scales."""
    return to_spec(Dense(values), spec, scale_dtype)


def to_spec(weight: Weight, spec: Spec, scale_dtype: np.dtype[np.generic] = BFLOAT16) -> Quantized:
    """The weight as `spec` stores it: itself, bit for bit, if it is stored so already, else quantized anew.

    Raises CheckpointError if K is no multiple of the group or a value is NaN or infinite.
    """
    if isinstance(weight, Quantized) and weight.spec == spec and weight.outer is None:
        return weight
    return quantize_with(weight, spec, _ENCODERS[spec.element, spec.scale], scale_dtype)


def quantize_nvfp4(weight: Weight, outer: Array) -> Quantized:
    """The weight quantized anew to NVFP4 under one second scale, `outer` float32 [], as ModelOpt does bit for bit.

    Its choice of `outer` is amax / 2688: the largest value is then 6 (e2m1) * 448 (e4m3) * outer.
    """

    def encode(groups: Floats, spec: Spec) -> tuple[Bytes, Bytes, None]:
        return _encode_nvfp4_scaled(groups, outer)

    found = quantize_with(weight, NVFP4, encode, BFLOAT16)
    return replace(found, outer=outer)


def quantize_fp8_rows(weight: Weight) -> Quantized:
    """The weight quantized anew to e4m3 codes with one bfloat16 scale a row, as compressed-tensors does bit for bit."""
    group = replace(FP8_ROW, group=weight.shape[-1], scale="float")
    found = quantize_with(weight, group, _encode_fp8_row, BFLOAT16)
    return Quantized(FP8_ROW, found.codes, outer=found.scale)


def quantize_symmetric(weight: Weight) -> Quantized:
    """The weight quantized anew to 4-bit integers around 8 with a float16 scale a group of 64, as AutoRound rounds to
    nearest, bit for bit. Raises CheckpointError for a value that float16 cannot scale."""
    return quantize_with(weight, AFFINE4, _encode_symmetric, np.dtype(np.float16))


def symmetric_bias(scale: Array) -> Array:
    """-8 * scale: what code 0 stands for where 8 is zero; exact in the scale's own dtype unless it is too large, which
    raises CheckpointError. NaN and infinity pass."""
    with np.errstate(over="ignore"):
        bias: Array = scale * scale.dtype.type(-8)
    if np.any(np.isinf(bias) & np.isfinite(scale)):
        raise CheckpointError(
            f"a scale is too large for 8 steps of it to be a {scale.dtype.name}; the checkpoint is damaged, or needs a "
            "format with wider scales, such as mlx-4bit"
        )
    return bias


def max_abs(weight: Weight) -> np.float32:
    """The largest magnitude. Raises CheckpointError if a value is NaN or infinite."""
    found: np.float32 = np.float32(0)
    for _, part in blocks(weight):
        found = max(found, _reduce_groups(np.abs(decode_block(part)).reshape(1, -1), np.maximum)[0])
    return found


def quantize_with(weight: Weight, spec: Spec, encode: GroupEncoder, scale_dtype: np.dtype[np.generic]) -> Quantized:
    """Decode and encode block by block; `encode` may overwrite the float32 [n, group] that it is given.

    It returns codes [n, group] as uint8, scales [n], and biases [n] or None.
    """
    *lead, width = weight.shape
    if width % spec.group:
        raise CheckpointError(f"rows of {width} values cannot be cut into groups of {spec.group}")
    floats = spec.scale == "float"
    codes = np.empty((*lead, width * spec.bits // 8), np.uint8)
    scale = np.empty((*lead, width // spec.group), scale_dtype if floats else np.uint8)
    bias = np.empty_like(scale) if floats else None
    for at, part in blocks(weight):
        block = decode_block(part)
        found, scale_block, bias_block = encode(block.reshape(-1, spec.group), spec)
        codes[at] = pack(found, spec.bits).reshape(codes[at].shape)
        scale[at] = scale_block.reshape(scale[at].shape)
        if bias is not None and bias_block is not None:
            bias[at] = bias_block.reshape(bias[at].shape)
    return Quantized(spec, codes, scale, bias)


def _reduce_groups(groups: Floats, reduction: np.ufunc) -> Floats:
    """The maximum or minimum of each group, [n, g] -> [n]; refuses NaN and infinity."""
    most: Floats = reduction.reduceat(groups.reshape(-1), np.arange(0, groups.size, groups.shape[1]))
    if not np.isfinite(most).all():
        raise CheckpointError("a weight is NaN or infinite and cannot be quantized; the checkpoint is damaged")
    return most


def encode_affine(groups: Floats, spec: Spec) -> tuple[Bytes, Floats, Floats]:
    """MLX's affine recipe: the edge of larger magnitude is a multiple of the scale, so that zero stays zero."""
    top = np.float32(2**spec.bits - 1)
    low, high = _reduce_groups(groups, np.minimum), _reduce_groups(groups, np.maximum)
    side = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / top, np.float32(1e-7))
    scale = np.where(side, scale, -scale)
    edge = np.where(side, low, high)
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

    Values that came from MXFP4 fit exactly, and -0 stays code 8. A group of zeros gets scale 1.
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
    """MLX's nvfp4 without a tensor-wide scale: e4m3(amax / 6). As its CPU code does (the files mlx-lm wrote show it),
    ties go to the smaller magnitude and what rounds to zero is +0."""
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
    """ModelOpt's nvfp4 (0.47, nvfp4_tensor.py): e4m3(amax / (6 outer)), at least 2^-9, and 1 for a group of zeros;
    ties go to the even code and what rounds to zero keeps its sign."""
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
    """compressed-tensors 0.19 on bfloat16 weights: scale bf16(amax / 448), 2^-7 for a row of zeros; the quotient is
    rounded to bfloat16 before it is to e4m3, and -0 becomes +0."""
    scale = (_reduce_groups(np.abs(groups), np.maximum) / np.float32(448)).astype(BFLOAT16)
    scale[scale == 0] = 2**-7
    quotient = (groups / scale.astype(np.float32)[:, None]).astype(BFLOAT16)
    return _BFLOAT16_TO_E4M3.take(quotient.view(np.uint16)), scale, None


def _encode_symmetric(groups: Floats, spec: Spec) -> tuple[Bytes, Array, Array]:
    """AutoRound 0.16's int_sym: the element of largest magnitude gets code 0, so the scale has the opposite of its
    sign; scales are at least float16(1e-5) in magnitude."""
    low = np.minimum(_reduce_groups(groups, np.minimum), 0)
    high = np.maximum(_reduce_groups(groups, np.maximum), 0)
    least = np.float16(1e-5)
    with np.errstate(over="ignore"):
        scale = (np.where(high < -low, -low, -high) / np.float32(8)).astype(np.float16)
    if not np.isfinite(scale).all():
        raise CheckpointError("a weight is too large for the float16 scales of int4-autoround; choose another format")
    scale = np.where(scale < 0, np.minimum(scale, -least), np.maximum(scale, least))
    work = groups / scale.astype(np.float32)[:, None]
    np.rint(work, out=work)
    work += np.float32(8)
    np.clip(work, 0, 15, out=work)
    return work.astype(np.uint8), scale, symmetric_bias(scale)


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


_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between neighbours of the e2m1 grid
_TIES_DOWN = tuple((np.greater, edge) for edge in _MIDPOINTS)
_TIES_TO_EVEN = tuple(((np.greater, np.greater_equal)[i % 2], edge) for i, edge in enumerate(_MIDPOINTS))


def _e2m1_codes(magnitude: Floats, edges: tuple[tuple[np.ufunc, float], ...]) -> Bytes:
    """The code 0..7 of each magnitude: the number of midpoints that it is beyond."""
    code = np.zeros(magnitude.shape, np.uint8)
    for beyond, edge in edges:
        code += beyond(magnitude, np.float32(edge)).view(np.uint8)
    return code


def _e4m3_codes(magnitude: Floats) -> Bytes:
    """Nearest code 0..126 of non-negative values, ties to even, saturating at 448."""
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
    """The nearest e4m3 code of every bfloat16 by its bits, saturating; +0 for both zeros."""
    values = np.arange(2**15, dtype=np.uint16).view(BFLOAT16).astype(np.float32)
    codes = _e4m3_codes(np.nan_to_num(values, nan=448))
    return np.concatenate([codes, codes[:1], codes[1:] | 128])


_BFLOAT16_TO_E4M3 = _bfloat16_to_e4m3()

GroupEncoder = Callable[[Floats, Spec], tuple[Bytes, Array, Array | None]]
_ENCODERS: Mapping[tuple[Element, ScaleKind], GroupEncoder] = {
    ("uint", "float"): encode_affine,
    ("e2m1", "e8m0"): _encode_mxfp4,
    ("e2m1", "e4m3"): _encode_nvfp4,
    ("e4m3", "e8m0"): _encode_mxfp8,
}
