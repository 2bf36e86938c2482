"""`mxfp4`: OpenAI's published checkpoints. Experts are MXFP4 and output-major: `*_blocks` U8 [E, N, K/32, 16], low
nibble first, and `*_scales` U8 [E, N, K/32]. Even rows of `gate_up_proj` are gate, odd rows up. Everything else is
dense, under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import CheckpointError
from .. import quantization
from ..params import Param
from ..safetensors import TensorInfo
from ..tensor import MXFP4, Quantized, Weight
from .base import (
    CheckpointHeaders,
    Encoder,
    ExpectedTensor,
    Format,
    GetTensor,
    Recipe,
    Source,
    TensorSlice,
    Unit,
    matrix_recipe,
)
from .hf_layout import HF_DENSE, experts_prefix, fused_rows, fused_shape, fused_units


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
        return fused_units(params, dtypes, _expert_unit)

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        """`quantization_config` as in OpenAI's config.json."""
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        return {"quantization_config": {"modules_to_not_convert": kept, "quant_method": "mxfp4"}}


def blocks_source(family: str, blocks: str, scales: str, param: Param) -> Source:
    """MXFP4 experts in OpenAI's layout, under the tensor names `blocks` and `scales`.

    The rows of gate and up are views of the fused tensor.
    """
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


def _expert_unit(params: tuple[Param, ...]) -> Unit:
    """`gate_up_proj` of (gate, up), or `down_proj` of (down,)."""
    experts, _, width = params[0].shape
    height = sum(param.shape[1] for param in params)
    base = experts_prefix(params[0]) + ("gate_up_proj" if len(params) == 2 else "down_proj")
    if width % 32:
        raise CheckpointError(
            f"{base} has rows of {width} values, which MXFP4 cannot split into groups of 32; choose bf16 instead"
        )
    blocks = TensorInfo(f"{base}_blocks", "U8", (experts, height, width // 32, 16))
    scales = TensorInfo(f"{base}_scales", "U8", (experts, height, width // 32))

    def encode(weights: Sequence[Weight]) -> Encoder:
        def encode_rows(start: int, stop: int) -> list[TensorSlice]:
            codes = np.empty((stop - start, height, width // 2), np.uint8)
            scale = np.empty((stop - start, height, width // 32), np.uint8)
            for index, weight in enumerate(weights):
                part = quantization.to_spec(weight[start:stop], MXFP4)
                codes[:, index :: len(weights)] = part.codes
                scale[:, index :: len(weights)] = np.asarray(part.scale)
            return [(blocks.name, start, codes), (scales.name, start, scale)]

        return encode_rows

    return Unit(params, (blocks, scales), encode)


FORMAT = Mxfp4()
