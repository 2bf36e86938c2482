"""`bf16`: Hugging Face's dequantized layout. Experts are fused, INPUT-major and interleaved on the last axis:
`gate_up_proj` [E, H, 2I] (even columns gate, odd columns up) and `down_proj` [E, I, H].

This module also reads what all Hugging Face layouts share: dense tensors, and the fused expert biases
`gate_up_proj_bias` [E, 2I] and `down_proj_bias` [E, H].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import codecs
from ..params import Param
from ..safetensors import TensorInfo
from ..tensor import Dense, Weight
from .base import (
    FLOATS,
    CheckpointHeaders,
    Encoder,
    ExpectedTensor,
    Format,
    Recipe,
    Source,
    TensorSlice,
    Unit,
    dense_source,
    matrix_recipe,
)
from .hf_layout import HF_DENSE, experts_prefix, fused_rows, fused_shape, fused_units, hf_name


class Bf16(Format):
    family = "bf16"
    writes = True
    recipes: Mapping[str, Recipe] = {"bf16": matrix_recipe(HF_DENSE, None, experts=("bf16", None))}

    def find(self, param: Param, headers: CheckpointHeaders) -> Source | None:
        if param.role != "experts":
            name = hf_name(param)
            return dense_source(HF_DENSE, name, param.shape) if headers.has(name) else None
        return _expert_source(param, headers)

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        return fused_units(params, dtypes, _expert_unit)

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        return {}


def _expert_source(param: Param, headers: CheckpointHeaders) -> Source | None:
    """Views of a fused tensor: weights [E, N, K], biases [E, N]."""
    _, part, kind = param.kind.split(".")
    fused = part != "down"
    name = experts_prefix(param) + ("gate_up_proj" if fused else "down_proj") + ("_bias" if kind == "bias" else "")
    if not headers.has(name):
        return None
    rows = fused_rows(part)
    shape = fused_shape(param.shape, 1) if fused else param.shape
    if kind == "bias":
        expected = ExpectedTensor(name, FLOATS, shape)
        return Source(HF_DENSE, None, (expected,), lambda get: Dense(get(name)[:, rows]))
    expected = ExpectedTensor(name, FLOATS, (shape[0], shape[2], shape[1]))
    return Source("bf16", None, (expected,), lambda get: Dense(get(name).swapaxes(1, 2)[:, rows]))


def _expert_unit(params: tuple[Param, ...]) -> Unit:
    """`gate_up_proj` of (gate, up), or `down_proj` of (down,)."""
    experts, _, width = params[0].shape
    height = sum(param.shape[1] for param in params)
    name = experts_prefix(params[0]) + ("gate_up_proj" if len(params) == 2 else "down_proj")

    def encode(weights: Sequence[Weight]) -> Encoder:
        def encode_rows(start: int, stop: int) -> list[TensorSlice]:
            rows = np.empty((stop - start, height, width), codecs.BFLOAT16)
            for index, weight in enumerate(weights):
                rows[:, index :: len(weights)] = codecs.to_bfloat16(weight[start:stop])
            return [(name, start, codecs.contiguous_rows(rows.swapaxes(1, 2)))]

        return encode_rows

    return Unit(params, (TensorInfo(name, "BF16", (experts, width, height)),), encode)


FORMAT = Bf16()
