"""`int4-autoround`: symmetric 4-bit integers in groups of 64, packed like GPTQ; AutoRound's other schemes are read.

Each linear layer of the experts is its own module, INPUT-major: `.qweight` I32 [K/8, N] (eight codes along K, lowest
bits first), `.scales` F16 [K/64, N], `.qzeros` I32 [K/64, N/8] and `.bias`. w = scale * (code - 8), and scales are
signed. All other weights are dense. The zero point 8 is written as 7, as GPTQ's version 1 has it.

gptq.py reads the packings: AutoRound writes `auto_round:auto_gptq` (version 1), `auto_round:gptqmodel` (version 2) and,
for asymmetric 4-bit codes, `auto_round:auto_awq`, with an entry in `extra_config` for modules of other bits or groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import CheckpointError
from .. import codecs, quantization
from ..params import Param
from ..tensor import AFFINE4, Quantized, Weight
from . import gptq
from .base import CheckpointHeaders, Encoder, Format, Recipe, Source, TensorSlice, Unit, matrix_recipe
from .hf_layout import HF_DENSE, dense_unit, hf_name
from .integers import Layout
from .per_expert import dense_experts_unit, modules_of, quantization_config

FAMILY = "int4-autoround"
_GROUP = AFFINE4.group
_CODES_PER_WORD = 8
_REPEAT_NIBBLE = 0x11111111  # multiplied by a nibble: a word with that nibble eight times
_STORED_ZERO = 7  # as this module writes the zero point


class AutoRound(Format):
    family = FAMILY
    writes = True
    recipes: Mapping[str, Recipe] = {
        "int4-autoround": matrix_recipe(HF_DENSE, None, experts=(FAMILY, AFFINE4)),
    }

    def find(self, param: Param, headers: CheckpointHeaders) -> Source | None:
        block = quantization_config(headers)
        if block.get("quant_method") in gptq.METHODS:
            return None
        return gptq.find_packed(param, headers, lambda layout: _family(layout, block))

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


def _family(layout: Layout, block: Mapping[str, object]) -> str:
    """int4-autoround for what this module writes, auto-round for AutoRound's other schemes and for mixed ones."""
    written = layout.symmetric and (layout.bits, layout.group) == (AFFINE4.bits, _GROUP)
    return FAMILY if written and not gptq.has_mixed_bits(block) else "auto-round"


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
