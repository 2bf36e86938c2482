"""Adapters of the bundled model, in mlx-lm's files, with random factors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mlx_gptoss.loading.plan import NANO
from mlx_gptoss.weights import checkpoint as checkpoints

QUESTION = "What is 12 + 30?"


def write_nano_adapter(folder: Path, seed: int = 0, scale: float = 1.0, experts: bool = False) -> Path:
    """An adapter of rank 4 for q and v, and with `experts` for the experts' down projections, too. At scale 1 it
    changes what the model says. Returns the folder."""
    config = checkpoints.open(NANO).config
    rng, tensors = np.random.default_rng(seed), {}
    pairs = {
        "self_attn.q_proj": ((config.hidden_size, 4), (4, config.q_size)),
        "self_attn.v_proj": ((config.hidden_size, 4), (4, config.kv_size)),
    }
    if experts:
        count, inner = config.num_local_experts, config.intermediate_size
        pairs["mlp.experts.down_proj"] = ((count, 4, inner), (count, config.hidden_size, 4))
    for layer in range(config.num_hidden_layers):
        for module, (a, b) in pairs.items():
            tensors[f"model.layers.{layer}.{module}.lora_a"] = rng.standard_normal(a).astype(np.float32)
            tensors[f"model.layers.{layer}.{module}.lora_b"] = rng.standard_normal(b).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapters.safetensors")
    parameters = {"rank": 4, "scale": scale, "dropout": 0.0}
    settings = {"fine_tune_type": "lora", "num_layers": config.num_hidden_layers, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
