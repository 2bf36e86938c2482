"""The metadata of a GGUF file as the files of a checkpoint folder (config.json, tokenizer.json, the rest), and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from ...config import ModelConfig
from ...errors import CheckpointError
from ...untrusted import tokenizer_file
from ...untrusted.json_file import parse_json
from ...untrusted.tokenizer_file import SPLIT_PATTERNS
from ..config_json import read_config, token_ids
from ..gguf import StringArray, Value
from ..safetensors import MAX_ITEMS, TensorInfo

ARCHITECTURE, OLLAMA = "gpt-oss", "gptoss"  # the latter in Ollama's first files
_STOP_TOKENS = ("<|return|>", "<|endoftext|>", "<|call|>")
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # token types


def config_json(metadata: Mapping[str, Value], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The content of config.json, in the published dialect. Raises CheckpointError for another architecture."""
    architecture = metadata.get("general.architecture")
    if architecture not in (ARCHITECTURE, OLLAMA):
        raise CheckpointError(
            f"the GGUF file's architecture is {architecture!r}; only {ARCHITECTURE!r} is supported: use a file that "
            "llama.cpp made from a gpt-oss model"
        )

    def get(key: str) -> Any:
        value = metadata.get(f"{architecture}.{key}")
        if not isinstance(value, (int, float, str, type(None))):
            raise CheckpointError(f"the GGUF file's {architecture}.{key} is a list, not a number; download it again")
        # The file holds float32: 1e-05 must come out as 1e-05, not as 9.99999974e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

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


def _rope_scaling(get: Callable[[str], Any]) -> dict[str, Any] | None:
    """`rope_scaling`; None for plain RoPE. GGUF has no key for `truncate`, which is false for gpt-oss."""
    kind = get("rope.scaling.type")
    if kind is None and get("rope.scaling.original_context_length"):
        kind = "yarn"  # Ollama's first files do not name it
    if kind in (None, "none"):
        return None
    content = {
        "rope_type": kind,
        "factor": get("rope.scaling.factor"),
        "original_max_position_embeddings": get("rope.scaling.original_context_length"),
        "beta_fast": get("rope.scaling.yarn_beta_fast"),
        "beta_slow": get("rope.scaling.yarn_beta_slow"),
        "truncate": False,
    }
    return {key: value for key, value in content.items() if value is not None}


def companion_files(metadata: Mapping[str, Value]) -> dict[str, str]:
    """The files of a checkpoint folder that the metadata contain, except weights and config.json: name -> text.

    Raises CheckpointError for a vocabulary that is not byte-level BPE with the published pre-tokenizer.
    """
    texts = {"generation_config.json": json.dumps({"do_sample": True, "eos_token_id": stop_ids(metadata)}, indent=2)}
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        texts["chat_template.jinja"] = template
    if "tokenizer.ggml.tokens" in metadata:
        texts["tokenizer.json"] = json.dumps(_tokenizer_json(metadata), ensure_ascii=False)
        texts["tokenizer_config.json"] = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2)
    return texts


def stop_ids(metadata: Mapping[str, Value]) -> list[int]:
    """The token ids that end a generation: the file's own EOS, then those of the published generation_config.json.

    The latter are looked up by their names, as llama.cpp does.
    """
    eos, tokens = metadata.get("tokenizer.ggml.eos_token_id"), metadata.get("tokenizer.ggml.tokens")
    ids = [] if eos is None else [eos]
    if isinstance(tokens, StringArray):
        names = {text: id for id, text in enumerate(tokens) if text in _STOP_TOKENS}
        ids += [names[text] for text in _STOP_TOKENS if text in names]
    return list(token_ids(list(dict.fromkeys(ids)), "tokenizer.ggml.eos_token_id"))


