"""`torchao`: tensor subclasses as torchao flattens them into safetensors files, as transformers saves them. Read only.

A tensor `M.weight` is stored as `M._weight_qdata`, `M._weight_scale` and so on, and the metadata of the file has its
class under the name `M.weight`. transformers quantizes the attention (and lm_head, if asked), all output-major:

| class | `qdata` | `scale` | in memory |
|---|---|---|---|
| Float8Tensor | F8_E4M3 [N, K] | [N, 1] or [1, 1] | FP8; with a scale per block, decoded |
| Int8Tensor, IntxUnpackedToInt8Tensor | I8 [N, K] | [N, G], and `zero_point` I8 | codes of the same values |
| Int4Tensor | I8 [N, K/2], low nibble first | [K/g, N], and `zero_point` in floats | 4-bit codes, float32 scales |
| MXTensor | F8_E4M3 [N, K] or U8 [N, K/2] | e8m0, one per 32 | MXFP8, MXFP4 |
| NVFP4Tensor | U8 [N, K/2] | e4m3, one per 16, and `per_tensor_scale` | NVFP4 |

Scales of the last two may be swizzled: tiles of 128 by 4, each stored as 32 by 16. A rule for the fused experts
quantizes `gate_up_proj` [E, H, 2I] along its last axis. That is the axis of the outputs, and no kernel reads such
scales: experts are decoded to float32, like biases.

Seen: what transformers 5.24 and torchao 0.18 write on a CPU, of all classes but Int4Tensor, whose packing needs a GPU
and follows MSLK's source (w = scale * q + zero_point).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...errors import CheckpointError
from ...untrusted.json_file import parse_json
from .. import codecs
from ..params import Param
from ..tensor import AFFINE, FP8_ROW, MXFP4, MXFP8, NVFP4, Array, Dense, Quantized, Spec, Weight
from . import signed_ints
from .base import FLOATS, CheckpointHeaders, ExpectedTensor, Format, GetTensor, Recipe, Source, Unit
from .hf_layout import experts_prefix, fused_rows, hf_name

FAMILY = "torchao"
_MAX_ITEMS = 200  # commas and brackets in the metadata of one tensor
_READ_ONLY = "torchao's formats are read but not written; convert to fp8-dynamic, mlx-8bit or another format"
_ADVICE = "quantize with Int8WeightOnlyConfig, Float8WeightOnlyConfig or IntxWeightOnlyConfig, or use the original"
_PARTS = ("qdata", "scale", "zero_point", "per_tensor_scale")
_UNUSED_PARTS = ("act_quant_scale", "act_quant_zero_point", "act_per_tensor_scale")  # of activations
_REFUSED = {
    "Int4TilePackedTo4dTensor": "its order of values is that of one CUDA kernel",
    "Int4PlainInt32Tensor": "its order of values is that of Intel's and Huawei's devices",
}
_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization")  # attributes that quantize activations


class TorchAo(Format):
    family = FAMILY
    writes = False
    recipes: Mapping[str, Recipe] = {}

    def find(self, param: Param, headers: CheckpointHeaders) -> Source | None:
        stored = _stored(param, headers)
        if stored is None:
            return None
        plan = _PLANS[stored.kind](stored, headers)
        return _experts_source(stored, plan, param) if stored.fused else _plain_source(stored, plan, param)

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        raise CheckpointError(_READ_ONLY)

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        raise CheckpointError(_READ_ONLY)


@dataclass(frozen=True)
class _Stored:
    """One flattened tensor. name: torchao's. prefix: of its parts. shape: of its values as stored, [..., N, K].
    kind, data: its class and attributes, from the metadata. fused: whether it has the experts of a layer."""

    name: str
    prefix: str
    shape: tuple[int, ...]
    kind: str
    data: Mapping[str, Any]
    fused: bool

    @property
    def note(self) -> str:
        quantized = any(self.data.get(name) is not None for name in _ACTIVATIONS)
        return "torchao's quantization of activations is not applied: they stay unquantized" if quantized else ""

    def expected(self, part: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> ExpectedTensor:
        return ExpectedTensor(self.prefix + part, dtypes, shape)

    def refuse(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.name} is torchao's {self.kind} {what}, which is not supported: {_ADVICE}")


@dataclass(frozen=True)
class _Plan:
    """How one tensor is read. expected: its tensors. load: returns the Weight in the stored orientation, from its parts
    by name. spec: of what `load` returns, None for Dense. bits: per weight, stored and in memory. float_scales: whether
    its scales per row or per group are float32."""

    expected: tuple[ExpectedTensor, ...]
    load: Callable[[Mapping[str, Array]], Weight]
    spec: Spec | None
    bits: tuple[float, float]
    float_scales: bool = False


def _stored(param: Param, headers: CheckpointHeaders) -> _Stored | None:
    """The flattened tensor of a parameter; None if there is none. Raises CheckpointError for one that is not read."""
    fused, shape = param.role == "experts", param.shape
    name = hf_name(param)
    if fused:
        part = param.kind.split(".")[1]
        name = experts_prefix(param) + ("down_proj" if part == "down" else "gate_up_proj")
        rows = shape[1] * (1 if part == "down" else 2)
        name, shape = (name, (shape[0], shape[2], rows)) if param.is_matrix else (f"{name}_bias", (shape[0], rows))
    module, _, last = name.rpartition(".")
    prefix = f"{module}._{last}_"
    if not headers.has(f"{prefix}qdata"):
        return None
    kind, data = _metadata(name, headers)
    stored = _Stored(name, prefix, shape, kind, data, fused)
    if kind in _REFUSED:
        raise stored.refuse(f"({_REFUSED[kind]})")
    if kind not in _PLANS:
        raise CheckpointError(f"{name} is {kind[:40]!r} of torchao, which is not known here: {_ADVICE}")
    if headers.has(f"{prefix}act_pre_scale"):
        raise stored.refuse("with a scale of its activations (act_pre_scale, of AWQ or SmoothQuant)")
    return stored


def _metadata(name: str, headers: CheckpointHeaders) -> tuple[str, Mapping[str, Any]]:
    """The class of a tensor and its attributes. Raises CheckpointError if the file's metadata does not have them."""
    text = headers.metadata.get(name)
    entry = parse_json(text.encode("utf-8", "replace"), f"the metadata of {name}", _MAX_ITEMS) if text else None
    kind, data = (entry.get("_type"), entry.get("_data")) if isinstance(entry, dict) else (None, None)
    if not isinstance(kind, str) or not isinstance(data, dict):
        raise CheckpointError(
            f"{name} is stored in torchao's parts, but the file's metadata does not say which class it has; the file "
            "was saved again without its metadata: use the checkpoint's source"
        )
    return kind, data


