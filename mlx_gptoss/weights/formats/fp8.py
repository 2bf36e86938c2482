"""`fp8-dynamic`: the output of llm-compressor, stored with compressed-tensors.

Each linear layer is its own module, output-major: `.weight` F8_E4M3 [N, K] and `.weight_scale` [N, 1], with
w = e4m3 * scale. Activations are quantized at run time by engines that do so; this program does not. The other schemes
of compressed-tensors for floats (fp8-block, mxfp8-quantized, nvfp4-pack-quantized, mxfp4-pack-quantized) and its
integers (compressed_ints.py) are read but not written.

Expert modules are called `mlp.experts.7.gate_proj` or, in older releases, `mlp.experts.experts.7.gate_proj`; or the
experts stay fused as in `bf16`. llm-compressor 0.12 and 0.13 split the interleaved rows of gate and up in halves: their
`gate_proj` is the first half of the rows, not the gate (fixed by llm-compressor's pull request 3100). Only the version
in config.json distinguishes the two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...errors import CheckpointError
from .. import codecs, quantization
from ..params import Param
from ..tensor import FP8_ROW, MXFP4, MXFP8, NVFP4, Array, Dense, Quantized, Spec, Weight
from .base import (
    FLOATS,
    CheckpointHeaders,
    Encoder,
    ExpectedTensor,
    Format,
    GetTensor,
    Recipe,
    Source,
    TensorSlice,
    Unit,
    matrix_recipe,
)
from .compressed_ints import integer_weights
from .hf_layout import HF_DENSE, dense_unit, hf_name
from .per_expert import (
    Modules,
    dense_experts_source,
    dense_experts_unit,
    half_split_modules,
    is_per_expert,
    modules_of,
    modules_source,
    quantization_config,
    same_float_dtype,
)

FAMILY = "fp8-dynamic"
_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?")
_HALF_SPLIT_SINCE, _HALF_SPLIT_BEFORE = (0, 17, 1), (0, 19, 0)  # compressed-tensors releases; llm-compressor pins them
_WRITTEN_VERSION = "0.19.0"
BLOCK = 128  # rows and columns of a block of FP8_BLOCK
_E8M0 = ("U8", "F8_E8M0")


class Fp8(Format):
    family = FAMILY
    writes = True
    recipes: Mapping[str, Recipe] = {
        "fp8-dynamic": matrix_recipe(HF_DENSE, None, attention=(FAMILY, FP8_ROW), experts=(FAMILY, FP8_ROW))
    }

    def find(self, param: Param, headers: CheckpointHeaders) -> Source | None:
        modules = _modules(param, headers)
        if modules is None:
            return None
        if not param.is_matrix:
            return dense_experts_source(modules, "bias", param, headers) if param.role == "experts" else None
        weight, packed = headers.dtype(f"{modules.first}.weight"), headers.dtype(f"{modules.first}.weight_packed")
        if weight == "F8_E4M3":
            return _fp8_source(modules, param, headers)
        if packed == "U8":
            return _fp4_source(modules, param, headers)
        integers = integer_weights(modules, param, headers)
        if integers is not None:
            return integers
        if packed is not None:
            raise CheckpointError(f"{modules.first}.weight_packed is {packed}; I32 and U8 are supported")
        return dense_experts_source(modules, "weight", param, headers) if param.role == "experts" else None

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        def unit(param: Param) -> Unit:
            dtype = dtypes.get(param.name, "BF16")
            if param.is_matrix and self.recipes[target][param.role][1]:
                return _fp8_unit(param, dtype)
            if param.role == "experts":
                return dense_experts_unit(param, dtype)
            return dense_unit(param, dtypes, hf_name(param))

        return [unit(param) for param in params]

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        """`quantization_config` as compressed-tensors 0.19 writes it for the FP8_DYNAMIC scheme."""
        ignored = [hf_name(param).rpartition(".")[0] for param in params if param.kind == "router.weight"]
        scheme: dict[str, Any] = {
            "format": "float-quantized",
            "input_activations": _quantization_args(dynamic=True, strategy="token"),
            "output_activations": None,
            "targets": ["Linear"],
            "weights": _quantization_args(dynamic=False, strategy="channel", observer="memoryless_minmax"),
        }
        block: dict[str, Any] = {
            "config_groups": {"group_0": scheme},
            "format": "float-quantized",
            "global_compression_ratio": None,
            "ignore": [*ignored, "lm_head"],
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": _WRITTEN_VERSION,
        }
        return {"quantization_config": block}


def _quantization_args(*, dynamic: bool, strategy: str, observer: str | None = None) -> dict[str, Any]:
    """compressed-tensors' QuantizationArgs for FP8."""
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
        "group_size": None,
        "num_bits": 8,
        "observer": observer,
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": strategy,
        "symmetric": True,
        "type": "float",
        "zp_dtype": None,
    }


