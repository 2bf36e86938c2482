"""Every parameter of the network: its canonical name, shape and role. No file layout is known here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..config import ModelConfig

Role = Literal["embed", "norm", "attention", "sinks", "router", "experts", "lm_head"]
MATRIX_ROLES: tuple[Role, ...] = ("attention", "experts", "router", "embed", "lm_head")  # the roles that have matrices


@dataclass(frozen=True)
class Param:
    """One parameter.

    name: canonical, for example `layers.3.experts.gate.weight`.
    layer: the layer's index, or None for `embed`, `norm` and `lm_head`.
    shape: matrices are output-major: [N, K], and [E, N, K] for experts. q, k and v are separate, as are gate and up.
    """

    name: str
    layer: int | None
    role: Role
    shape: tuple[int, ...]

    @property
    def kind(self) -> str:
        """The name without its layer: `experts.gate.weight`, `attention.sinks`, `embed.weight`."""
        return self.name if self.layer is None else self.name.split(".", 2)[2]

    @property
    def is_matrix(self) -> bool:
        """True if a quantizer may change it: the weights that multiply activations, and the embedding table."""
        return self.role not in ("norm", "sinks") and self.name.endswith(".weight")

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def parameters(config: ModelConfig) -> tuple[Param, ...]:
    """All parameters of a model, in the order in which the network uses them."""
    hidden, vocab = config.hidden_size, config.vocab_size
    layers = [param for layer in range(config.num_hidden_layers) for param in _layer_parameters(layer, config)]
    return (
        Param("embed.weight", None, "embed", (vocab, hidden)),
        *layers,
        Param("norm.weight", None, "norm", (hidden,)),
        Param("lm_head.weight", None, "lm_head", (vocab, hidden)),
    )


def _layer_parameters(layer: int, config: ModelConfig) -> list[Param]:
    hidden, intermediate, experts = config.hidden_size, config.intermediate_size, config.experts[layer]
    q, kv = config.q_size, config.kv_size

    def linear(name: str, role: Role, shape: tuple[int, ...]) -> list[Param]:
        prefix = f"layers.{layer}.{name}"
        return [Param(f"{prefix}.weight", layer, role, shape), Param(f"{prefix}.bias", layer, role, shape[:-1])]

    return [
        Param(f"layers.{layer}.attention_norm.weight", layer, "norm", (hidden,)),
        *linear("attention.q", "attention", (q, hidden)),
        *linear("attention.k", "attention", (kv, hidden)),
        *linear("attention.v", "attention", (kv, hidden)),
        *linear("attention.o", "attention", (hidden, q)),
        Param(f"layers.{layer}.attention.sinks", layer, "sinks", (config.num_attention_heads,)),
        Param(f"layers.{layer}.mlp_norm.weight", layer, "norm", (hidden,)),
        *linear("router", "router", (experts, hidden)),
        *linear("experts.gate", "experts", (experts, intermediate, hidden)),
        *linear("experts.up", "experts", (experts, intermediate, hidden)),
        *linear("experts.down", "experts", (experts, hidden, intermediate)),
    ]
