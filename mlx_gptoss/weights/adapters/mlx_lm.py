"""mlx-lm's adapters: adapters.safetensors, with lora_a [K, R] and lora_b [R, N] of linear layers, and [E, R, K] and
[E, N, R] of switch layers. The scale is used as it stands, not divided by the rank. Source: mlx_lm/tuner/lora.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError
from .factors import Entry
from .files import AdapterFiles, checked_rank

LAYER = re.compile(r"model\.layers\.(\d{1,4})\.(self_attn|mlp)\.([\w.]{1,60})\.lora_([ab])", re.ASCII)
MODULES = {
    ("self_attn", "q_proj"): "attention.q",
    ("self_attn", "k_proj"): "attention.k",
    ("self_attn", "v_proj"): "attention.v",
    ("self_attn", "o_proj"): "attention.o",
    ("mlp", "router"): "router",
    ("mlp", "experts.gate_proj"): "experts.gate",
    ("mlp", "experts.up_proj"): "experts.up",
    ("mlp", "experts.down_proj"): "experts.down",
}
PARAMETERS = {"rank", "scale", "dropout", "keys"}
SHOWN = {"fine_tune_type", "lora_parameters", "num_layers", "model"}  # fields of the config; others are of the training


def entries_of(files: AdapterFiles) -> dict[str, Entry]:
    """The entries by parameter. Raises CheckpointError."""
    scale, rank = _scale_and_rank(files)
    pairs: dict[str, dict[str, str]] = {}
    for tensor in files.file.header.tensors:
        match = LAYER.fullmatch(tensor)
        kind = MODULES.get((match[2], match[3])) if match else None
        if match is None or kind is None:
            raise CheckpointError(
                f"{files.folder} has {tensor!r:.200}, which is no LoRA of attention, router or experts; train only "
                "those (keys in lora_parameters)"
            )
        pairs.setdefault(f"layers.{int(match[1])}.{kind}", {})[match[4]] = tensor
    return {name: _entry(files, name, pair, scale, rank) for name, pair in pairs.items()}


def _entry(files: AdapterFiles, name: str, pair: Mapping[str, str], scale: float, rank: int) -> Entry:
    if set(pair) != {"a", "b"}:
        raise CheckpointError(f"{files.folder} has only one of lora_a and lora_b for {name}; save the adapter again")
    entry = _switch(files, name, pair, scale) if ".experts." in name else _linear(files, name, pair, scale)
    if entry.rank != rank:
        raise CheckpointError(f"{pair['a']!r:.200} has rank {entry.rank}, adapter_config.json says {rank}")
    return entry


def _linear(files: AdapterFiles, name: str, pair: Mapping[str, str], scale: float) -> Entry:
    return files.linear(name, (pair["a"], pair["b"]), scale, transposed=True)


def _switch(files: AdapterFiles, name: str, pair: Mapping[str, str], scale: float) -> Entry:
    a, b = pair["a"], pair["b"]
    param = files.param(name, a)
    experts, outputs, inputs = param.shape
    shape = files.shape(a)
    if len(shape) != 3 or (shape[0], shape[2]) != (experts, inputs):
        raise files.misfit(a, shape, param)
    rank = checked_rank(shape[1], a)
    if files.shape(b) != (experts, outputs, rank):
        raise files.misfit(b, files.shape(b), param)
    return Entry(a, rank, inputs, outputs, experts, scale, lambda: files.get(a), lambda: files.get(b))


def _scale_and_rank(files: AdapterFiles) -> tuple[float, int]:
    config, where = files.config, f"{files.folder}/adapter_config.json"
    kind: Any = config.get("fine_tune_type", "lora")
    if kind == "full":
        raise CheckpointError(f"{where}: fine_tune_type full has whole weights; save the model with `mlx_lm.fuse`")
    if kind != "lora":
        raise CheckpointError(f"{where}: fine_tune_type {kind!r:.40} is not supported; train with lora")
    given = config.get("lora_parameters")
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{where} has no lora_parameters; save the adapter again with mlx-lm")
    if unknown := sorted(set(map(str, given)) - PARAMETERS):
        raise CheckpointError(f"{where}: lora_parameters has {unknown[0]!r:.60}, whose meaning is not known here")
    scale, rank = given.get("scale"), given.get("rank")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) <= 1e6:
        raise CheckpointError(f"{where}: lora_parameters needs a scale, a number, not {scale!r:.60}")
    if type(rank) is not int:
        raise CheckpointError(f"{where}: lora_parameters needs a rank, an integer, not {rank!r:.60}")
    return float(scale), rank
