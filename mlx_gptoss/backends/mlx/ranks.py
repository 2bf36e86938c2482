"""The ranks that share one model through MLX's distributed layer, as model.py sees them: a sum and a gather.

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
    """shard: what this rank holds. group: None for a rank that is alone, which has nothing to sum or to gather."""

    shard: RankShard
    group: mx.distributed.Group | None

    @staticmethod
    def join(shard: RankShard) -> Ranks:
        """Meet the others, as `mlx.launch` has told each rank where they are. Raises BackendUnavailable."""
        if shard.ranks == 1:
            return Ranks(shard, None)
        try:
            group = mx.distributed.init(strict=True, backend="any")
        except RuntimeError as error:
            raise BackendUnavailable(f"MLX cannot reach the other ranks ({error}); start them by mlx.launch") from error
        if (group.rank(), group.size()) != (shard.rank, shard.ranks):
            raise BackendUnavailable(
                f"MLX makes this rank {group.rank()} of {group.size()}, not {shard.rank} of {shard.ranks}; start all "
                "ranks by one mlx.launch"
            )
        return Ranks(shard, group)

    @property
    def alone(self) -> bool:
        return self.group is None

    def sum(self, x: mx.array) -> mx.array:
        """Every rank's x, added up: the same bits on all."""
        return x if self.group is None else mx.distributed.all_sum(x, group=self.group)

    def gather(self, logits: mx.array, size: int) -> mx.array:
        """The ranks' parts of the vocabulary side by side, [..., V / ranks] -> [..., V], V being `size`."""
        if self.group is None:
            return logits
        block = -(-size // self.shard.ranks)
        *rows, held = logits.shape
        padded = mx.pad(logits, [*[(0, 0) for _ in rows], (0, block - held)])
        parts = mx.distributed.all_gather(padded[None], group=self.group)  # [ranks, ..., block]
        return mx.moveaxis(parts, 0, -2).reshape(*rows, -1)[..., :size]

    def local_experts(self, experts: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        """A token's experts and their weights, [T, A] each, as this rank computes them: by their places here, and an
        expert of another rank with weight 0, in its place one that the token needs here anyhow: it has been read."""
        if self.group is None:
            return experts, weights
        mine = self.shard.experts
        here = (experts >= mine.start) & (experts < mine.stop)
        places = mx.where(here, experts - mine.start, 0)
        return mx.where(here, places, places.max(axis=-1, keepdims=True)), mx.where(here, weights, 0)

    def local_pairs(self, order: mx.array, experts: mx.array) -> mx.array:
        """Of `order`, which sorts pairs of token and expert by `experts`, the pairs whose expert is held here. It waits
        for the router's choice, without which all pairs would have to be computed."""
        if self.group is None:
            return order
        mine = self.shard.experts
        before = np.array(mx.stack([(experts < end).sum() for end in (mine.start, mine.stop)])).tolist()
        return order[before[0] : before[1]]
