"""`int4-autoround`: symmetric 4-bit integers in groups of 64, packed like GPTQ.

Each linear layer of the experts is its own module, INPUT-major: `.qweight` I32 [K/8, N] (eight codes along K, lowest
bits first), `.scales` F16 [K/64, N], `.qzeros` I32 [K/64, N/8] and `.bias`. w = scale * (code - 8), and scales are
signed. All other weights are dense.

The zero point is 8. GPTQ's version 1 (`auto_round:auto_gptq`, `auto_gptq`) stores it as 7, version 2
(`auto_round:gptqmodel`) as 8. GPTQ's `g_idx` is accepted if it describes the default order: row k in group k // 64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import CheckpointError
from .. import codecs, quantization
from ..params import Param
from ..tensor import AFFINE4, Array, Quantized, Weight
from .base import CheckpointHeaders, Encoder, Format, GetTensor, Recipe, Source, TensorSlice, Unit, matrix_recipe
from .hf_layout import HF_DENSE, dense_unit, experts_prefix, hf_name
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

FAMILY = "int4-autoround"
_GROUP = AFFINE4.group
_CODES_PER_WORD = 8
_REPEAT_NIBBLE = 0x11111111  # multiplied by a nibble: a word with that nibble eight times
_STORED_ZERO = 7  # as this module writes the zero point
_OLD_NAMES = ("gate_up_projs", "down_projs")
_ADVICE = "quantize the model symmetrically with 4 bits, groups of 64 and no reordering, or use the original checkpoint"


class AutoRound(Format):
    family = FAMILY
    writes = True
    recipes: Mapping[str, Recipe] = {
        "int4-autoround": matrix_recipe(HF_DENSE, None, experts=(FAMILY, AFFINE4)),
    }

    def find(self, param: Param, headers: CheckpointHeaders) -> Source | None:
        if param.role == "experts":
            _refuse_old_names(param, headers)
            if not is_per_expert(param, headers):
                return None
        modules = modules_of(param)
        if not headers.has(f"{modules.first}.qweight"):
            return None
        if param.is_matrix:
            return _int4_source(modules, param, headers)
        return dense_experts_source(modules, "bias", param, headers) if param.role == "experts" else None

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        def unit(param: Param) -> Unit:
            if param.role != "experts":
                return dense_unit(param, dtypes, hf_name(param))
            return _int4_unit(param) if param.is_matrix else dense_experts_unit(param, "F16")

        return [unit(param) for param in params]

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        return {"quantization_config": _quantization_config(params)}

    def extra_files(self, target: str, params: Sequence[Param]) -> Mapping[str, Any]:
        return {"quantization_config.json": _quantization_config(params)}


def _quantization_config(params: Sequence[Param]) -> dict[str, Any]:
    """`quantization_config` as AutoRound 0.16 writes it."""
    attention = (param for param in params if param.role == "attention" and param.is_matrix)
    return {
        "autoround_version": "0.16.1",
        "bits": 4,
        "block_name_to_quantize": "model.layers",
        "data_type": "int",
        "enable_quanted_input": False,
        "extra_config": {hf_name(param).removesuffix(".weight"): {"bits": 16} for param in attention},
        "group_size": _GROUP,
        "packing_format": "auto_round:auto_gptq",
        "quant_method": "auto-round",
        "sym": True,
    }


def _refuse_old_names(param: Param, headers: CheckpointHeaders) -> None:
    """Raise CheckpointError for expert names of older uploads, whose order of gate and up rows is not documented."""
    prefix = experts_prefix(param)
    if headers.has(*(f"{prefix}{old}.0.{part}" for old in _OLD_NAMES for part in ("qweight", "weight", "bias"))):
        names = [name for name in headers.tensors if any(f".{old}." in name for old in _OLD_NAMES)]
        raise CheckpointError(
            f"{len(names)} tensors have names like {', '.join(names[:4])}. How these order gate and up is unknown, so "
            "they are not supported; use a checkpoint with mlp.experts.0.gate_proj, or the original one"
        )


def _int4_source(modules: Modules, param: Param, headers: CheckpointHeaders) -> Source:
    """The packed integers of a matrix as AFFINE4 with bias = -8 * scale, in the scales' own dtype."""
    rows, width = param.shape[-2:]
    _check_layout(modules.first, rows, width, headers)
    scales, groups = f"{modules.first}.scales", width // _GROUP
    expected = modules.expected("qweight", ("I32",), (width // _CODES_PER_WORD, rows))
    expected += modules.expected("scales", same_float_dtype(headers, scales), (groups, rows))
    expected += modules.expected("qzeros", ("I32",), (groups, rows // _CODES_PER_WORD))
    has_g_idx = headers.has(f"{modules.first}.g_idx")
    if has_g_idx:
        expected += modules.expected("g_idx", ("I32",), (width,))
    zeros = _allowed_zeros(headers)

    def load(get: GetTensor, modules: Modules) -> Weight:
        for name in (name for names in modules.names for name in names):
            _check_zeros(f"{name}.qzeros", get(f"{name}.qzeros"), zeros)
            if has_g_idx and not np.array_equal(get(f"{name}.g_idx"), np.arange(width) // _GROUP):
                raise CheckpointError(f"{name}.g_idx reorders groups (act-order), which is not supported: {_ADVICE}")
        codes = modules.read(get, "qweight", lambda words: codecs.contiguous_rows(words.T).view(np.uint8))
        scale = modules.read(get, "scales", lambda stored: codecs.contiguous_rows(stored.T))
        return Quantized(AFFINE4, codes, scale, quantization.symmetric_bias(scale))

    return modules_source(modules, FAMILY, AFFINE4, expected, load, scales)


def _check_layout(module: str, rows: int, width: int, headers: CheckpointHeaders) -> None:
    """Raise CheckpointError, with the reason, if the shapes or config.json show a different packing.

    Shapes that match no known packing pass; the general check of shapes reports them.
    """
    block, words = quantization_config(headers), headers.shape(f"{module}.qweight")
    groups = headers.shape(f"{module}.scales")[:1]
    problem = None
    packing = f"{block.get('quant_method')} {block.get('packing_format')}"
    if "awq" in packing or words == (width, rows // _CODES_PER_WORD):
        problem = "uses AWQ packing"
    elif block.get("sym") is False:
        problem = "is quantized asymmetrically"
    elif words[1:] == (rows,) and words[0] * 32 % width == 0 and words[0] * 32 // width != AFFINE4.bits:
        problem = f"has {words[0] * 32 // width} bits per weight"
    elif groups and groups[0] and groups[0] != width // _GROUP:
        problem = f"has groups of {-(-width // groups[0])}"
    if problem:
        raise CheckpointError(f"{module} {problem}, which is not supported: {_ADVICE}")


def _allowed_zeros(headers: CheckpointHeaders) -> tuple[int, ...]:
    """The stored values that mean the zero point 8, by config.json's packing; 7 or 8 if config.json does not say."""
    block = quantization_config(headers)
    packing = str(block.get("packing_format") or block.get("checkpoint_format") or block.get("quant_method"))
    version_1 = packing in ("auto_round:auto_gptq", "auto_gptq", "gptq")
    version_2 = packing in ("auto_round:gptqmodel", "auto_round", "gptq_v2")
    return (7,) if version_1 else (8,) if version_2 else (7, 8)


def _check_zeros(name: str, words: Array, zeros: tuple[int, ...]) -> None:
    """Raise CheckpointError unless one of `zeros` fills every nibble of `qzeros`, I32 [K/64, N/8]."""
    if not any((words.view(np.uint32) == zero * _REPEAT_NIBBLE).all() for zero in zeros):
        raise CheckpointError(
            f"{name} is not {' or '.join(map(str, zeros))} throughout, so the zero point is not 8: the checkpoint is "
            f"asymmetric, or config.json gives the wrong packing_format: {_ADVICE}"
        )


def _int4_unit(param: Param) -> Unit:
    """`.qweight`, `.qzeros` and `.scales` of every expert."""
    rows, width = param.shape[-2:]
    modules = modules_of(param)
    if width % _GROUP or rows % _CODES_PER_WORD:
        raise CheckpointError(
            f"{param.name} has {rows} rows of {width} values; int4-autoround needs multiples of "
            f"{_CODES_PER_WORD} and {_GROUP}: choose another format"
        )
    groups = width // _GROUP
    tensors = modules.tensor_infos("qweight", "I32", (width // _CODES_PER_WORD, rows))
    tensors += modules.tensor_infos("qzeros", "I32", (groups, rows // _CODES_PER_WORD))
    tensors += modules.tensor_infos("scales", "F16", (groups, rows))

    def encode(weights: Sequence[Weight]) -> Encoder:
        def encode_rows(start: int, stop: int) -> list[TensorSlice]:
            part = _as_symmetric(weights[0][start:stop])
            words = np.ascontiguousarray(part.codes).view(np.int32)
            zeros = np.full((stop - start, groups, rows // _CODES_PER_WORD), _STORED_ZERO * _REPEAT_NIBBLE, np.int32)
            return [
                *modules.slices("qweight", start, codecs.contiguous_rows(words.swapaxes(1, 2))),
                *modules.slices("qzeros", start, zeros),
                *modules.slices("scales", start, np.asarray(part.scale).swapaxes(1, 2)),
            ]

        return encode_rows

    return Unit((param,), tuple(tensors), encode)


def _as_symmetric(weight: Weight) -> Quantized:
    """The weight with its own codes if it is 4-bit, in groups of 64, with zero point 8 and scales that float16 holds
    exactly; otherwise quantized to that."""
    if isinstance(weight, Quantized) and weight.spec == AFFINE4 and weight.outer is None:
        scale, bias = np.asarray(weight.scale).astype(np.float32), np.asarray(weight.bias).astype(np.float32)
        with np.errstate(over="ignore"):
            half = scale.astype(np.float16)
        if (bias == -8 * scale).all() and (half == scale).all():
            return Quantized(AFFINE4, weight.codes, half, weight.bias)
    return quantization.quantize_symmetric(weight)


FORMAT = AutoRound()
