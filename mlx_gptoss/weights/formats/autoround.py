"""`int4-autoround`: symmetric 4-bit integers in groups of 64, packed as GPTQ does. Each linear layer of the experts is
a module of its own, INPUT-major: `.qweight` I32 [K/8, N] (eight codes along K, lowest bits first), `.scales` F16
[K/64, N], `.qzeros` I32 [K/64, N/8], `.bias`; w = scale * (code - 8). Scales are signed. The rest is dense.

The stored zero is 7 for the true zero 8 in GPTQ's first version (`auto_round:auto_gptq`, `auto_gptq`), and 8 in its
second (`auto_round:gptqmodel`). GPTQ's `g_idx` may be there if it says what is plain: row k is of group k // 64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import CheckpointError
from .. import codecs, quantization
from ..params import Param
from ..tensor import AFFINE4, Array, Quantized, Weight
from .base import (
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
    experts_prefix,
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

FAMILY = "int4-autoround"
_GROUP = AFFINE4.group
_CODES_PER_WORD = 8
_REPEAT_NIBBLE = 0x11111111  # times a nibble: a word of eight of it
_STORED_ZERO = 7  # as written
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
        return {"quantization_config": self._block(params)}

    def extra_files(self, target: str, params: Sequence[Param]) -> Mapping[str, Any]:
        return {"quantization_config.json": self._block(params)}

    def _block(self, params: Sequence[Param]) -> dict[str, Any]:
        """As AutoRound 0.16 writes it."""
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
    prefix = experts_prefix(param)
    if headers.has(*(f"{prefix}{old}.0.{part}" for old in _OLD_NAMES for part in ("qweight", "weight", "bias"))):
        names = [name for name in headers.tensors if any(f".{old}." in name for old in _OLD_NAMES)]
        raise CheckpointError(
            f"{len(names)} tensors are named as {', '.join(names[:4])}; it is not known how these hold gate and up, so "
            "they cannot be read: take a checkpoint with mlp.experts.0.gate_proj, or the original one"
        )


def _int4_source(modules: Modules, param: Param, headers: CheckpointHeaders) -> Source:
    rows, width = param.shape[-2:]
    _check_layout(modules.first, rows, width, headers)
    scales, groups = f"{modules.first}.scales", width // _GROUP
    expected = modules.expected("qweight", ("I32",), (width // _CODES_PER_WORD, rows))
    expected += modules.expected("scales", same_float_dtype(headers, scales), (groups, rows))
    expected += modules.expected("qzeros", ("I32",), (groups, rows // _CODES_PER_WORD))
    ordered = headers.has(f"{modules.first}.g_idx")
    if ordered:
        expected += modules.expected("g_idx", ("I32",), (width,))
    zeros = _allowed_zeros(headers)

    def load(get: GetTensor, modules: Modules) -> Weight:
        for name in (name for names in modules.names for name in names):
            _check_zeros(f"{name}.qzeros", get(f"{name}.qzeros"), zeros)
            if ordered and not np.array_equal(get(f"{name}.g_idx"), np.arange(width) // _GROUP):
                raise CheckpointError(f"{name}.g_idx reorders the groups (act-order), which cannot be read: {_ADVICE}")
        codes = modules.read(get, "qweight", lambda words: codecs.straight(words.T).view(np.uint8))
        scale = modules.read(get, "scales", lambda found: codecs.straight(found.T))
        return Quantized(AFFINE4, codes, scale, quantization.symmetric_bias(scale))

    return modules_source(modules, FAMILY, AFFINE4, expected, load, scales)


def _check_layout(module: str, rows: int, width: int, headers: CheckpointHeaders) -> None:
    """Refuse by name what the shapes or config.json show to be another packing. Shapes that fit none are left to the
    check of shapes."""
    block, words = quantization_config(headers), headers.shape(f"{module}.qweight")
    groups = headers.shape(f"{module}.scales")[:1]
    problem = None
    packing = f"{block.get('quant_method')} {block.get('packing_format')}"
    if "awq" in packing or words == (width, rows // _CODES_PER_WORD):
        problem = "is packed as AWQ does"
    elif block.get("sym") is False:
        problem = "is quantized asymmetrically"
    elif words[1:] == (rows,) and words[0] * 32 % width == 0 and words[0] * 32 // width != AFFINE4.bits:
        problem = f"has {words[0] * 32 // width} bits a weight"
    elif groups and groups[0] and groups[0] != width // _GROUP:
        problem = f"has groups of {-(-width // groups[0])}"
    if problem:
        raise CheckpointError(f"{module} {problem}, which cannot be read: {_ADVICE}")


def _allowed_zeros(headers: CheckpointHeaders) -> tuple[int, ...]:
    """The values of a stored zero that mean 8: by config.json's packing, or either if it says nothing."""
    block = quantization_config(headers)
    packing = str(block.get("packing_format") or block.get("checkpoint_format") or block.get("quant_method"))
    first = packing in ("auto_round:auto_gptq", "auto_gptq", "gptq")
    second = packing in ("auto_round:gptqmodel", "auto_round", "gptq_v2")
    return (7,) if first else (8,) if second else (7, 8)


