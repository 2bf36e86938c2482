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
    Encoder,
    Format,
    Piece,
    Recipe,
    Source,
    Stored,
    Unit,
    Want,
    dense_source,
    doubled,
    experts_prefix,
    gate_up_units,
    matrix_recipe,
    plain_name,
    rows_of,
)


class Bf16(Format):
    family = "bf16"
    writes = True
    recipes: Mapping[str, Recipe] = {"bf16": matrix_recipe("plain", None, experts=("bf16", None))}

    def find(self, param: Param, stored: Stored) -> Source | None:
        if param.role != "experts":
            name = plain_name(param)
            return dense_source("plain", name, param.shape) if stored.has(name) else None
        return self._expert(param, stored)

    def _expert(self, param: Param, stored: Stored) -> Source | None:
        _, part, kind = param.kind.split(".")
        fused = part != "down"
        name = experts_prefix(param) + ("gate_up_proj" if fused else "down_proj") + ("_bias" if kind == "bias" else "")
        if not stored.has(name):
            return None
        rows = rows_of(part)
        shape = doubled(param.shape, 1) if fused else param.shape
        if kind == "bias":
            want = Want(name, FLOATS, shape)
            return Source("plain", None, (want,), lambda get: Dense(get(name)[:, rows]))
        want = Want(name, FLOATS, (shape[0], shape[2], shape[1]))
        return Source("bf16", None, (want,), lambda get: Dense(get(name).swapaxes(1, 2)[:, rows]))

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        return gate_up_units(params, dtypes, self._experts)

    def _experts(self, params: tuple[Param, ...]) -> Unit:
        """gate and up together, or down alone."""
        experts, _, wide = params[0].shape
        height = sum(param.shape[1] for param in params)
        name = experts_prefix(params[0]) + ("gate_up_proj" if len(params) == 2 else "down_proj")

        def encode(weights: Sequence[Weight]) -> Encoder:
            def pieces(start: int, stop: int) -> list[Piece]:
                rows = np.empty((stop - start, height, wide), codecs.BFLOAT16)
                for index, weight in enumerate(weights):
                    rows[:, index :: len(weights)] = codecs.to_bfloat16(weight[start:stop])
                return [(name, start, codecs.contiguous_rows(rows.swapaxes(1, 2)))]

            return pieces

        return Unit(params, (TensorInfo(name, "BF16", (experts, wide, height)),), encode)

    def describe(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        return {}


FORMAT = Bf16()
