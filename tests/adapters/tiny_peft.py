"""Tiny random models and PEFT adapters for them, made by transformers and PEFT themselves, with their own logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LAYERS, EXPERT_COUNT, HIDDEN, INNER, VOCABULARY = 3, 6, 64, 96, 100


def tiny_model(inner: int = INNER) -> Any:
    """A transformers model in float32, with no two weights alike. inner: the experts' size."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(1)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = GptOssConfig(
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=inner,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=EXPERT_COUNT,
        num_experts_per_tok=2,
        vocab_size=VOCABULARY,
        sliding_window=8,
        layer_types=kinds,
        max_position_embeddings=512,
        eos_token_id=1,
        pad_token_id=0,
        attn_implementation="eager",
    )
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "norm" not in name:
                values.copy_(torch.randn(values.shape) * 0.1)
    return model


def save_base(model: Any, folder: Path) -> Path:
    """The model as a checkpoint that mlx-gptoss opens."""
    model.save_pretrained(folder)
    return folder


def make_adapter(model: Any, folder: Path, seed: int = 2, **options: Any) -> Any:
    """A PEFT model with random factors, saved to the folder. options: of LoraConfig."""
    import peft

    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options})).eval()
    with torch.no_grad():
        for name, values in wrapped.named_parameters():
            if "lora_" in name:
                values.copy_(torch.randn(values.shape) * 0.1)
    wrapped.save_pretrained(folder)
    return wrapped


def logits(model: Any, ids: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].float().numpy()


def rewrite(folder: Path, change: Any = None, **fields: Any) -> None:
    """Change an adapter's files: change(tensors) -> tensors, and fields of its config."""
    if change is not None:
        file = next(folder.glob("*.safetensors"))
        save_file({name: np.ascontiguousarray(values) for name, values in change(load_file(file)).items()}, file)
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))


CASES: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "both": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
    "gate_up alone": {"target_modules": [], "target_parameters": EXPERTS[:1]},
    "down alone": {"target_modules": [], "target_parameters": EXPERTS[1:]},
    "router": {"target_modules": ["q_proj"], "target_parameters": ["mlp.router.weight"]},
    "rslora": {"target_modules": ATTENTION, "target_parameters": EXPERTS, "use_rslora": True},
    "rank_pattern": {
        "target_modules": ATTENTION,
        "target_parameters": EXPERTS,
        "rank_pattern": {"q_proj": 7, r"layers.1.self_attn.o_proj": 2, "mlp.experts.down_proj": 3},
        "alpha_pattern": {"k_proj": 11, "gate_up_proj": 5},
    },
    "layers_to_transform": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
    "layer-limited": {"target_modules": ["v_proj"], "target_parameters": [f"1.{name}" for name in EXPERTS]},
}
