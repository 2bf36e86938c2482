"""What a model has to do: the bytes that a decode step reads, and the arithmetic of a prompt."""

from __future__ import annotations

from ..config import ModelConfig
from ..weights.adapters import Adapter
from ..weights.params import Param, parameters


def step_bytes(
    sizes: dict[str, int],
    config: ModelConfig,
    batch: int,
    context: int,
    activation_bytes: int,
    adapter: Adapter | None = None,
    kv_bits: int | None = None,
) -> float:
    """Bytes that one decode step of `batch` sequences must read. sizes: bytes of each parameter as stored, by name.
    adapter: that all sequences use. kv_bits: of the full-attention layers' cache, as for load().

    Experts are assumed to be chosen at random: `batch` tokens use E (1 - (1 - A/E)^batch) of E experts in expectation.
    """

    def used(experts: int) -> float:
        return 1 - (1 - config.num_experts_per_tok / experts) ** batch

    def read(param: Param) -> float:
        if param.role == "embed":
            return batch * sizes[param.name] / config.vocab_size
        if param.role == "experts":
            return sizes[param.name] * used(param.shape[0])
        return sizes[param.name]

    full = activation_bytes if kv_bits is None else 72 / 64  # bytes of a value; 8 for the scale and the bias of 64
    seen = (context * full if w is None else min(context, w) * activation_bytes for w in config.windows)
    cache = batch * sum(seen) * 2 * config.kv_size
    stacks = [] if adapter is None else adapter.stacks()
    factors = activation_bytes * sum(values * (1 if experts is None else used(experts)) for values, experts in stacks)
    return sum(read(param) for param in parameters(config)) + factors + cache


def prefill_flops(config: ModelConfig, tokens: int) -> float:
    """Multiplications and additions of a prompt of so many tokens, from an empty cache: products with every matrix that
    a token uses, scores and weighted values of attention, and lm_head for the last token."""
    total = 0.0
    for param in parameters(config):
        if param.is_matrix and param.role != "embed":
            share = config.num_experts_per_tok / param.shape[0] if param.role == "experts" else 1.0
            total += 2 * param.size * share * (1 if param.role == "lm_head" else tokens)
    for window in config.windows:
        wide = tokens if window is None else min(tokens, window)
        seen = wide * (wide + 1) / 2 + (tokens - wide) * wide
        total += 4 * seen * config.num_attention_heads * config.head_dim
    return total