def _tokenizer_json(metadata: Mapping[str, Value]) -> dict[str, Any]:
    """The content of tokenizer.json. Raises CheckpointError for another tokenizer, or for contradictory tokens."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre != "gpt-4o":
        raise CheckpointError(
            f"the GGUF file's tokenizer is {kind!r} with {pre!r}, not gpt-oss's 'gpt2' with 'gpt-4o'; "
            "use a file that llama.cpp made from a gpt-oss model"
        )
    tokens, merges = _tokens_and_merges(metadata)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": id, "content": text, **plain, "special": kind == _CONTROL}
        for text, id, kind in tokens
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": "|".join(SPLIT_PATTERNS)}, "behavior": "Isolated", "invert": False}
    vocabulary = {text: id for text, id, _ in tokens}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocabulary, "merges": merges},
    }


def _tokens_and_merges(metadata: Mapping[str, Value]) -> tuple[list[tuple[str, int, int]], list[list[str]]]:
    """(text, id, token type) of every token that is in use, and the pairs that BPE merges."""
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.merges")
    types = metadata.get("tokenizer.ggml.token_type")
    if not (isinstance(tokens, StringArray) and isinstance(merges, StringArray) and isinstance(types, np.ndarray)):
        raise CheckpointError("the GGUF file's tokenizer lacks tokens, merges or token types; download it again")
    typed = enumerate(zip(tokens, types.tolist(), strict=False))
    used = [(text, id, kind) for id, (text, kind) in typed if kind != _UNUSED]
    pairs = [merge.split(" ") for merge in merges]
    distinct = len({text for text, _, _ in used})
    if len(types) != len(tokens) or distinct != len(used) or any(len(pair) != 2 for pair in pairs):
        raise CheckpointError("the GGUF file's tokens, types and merges contradict each other; download it again")
    return used, pairs


def check_config(content: Mapping[str, Any], config: ModelConfig) -> None:
    """Raise CheckpointError if GGUF has no keys for what the config says: the file would be another model."""
    keys = _config_entries(content)
    found = read_config(config_json(keys, {}) | {"vocab_size": config.vocab_size})
    differing = [f.name for f in fields(config) if getattr(found, f.name) != getattr(config, f.name)]
    differing = [name for name in differing if name not in ("eos_token_id", "pad_token_id")]
    if differing:
        raise CheckpointError(
            f"GGUF has no keys for this model's {', '.join(differing)}; convert it to mxfp4 or an mlx-* format instead"
        )


def entries(content: Mapping[str, Any], files: Mapping[str, bytes], file_type: int, name: str) -> dict[str, Any]:
    """The metadata of a GGUF file, with the keys of llama.cpp's converter.

    content: that of config.json. files: tokenizer.json and the like. Raises CheckpointError for a tokenizer.json that
    is not gpt-oss's kind.
    """
    found = {"general.architecture": ARCHITECTURE, "general.type": "model", "general.name": name}
    found |= _config_entries(content) | {"general.file_type": file_type, "general.quantization_version": 2}
    found |= _tokenizer_entries(files["tokenizer.json"], content) if "tokenizer.json" in files else {}
    template: object = files.get("chat_template.jinja", b"").decode("utf-8", "replace")
    if not template and "tokenizer_config.json" in files:
        settings = parse_json(files["tokenizer_config.json"], "tokenizer_config.json", MAX_ITEMS)
        template = settings.get("chat_template") if isinstance(settings, dict) else None
    if isinstance(template, str) and template:
        found["tokenizer.chat_template"] = template
    return found


def _check_split(tokenizer: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless text is split as gpt-oss's tokenizer splits it: GGUF has a name for that, "gpt-4o",
    and no place for another pattern."""
    steps = (tokenizer.get("pre_tokenizer") or {}).get("pretokenizers", [])
    patterns = [step["pattern"] for step in steps if isinstance(step, dict) and step.get("type") == "Split"]
    if patterns != [{"Regex": "|".join(SPLIT_PATTERNS)}]:
        raise CheckpointError(
            "the model's tokenizer splits text in its own way, which GGUF cannot say; convert to another format"
        )


def _config_entries(content: Mapping[str, Any]) -> dict[str, Any]:
    scaling = content["rope_scaling"]
    values = {
        "block_count": content["num_hidden_layers"],
        "context_length": content["max_position_embeddings"],
        "embedding_length": content["hidden_size"],
        "feed_forward_length": content["intermediate_size"],
        "attention.head_count": content["num_attention_heads"],
        "attention.head_count_kv": content["num_key_value_heads"],
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(scaling["factor"]),
        "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": float(scaling["beta_fast"]),
        "rope.scaling.yarn_beta_slow": float(scaling["beta_slow"]),
        "rope.freq_base": float(content["rope_theta"]),
        "attention.layer_norm_rms_epsilon": float(content["rms_norm_eps"]),
        "expert_count": content["num_local_experts"],
        "expert_used_count": content["num_experts_per_tok"],
        "attention.key_length": content["head_dim"],
        "attention.value_length": content["head_dim"],
        "attention.sliding_window": content["sliding_window"],
        "expert_feed_forward_length": content["intermediate_size"],
    }
    named = {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}
    return {"general.architecture": ARCHITECTURE, **named}


def _tokenizer_entries(data: bytes, content: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens, one for each row of the embeddings, their types, the merges, and the ids of special tokens."""
    tokenizer_file.check(data, "tokenizer.json")
    file = json.loads(data)
    _check_split(file)
    tokens = [f"[PAD{id}]" for id in range(content["vocab_size"])]
    types = np.full(len(tokens), _UNUSED, np.int32)
    added = file.get("added_tokens") or []
    kinds = {token["id"]: _CONTROL if token.get("special") else _USER_DEFINED for token in added}
    ids = {**file["model"]["vocab"], **{token["content"]: token["id"] for token in added}}
    for text, id in ids.items():
        if id < len(tokens):
            tokens[id], types[id] = text, kinds.get(id, _NORMAL)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in file["model"]["merges"]]
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }
    eos = content.get("eos_token_id")
    specials = {
        "bos": ids.get("<|startoftext|>"),
        "eos": eos[0] if isinstance(eos, list) else eos,
        "padding": content.get("pad_token_id"),
    }
    return found | {f"tokenizer.ggml.{key}_token_id": id for key, id in specials.items() if id is not None}
