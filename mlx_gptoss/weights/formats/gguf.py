"""`gguf`: llama.cpp's layout of the architecture `gpt-oss`. Gate, up and down are apart and output-major; a matrix is
MXFP4 (experts), Q8_0, BF16, F16 or F32. Config and tokenizer are in the file's metadata. Read only.

An MXFP4 block of 32 is 17 bytes: the e8m0 scale, then byte j with element j in its low and element j + 16 in its high
nibble. A Q8_0 block of 32 is 34 bytes: a float16 scale, then int8 values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...config import token_ids
from ...errors import CheckpointError
from .. import codecs
from ..gguf import Strings, Value
from ..params import Param
from ..safetensors import TensorInfo
from ..tensor import AFFINE8_G32, MXFP4, Array, Quantized
from .base import CheckpointHeaders, ExpectedTensor, Format, Recipe, Source, Unit, dense_source, matrix_recipe

ARCHITECTURE = "gpt-oss"
_BLOCK = 32
_MXFP4_BYTES, _Q8_0_BYTES = 17, 34
_BLOCKS_PER_STEP = 2**14  # blocks rearranged at once: they and their copies stay in the processor's cache
_READ_ONLY = "GGUF files are only read; convert to mxfp4, which keeps the experts' bits, or to another format"

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

_STOP_TOKENS = ("<|return|>", "<|endoftext|>", "<|call|>")
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # token types
# How o200k cuts text into pieces before merging ("gpt-4o" in llama.cpp's table of such expressions)
_SPLIT_PATTERNS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)


class Gguf(Format):
    family = "gguf"
    writes = False
    recipes: Mapping[str, Recipe] = {"gguf": matrix_recipe("gguf", None, experts=("gguf", MXFP4))}

    def find(self, param: Param, headers: CheckpointHeaders) -> Source | None:
        if not headers.has("token_embd.weight", "blk.0.attn_q.weight"):
            return None
        name = tensor_name(param)
        size = headers.shape(name)[-1:]
        if headers.dtype(name) != "U8" or size not in ((_MXFP4_BYTES,), (_Q8_0_BYTES,)) or not param.is_matrix:
            return dense_source("gguf", name, param.shape)
        expected = ExpectedTensor(name, ("U8",), (*param.shape[:-1], param.shape[-1] // _BLOCK, *size))
        if size == (_MXFP4_BYTES,):
            return Source("gguf", MXFP4, (expected,), lambda get: repack_mxfp4(get(name)))
        return Source("gguf", AFFINE8_G32, (expected,), lambda get: repack_q8_0(get(name)))

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        raise CheckpointError(_READ_ONLY)

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        raise CheckpointError(_READ_ONLY)


def tensor_name(param: Param) -> str:
    """`blk.3.ffn_gate_exps.weight`"""
    module, _, part = param.kind.rpartition(".")
    name = _NAMES.get(param.kind) or f"{_MODULES[module]}.{part}"
    return name if param.layer is None else f"blk.{param.layer}.{name}"


def repack_mxfp4(blocks: Array) -> Quantized:
    """U8 [..., N, K / 32, 17] -> MXFP4 with neighbours in one byte; the same numbers."""
    *lead, groups, size = blocks.shape
    flat = blocks.reshape(-1, size)
    codes = np.empty((len(flat), 16), np.uint8)
    for start in range(0, len(flat), _BLOCKS_PER_STEP):
        part = np.ascontiguousarray(flat[start : start + _BLOCKS_PER_STEP, 1:])
        codes[start : start + _BLOCKS_PER_STEP, :8] = codecs.pack(part & 15, 4)
        codes[start : start + _BLOCKS_PER_STEP, 8:] = codecs.pack(part >> 4, 4)
    return Quantized(MXFP4, codes.reshape(*lead, groups * 16), np.ascontiguousarray(blocks[..., 0]))


def repack_q8_0(blocks: Array) -> Quantized:
    """U8 [..., N, K / 32, 34] -> scale * code - 128 scale, exact; in float16, or float32 if that overflows."""
    *lead, groups, _ = blocks.shape
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
    if scale.size and not np.abs(scale).max() < 512:
        scale = scale.astype(np.float32)
    codes = (blocks[..., 2:] ^ 128).reshape(*lead, groups * _BLOCK)
    return Quantized(AFFINE8_G32, codes, scale, scale * scale.dtype.type(-128))


def config(metadata: Mapping[str, Value], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """config.json's content in the published dialect. Raises CheckpointError for another architecture."""
    found = metadata.get("general.architecture")
    if found != ARCHITECTURE:
        hint = " (Ollama's own files name and fuse tensors otherwise)" if found == "gptoss" else ""
        raise CheckpointError(
            f"the GGUF file's architecture is {found!r}{hint}; only {ARCHITECTURE!r} can be read: take a file that "
            "llama.cpp made"
        )

    def get(key: str) -> Any:
        value = metadata.get(f"{ARCHITECTURE}.{key}")
        if not isinstance(value, (int, float, str, type(None))):
            raise CheckpointError(f"the GGUF file's {ARCHITECTURE}.{key} is a list, not one value; download it again")
        return float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-05, not 9.99999974e-06

    embedding = tensors.get("token_embd.weight")
    expert_width = get("expert_feed_forward_length")
    content = {
        "model_type": "gpt_oss",
        "num_hidden_layers": get("block_count"),
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length") if expert_width is None else expert_width,
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": get("attention.key_length"),
        "num_local_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "vocab_size": embedding.shape[0] if embedding else None,
        "sliding_window": get("attention.sliding_window"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base"),
        "rope_scaling": _rope_scaling(get),
        "eos_token_id": stop_ids(metadata),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in content.items() if value is not None}


def _rope_scaling(get: Any) -> dict[str, Any] | None:
    if get("rope.scaling.type") in (None, "none"):
        return None
    found = {
        "rope_type": get("rope.scaling.type"),
        "factor": get("rope.scaling.factor"),
        "original_max_position_embeddings": get("rope.scaling.original_context_length"),
        "beta_fast": get("rope.scaling.yarn_beta_fast"),
        "beta_slow": get("rope.scaling.yarn_beta_slow"),
        "truncate": False,
    }
    return {key: value for key, value in found.items() if value is not None}


def files(metadata: Mapping[str, Value]) -> dict[str, str]:
    """The files of a checkpoint folder, besides weights and config.json, that the metadata hold: name -> text.

    Raises CheckpointError for a vocabulary that is not byte-level BPE with the published splitting of text.
    """
    found = {"generation_config.json": json.dumps({"do_sample": True, "eos_token_id": stop_ids(metadata)}, indent=2)}
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        found["chat_template.jinja"] = template
    if "tokenizer.ggml.tokens" in metadata:
        found["tokenizer.json"] = json.dumps(_tokenizer_json(metadata), ensure_ascii=False)
        found["tokenizer_config.json"] = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2)
    return found


