"""`mxfp4-original`: the `original/` folder of OpenAI's releases. It holds the values of `mxfp4` under other names, with
q, k and v in one `qkv` tensor. Read only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import CheckpointError
from ..params import Param
from ..tensor import MXFP4, Dense
from .base import FLOATS, CheckpointHeaders, ExpectedTensor, Format, Recipe, Source, Unit, dense_source, matrix_recipe
from .hf_layout import fused_rows, fused_shape
from .mxfp4 import blocks_source

FAMILY = "original"
_NAMES = {
    "embed.weight": "embedding.weight",
    "norm.weight": "norm.scale",
    "lm_head.weight": "unembedding.weight",
    "attention_norm.weight": "attn.norm.scale",
    "mlp_norm.weight": "mlp.norm.scale",
    "attention.sinks": "attn.sinks",
    "attention.o.weight": "attn.out.weight",
    "attention.o.bias": "attn.out.bias",
    "router.weight": "mlp.gate.weight",
    "router.bias": "mlp.gate.bias",
}
_EXPERTS = {"gate": "mlp1", "up": "mlp1", "down": "mlp2"}


class Original(Format):
    family = FAMILY
    writes = False
    recipes: Mapping[str, Recipe] = {"mxfp4-original": matrix_recipe(FAMILY, None, experts=(FAMILY, MXFP4))}

    def find(self, param: Param, headers: CheckpointHeaders) -> Source | None:
        if not headers.has("embedding.weight", "unembedding.weight", "norm.scale", "block.0.attn.qkv.weight"):
            return None
        prefix = "" if param.layer is None else f"block.{param.layer}."
        if param.kind in _NAMES:
            return dense_source(FAMILY, prefix + _NAMES[param.kind], param.shape)
        _, part, kind = param.kind.split(".")
        if param.role == "attention":
            return _qkv_source(f"{prefix}attn.qkv.{kind}", part, param, headers)
        base = f"{prefix}mlp.{_EXPERTS[part]}"
        if kind == "weight":
            return blocks_source(FAMILY, f"{base}_weight.blocks", f"{base}_weight.scales", param)
        name, rows = f"{base}_bias", fused_rows(part)
        shape = param.shape if part == "down" else fused_shape(param.shape, 1)
        return Source(FAMILY, None, (ExpectedTensor(name, FLOATS, shape),), lambda get: Dense(get(name)[:, rows]))

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        raise _not_written(target)

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        raise _not_written(target)


def _not_written(target: str) -> CheckpointError:
    return CheckpointError(
        f"{target} is read but not written; convert to mxfp4, which has the same values under Hugging Face's names"
    )


def _qkv_source(name: str, part: str, param: Param, headers: CheckpointHeaders) -> Source:
    """The rows of q, k or v in the fused tensor, which stacks q, then k, then v."""
    q, kv = headers.config.q_size, headers.config.kv_size
    start = {"q": 0, "k": q, "v": q + kv}[part]
    rows = slice(start, start + param.shape[0])
    expected = ExpectedTensor(name, FLOATS, (q + 2 * kv, *param.shape[1:]))
    return Source(FAMILY, None, (expected,), lambda get: Dense(get(name)[rows]))


FORMAT = Original()
