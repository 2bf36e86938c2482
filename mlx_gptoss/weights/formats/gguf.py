"""`gguf`: llama.cpp's layout of the architecture `gpt-oss`. Gate, up and down are separate and output-major; a matrix
is MXFP4 (experts), Q8_0, BF16, F16 or F32. Read only. gguf_metadata.py reads config and tokenizer.

An MXFP4 block of 32 values is 17 bytes: the e8m0 scale, then 16 bytes of which byte j has element j in its low nibble
and element j + 16 in its high nibble. A Q8_0 block of 32 values is 34 bytes: a float16 scale, then 32 int8 values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import CheckpointError
from .. import codecs
from ..params import Param
from ..tensor import AFFINE8_G32, MXFP4, Array, Quantized
from .base import CheckpointHeaders, ExpectedTensor, Format, Recipe, Source, Unit, dense_source, matrix_recipe

FAMILY = "gguf"
_BLOCK = 32
_MXFP4_BYTES, _Q8_0_BYTES = 17, 34
_BLOCKS_PER_STEP = 2**14  # repacked at a time, so that the blocks and their copies stay in the CPU's cache
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


class Gguf(Format):
    family = FAMILY
    writes = False
    recipes: Mapping[str, Recipe] = {"gguf": matrix_recipe(FAMILY, None, experts=(FAMILY, MXFP4))}

    def find(self, param: Param, headers: CheckpointHeaders) -> Source | None:
        if not headers.has("token_embd.weight", "blk.0.attn_q.weight"):
            return None
        name = tensor_name(param)
        size = headers.shape(name)[-1:]
        if headers.dtype(name) != "U8" or size not in ((_MXFP4_BYTES,), (_Q8_0_BYTES,)) or not param.is_matrix:
            return dense_source(FAMILY, name, param.shape)
        expected = ExpectedTensor(name, ("U8",), (*param.shape[:-1], param.shape[-1] // _BLOCK, *size))
        if size == (_MXFP4_BYTES,):
            return Source(FAMILY, MXFP4, (expected,), lambda get: repack_mxfp4(get(name)))
        return Source(FAMILY, AFFINE8_G32, (expected,), lambda get: repack_q8_0(get(name)))

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        raise CheckpointError(_READ_ONLY)

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        raise CheckpointError(_READ_ONLY)


def tensor_name(param: Param) -> str:
    """The name of a parameter's tensor in the file, such as `blk.3.ffn_gate_exps.weight`."""
    module, _, part = param.kind.rpartition(".")
    name = _NAMES.get(param.kind) or f"{_MODULES[module]}.{part}"
    return name if param.layer is None else f"blk.{param.layer}.{name}"


def repack_mxfp4(blocks: Array) -> Quantized:
    """MXFP4 blocks U8 [..., N, K / 32, 17] as a Quantized of the same values, with neighbours in one byte."""
    *lead, groups, size = blocks.shape
    flat = blocks.reshape(-1, size)
    codes = np.empty((len(flat), 16), np.uint8)
    for start in range(0, len(flat), _BLOCKS_PER_STEP):
        part = np.ascontiguousarray(flat[start : start + _BLOCKS_PER_STEP, 1:])
        codes[start : start + _BLOCKS_PER_STEP, :8] = codecs.pack(part & 15, 4)
        codes[start : start + _BLOCKS_PER_STEP, 8:] = codecs.pack(part >> 4, 4)
    return Quantized(MXFP4, codes.reshape(*lead, groups * 16), np.ascontiguousarray(blocks[..., 0]))


def repack_q8_0(blocks: Array) -> Quantized:
    """Q8_0 blocks U8 [..., N, K / 32, 34] as affine weights of the same values: scale * code - 128 * scale.

    Scales and biases are float16, or float32 where 128 * scale overflows float16.
    """
    *lead, groups, _ = blocks.shape
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
    if scale.size and not np.abs(scale).max() < 512:
        scale = scale.astype(np.float32)
    codes = (blocks[..., 2:] ^ 128).reshape(*lead, groups * _BLOCK)
    return Quantized(AFFINE8_G32, codes, scale, scale * scale.dtype.type(-128))


FORMAT = Gguf()
