"""The ranks that share one model: the sum and the gather that model.py calls, by MLX's distributed layer.

Legend: T tokens, A experts active per token, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ...errors import BackendUnavailable
from ...weights.split import RankShard


@dataclass(frozen=True)
class Ranks:
    """shard: this rank's part of the model. group: MLX's group of ranks; None for a single process."""

    shard: RankShard
    group: mx.distributed.Group | None

    @staticmethod
    def join(shard: RankShard) -> Ranks:
        """Connect to the other ranks, whose addresses `mlx.launch` set. Raises BackendUnavailable."""
        if shard.ranks == 1:
            return Ranks(shard, None)
        try:
            group = mx.distributed.init(strict=True, backend="any")
        except RuntimeError as error:
            raise BackendUnavailable(
                f"MLX cannot reach the other ranks ({error}); start all ranks with mlx.launch"
            ) from error
        if (group.rank(), group.size()) != (shard.rank, shard.ranks):
            raise BackendUnavailable(
                f"MLX makes this rank {group.rank()} of {group.size()}, not {shard.rank} of {shard.ranks}; start all "
                "ranks with one mlx.launch command"
            )
        return Ranks(shard, group)

    @property
    def alone(self) -> bool:
        return self.group is None

    def sum(self, x: mx.array) -> mx.array:
        """The sum of every rank's x, bit for bit the same on all ranks."""
        return x if self.group is None else mx.distributed.all_sum(x, group=self.group)

    def gather(self, logits: mx.array, size: int) -> mx.array:
        """The ranks' parts of the vocabulary concatenated, [..., V / ranks] -> [..., V], where V is `size`."""
        if self.group is None:
            return logits
        block = -(-size // self.shard.ranks)
        *rows, own = logits.shape
        padded = mx.pad(logits, [*[(0, 0) for _ in rows], (0, block - own)])
        parts = mx.distributed.all_gather(padded[None], group=self.group)  # [ranks, ..., block]
        return mx.moveaxis(parts, 0, -2).reshape(*rows, -1)[..., :size]

    def local_experts(self, experts: mx.array, weights: mx.array, own: range) -> tuple[mx.array, mx.array]:
        """Each token's experts and weights, [T, A] each, with experts numbered from this rank's first. An expert of
        another rank gets weight 0, and the number of an expert that the token reads on this rank anyway."""
        if self.group is None:
            return experts, weights
        is_local = (experts >= own.start) & (experts < own.stop)
        local = mx.where(is_local, experts - own.start, 0)
        return mx.where(is_local, local, local.max(axis=-1, keepdims=True)), mx.where(is_local, weights, 0)

    def local_pairs(self, order: mx.array, experts: mx.array, own: range) -> mx.array:
        """The part of `order`, which sorts token-expert pairs by `experts`, with this rank's experts. This waits for
        the router's result; otherwise the rank would have to compute all pairs."""
        if self.group is None:
            return order
        start, stop = np.array(mx.stack([(experts < end).sum() for end in (own.start, own.stop)])).tolist()
        return order[start:stop]
