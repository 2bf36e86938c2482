"""OpenAI's own package `gpt-oss`: the published `original/` folder as its PyTorch model reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from . import base
from .with_transformers import random_mxfp4

NAME = "gpt-oss"
_NAMES = {
    "embedding.weight": "embed.weight",
    "unembedding.weight": "lm_head.weight",
    "norm.scale": "norm.weight",
    "attn.norm.scale": "attention_norm.weight",
    "attn.sinks": "attention.sinks",
    "attn.out.weight": "attention.o.weight",
    "attn.out.bias": "attention.o.bias",
    "mlp.norm.scale": "mlp_norm.weight",
    "mlp.gate.weight": "router.weight",
    "mlp.gate.bias": "router.bias",
}


def version() -> str | None:
    return base.version_of("gpt-oss")


def _original(source: Path, folder: Path) -> base.Weights:
    import json

    import torch
    from gpt_oss.torch.weights import Checkpoint

    random_mxfp4(source, folder)
    stored = base.load(folder)
    for path in folder.iterdir():
        path.unlink()
    plain = {n: v for n, v in base.by_parameter(base.load(source)).items() if n.split(".")[2:3] != ["experts"]}
    inverse = {ours: theirs for theirs, ours in _NAMES.items()}
    tensors = {}
    for name, values in plain.items():
        layer, rest = (f"block.{name.split('.')[1]}.", name.split(".", 2)[2]) if "layers." in name else ("", name)
        if rest in inverse:
            tensors[layer + inverse[rest]] = values
    for layer in range(base.LAYERS):
        ours, theirs = f"layers.{layer}.attention", f"block.{layer}."
        for part in ("weight", "bias"):
            tensors[f"{theirs}attn.qkv.{part}"] = np.concatenate([plain[f"{ours}.{x}.{part}"] for x in "qkv"])
        experts = f"model.layers.{layer}.mlp.experts."
        for fused, mlp in (("gate_up_proj", "mlp1"), ("down_proj", "mlp2")):
            tensors[f"{theirs}mlp.{mlp}_weight.blocks"] = stored[f"{experts}{fused}_blocks"]
            tensors[f"{theirs}mlp.{mlp}_weight.scales"] = stored[f"{experts}{fused}_scales"]
            tensors[f"{theirs}mlp.{mlp}_bias"] = stored[f"{experts}{fused}_bias"]
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, folder / "model.safetensors")
    c = base.CONFIG
    names = ("num_hidden_layers", "experts_per_token", "vocab_size", "hidden_size", "intermediate_size", "swiglu_limit",
             "head_dim", "num_attention_heads", "num_key_value_heads", "sliding_window", "initial_context_length",
             "rope_theta")  # fmt: skip
    rope = {"rope_scaling_factor": 32.0, "rope_ntk_alpha": 1, "rope_ntk_beta": 32}
    (folder / "config.json").write_text(
        json.dumps({name: c[name] for name in names} | rope | {"num_experts": base.EXPERTS})
    )

    theirs = Checkpoint(str(folder), torch.device("cpu"))
    found = {}
    for layer in ("", *(f"block.{n}." for n in range(base.LAYERS))):
        prefix = layer.replace("block", "layers")
        names = [name for name in _NAMES if (layer + name) in theirs.tensor_name_to_file]
        found |= {prefix + _NAMES[name]: theirs.get(layer + name).float().numpy() for name in names}
        if not layer:
            continue
        for part in ("weight", "bias"):
            fused = theirs.get(f"{layer}attn.qkv.{part}").float().numpy()
            for x, rows in zip("qkv", np.split(fused, [256, 384]), strict=True):
                found[f"{prefix}attention.{x}.{part}"] = rows
            up = theirs.get(f"{layer}mlp.mlp1_{part}").float().numpy()
            found |= {f"{prefix}experts.{which}.{part}": up[:, at] for which, at in base.PARTS.items()}
            found[f"{prefix}experts.down.{part}"] = theirs.get(f"{layer}mlp.mlp2_{part}").float().numpy()
    return found


ROWS = (base.Row("MXFP4 experts, the published `original/` (decoded by the tool)", {"original": _original}),)