def _check_zeros(name: str, words: Array, zeros: tuple[int, ...]) -> None:
    if not any((words.view(np.uint32) == zero * _REPEAT_NIBBLE).all() for zero in zeros):
        raise CheckpointError(
            f"{name} is not {' or '.join(map(str, zeros))} throughout, so zero is not code 8: the checkpoint is "
            f"asymmetric, or its packing_format is not what config.json says: {_ADVICE}"
        )


def _int4_unit(param: Param) -> Unit:
    rows, width = param.shape[-2:]
    modules = modules_of(param)
    if width % _GROUP or rows % _CODES_PER_WORD:
        raise CheckpointError(
            f"{param.name} has {rows} rows of {width} values; int4-autoround needs multiples of "
            f"{_CODES_PER_WORD} and of {_GROUP}: choose another format"
        )
    groups = width // _GROUP
    tensors = modules.tensor_infos("qweight", "I32", (width // _CODES_PER_WORD, rows))
    tensors += modules.tensor_infos("qzeros", "I32", (groups, rows // _CODES_PER_WORD))
    tensors += modules.tensor_infos("scales", "F16", (groups, rows))

    def encode(weights: Sequence[Weight]) -> Encoder:
        def pieces(start: int, stop: int) -> list[TensorSlice]:
            part = _as_symmetric(codecs.rows(weights[0], start, stop))
            words = np.ascontiguousarray(part.codes).view(np.int32)
            zeros = np.full((stop - start, groups, rows // _CODES_PER_WORD), _STORED_ZERO * _REPEAT_NIBBLE, np.int32)
            return [
                *modules.slices("qweight", start, codecs.straight(words.swapaxes(1, 2))),
                *modules.slices("qzeros", start, zeros),
                *modules.slices("scales", start, np.asarray(part.scale).swapaxes(1, 2)),
            ]

        return pieces

    return Unit((param,), tuple(tensors), encode)


def _as_symmetric(weight: Weight) -> Quantized:
    """The weight as it is stored if its groups are of 64, its zero is code 8 and float16 holds its scales, else
    quantized anew."""
    if isinstance(weight, Quantized) and weight.spec == AFFINE4 and weight.outer is None:
        scale, bias = np.asarray(weight.scale).astype(np.float32), np.asarray(weight.bias).astype(np.float32)
        with np.errstate(over="ignore"):
            half = scale.astype(np.float16)
        if (bias == -8 * scale).all() and (half == scale).all():
            return Quantized(AFFINE4, weight.codes, half, weight.bias)
    return quantization.quantize_symmetric(weight)


FORMAT = AutoRound()
