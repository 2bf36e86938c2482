"""`quark`: AMD Quark's safetensors export (`quant_method: quark`), with a module per linear layer. Read only.

Experts are `mlp.experts.7.gate_up_proj`, whose rows interleave gate and up, and `mlp.experts.7.down_proj`; attention
has Hugging Face's names. All matrices are output-major, with `.weight` and `.weight_scale`:

| scheme | `.weight` | `.weight_scale` | in memory |
|---|---|---|---|
| mxfp4, mxfp4_fp8, mxfp4_weight_only | U8 [N, K/2], low nibble first | U8 [N, K/32], e8m0 | MXFP4 |
| fp8 | F8_E4M3 [N, K] | [], per tensor | FP8 |
| ptpc_fp8 | F8_E4M3 [N, K] | [N], per row | FP8 |
| nvfp4 | U8 [N, K/2] | F8_E4M3 [N, K/16], with `.weight_scale_2` F32 [] | NVFP4 |
| int8 | I8 [N, K], with `.weight_zero_point` I8 | [] or [N] | 8-bit codes, exact |

Static scales of activations (`.input_scale`) and of an FP8 cache (`k_proj.output_scale`) are not used: activations and
cache stay unquantized here.

Sources: the names of amd/gpt-oss-20b-MoE-Quant-W-MXFP4-A-FP8-KV-FP8 and amd/gpt-oss-20b-WFP8-AFP8-KVFP8 as vLLM's
gpt_oss loader maps them; everything in the table was written by Quark 0.13. No published file was at hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...errors import CheckpointError
from ..params import Param
from ..tensor import AFFINE, FP8_ROW, MXFP4, NVFP4, Array, Quantized, Spec, Weight
from . import signed_ints
from .base import FLOATS, CheckpointHeaders, ExpectedTensor, Format, GetTensor, Recipe, Source, Unit
from .hf_layout import experts_prefix, fused_rows, hf_name
from .per_expert import Modules, dense_experts_source, modules_source, quantization_config, same_float_dtype

FAMILY = "quark"
_READ_ONLY = "Quark's formats are read but not written; convert to mxfp4, fp8-dynamic or nvfp4"
_UNUSED_PARTS = ("input_scale", "input_scale_2", "input_zero_point", "output_scale")  # of activations and the cache
_ADVICE = "export with the scheme mxfp4, mxfp4_fp8, fp8, ptpc_fp8, nvfp4 or int8, or use the original checkpoint"
_REFUSED_PARTS = {
    "input_rotation": "rotates activations at run time",
    "input_prescale": "scales activations at run time",
}


class Quark(Format):
    family = FAMILY
    writes = False
    recipes: Mapping[str, Recipe] = {}

    def find(self, param: Param, headers: CheckpointHeaders) -> Source | None:
        if not _is_quark(headers):
            return None
        modules = _modules(param, headers)
        if modules is None:
            return None
        if not param.is_matrix:
            return dense_experts_source(modules, "bias", param, headers) if param.role == "experts" else None
        dtype = headers.dtype(f"{modules.first}.weight")
        if dtype is None:
            return None
        if dtype in FLOATS:
            return dense_experts_source(modules, "weight", param, headers) if param.role == "experts" else None
        return replace(_matrix_source(modules, dtype, param, headers), note=_activations_note(headers))

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        raise CheckpointError(_READ_ONLY)

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        raise CheckpointError(_READ_ONLY)


def _is_quark(headers: CheckpointHeaders) -> bool:
    """Whether config.json says so, or the experts have Quark's names."""
    return quantization_config(headers).get("quant_method") == "quark" or headers.has(
        *(f"model.layers.0.mlp.experts.0.gate_up_proj.{part}" for part in ("weight_scale", "weight"))
    )


def _modules(param: Param, headers: CheckpointHeaders) -> Modules | None:
    """The modules of a parameter; None for experts that have none of their own."""
    if param.role != "experts":
        return Modules(((hf_name(param).rpartition(".")[0],),), stacked=False)
    part = param.kind.split(".")[1]
    prefix, name = experts_prefix(param), "down_proj" if part == "down" else "gate_up_proj"
    if not headers.has(f"{prefix}0.{name}.weight", f"{prefix}0.{name}.bias"):
        return None
    if param.shape[0] > len(headers.tensors):
        raise CheckpointError(
            f"config.json says {param.shape[0]} experts but there are only {len(headers.tensors)} tensors; "
            "a shard is missing or config.json belongs to another checkpoint"
        )
    names = tuple((f"{prefix}{expert}.{name}",) for expert in range(param.shape[0]))
    return Modules(names, fused_rows(part))


def _matrix_source(modules: Modules, dtype: str, param: Param, headers: CheckpointHeaders) -> Source:
    """A quantized matrix. Raises CheckpointError, with the reason, for a scheme that is not read."""
    for part, why in _REFUSED_PARTS.items():
        if headers.has(f"{modules.first}.{part}"):
            raise CheckpointError(f"{modules.first} {why} (Quark's {part}), which is not supported: {_ADVICE}")
    scale = headers.dtype(f"{modules.first}.weight_scale")
    if dtype == "F8_E4M3":
        return _fp8_source(modules, param, headers)
    if dtype == "U8" and scale in ("U8", "F8_E8M0", "F8_E4M3"):
        return _fp4_source(modules, param, headers)
    if dtype == "I8":
        return _int8_source(modules, param, headers)
    problem = f"Quark's packed integers ({dtype})" if dtype == "I32" else f"weights of {dtype} with scales of {scale}"
    raise CheckpointError(f"{modules.first} has {problem}, which are not supported: {_ADVICE}")