def _plain_source(stored: _Stored, plan: _Plan, param: Param) -> Source:
    """A matrix in its own orientation, or a vector, which is decoded."""

    def load(get: GetTensor) -> Weight:
        weight = plan.load(_parts(get, stored, plan))
        return weight if param.is_matrix else Dense(codecs.dequantize(weight))

    spec, memory = (plan.spec, plan.bits[1]) if param.is_matrix else (None, 32)
    return _source(stored, plan, spec, load, memory)


def _experts_source(stored: _Stored, plan: _Plan, param: Param) -> Source:
    """Experts [E, N, K] from [E, K, 2N] or [E, K, N], and their biases, decoded expert by expert."""
    rows = fused_rows(param.kind.split(".")[1])

    def load(get: GetTensor, experts: range | None = None) -> Weight:
        chosen = range(param.shape[0]) if experts is None else experts
        weight = plan.load(_parts(get, stored, plan))
        out = np.empty((len(chosen), *param.shape[1:]), np.float32)
        for at, expert in enumerate(chosen):
            out[at] = codecs.dequantize(weight[expert]).T[rows]
        return Dense(out)

    return replace(_source(stored, plan, None, load, 32), load_experts=load)


def _source(stored: _Stored, plan: _Plan, spec: Spec | None, load: Callable[..., Weight], memory: float) -> Source:
    decoded = "torchao's numbers that have no codes here are decoded to float32 when loaded" if spec is None else ""
    return Source(
        FAMILY,
        spec,
        plan.expected,
        load,
        note="; ".join(filter(None, (decoded, stored.note))),
        memory_bits=memory,
        stored_bits=plan.bits[0],
        stored_name=f"torchao-{stored.kind.removesuffix('Tensor').lower()}",
        scale_dtype="F32" if spec is not None and plan.float_scales else None,
    )


def _parts(get: GetTensor, stored: _Stored, plan: _Plan) -> dict[str, Array]:
    """The parts of a tensor by their names."""
    return {e.name.removeprefix(stored.prefix): get(e.name) for e in plan.expected}


def _optional(stored: _Stored, headers: CheckpointHeaders) -> tuple[ExpectedTensor, ...]:
    """Scales of activations, which are accepted but not used."""
    names = (stored.prefix + part for part in _UNUSED_PARTS)
    return tuple(ExpectedTensor(name, (*FLOATS, "I8"), headers.shape(name)) for name in names if headers.has(name))


def _scale_shape(stored: _Stored, headers: CheckpointHeaders) -> tuple[int, ...]:
    """The shape of the scales, one for each block of equal blocks; that of a scale per row if it is not such."""
    shape, full = headers.shape(f"{stored.prefix}scale"), stored.shape
    if len(shape) == len(full) and all(n and not size % n for n, size in zip(shape, full, strict=True)):
        return shape
    return (*full[:-1], 1)


