"""What one decode step reads, launch by launch, and what is resident, from the headers alone: for the backend's limits
on command buffers (Backend.prepare), and for what `bench` says of them."""

from __future__ import annotations

from collections.abc import Iterator

from ..backends.base import Read, run_as
from ..weights.checkpoint import CheckpointLike
from ..weights.requantize import Requantized

FUSED = ("attention.q", "attention.k", "attention.v"), ("experts.gate", "experts.up")  # one product each


def step_reads(weights: CheckpointLike | Requantized, backend: str, context: int = 0, slots: int = 1) -> list[Read]:
    """Values and storage of each array that a decode step reads, in the order of its launches, as the backend named
    `backend` holds them. Every expert counts, although a step reads a few: they are one array. context: tokens of each
    of the slots, whose keys and values count as well; 0 leaves them out. The embeddings, of which it reads rows, are
    not there.
    """
    config = weights.config
    for_names = {param.name: param for param in weights.params}

    def read(*names: str) -> Iterator[Read]:
        """Of matrices that are fused if they are stored alike."""
        found = [(for_names[f"{name}.weight"].size, weights.stored_as(f"{name}.weight")[0]) for name in names]
        specs = {spec if spec is None else run_as(backend, spec) for _, spec in found}
        if len(specs) == 1:
            yield sum(size for size, _ in found), specs.pop()
        else:
            yield from ((size, spec if spec is None else run_as(backend, spec)) for size, spec in found)

    reads: list[Read] = []
    for layer, window in enumerate(config.windows):
        prefix = f"layers.{layer}"
        seen = 0 if not context else context if window is None else min(context, window)
        reads += read(*(f"{prefix}.{name}" for name in FUSED[0]))
        reads += [(2 * slots * config.kv_size * seen, None)] if seen else []
        reads += read(f"{prefix}.attention.o")
        reads += read(f"{prefix}.router")
        reads += read(*(f"{prefix}.{name}" for name in FUSED[1]))
        reads += read(f"{prefix}.experts.down")
    return [*reads, *read("lm_head")]


def resident_bytes(weights: CheckpointLike | Requantized, context: int | None, slots: int) -> int:
    """Bytes of the weights as stored, and of keys and values in 16 bits. context: tokens of each of the slots; None is
    the model's maximum."""
    config = weights.config
    tokens = context or config.max_position_embeddings
    return weights.size_bytes + slots * tokens * config.full_layers * 2 * config.kv_size * 2
