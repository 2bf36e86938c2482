"""`fp8-dynamic`: what llm-compressor writes with compressed-tensors. Each linear layer is a module of its own,
output-major: `.weight` F8_E4M3 [N, K], `.weight_scale` [N, 1]; w = e4m3 * scale. Activations are quantized by whoever
runs it; here they are not. The same tool's FP4 schemes are read, not written.

The experts' modules are `mlp.experts.7.gate_proj` or, from older releases, `mlp.experts.experts.7.gate_proj`; or they
stay fused as in `bf16`. llm-compressor 0.12 and 0.13 cut the interleaved rows of gate and up in halves: their
`gate_proj` is the first half of the rows, not the gate (its pull request 3100 mended it). Only the version tells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import CheckpointError
from .. import codecs, quantization
from ..params import Param
from ..tensor import FP8_ROW, MXFP4, NVFP4, Array, Quantized, Spec, Weight
from .base import (
    FLOATS,
    HF_DENSE,
    CheckpointHeaders,
    Encoder,
    Format,
    GetTensor,
    Recipe,
    Source,
    TensorSlice,
    Unit,
    dense_unit,
    fused_rows,
    hf_name,
    matrix_recipe,
)
from .per_expert import (
    Modules,
    dense_experts_source,
    dense_experts_unit,
    is_per_expert,
    modules_of,
    modules_source,
    quantization_config,
    same_float_dtype,
)

FAMILY = "fp8-dynamic"
_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?")
_HALF_SPLIT_SINCE, _HALF_SPLIT_BEFORE = (0, 17, 1), (0, 19, 0)  # of compressed-tensors, which llm-compressor pins
_WRITTEN_VERSION = "0.19.0"


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
        if packed is not None or weight == "I8":
            scheme = "pack-quantized" if packed else "int-quantized"
            raise CheckpointError(
                f"{modules.first} is {scheme} (integers of compressed-tensors), which cannot be read; float-quantized "
                "(FP8), nvfp4-pack-quantized and mxfp4-pack-quantized can; take one of those or the original checkpoint"
            )
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
        """As compressed-tensors 0.19 writes it for the FP8_DYNAMIC scheme."""
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
    """The modules that the rows of a parameter are in, for the experts under whichever of their names."""
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
    first, second = (modules_of(_sibling(param, part, other)) for other in ("gate", "up"))
    both = zip(first.names, second.names, strict=True)
    return Modules(tuple((*gate, *up) for gate, up in both), fused_rows(part))


def _sibling(param: Param, part: str, other: str) -> Param:
    return Param(param.name.replace(f".{part}.", f".{other}."), param.layer, param.role, param.shape)


def _is_half_split(module: str, headers: CheckpointHeaders) -> bool:
    """Whether `gate_proj` and `up_proj` are halves of the interleaved rows."""
    block = quantization_config(headers)
    if block.get("quant_method") != "compressed-tensors" and headers.dtype(f"{module}.weight") in (None, *FLOATS):
        return False
    version = block.get("version")
    match = _VERSION.match(version) if isinstance(version, str) else None
    if match is None:
        raise CheckpointError(
            f"config.json's quantization_config has the version {version!r}, but only compressed-tensors' version "
            f"tells whether {module} is the gate or half of gate and up; take config.json from the checkpoint's source"
        )
    found = tuple(int(part or 0) for part in match.groups())
    return _HALF_SPLIT_SINCE <= found < _HALF_SPLIT_BEFORE


def _fp8_source(modules: Modules, param: Param, headers: CheckpointHeaders) -> Source:
    """One scale a row, or one for all, which then serves every row."""
    rows, width = param.shape[-2:]
    scales = f"{modules.first}.weight_scale"
    shape = headers.shape(scales)
    if len(shape) == 2 and shape[1] > 1:
        raise CheckpointError(
            f"{scales} has the shape {list(shape)}: FP8 with a scale for each block cannot be read, only with one for "
            "each row (FP8_DYNAMIC); quantize the model with that scheme, or convert the original checkpoint"
        )
    expected = modules.expected("weight", ("F8_E4M3",), (rows, width))
    expected += modules.expected(
        "weight_scale", same_float_dtype(headers, scales), shape if shape in ((), (1,)) else (rows, 1)
    )
    expected += _activation_scales(modules, headers)

    def load(get: GetTensor, modules: Modules) -> Weight:
        outer = modules.read(get, "weight_scale", lambda scale: _per_row(scale, rows))
        return Quantized(FP8_ROW, modules.read(get, "weight"), outer=outer)

    return modules_source(modules, FAMILY, FP8_ROW, expected, load, scales)


def _fp4_source(modules: Modules, param: Param, headers: CheckpointHeaders) -> Source:
    """`.weight_packed` U8 [N, K/2], low nibble first; `.weight_scale`: e4m3 a group of 16 (NVFP4) with
    `.weight_global_scale`, which divides, or e8m0 a group of 32 (MXFP4)."""
    rows, width = param.shape[-2:]
    with_global = headers.dtype(f"{modules.first}.weight_scale") == "F8_E4M3"
    spec: Spec = NVFP4 if with_global else MXFP4
    dtypes = ("F8_E4M3",) if with_global else ("U8", "F8_E8M0")
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


def _activation_scales(modules: Modules, headers: CheckpointHeaders) -> list[Any]:
    """Scales of activations, which are not quantized here."""
    names = (part for part in ("input_scale", "input_global_scale") if headers.has(f"{modules.first}.{part}"))
    return [
        tensor for part in names for tensor in modules.expected(part, FLOATS, headers.shape(f"{modules.first}.{part}"))
    ]


def _per_row(scale: Array, rows: int) -> Array:
    return np.broadcast_to(scale.reshape(-1, 1), (rows, 1))


def _reciprocal(scale: Array) -> Array:
    """A global scale of zero becomes infinity, which is then refused as every scale is that is no number."""
    with np.errstate(divide="ignore"):
        found: Array = np.float32(1) / scale
    return found


def _as_fp8_rows(weight: Weight) -> Quantized:
    """The weight as it is stored if it is FP8 already, else quantized anew."""
    if isinstance(weight, Quantized) and weight.spec == FP8_ROW:
        return weight
    return quantization.quantize_fp8_rows(weight)


def _fp8_unit(param: Param, dtype: str) -> Unit:
    """`dtype` is that of the scales."""
    rows, width = param.shape[-2:]
    modules = modules_of(param)
    tensors = modules.tensor_infos("weight", "F8_E4M3", (rows, width)) + modules.tensor_infos(
        "weight_scale", dtype, (rows, 1)
    )

    def encode(weights: Sequence[Weight]) -> Encoder:
        def pieces(start: int, stop: int) -> list[TensorSlice]:
            part = _as_fp8_rows(codecs.rows(weights[0], start, stop))
            return [
                *modules.slices("weight", start, part.codes),
                *modules.slices("weight_scale", start, np.asarray(part.outer)),
            ]

        return pieces

    return Unit((param,), tuple(tensors), encode)


FORMAT = Fp8()