def _float8(stored: _Stored, headers: CheckpointHeaders) -> _Plan:
    """e4m3 times a scale per row, per matrix or per block."""
    if headers.dtype(f"{stored.prefix}qdata") == "F8_E5M2":
        raise stored.refuse("with float8_e5m2")
    shape = _scale_shape(stored, headers)
    expected = (stored.expected("qdata", ("F8_E4M3",), stored.shape), stored.expected("scale", FLOATS, shape))
    by_row = shape[-1] == 1 and shape[:-1] in (stored.shape[:-1], (1,) * (len(shape) - 1))

    def load(parts: Mapping[str, Array]) -> Weight:
        codes, scale = parts["qdata"], parts["scale"].astype(np.float32)
        if by_row and codes.ndim > 1:
            return Quantized(FP8_ROW, codes, outer=np.broadcast_to(scale, (*codes.shape[:-1], 1)))
        _check_finite(scale, stored)
        return Dense(codecs.E4M3.take(codes) * _expand(scale, codes.shape))

    coded = by_row and len(shape) > 1
    held = 8 + 32 / stored.shape[-1] if coded else 32
    return _Plan((*expected, *_optional(stored, headers)), load, FP8_ROW if coded else None, (8, held), coded)


def _int8(stored: _Stored, headers: CheckpointHeaders) -> _Plan:
    return _signed(stored, headers, 8)


def _intx(stored: _Stored, headers: CheckpointHeaders) -> _Plan:
    """Integers of 1 to 8 bits, each in a byte."""
    dtype = stored.data.get("target_dtype")
    name = dtype.get("_data") if isinstance(dtype, dict) else None
    if not isinstance(name, str) or name not in {f"int{bits}" for bits in range(1, 9)}:
        raise stored.refuse(f"of {name!r:.40}")
    return _signed(stored, headers, int(name.removeprefix("int")))


