"""Tiny models whose matrices are integers with scales and zero points, for the readers of GPTQ's and other packings.

The packers are written from the formats' definitions, bit by bit, and share no code with the readers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import family
import numpy as np

Tensors = dict[str, np.ndarray]
Encoder = Callable[..., tuple[Tensors, np.ndarray]]  # (rows, width, seed) -> tensors by suffix, decoded float32 values

HIDDEN, INNER, EXPERTS, WINDOW = 192, 64, 4, 8
CONFIG: dict[str, Any] = family.CONFIG | {
    "num_hidden_layers": 2,
    "num_local_experts": EXPERTS,
    "sliding_window": WINDOW,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
}


def to_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 [..., n * bits / 32] of codes [..., n]: one stream of bits, the lowest of the first code first."""
    stream = (codes[..., None].astype(np.int64) >> np.arange(bits)) & 1
    packed = np.packbits(stream.reshape(*codes.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<i4")


def random_integers(rows: int, width: int, bits: int, group: int, seed: int, symmetric: bool) -> tuple[np.ndarray, ...]:
    """codes [N, K], scales float16 [N, groups] and zero points [N, groups], for weights of unit variance / sqrt(K)."""
    rng = np.random.default_rng([seed, rows, width])
    groups = -(-width // group)
    codes = rng.integers(0, 2**bits, (rows, width))
    scale = (rng.uniform(0.5, 1, (rows, groups)) / np.sqrt(width) / 2 ** (bits - 2)).astype(np.float16)
    zeros = np.full((rows, groups), 2 ** (bits - 1))
    if not symmetric:
        zeros = rng.integers(1, 2**bits, (rows, groups))
    return codes, scale, zeros


def decoded(codes: np.ndarray, scale: np.ndarray, zeros: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(code - zero) * scale in float64, rounded to float32. order: the group of each column."""
    values = (codes - zeros[:, order]) * scale.astype(np.float64)[:, order]
    return values.astype(np.float32)


def model(
    encode: Encoder,
    half_split: bool = False,
    names: Mapping[str, str] | None = None,
    lm_head: bool = False,
    router: bool = False,
) -> tuple[Tensors, Tensors]:
    """(the stored tensors, the same in float32 as `bf16` has them).

    Attention and experts are encoded; lm_head and router on request. half_split: gate_proj and up_proj are the halves
    of the interleaved rows. names: the expert modules, with {} for the expert; without "up", "gate" has both,
    interleaved.
    """
    names = names or {part: f"{{}}.{part}_proj" for part in ("gate", "up", "down")}
    plain = family.random_tensors([EXPERTS] * 2, config=CONFIG)
    stored = dict(plain)

    def store(module: str, rows: int, width: int) -> np.ndarray:
        parts, values = encode(rows, width, sum(module.encode()))
        stored.update({f"{module}.{suffix}": np.ascontiguousarray(array) for suffix, array in parts.items()})
        return values

    encoded = ["self_attn", *["lm_head"] * lm_head, *["router"] * router]
    for name in [name for name in plain if name.endswith("weight") and any(part in name for part in encoded)]:
        del stored[name]
        plain[name] = store(name.removesuffix(".weight"), *plain[name].shape)
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        for fused in ("gate_up_proj", "down_proj"):
            del stored[f"{prefix}.{fused}"]
            biases = stored.pop(f"{prefix}.{fused}_bias")
            for expert in range(EXPERTS):
                module = {part: f"{prefix}.{name.format(expert)}" for part, name in names.items()}
                if fused == "down_proj":
                    values = store(module["down"], HIDDEN, INNER)
                    stored[f"{module['down']}.bias"] = biases[expert]
                elif "up" not in module:
                    values = store(module["gate"], 2 * INNER, HIDDEN)
                    stored[f"{module['gate']}.bias"] = biases[expert]
                else:
                    both = [store(module[part], INNER, HIDDEN) for part in ("gate", "up")]
                    split = np.split(biases[expert], 2) if half_split else (biases[expert][::2], biases[expert][1::2])
                    for part, bias in zip(("gate", "up"), split, strict=True):
                        stored[f"{module[part]}.bias"] = np.ascontiguousarray(bias)
                    values = np.concatenate(both) if half_split else np.stack(both, axis=1).reshape(2 * INNER, HIDDEN)
                plain[f"{prefix}.{fused}"][expert] = values.T
    return stored, plain


def write(folder: Path, stored: Tensors, quantization_config: Mapping[str, Any] | None) -> Path:
    """A checkpoint folder of these tensors."""
    extra = {} if quantization_config is None else {"quantization_config": quantization_config}
    return family.write_checkpoint(folder, CONFIG | extra, stored)
