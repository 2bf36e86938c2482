"""`gguf`: llama.cpp's layout of the architecture `gpt-oss`. Gate, up and down are separate and output-major; a matrix
has any of ggml's types that gguf_blocks.py knows. gguf_metadata.py reads and writes config and tokenizer.

Written are MXFP4 experts, the router and vectors in float32, and the rest in Q8_0, float16 or bfloat16, as llama.cpp's
converter does.

Ollama's first files (architecture `gptoss`) have other names, and some fuse q, k and v, or gate and up (interleaved).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from .. import gguf_blocks
from ..gguf_blocks import BY_NAME, RENUMBERED, BlockType
from ..gguf_writing import block_tensor, to_floats, to_mxfp4, to_q8_0
from ..params import Param
from ..safetensors import TensorInfo
from ..tensor import MXFP4, Array, Dense, Weight, storage_name
from .base import (
    FLOATS,
    CheckpointHeaders,
    Encoder,
    ExpectedTensor,
    Format,
    GetTensor,
    Recipe,
    Source,
    Unit,
    matrix_recipe,
)

FAMILY = "gguf"
_REST: Mapping[str, str] = {"gguf": "Q8_0", "gguf-f16": "F16", "gguf-bf16": "BF16"}  # of attention, embeddings, lm_head

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
    """Where a parameter is in the file: a tensor, its shape in values, and the parameter's part of an axis."""

    name: str
    shape: tuple[int, ...]
    axis: int = 0
    part: slice | None = None

    def of(self, tensor: Array) -> Array:
        return tensor if self.part is None else tensor[(slice(None),) * self.axis + (self.part,)]


class Gguf(Format):
    family = FAMILY
    writes = False  # as safetensors; GGUF_NAMES are written as GGUF files
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
        return [_unit(param, _REST[target]) for param in params]

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        return {}


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


def _unit(param: Param, rest: str) -> Unit:
    """The tensor of a parameter. A matrix whose rows blocks do not divide is float16, as llama.cpp's converter does."""
    name, kind = tensor_name(param), "F32"
    if param.is_matrix and param.role != "router":
        kind = "MXFP4" if param.role == "experts" else rest
    if kind in BY_NAME and param.shape[-1] % BY_NAME[kind].values:
        kind = "F16"
    info = block_tensor(name, kind, param.shape) if kind in BY_NAME else TensorInfo(name, kind, param.shape)
    convert: Callable[[Weight], Array] = {"MXFP4": to_mxfp4, "Q8_0": to_q8_0}.get(kind) or partial(
        to_floats, dtype=kind
    )

    def encode(weights: Sequence[Weight]) -> Encoder:
        return lambda start, stop: [(name, start, convert(weights[0][start:stop]))]

    return Unit((param,), (info,), encode)


def file_type(target: str) -> int:
    """llama.cpp's number of a file's main type, in its metadata: mostly Q8_0, F16 or BF16."""
    return {"Q8_0": 7, "F16": 1, "BF16": 32}[_REST[target]]


FORMAT = Gguf()
GGUF_NAMES = tuple(_REST)