def _signed(stored: _Stored, headers: CheckpointHeaders, bits: int) -> _Plan:
    """(q - zero_point) * scale."""
    full, shape, name = stored.shape, _scale_shape(stored, headers), f"{stored.prefix}scale"
    expected = (
        stored.expected("qdata", ("I8",), full),
        stored.expected("scale", FLOATS, shape),
        *((stored.expected("zero_point", ("I8",), shape),) if headers.has(f"{stored.prefix}zero_point") else ()),
        *_optional(stored, headers),
    )
    by_row = shape[-1] == 1 and shape[:-1] in (full[:-1], (1,) * (len(shape) - 1))
    by_group = shape[:-1] == full[:-1]
    wide = 4 if headers.dtype(name) == "F32" else 2
    if len(full) == 1 or not (by_row or by_group):
        held = 0.0
    elif by_row:
        held = signed_ints.row_bits(full[-1], bits)
    else:
        held = signed_ints.grouped_bits(full[-1] // shape[-1], bits, wide)
    group = signed_ints.affine_group(full[-1] // (1 if by_row else shape[-1]))

    def load(parts: Mapping[str, Array]) -> Weight:
        q, scale = parts["qdata"], parts["scale"]
        zero = parts.get("zero_point", np.zeros(shape, np.int8))
        _check_finite(scale, stored)
        if held and by_row:
            rows = (*q.shape[:-1], 1)
            return signed_ints.from_rows(q, np.broadcast_to(zero, rows), np.broadcast_to(scale, rows), bits)
        if held:
            return signed_ints.from_groups(q, zero, scale, bits)
        zero, scale = (_expand(part.astype(np.float32), q.shape) for part in (zero, scale))
        return Dense((q.astype(np.float32) - zero) * scale)

    spec = AFFINE[signed_ints.code_bits(bits), group] if held else None
    return _Plan(expected, load, spec, (8, held or 32), held > 0 and not by_row)


def _int4(stored: _Stored, headers: CheckpointHeaders) -> _Plan:
    """Signed nibbles, scale * q + zero_point, as MSLK's int4 kernels have it. Scales are [..., K/g, N]."""
    *lead, rows, width = stored.shape
    if len(stored.shape) < 2:
        raise stored.refuse("of a vector")
    groups = (headers.shape(f"{stored.prefix}scale") or (0,))[len(lead) : len(lead) + 1] or (0,)
    count = groups[0] if groups[0] and not width % groups[0] else 1
    span = width // count
    group = signed_ints.affine_group(span)
    scales = (*lead, count, rows)
    expected = (
        stored.expected("qdata", ("I8", "U8"), (*lead, rows, width // 2)),
        stored.expected("scale", FLOATS, scales),
        stored.expected("zero_point", FLOATS, scales),
    )

    def load(parts: Mapping[str, Array]) -> Weight:
        codes = np.ascontiguousarray(parts["qdata"]).view(np.uint8) ^ np.uint8(0x88)  # q + 8
        scale, zero = (parts[name].astype(np.float32).swapaxes(-1, -2) for name in ("scale", "zero_point"))
        with np.errstate(over="ignore", invalid="ignore"):  # refused below, or by Checkpoint.read
            bias = zero - 8 * scale
        if not group:
            _check_finite(scale, stored)
            _check_finite(bias, stored)
            values = codecs.unpack(codes, 4).astype(np.float32).reshape(*scale.shape, span)
            return Dense((values * scale[..., None] + bias[..., None]).reshape(*lead, rows, width))
        scale, bias = (np.repeat(part, span // group, axis=-1) for part in (scale, bias))
        return Quantized(AFFINE[4, group], codes, scale, bias)

    spec = AFFINE[4, group] if group else None
    return _Plan(expected, load, spec, (4 + 32 / span, 4 + 64 / group if group else 32), group > 0)


def _mx(stored: _Stored, headers: CheckpointHeaders) -> _Plan:
    """MXFP8 or MXFP4."""
    element = stored.data.get("elem_dtype")
    name = element.get("_data") if isinstance(element, dict) else None
    spec = {"float8_e4m3fn": MXFP8, "float4_e2m1fn_x2": MXFP4}.get(name) if isinstance(name, str) else None
    if spec is None or stored.data.get("block_size") != spec.group:
        raise stored.refuse(f"of {name!r:.40} in blocks of {stored.data.get('block_size')!r:.20}")
    return _blocks(stored, headers, spec, ("F8_E4M3",) if spec == MXFP8 else ("U8",), ("F8_E8M0", "U8"))


def _nvfp4(stored: _Stored, headers: CheckpointHeaders) -> _Plan:
    """NVFP4, with or without a scale per matrix."""
    if stored.data.get("block_size") != NVFP4.group:
        raise stored.refuse(f"in blocks of {stored.data.get('block_size')!r:.20}")
    return _blocks(stored, headers, NVFP4, ("U8",), ("F8_E4M3",))


def _blocks(
    stored: _Stored, headers: CheckpointHeaders, spec: Spec, dtypes: tuple[str, ...], scale_dtypes: tuple[str, ...]
) -> _Plan:
    """Floats of 4 or 8 bits with a small scale per block."""
    *lead, rows, width = stored.shape
    if lead or len(stored.shape) < 2:
        raise stored.refuse("of experts or a vector")
    swizzled = stored.data.get("is_swizzled_scales") is True
    groups = width // spec.group
    shape = (32 * -(-rows // 128), 16 * -(-groups // 4)) if swizzled else (rows, groups)
    outer = f"{stored.prefix}per_tensor_scale"
    expected = (
        stored.expected("qdata", dtypes, (rows, width * spec.bits // 8)),
        stored.expected("scale", scale_dtypes, shape),
        *((stored.expected("per_tensor_scale", FLOATS, ()),) if headers.has(outer) else ()),
        *_optional(stored, headers),
    )

    def load(parts: Mapping[str, Array]) -> Weight:
        scale = unswizzle(parts["scale"], rows, groups) if swizzled else parts["scale"]
        return Quantized(spec, parts["qdata"], scale, outer=parts.get("per_tensor_scale"))

    bits = spec.bits + 8 / spec.group
    return _Plan(expected, load, spec, (bits, bits))


def unswizzle(scale: Array, rows: int, groups: int) -> Array:
    """[rows, groups] of scales in the order of cuBLAS, [32 * tiles down, 16 * tiles across].

    A tile of 128 rows and 4 groups is stored as 32 by 16: row r of it at r % 32, in the columns from 4 * (r // 32).
    Tiles follow each other row by row.
    """
    down, across = -(-rows // 128), -(-groups // 4)
    tiles = scale.reshape(down, across, 32, 4, 4).transpose(0, 3, 2, 1, 4)  # [down, r // 32, r % 32, across, 4]
    return np.ascontiguousarray(tiles.reshape(down * 128, across * 4)[:rows, :groups])


def _expand(part: Array, shape: tuple[int, ...]) -> Array:
    """A scale per block as one per value."""
    for axis, size in enumerate(shape):
        part = np.repeat(part, size // part.shape[axis], axis=axis)
    return part


def _check_finite(scale: Array, stored: _Stored) -> None:
    if not np.isfinite(scale.astype(np.float32)).all():
        raise CheckpointError(
            f"{stored.name} has a scale that is not a number; the checkpoint is damaged, download it again"
        )


_PLANS: Mapping[str, Callable[[_Stored, CheckpointHeaders], _Plan]] = {
    "Float8Tensor": _float8,
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4Tensor": _int4,
    "MXTensor": _mx,
    "NVFP4Tensor": _nvfp4,
}
FORMAT = TorchAo()
