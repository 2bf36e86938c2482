"""Writing GGUF: the header of a file, and weights as its blocks, with the bytes that llama.cpp's converter writes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import CheckpointError
from . import codecs, quantization
from .gguf_blocks import BLOCK_TYPES, FLOAT16
from .safetensors import TensorInfo
from .tensor import AFFINE8_G32, MXFP4, Array, Quantized, Weight

ALIGNMENT = 32
_NUMBERS: Mapping[str, int] = {"F32": 0, "F16": 1, "BF16": 30} | {t.name: number for number, t in BLOCK_TYPES.items()}
_SIZES: Mapping[str, tuple[int, int]] = {t.name: (t.values, t.size) for t in BLOCK_TYPES.values()}

Entries = Mapping[str, Any]  # metadata: strings, integers, floats, lists of strings, int32 arrays


def block_tensor(name: str, kind: str, shape: Sequence[int]) -> TensorInfo:
    """The tensor of a matrix of this shape in blocks of the type `kind`."""
    values, size = _SIZES[kind]
    return TensorInfo(name, "U8", (*shape[:-1], shape[-1] // values, size), kind)


def layout(entries: Entries, tensors: Sequence[TensorInfo]) -> tuple[bytes, dict[str, int], int]:
    """The bytes before the data, the offset of each tensor in the file, and the file's size."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(entries))]
    parts += [_text(key) + _value(value) for key, value in entries.items()]
    offsets, end = {}, 0
    for info in tensors:
        kind = info.blocks or info.dtype
        shape = info.shape if not info.blocks else (*info.shape[:-2], info.shape[-2] * _SIZES[kind][0])
        parts.append(_text(info.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)))
        parts.append(struct.pack("<IQ", _NUMBERS[kind], end))
        offsets[info.name] = end
        end += info.nbytes + -info.nbytes % ALIGNMENT
    header = b"".join(parts)
    header += b"\0" * (-len(header) % ALIGNMENT)
    return header, {name: len(header) + at for name, at in offsets.items()}, len(header) + end


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """The type and the bytes of a metadata value."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", 9, 5, len(value)) + value.astype("<i4").tobytes()
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))


def to_mxfp4(weight: Weight) -> Array:
    """MXFP4 blocks U8 [..., N, K / 32, 17]; the codes of an MXFP4 weight as they are."""
    found = quantization.to_spec(weight, MXFP4)
    assert found.scale is not None
    codes = codecs.unpack(np.ascontiguousarray(found.codes), 4).reshape(*found.scale.shape, 2, 16)
    out = np.empty((*found.scale.shape, 17), np.uint8)
    out[..., 0] = found.scale
    out[..., 1:] = codes[..., 0, :] | codes[..., 1, :] << 4
    return out


def to_q8_0(weight: Weight) -> Array:
    """Q8_0 blocks U8 [..., N, K / 32, 34], as ggml quantizes; a weight that came from Q8_0 as it was.

    Raises CheckpointError for values that are not finite or too large for a float16 scale.
    """
    out = np.empty((*weight.shape[:-1], weight.shape[-1] // 32, 34), np.uint8)
    if _is_q8_0(weight):
        assert isinstance(weight, Quantized) and weight.scale is not None
        out[..., :2] = weight.scale.astype(FLOAT16)[..., None].view(np.uint8)
        out[..., 2:] = weight.codes.reshape(*out.shape[:-1], 32) ^ 128
        return out
    for index, block in codecs.blocks(weight):
        groups = codecs.decode_block(block).reshape(-1, 32)
        scale = np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)
        if not (scale < 65504).all():
            raise CheckpointError("a weight is not finite, or too large for the float16 scales of Q8_0")
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
        groups *= inverse
        part = np.empty((len(groups), 34), np.uint8)
        part[:, :2] = scale.astype(FLOAT16).view(np.uint8)
        part[:, 2:] = _round(groups).astype(np.int8).view(np.uint8)
        out[index] = part.reshape(out[index].shape)
    return out


def _is_q8_0(weight: Weight) -> bool:
    if not isinstance(weight, Quantized) or weight.spec != AFFINE8_G32 or weight.outer is not None:
        return False
    scale, bias = weight.scale, weight.bias
    if scale is None or bias is None or (scale.dtype != FLOAT16 and (scale.astype(FLOAT16) != scale).any()):
        return False
    return bool((bias == scale * scale.dtype.type(-128)).all()) and scale.dtype in (np.float16, np.float32)


def _round(values: Array) -> Array:
    """To the nearest integer, halves away from zero, as C's roundf."""
    whole = np.trunc(values)
    rounded: Array = whole + np.trunc(2 * (values - whole))
    return rounded


def to_floats(weight: Weight, dtype: str) -> Array:
    """Values as F32, F16 or BF16. Raises CheckpointError for values beyond float16's."""
    if dtype == "BF16":
        return codecs.to_bfloat16(weight)
    values = codecs.dequantize(weight)
    if dtype == "F32":
        return values
    with np.errstate(over="ignore"):
        narrow = values.astype(FLOAT16)
    if not np.isfinite(narrow).all():
        raise CheckpointError("a weight is too large for float16; choose gguf-bf16 or gguf")
    return narrow
