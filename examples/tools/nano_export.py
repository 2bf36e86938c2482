"""Write the trained model as a checkpoint in OpenAI's layout, experts in MXFP4 and the rest bfloat16; read it back."""

from __future__ import annotations

import json
from pathlib import Path

from nano_model import Experts, Nano, Shape, mxfp4_codes, mxfp4_values
from nano_tokenizer import write_tokenizer
from requires import torch
from safetensors.torch import load_file, save
from torch import Tensor

NOT_QUANTIZED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def export(model: Nano, folder: Path) -> None:
    """Write model.safetensors, config.json, generation_config.json and tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    specials = write_tokenizer(folder)
    (folder / "model.safetensors").write_bytes(save(tensors(model), metadata={"format": "pt"}))
    write_json(folder / "config.json", config(model.shape, specials))
    stops = [specials["<|return|>"], specials["<|call|>"], specials["<|endoftext|>"]]
    start, pad = specials["<|startoftext|>"], specials["<|endoftext|>"]
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": start, "do_sample": False, "eos_token_id": stops, "pad_token_id": pad},
    )


def write_json(file: Path, value: dict[str, object]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def tensors(model: Nano) -> dict[str, Tensor]:
    """All tensors of model.safetensors by their published names."""
    out = {}
    for name, p in model.named_parameters():
        if ".mlp." not in name or ".router." in name:
            full = name if name == "lm_head.weight" else f"model.{name}"
            out[full] = p.detach().to(torch.bfloat16).contiguous()
    for i, layer in enumerate(model.layers):
        out |= {f"model.layers.{i}.mlp.experts.{name}": t for name, t in experts(layer.mlp).items()}
    return out


def experts(mlp: Experts) -> dict[str, Tensor]:
    """Blocks [E, out, in/32, 16] (low nibble first), scales [E, out, in/32], biases [E, out]."""
    out = {}
    for name, weight, bias in (
        ("gate_up_proj", mlp.gate_up, mlp.gate_up_bias),
        ("down_proj", mlp.down, mlp.down_bias),
    ):
        codes, scales = mxfp4_codes(weight.detach())
        pairs = codes.unflatten(-1, (-1, 16, 2))
        out[f"{name}_blocks"] = (pairs[..., 0] | pairs[..., 1] << 4).contiguous()
        out[f"{name}_scales"] = scales
        out[f"{name}_bias"] = bias.detach().to(torch.bfloat16)
    return out


def parameters(folder: Path) -> dict[str, Tensor]:
    """The state of a Nano in float32, from the weights that `export` wrote."""
    stored = load_file(folder / "model.safetensors")
    out = {}
    for name, t in stored.items():
        short = name.removeprefix("model.").replace(".experts.", ".").replace("_proj_", "_")
        if name.endswith("_blocks"):
            codes = torch.stack([t & 15, t >> 4], -1).flatten(-3)
            out[short.removesuffix("_blocks")] = mxfp4_values(codes, stored[name.replace("_blocks", "_scales")])
        elif not name.endswith("_scales"):
            out[short] = t.float()
    return out


def config(s: Shape, specials: dict[str, int]) -> dict[str, object]:
    """config.json as published with gpt-oss."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "torch_dtype": "bfloat16",
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "intermediate_size": s.intermediate,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "num_local_experts": s.experts,
        "num_experts_per_tok": s.active,
        "experts_per_token": s.active,
        "sliding_window": s.window,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(s.layers)],
        "max_position_embeddings": 131072,
        "initial_context_length": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "swiglu_limit": 7.0,
        "hidden_act": "silu",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "router_aux_loss_coef": 0.9,
        "output_router_logits": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "eos_token_id": specials["<|return|>"],
        "pad_token_id": specials["<|endoftext|>"],
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": NOT_QUANTIZED},
    }
