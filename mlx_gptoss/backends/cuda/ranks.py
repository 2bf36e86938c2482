"""The ranks that share one model through torch.distributed, as model.py and decode.py see them: a sum and a gather.

On GPUs these are NCCL's, which CUDA graphs capture; on CPUs gloo's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...errors import BackendUnavailable
from ...weights.split import RankShard


@dataclass(frozen=True)
class Ranks:
    """shard: what this rank holds; of one that is alone it is all, and there is nothing to sum or to gather."""

    shard: RankShard

    @staticmethod
    def join(shard: RankShard, device: torch.device) -> Ranks:
        """Meet the others, as torchrun has told each rank where they are. Raises BackendUnavailable."""
        try:
            if not dist.is_initialized():  # by a model that this process loaded before
                kind = "nccl" if device.type == "cuda" else "gloo"
                bound = device if device.type == "cuda" else None  # connects at once, and what fails does so here
                dist.init_process_group(kind, rank=shard.rank, world_size=shard.ranks, device_id=bound)
        except (RuntimeError, ValueError) as error:
            raise BackendUnavailable(f"torch cannot reach the other ranks ({error}); start them by torchrun") from error
        return Ranks(shard)

    @property
    def alone(self) -> bool:
        return self.shard.ranks == 1

    @property
    def first(self) -> bool:
        """Whether this is the one rank that adds what every rank has: o's bias."""
        return self.shard.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """x itself, in which every rank's is added up."""
        if not self.alone:
            dist.all_reduce(x)
        return x

    def gather(self, logits: Tensor, size: int) -> Tensor:
        """The ranks' parts of the vocabulary side by side, [..., V / ranks] -> [..., V], V being `size`."""
        if self.alone:
            return logits
        block = -(-size // self.shard.ranks)
        mine = F.pad(logits.reshape(-1, logits.shape[-1]), (0, block - logits.shape[-1])).contiguous()
        parts = mine.new_empty((self.shard.ranks, len(mine), block))
        dist.all_gather(list(parts), mine)
        rows = parts.transpose(0, 1).reshape(len(mine), -1)
        return rows[:, :size].view(*logits.shape[:-1], size)

    def leave(self) -> None:
        if not self.alone and dist.is_initialized():
            dist.destroy_process_group()
