"""`bf16`: Hugging Face's dequantized layout. Experts are fused, INPUT-major and interleaved on the last axis:
`gate_up_proj` [E, H, 2I] (even columns gate, odd up) and `down_proj` [E, I, H]. Also the home of everything that the
Hugging Face layouts share: plain dense tensors and the fused expert biases [E, 2I]."""

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
    HF_DENSE,
    CheckpointHeaders,
    Encoder,
    ExpectedTensor,
    Format,
    Recipe,
    Source,
    TensorSlice,
    Unit,
    dense_source,
    experts_prefix,
    fused_rows,
    fused_shape,
    fused_units,
    hf_name,
    matrix_recipe,
)


class Bf16(Format):
    family = "bf16"
    writes = True
    recipes: Mapping[str, Recipe] = {"bf16": matrix_recipe(HF_DENSE, None, experts=("bf16", None))}

    def find(self, param: Param, headers: CheckpointHeaders) -> Source | None:
        if param.role != "experts":
            name = hf_name(param)
            return dense_source(HF_DENSE, name, param.shape) if headers.has(name) else None
        return self._expert_source(param, headers)

    def _expert_source(self, param: Param, headers: CheckpointHeaders) -> Source | None:
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

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        return fused_units(params, dtypes, self._expert_unit)

    def _expert_unit(self, params: tuple[Param, ...]) -> Unit:
        """gate and up together, or down alone."""
        experts, _, width = params[0].shape
        height = sum(param.shape[1] for param in params)
        name = experts_prefix(params[0]) + ("gate_up_proj" if len(params) == 2 else "down_proj")

        def encode(weights: Sequence[Weight]) -> Encoder:
            def pieces(start: int, stop: int) -> list[TensorSlice]:
                rows = np.empty((stop - start, height, width), codecs.BFLOAT16)
                for index, weight in enumerate(weights):
                    rows[:, index :: len(weights)] = codecs.to_bfloat16(codecs.rows(weight, start, stop))
                return [(name, start, codecs.straight(rows.swapaxes(1, 2)))]

            return pieces

        return Unit(params, (TensorInfo(name, "BF16", (experts, width, height)),), encode)

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        return {}


FORMAT = Bf16()