def _modules(param: Param, headers: CheckpointHeaders) -> Modules | None:
    """The modules that hold a parameter's rows, under any of the names used for experts; None for fused experts."""
    if param.role != "experts":
        return modules_of(param)
    if is_per_expert(param, headers, "experts."):
        return modules_of(param, "experts.")
    if not is_per_expert(param, headers):
        return None
    modules = modules_of(param)
    part = param.kind.split(".")[1]
    if part == "down" or not _is_half_split(modules.first, headers):
        return modules
    return half_split_modules(param)


def _is_half_split(module: str, headers: CheckpointHeaders) -> bool:
    """Whether `gate_proj` and `up_proj` are the two halves of the interleaved rows."""
    block = quantization_config(headers)
    if block.get("quant_method") != "compressed-tensors" and headers.dtype(f"{module}.weight") in (None, *FLOATS):
        return False
    text = block.get("version")
    match = _VERSION.match(text) if isinstance(text, str) else None
    if match is None:
        raise CheckpointError(
            f"config.json's quantization_config has the version {text!r}. Only compressed-tensors' version tells "
            f"whether {module} is the gate or half of gate and up; take config.json from the checkpoint's source"
        )
    version = tuple(int(part or 0) for part in match.groups())
    return _HALF_SPLIT_SINCE <= version < _HALF_SPLIT_BEFORE


def _fp8_source(modules: Modules, param: Param, headers: CheckpointHeaders) -> Source:
    """`.weight` F8_E4M3 [N, K] with `.weight_scale` [N, 1], or one scale [] or [1] that applies to every row."""
    rows, width = param.shape[-2:]
    scales = f"{modules.first}.weight_scale"
    if headers.dtype(scales) in _E8M0:
        return _mxfp8_source(modules, param, headers)
    shape = headers.shape(scales)
    if len(shape) == 2 and shape != (rows, 1):
        return _block_source(modules, param, headers)
    expected = modules.expected("weight", ("F8_E4M3",), (rows, width))
    scale_shape = shape if shape in ((), (1,)) else (rows, 1)
    expected += modules.expected("weight_scale", same_float_dtype(headers, scales), scale_shape)
    expected += _activation_scales(modules, headers)

    def load(get: GetTensor, modules: Modules) -> Weight:
        outer = modules.read(get, "weight_scale", lambda scale: _per_row(scale, rows))
        return Quantized(FP8_ROW, modules.read(get, "weight"), outer=outer)

    return modules_source(modules, FAMILY, FP8_ROW, expected, load, headers.dtype(scales))


