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
    Encoder,
    Format,
    Get,
    Piece,
    Recipe,
    Source,
    Stored,
    Unit,
    dense_unit,
    experts_prefix,
    matrix_recipe,
    plain_name,
)
from .per_expert import (
    Modules,
    block_of,
    dense_experts,
    dense_experts_unit,
    is_per_expert,
    made_of,
    modules_of,
    one_dtype,
)

FAMILY = "int4-autoround"
_GROUP = AFFINE4.group
_CODES_A_WORD = 8
_NIBBLES = 0x11111111  # times a nibble: a word of eight of it
_ZERO = 7  # as written
_OLD_NAMES = ("gate_up_projs", "down_projs")
_ADVICE = "quantize the model symmetrically with 4 bits, groups of 64 and no reordering, or use the original checkpoint"


class AutoRound(Format):
    family = FAMILY
    writes = True
    recipes: Mapping[str, Recipe] = {
        "int4-autoround": matrix_recipe("plain", None, experts=(FAMILY, AFFINE4)),
    }

    def find(self, param: Param, stored: Stored) -> Source | None:
        if param.role == "experts":
            _refuse_old_names(param, stored)
            if not is_per_expert(param, stored):
                return None
        modules = modules_of(param)
        if not stored.has(f"{modules.first}.qweight"):
            return None
        if param.is_matrix:
            return _integers(modules, param, stored)
        return dense_experts(modules, "bias", param, stored) if param.role == "experts" else None

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        def unit(param: Param) -> Unit:
            if param.role != "experts":
                return dense_unit(param, dtypes, plain_name(param))
            return _unit(param) if param.is_matrix else dense_experts_unit(param, "F16")

        return [unit(param) for param in params]

    def describe(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
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
            "extra_config": {plain_name(param).removesuffix(".weight"): {"bits": 16} for param in attention},
            "group_size": _GROUP,
            "packing_format": "auto_round:auto_gptq",
            "quant_method": "auto-round",
            "sym": True,
        }


def _refuse_old_names(param: Param, stored: Stored) -> None:
    prefix = experts_prefix(param)
    if stored.has(*(f"{prefix}{old}.0.{part}" for old in _OLD_NAMES for part in ("qweight", "weight", "bias"))):
        names = [name for name in stored.tensors if any(f".{old}." in name for old in _OLD_NAMES)]
        raise CheckpointError(
            f"{len(names)} tensors are named as {', '.join(names[:4])}; it is not known how these hold gate and up, so "
            "they cannot be read: take a checkpoint with mlp.experts.0.gate_proj, or the original one"
        )


def _integers(modules: Modules, param: Param, stored: Stored) -> Source:
    rows, width = param.shape[-2:]
    _check_layout(modules.first, rows, width, stored)
    scales, groups = f"{modules.first}.scales", width // _GROUP
    wants = modules.wants("qweight", ("I32",), (width // _CODES_A_WORD, rows))
    wants += modules.wants("scales", one_dtype(stored, scales), (groups, rows))
    wants += modules.wants("qzeros", ("I32",), (groups, rows // _CODES_A_WORD))
    ordered = stored.has(f"{modules.first}.g_idx")
    if ordered:
        wants += modules.wants("g_idx", ("I32",), (width,))
    zeros = _stored_zeros(stored)

    def load(get: Get, modules: Modules) -> Weight:
        for name in (name for names in modules.names for name in names):
            _check_zeros(f"{name}.qzeros", get(f"{name}.qzeros"), zeros)
            if ordered and not np.array_equal(get(f"{name}.g_idx"), np.arange(width) // _GROUP):
                raise CheckpointError(f"{name}.g_idx reorders the groups (act-order), which cannot be read: {_ADVICE}")
        codes = modules.read(get, "qweight", lambda words: codecs.contiguous_rows(words.T).view(np.uint8))
        scale = modules.read(get, "scales", lambda found: codecs.contiguous_rows(found.T))
        return Quantized(AFFINE4, codes, scale, quantization.symmetric_bias(scale))

    return made_of(modules, FAMILY, AFFINE4, wants, load, scales)


def _check_layout(module: str, rows: int, width: int, stored: Stored) -> None:
    """Refuse by name what the shapes or config.json show to be another packing. Shapes that fit none are left to the
    check of shapes."""
    block, words = block_of(stored), stored.shape(f"{module}.qweight")
    groups = stored.shape(f"{module}.scales")[:1]
    what = None
    if "awq" in f"{block.get('quant_method')} {block.get('packing_format')}" or words == (width, rows // _CODES_A_WORD):
        what = "is packed as AWQ does"
    elif block.get("sym") is False:
        what = "is quantized asymmetrically"
    elif words[1:] == (rows,) and words[0] * 32 % width == 0 and words[0] * 32 // width != AFFINE4.bits:
        what = f"has {words[0] * 32 // width} bits a weight"
    elif groups and groups[0] and groups[0] != width // _GROUP:
        what = f"has groups of {-(-width // groups[0])}"
    if what:
        raise CheckpointError(f"{module} {what}, which cannot be read: {_ADVICE}")


def _stored_zeros(stored: Stored) -> tuple[int, ...]:
    """The values of a stored zero that mean 8: by config.json's packing, or either if it says nothing."""
    block = block_of(stored)
    packing = str(block.get("packing_format") or block.get("checkpoint_format") or block.get("quant_method"))
    first = packing in ("auto_round:auto_gptq", "auto_gptq", "gptq")
    second = packing in ("auto_round:gptqmodel", "auto_round", "gptq_v2")
    return (7,) if first else (8,) if second else (7, 8)


def _check_zeros(name: str, words: Array, zeros: tuple[int, ...]) -> None:
    if not any((words.view(np.uint32) == zero * _NIBBLES).all() for zero in zeros):
        raise CheckpointError(
            f"{name} is not {' or '.join(map(str, zeros))} throughout, so zero is not code 8: the checkpoint is "
            f"asymmetric, or its packing_format is not what config.json says: {_ADVICE}"
        )


def _unit(param: Param) -> Unit:
    rows, width = param.shape[-2:]
    modules = modules_of(param)
    if width % _GROUP or rows % _CODES_A_WORD:
        raise CheckpointError(
            f"{param.name} has {rows} rows of {width} values; int4-autoround needs multiples of {_CODES_A_WORD} and of "
            f"{_GROUP}: choose another format"
        )
    groups = width // _GROUP
    tensors = modules.infos("qweight", "I32", (width // _CODES_A_WORD, rows))
    tensors += modules.infos("qzeros", "I32", (groups, rows // _CODES_A_WORD))
    tensors += modules.infos("scales", "F16", (groups, rows))

    def encode(weights: Sequence[Weight]) -> Encoder:
        def pieces(start: int, stop: int) -> list[Piece]:
            part = _as_symmetric(weights[0][start:stop])
            words = np.ascontiguousarray(part.codes).view(np.int32)
            zeros = np.full((stop - start, groups, rows // _CODES_A_WORD), _ZERO * _NIBBLES, np.int32)
            return [
                *modules.pieces("qweight", start, codecs.contiguous_rows(words.swapaxes(1, 2))),
                *modules.pieces("qzeros", start, zeros),
                *modules.pieces("scales", start, np.asarray(part.scale).swapaxes(1, 2)),
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