def stop_ids(metadata: Mapping[str, Value]) -> list[int]:
    """The ids that end a generation: the file's own, then those that generation_config.json lists in the published
    models. As in llama.cpp, they are known by their names."""
    eos, tokens = metadata.get("tokenizer.ggml.eos_token_id"), metadata.get("tokenizer.ggml.tokens")
    found = [] if eos is None else [eos]
    if isinstance(tokens, Strings):
        names = {text: id for id, text in enumerate(tokens) if text in _STOP_TOKENS}
        found += [names[text] for text in _STOP_TOKENS if text in names]
    return list(token_ids(list(dict.fromkeys(found)), "tokenizer.ggml.eos_token_id"))


def _tokenizer_json(metadata: Mapping[str, Value]) -> dict[str, Any]:
    """tokenizer.json's content."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre != "gpt-4o":
        raise CheckpointError(
            f"the GGUF file's tokenizer is {kind!r} with {pre!r}, not gpt-oss's 'gpt2' with 'gpt-4o'; "
            "take a file that llama.cpp made of a gpt-oss model"
        )
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.merges")
    types = metadata.get("tokenizer.ggml.token_type")
    if not (isinstance(tokens, Strings) and isinstance(merges, Strings) and isinstance(types, np.ndarray)):
        raise CheckpointError("the GGUF file's tokenizer lacks tokens, merges or token types; download it again")
    all_tokens = enumerate(zip(tokens, types.tolist(), strict=False))
    used = [(text, id, kind) for id, (text, kind) in all_tokens if kind != _UNUSED]
    vocabulary = {text: id for text, id, _ in used}
    pairs = [merge.split(" ") for merge in merges]
    if len(types) != len(tokens) or len(vocabulary) != len(used) or any(len(pair) != 2 for pair in pairs):
        raise CheckpointError("the GGUF file's tokens, types and merges contradict each other; download it again")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": id, "content": text, **plain, "special": kind == _CONTROL}
        for text, id, kind in used
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": "|".join(_SPLIT_PATTERNS)}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocabulary, "merges": pairs},
    }


FORMAT = Gguf()