def _fp8_source(modules: Modules, param: Param, headers: CheckpointHeaders) -> Source:
    """e4m3 with a scale per row or per matrix."""
    expected = _expected(modules, headers, ("F8_E4M3",), (modules.stored_rows(param), param.shape[-1]))
    expected += _expected_scale(modules, param, headers)

    def load(get: GetTensor, modules: Modules) -> Weight:
        codes = modules.read(get, "weight")
        return Quantized(FP8_ROW, codes, outer=_row_scales(modules, get, param))

    return modules_source(modules, FAMILY, FP8_ROW, expected, load, headers.dtype(f"{modules.first}.weight_scale"))


def _fp4_source(modules: Modules, param: Param, headers: CheckpointHeaders) -> Source:
    """MXFP4, or NVFP4 with a second scale per matrix."""
    rows, width, first = modules.stored_rows(param), param.shape[-1], modules.first
    two_scales = headers.dtype(f"{first}.weight_scale") == "F8_E4M3"
    spec: Spec = NVFP4 if two_scales else MXFP4
    stored, groups = headers.shape(f"{first}.weight"), headers.shape(f"{first}.weight_scale")
    if stored == (rows, width * 3 // 4):
        raise CheckpointError(f"{first} has 6 bits per weight (Quark's mxfp6), which is not supported: {_ADVICE}")
    if not two_scales and groups[:1] == (rows,) and groups[1:] == (width // 16,):
        raise CheckpointError(f"{first} has a scale per 16 values (Quark's amdfp4), which is not supported: {_ADVICE}")
    expected = _expected(modules, headers, ("U8",), (rows, width // 2))
    scale_dtypes = ("F8_E4M3",) if two_scales else ("U8", "F8_E8M0")
    expected += modules.expected("weight_scale", scale_dtypes, (rows, width // spec.group))
    if two_scales:
        expected += modules.expected("weight_scale_2", FLOATS, ())

    def load(get: GetTensor, modules: Modules) -> Weight:
        codes, scale = modules.read(get, "weight"), modules.read(get, "weight_scale")
        return Quantized(
            spec, codes, scale, outer=_row_scales(modules, get, param, "weight_scale_2") if two_scales else None
        )

    return modules_source(modules, FAMILY, spec, expected, load)


def _int8_source(modules: Modules, param: Param, headers: CheckpointHeaders) -> Source:
    """int8 with a zero point and a scale per row or per matrix."""
    width = param.shape[-1]
    expected = _expected(modules, headers, ("I8",), (modules.stored_rows(param), width))
    scales = _expected_scale(modules, param, headers)
    expected += [*scales, *modules.expected("weight_zero_point", ("I8",), scales[0].shape)]

    def load(get: GetTensor, modules: Modules) -> Weight:
        codes = modules.read(get, "weight")
        zero = _row_scales(modules, get, param, "weight_zero_point")
        return signed_ints.from_rows(codes, zero, _row_scales(modules, get, param), 8)

    bits = signed_ints.row_bits(width, 8)
    spec = AFFINE[8, signed_ints.affine_group(width)] if bits else None
    source = modules_source(modules, FAMILY, spec, expected, load)
    return replace(source, memory_bits=bits or 32, stored_bits=8, stored_name="int8")


def _expected(
    modules: Modules, headers: CheckpointHeaders, dtypes: tuple[str, ...], shape: tuple[int, ...]
) -> list[ExpectedTensor]:
    """The codes, and the scales that are accepted but not used."""
    expected = modules.expected("weight", dtypes, shape)
    for part in _UNUSED_PARTS:
        name = f"{modules.first}.{part}"
        if headers.has(name):
            expected += modules.expected(part, (*FLOATS, "I8"), headers.shape(name))
    return expected


def _expected_scale(modules: Modules, param: Param, headers: CheckpointHeaders) -> list[ExpectedTensor]:
    """`.weight_scale` [] or [1] of the matrix, or [N] or [N, 1] of its rows."""
    name, rows = f"{modules.first}.weight_scale", modules.stored_rows(param)
    shape = headers.shape(name)
    found = shape if shape in ((), (1,), (rows, 1)) and headers.has(name) else (rows,)
    return modules.expected("weight_scale", same_float_dtype(headers, name), found)


def _row_scales(modules: Modules, get: GetTensor, param: Param, part: str = "weight_scale") -> Array:
    """[..., N, 1] of a scale per row or per matrix."""
    rows = modules.stored_rows(param)
    return modules.read(get, part, lambda s: np.broadcast_to(s.reshape(-1, 1), (rows, 1)))


def _activations_note(headers: CheckpointHeaders) -> str:
    """What config.json says about quantized activations, which this program does not compute with; "" if nothing."""
    schemes = sorted({_scheme(each) for each in _input_configs(quantization_config(headers))} - {""})
    if not schemes:
        return ""
    return f"Quark's activation scheme ({', '.join(schemes[:4])}) is not applied: activations stay unquantized"


def _input_configs(block: Mapping[str, object]) -> Iterator[object]:
    """Every `input_tensors` of a quantization_config: the global one, and those of single layers."""
    layers = block.get("layer_quant_config")
    for layer in (block.get("global_quant_config"), *(layers.values() if isinstance(layers, Mapping) else ())):
        inputs = layer.get("input_tensors") if isinstance(layer, Mapping) else None
        yield from inputs if isinstance(inputs, list) else (inputs,)


def _scheme(config: object) -> str:
    """`fp8_e4m3 static` of one config of a tensor; "" where it has no plausible dtype."""
    dtype = config.get("dtype") if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(dtype, str) or not re.fullmatch(r"[a-z0-9_]{1,20}", dtype):
        return ""
    return f"{dtype} {'dynamic' if config.get('is_dynamic') is True else 'static'}"


FORMAT = Quark()
