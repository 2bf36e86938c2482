"""Small random checkpoints, and the network in float64 numpy for those that transformers' GptOss cannot run.

The reference is written from the definition (openai/gpt-oss, gpt_oss/torch/model.py), with the number of experts and
the window taken from each layer. It shares no code with the backends.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCAB = 64, 32, 4, 2, 16, 96
CONFIG: dict[str, Any] = {
    "model_type": "gpt_oss", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "head_dim": DIM, "num_experts_per_tok": 2, "vocab_size": VOCAB,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "eos_token_id": VOCAB - 1,
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 128, "beta_fast": 32.0,
                     "beta_slow": 1.0, "truncate": False},
}  # fmt: skip


def random_tensors(
    experts: list[int], seed: int = 0, vocab: int | None = None, config: dict[str, Any] = CONFIG
) -> dict[str, np.ndarray]:
    """float32 tensors in the bf16 layout of Hugging Face, one layer for each entry of `experts`."""
    hidden, inner, dim = (config[name] for name in ("hidden_size", "intermediate_size", "head_dim"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    vocab = vocab or config["vocab_size"]
    rng = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)

    def vector(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.3).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden) * 8, "lm_head.weight": matrix(vocab, hidden)}
    tensors["model.norm.weight"] = 1 + vector(hidden)
    for layer, count in enumerate(experts):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = 1 + vector(hidden)
        sizes = {"q": heads * dim, "k": kv_heads * dim, "v": kv_heads * dim}
        for name, size in sizes.items():
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = matrix(size, hidden)
            tensors[f"{prefix}.self_attn.{name}_proj.bias"] = vector(size)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = matrix(hidden, heads * dim)
        tensors[f"{prefix}.self_attn.o_proj.bias"] = vector(hidden)
        tensors[f"{prefix}.self_attn.sinks"] = vector(heads) * 3
        tensors[f"{prefix}.mlp.router.weight"] = matrix(count, hidden)
        tensors[f"{prefix}.mlp.router.bias"] = vector(count)
        tensors[f"{prefix}.mlp.experts.gate_up_proj"] = matrix(count, 2 * inner, hidden).swapaxes(1, 2).copy() * 2
        tensors[f"{prefix}.mlp.experts.gate_up_proj_bias"] = vector(count, 2 * inner)
        tensors[f"{prefix}.mlp.experts.down_proj"] = matrix(count, hidden, inner).swapaxes(1, 2).copy()
        tensors[f"{prefix}.mlp.experts.down_proj_bias"] = vector(count, hidden)
    return tensors


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A checkpoint folder without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def logits(
    tensors: dict[str, np.ndarray],
    windows: list[int | None],
    ids: list[int],
    active: int = 2,
    config: dict[str, Any] = CONFIG,
) -> np.ndarray:
    """float64 [L, V]. windows: of each layer, None for full attention. config: its head_dim and rope_scaling count."""
    t = {name: value.astype(np.float64) for name, value in tensors.items()}
    x = t["model.embed_tokens.weight"][ids]
    cos, sin = _rotation(len(ids), config)
    for layer, window in enumerate(windows):
        prefix = f"model.layers.{layer}."
        w = {name.removeprefix(prefix): value for name, value in t.items() if name.startswith(prefix)}
        x = x + _attention(w, _norm(x, w["input_layernorm.weight"]), window, cos, sin)
        x = x + _experts(w, _norm(x, w["post_attention_layernorm.weight"]), active)
    return _norm(x, t["model.norm.weight"]) @ t["lm_head.weight"].T


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def _rotation(length: int, config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    scaling, dim = config["rope_scaling"], config["head_dim"]
    base = 150000.0 ** -(np.arange(0, dim, 2) / dim)
    low, high = (
        dim * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(150000.0))
        for turns in (scaling["beta_fast"], scaling["beta_slow"])
    )
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    angles = np.arange(length)[:, None] * (base / scaling["factor"] * ramp + base * (1 - ramp))
    scale = 0.1 * math.log(scaling["factor"]) + 1
    return np.cos(angles) * scale, np.sin(angles) * scale


def _attention(
    w: dict[str, np.ndarray], x: np.ndarray, window: int | None, cos: np.ndarray, sin: np.ndarray
) -> np.ndarray:
    L, dim = len(x), 2 * cos.shape[1]
    heads = len(w["self_attn.sinks"])
    kv_heads = w["self_attn.k_proj.weight"].shape[0] // dim

    def project(name: str) -> np.ndarray:
        return (x @ w[f"self_attn.{name}_proj.weight"].T + w[f"self_attn.{name}_proj.bias"]).reshape(L, -1, dim)

    def rotate(a: np.ndarray) -> np.ndarray:
        first, second = a[..., : dim // 2], a[..., dim // 2 :]
        c, s = cos[:, None], sin[:, None]
        return np.concatenate([first * c - second * s, second * c + first * s], -1)

    q, k, v = rotate(project("q")), rotate(project("k")), project("v")
    i, j = np.arange(L)[:, None], np.arange(L)[None]
    seen = (j <= i) & (i - j < (window or L))
    outputs = []
    for head in range(heads):
        kv = head // (heads // kv_heads)
        scores = np.where(seen, q[:, head] @ k[:, kv].T / math.sqrt(dim), -np.inf)
        scores = np.concatenate([scores, np.full((L, 1), w["self_attn.sinks"][head])], 1)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights = (weights / weights.sum(1, keepdims=True))[:, :-1]
        outputs.append(weights @ v[:, kv])
    return np.concatenate(outputs, -1) @ w["self_attn.o_proj.weight"].T + w["self_attn.o_proj.bias"]


def _experts(w: dict[str, np.ndarray], x: np.ndarray, active: int) -> np.ndarray:
    scores = x @ w["mlp.router.weight"].T + w["mlp.router.bias"]
    y = np.zeros_like(x)
    for token, row in enumerate(scores):
        chosen = np.argsort(-row)[:active]
        weights = np.exp(row[chosen] - row[chosen].max())
        for expert, weight in zip(chosen, weights / weights.sum(), strict=True):
            both = x[token] @ w["mlp.experts.gate_up_proj"][expert] + w["mlp.experts.gate_up_proj_bias"][expert]
            gate, up = np.minimum(both[::2], 7), np.clip(both[1::2], -7, 7)
            hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            down = hidden @ w["mlp.experts.down_proj"][expert] + w["mlp.experts.down_proj_bias"][expert]
            y[token] += weight * down
    return y