def _block_source(modules: Modules, param: Param, headers: CheckpointHeaders) -> Source:
    """FP8_BLOCK: `.weight_scale` [ceil(N / 128), ceil(K / 128)], a scale for each square block of a module.

    No kernel reads such scales, as blocks do not divide rows of 2880: the values are decoded to float32.
    """
    rows, width = param.shape[-2:]
    scales = f"{modules.first}.weight_scale"
    expected = modules.expected("weight", ("F8_E4M3",), (rows, width))
    expected += modules.expected(
        "weight_scale", same_float_dtype(headers, scales), (-(-rows // BLOCK), -(-width // BLOCK))
    )
    expected += _activation_scales(modules, headers)

    def load(get: GetTensor, modules: Modules) -> Weight:
        scale = modules.read(get, "weight_scale", lambda each: np.repeat(each, BLOCK, axis=0)[:rows]).astype(np.float32)
        if not np.isfinite(scale).all():
            raise CheckpointError(
                f"{scales} or a sibling is not a number; the checkpoint is damaged, download it again"
            )
        values = codecs.E4M3.take(modules.read(get, "weight").view(np.uint8))
        for start in range(0, width, BLOCK):
            values[..., start : start + BLOCK] *= scale[..., start // BLOCK, None]
        return Dense(values)

    source = modules_source(modules, "fp8-block", None, expected, load)
    note = "FP8 with a scale per block is decoded to float32 when loaded"
    return replace(source, note=note, memory_bits=32, stored_bits=8 + 16 / BLOCK**2, stored_name="fp8-block")


def _mxfp8_source(modules: Modules, param: Param, headers: CheckpointHeaders) -> Source:
    """`.weight` F8_E4M3 [N, K] with `.weight_scale` U8 [N, K/32], e8m0."""
    rows, width = param.shape[-2:]
    expected = modules.expected("weight", ("F8_E4M3",), (rows, width))
    expected += modules.expected("weight_scale", _E8M0, (rows, width // MXFP8.group))
    expected += _activation_scales(modules, headers)

    def load(get: GetTensor, modules: Modules) -> Weight:
        return Quantized(MXFP8, modules.read(get, "weight"), modules.read(get, "weight_scale"))

    return modules_source(modules, "mxfp8-quantized", MXFP8, expected, load)


def _fp4_source(modules: Modules, param: Param, headers: CheckpointHeaders) -> Source:
    """`.weight_packed` U8 [N, K/2], low nibble first, with `.weight_scale`.

    NVFP4: scales are e4m3, one per 16 values, divided by `.weight_global_scale`. MXFP4: e8m0, one per 32 values.
    """
    data_type = quantization_config(headers).get("data_type")
    if isinstance(data_type, str) and data_type.startswith("mx_int"):  # AutoRound's MXINT4, with MXFP4's shapes
        raise CheckpointError(
            f"{modules.first}.weight_packed holds integers with power-of-two scales ({data_type[:20]}), which are not "
            "supported; use a checkpoint in MXFP4 or int4, or the original one"
        )
    rows, width = param.shape[-2:]
    if headers.shape(f"{modules.first}.weight_packed") == (rows, width * 3 // 4):
        raise CheckpointError(
            f"{modules.first}.weight_packed holds 6-bit floats (compressed-tensors' MXFP6, mxfp6-pack-quantized), "
            "which are not supported; use a checkpoint in MXFP4 or MXFP8, or the original one"
        )
    with_global = headers.dtype(f"{modules.first}.weight_scale") == "F8_E4M3"
    spec: Spec = NVFP4 if with_global else MXFP4
    dtypes = ("F8_E4M3",) if with_global else _E8M0
    expected = modules.expected("weight_packed", ("U8",), (rows, width // 2))
    expected += modules.expected("weight_scale", dtypes, (rows, width // spec.group))
    if with_global:
        expected += modules.expected("weight_global_scale", ("F32",), (1,))
    expected += _activation_scales(modules, headers)

    def load(get: GetTensor, modules: Modules) -> Weight:
        codes, scale = modules.read(get, "weight_packed"), modules.read(get, "weight_scale")
        outer = None
        if with_global:
            outer = modules.read(get, "weight_global_scale", lambda scale: _per_row(_reciprocal(scale), rows))
        return Quantized(spec, codes, scale, outer=outer)

    family = "nvfp4-pack-quantized" if with_global else "mxfp4-pack-quantized"
    return modules_source(modules, family, spec, expected, load)


def _activation_scales(modules: Modules, headers: CheckpointHeaders) -> list[ExpectedTensor]:
    """Static activation scales. They are accepted but not used, because activations stay unquantized."""
    expected = []
    for part in ("input_scale", "input_global_scale"):
        name = f"{modules.first}.{part}"
        if headers.has(name):
            expected += modules.expected(part, FLOATS, headers.shape(name))
    return expected


def _per_row(scale: Array, rows: int) -> Array:
    """[N, 1] of scales [N, 1], [1] or []."""
    return np.broadcast_to(scale.reshape(-1, 1), (rows, 1))


def _reciprocal(scale: Array) -> Array:
    """1 / scale. Zero becomes infinity, which Checkpoint.read then refuses like every scale that is not finite."""
    with np.errstate(divide="ignore"):
        reciprocal: Array = np.float32(1) / scale
    return reciprocal


def _fp8_unit(param: Param, dtype: str) -> Unit:
    """`.weight` and `.weight_scale` of each module; `dtype` is the dtype of the scales."""
    rows, width = param.shape[-2:]
    modules = modules_of(param)
    tensors = modules.tensor_infos("weight", "F8_E4M3", (rows, width))
    tensors += modules.tensor_infos("weight_scale", dtype, (rows, 1))

    def encode(weights: Sequence[Weight]) -> Encoder:
        def encode_rows(start: int, stop: int) -> list[TensorSlice]:
            part = _as_fp8_rows(weights[0][start:stop])
            return [
                *modules.slices("weight", start, part.codes),
                *modules.slices("weight_scale", start, np.asarray(part.outer)),
            ]

        return encode_rows

    return Unit((param,), tuple(tensors), encode)


def _as_fp8_rows(weight: Weight) -> Quantized:
    """The weight itself if it is stored as FP8 with a scale per row; otherwise quantized to that."""
    if isinstance(weight, Quantized) and weight.spec == FP8_ROW:
        return weight
    return quantization.quantize_fp8_rows(weight)


FORMAT = Fp8()
