"""`gguf`: llama.cpp's layout of the architecture `gpt-oss`. Gate, up and down are separate and output-major; a matrix
has any of ggml's types that gguf_blocks.py knows. Read only. gguf_metadata.py reads config and tokenizer.

Ollama's first files (architecture `gptoss`) have other names, and some fuse q, k and v, or gate and up (interleaved).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...errors import CheckpointError
from .. import gguf_blocks
from ..gguf_blocks import BY_NAME, RENUMBERED, BlockType
from ..params import Param
from ..tensor import MXFP4, Array, Dense, Weight, storage_name
from .base import FLOATS, CheckpointHeaders, ExpectedTensor, Format, GetTensor, Recipe, Source, Unit, matrix_recipe

FAMILY = "gguf"
_READ_ONLY = "GGUF is read but not written; convert to mxfp4, which keeps the experts' bits, or to another format"

_NAMES = {
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "attention_norm.weight": "attn_norm.weight",
    "mlp_norm.weight": "post_attention_norm.weight",
    "attention.sinks": "attn_sinks.weight",
}
_MODULES = {
    **{f"attention.{x}": f"attn_{x}" for x in "qkv"},
    "attention.o": "attn_output",
    "router": "ffn_gate_inp",
    **{f"experts.{x}": f"ffn_{x}_exps" for x in ("gate", "up", "down")},
}


_OLLAMA_NAMES = {  # llama.cpp's names, each with what Ollama's first files have in its place
    "attn_output.": "attn_out.",
    "post_attention_norm.weight": "ffn_norm.weight",
    "attn_sinks.weight": "attn_sinks",
}
_SAME_VALUES = "the numbers of {} run as {} of the same values"


@dataclass(frozen=True)
class _Place:
    """Where a parameter is in the file: a tensor, its shape in values, and the part of an axis that is the parameter's."""

    name: str
    shape: tuple[int, ...]
    axis: int = 0
    part: slice | None = None

    def of(self, tensor: Array) -> Array:
        return tensor if self.part is None else tensor[(slice(None),) * self.axis + (self.part,)]


class Gguf(Format):
    family = FAMILY
    writes = False
    recipes: Mapping[str, Recipe] = {"gguf": matrix_recipe(FAMILY, None, experts=(FAMILY, MXFP4))}

    def find(self, param: Param, headers: CheckpointHeaders) -> Source | None:
        if not headers.has("token_embd.weight", "blk.0.attn_norm.weight"):
            return None
        place = _place(param, headers)
        info = headers.tensors.get(place.name)
        if info is None or not info.blocks or not param.is_matrix:
            expected = ExpectedTensor(place.name, FLOATS, place.shape)
            return Source(FAMILY, None, (expected,), lambda get: Dense(place.of(get(place.name))))
        return _block_source(place, BY_NAME[info.blocks], param, headers)

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        raise CheckpointError(_READ_ONLY)

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        raise CheckpointError(_READ_ONLY)


def tensor_name(param: Param) -> str:
    """The name of a parameter's tensor in the file, such as `blk.3.ffn_gate_exps.weight`."""
    module, _, part = param.kind.rpartition(".")
    name = _NAMES.get(param.kind) or f"{_MODULES[module]}.{part}"
    return name if param.layer is None else f"blk.{param.layer}.{name}"


def _place(param: Param, headers: CheckpointHeaders) -> _Place:
    """The tensor of a parameter under the names of llama.cpp, or under Ollama's where the file has those."""
    name = tensor_name(param)
    for theirs, ollamas in _OLLAMA_NAMES.items():
        other = name.replace(theirs, ollamas)
        if other != name and not headers.has(name) and headers.has(other):
            return _Place(other, param.shape)
    if headers.has(name):
        return _Place(name, param.shape)
    part = param.kind.rpartition(".")[0].rpartition(".")[2]
    if part in ("q", "k", "v") and headers.has(fused := name.replace(f"attn_{part}.", "attn_qkv.")):
        queries, keys = headers.config.q_size, headers.config.kv_size
        start = {"q": 0, "k": queries, "v": queries + keys}[part]
        shape = (queries + 2 * keys, *param.shape[1:])
        return _Place(fused, shape, 0, slice(start, start + param.shape[0]))
    if part in ("gate", "up") and headers.has(fused := name.replace(f"ffn_{part}_exps", "ffn_gate_up_exps")):
        shape = (param.shape[0], 2 * param.shape[1], *param.shape[2:])
        return _Place(fused, shape, 1, slice(part == "up", None, 2))
    return _Place(name, param.shape)


def _block_source(place: _Place, kind: BlockType, param: Param, headers: CheckpointHeaders) -> Source:
    """A tensor of blocks U8 [..., K / values, size], and the factor (`.scale`, [1] or [E]) that NVFP4 may have."""
    expected = [ExpectedTensor(place.name, ("U8",), (*place.shape[:-1], place.shape[-1] // kind.values, kind.size))]
    factor = place.name.removesuffix("weight") + "scale"
    has_factor = kind.spec is not None and place.part is None and headers.has(factor)
    if has_factor:
        expected.append(ExpectedTensor(factor, ("F32",), param.shape[:1] if param.role == "experts" else (1,)))

    def load(get: GetTensor, rows: range | None = None) -> Weight:
        part = slice(None) if rows is None else slice(rows.start, rows.stop)
        weight = gguf_blocks.load(kind, place.of(get(place.name))[part])
        if not has_factor or isinstance(weight, Dense):
            return weight
        outer = get(factor)
        shaped = outer[part].reshape(-1, 1, 1) if param.role == "experts" else outer.reshape(())
        return replace(weight, outer=np.array(shaped))

    note = _SAME_VALUES.format(kind.name, storage_name(kind.spec)) if kind.name in RENUMBERED and kind.spec else ""
    if kind.spec is None:
        note = f"the numbers of {kind.name} are decoded to float32 when loaded"
    more = kind.bits_in_memory > 8 * kind.size / kind.values
    return Source(
        FAMILY,
        kind.spec,
        tuple(expected),
        load,
        note=note,
        load_experts=load,
        memory_bits=kind.bits_in_memory if more else None,
        stored_name=kind.name.lower(),
    )


FORMAT = Gguf()
