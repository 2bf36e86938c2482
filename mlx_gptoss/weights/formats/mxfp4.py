"""`mxfp4`: OpenAI's published checkpoints. Experts are MXFP4, output-major: `*_blocks` U8 [E, N, K/32, 16] with the low
nibble first, `*_scales` U8 [E, N, K/32]; even rows of `gate_up_proj` are gate, odd rows up. The rest is dense, under
Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import CheckpointError
from .. import codecs, quantization
from ..params import Param
from ..safetensors import TensorInfo
from ..tensor import MXFP4, Quantized, Weight
from .base import (
    HF_DENSE,
    CheckpointHeaders,
    Encoder,
    ExpectedTensor,
    Format,
    GetTensor,
    Recipe,
    Source,
    TensorSlice,
    Unit,
    experts_prefix,
    fused_rows,
    fused_shape,
    fused_units,
    matrix_recipe,
)


def blocks_source(family: str, blocks: str, scales: str, param: Param) -> Source:
    """MXFP4 experts stored as OpenAI does, under whichever names; rows of gate and up are views of the fused tensor."""
    part = param.kind.split(".")[1]
    experts, height, width = param.shape if part == "down" else fused_shape(param.shape, 1)
    rows = fused_rows(part)
    expected = (
        ExpectedTensor(blocks, ("U8",), (experts, height, width // 32, 16)),
        ExpectedTensor(scales, ("U8", "F8_E8M0"), (experts, height, width // 32)),
    )

    def load(get: GetTensor) -> Weight:
        codes = get(blocks).reshape(experts, height, width // 2)
        return Quantized(MXFP4, codes[:, rows], get(scales)[:, rows])

    return Source(family, MXFP4, expected, load)


class Mxfp4(Format):
    family = "mxfp4"
    writes = True
    recipes: Mapping[str, Recipe] = {"mxfp4": matrix_recipe(HF_DENSE, None, experts=("mxfp4", MXFP4))}

    def find(self, param: Param, headers: CheckpointHeaders) -> Source | None:
        if param.role != "experts" or not param.is_matrix:
            return None
        base = experts_prefix(param) + ("down_proj" if param.kind == "experts.down.weight" else "gate_up_proj")
        blocks, scales = f"{base}_blocks", f"{base}_scales"
        return blocks_source("mxfp4", blocks, scales, param) if headers.has(blocks, scales) else None

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        return fused_units(params, dtypes, self._expert_unit)

    def _expert_unit(self, params: tuple[Param, ...]) -> Unit:
        """gate and up together, or down alone."""
        experts, _, width = params[0].shape
        height = sum(param.shape[1] for param in params)
        base = experts_prefix(params[0]) + ("gate_up_proj" if len(params) == 2 else "down_proj")
        if width % 32:
            raise CheckpointError(f"{base} has rows of {width} values, which MXFP4 cannot cut into groups of 32")
        blocks = TensorInfo(f"{base}_blocks", "U8", (experts, height, width // 32, 16))
        scales = TensorInfo(f"{base}_scales", "U8", (experts, height, width // 32))

        def encode(weights: Sequence[Weight]) -> Encoder:
            def pieces(start: int, stop: int) -> list[TensorSlice]:
                codes = np.empty((stop - start, height, width // 2), np.uint8)
                scale = np.empty((stop - start, height, width // 32), np.uint8)
                for index, weight in enumerate(weights):
                    part = quantization.convert(codecs.rows(weight, start, stop), MXFP4)
                    codes[:, index :: len(weights)] = part.codes
                    scale[:, index :: len(weights)] = np.asarray(part.scale)
                return [(blocks.name, start, codes), (scales.name, start, scale)]

            return pieces

        return Unit(params, (blocks, scales), encode)

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        """As in OpenAI's config.json."""
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        return {"quantization_config": {"modules_to_not_convert": kept, "quant_method": "mxfp4"}}


FORMAT = Mxfp4()
