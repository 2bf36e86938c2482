"""PEFT's LoRA adapters, and the same model with the adapter merged by PEFT."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from . import base

NAME = "peft"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def version() -> str | None:
    return base.version_of("peft")


def _make(source: Path, folder: Path, modules: list[str], parameters: list[str]) -> base.Weights:
    """The decoding is PEFT's merge in float32."""
    import peft
    import torch
    from transformers import GptOssForCausalLM

    torch.manual_seed(2)
    model = GptOssForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=modules, target_parameters=parameters)
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, values in wrapped.named_parameters():
            if "lora_" in name:
                values.copy_(torch.randn(values.shape) * 0.1)
    wrapped.save_pretrained(folder)
    merged = wrapped.merge_and_unload().state_dict()
    return base.by_parameter({name: values.float().numpy() for name, values in merged.items()})


ROWS = (
    base.Row(
        "LoRA adapters of attention and experts",
        {
            "lora": partial(_make, modules=ATTENTION, parameters=EXPERTS),
            "lora-attention": partial(_make, modules=ATTENTION, parameters=[]),
        },
    ),
)
