"""A LoRA adapter over ranks: each holds its heads' and experts' parts of the factors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights.params import parameters

SCRIPT = str(Path(__file__).parent / "adapter_logits.py")


@pytest.fixture
def adapter(mini, tmp_path):
    """Random factors for attention, router and every expert, of ranks that no number of ranks divides."""
    rng, tensors = np.random.default_rng(0), {}
    names = {f"attention.{part}": f"self_attn.{part}_proj" for part in "qkvo"} | {"router": "mlp.router"}
    for param in parameters(checkpoints.open(mini / "mxfp4").config):
        kind = param.kind.removesuffix(".weight")
        if not param.is_matrix or param.layer is None:
            continue
        pairs = {names[kind]: param.shape} if kind in names else {}
        if kind.startswith("experts."):
            part = kind.split(".")[1]
            pairs = {f"mlp.experts.{e}.{part}_proj": param.shape[1:] for e in range(param.shape[0])}
        for name, (outputs, inputs) in pairs.items():
            stem = f"base_model.model.model.layers.{param.layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = rng.standard_normal((3, inputs)).astype("f4") * np.float32(0.1)
            tensors[f"{stem}.lora_B.weight"] = rng.standard_normal((outputs, 3)).astype("f4") * np.float32(0.1)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6}))
    return folder


def check(ranks):
    (code, out, err), *others = ranks.end(200)
    assert code == 0, err
    assert all(other[:2] == (0, "") for other in others), others
    result = json.loads(out)
    assert result["error"] < 1e-4 and result["effect"] > 1e-2 and result["same"], result
    own, whole = result["bytes"]
    assert 0.3 * whole < own < 0.8 * whole


def test_through_mlx(ring, mini, adapter):
    check(ring(2, SCRIPT, str(mini / "mxfp4"), str(adapter)))


def test_through_torch(torchrun, mini, adapter):
    check(torchrun(2, SCRIPT, str(mini / "mxfp4"), str(adapter)))
