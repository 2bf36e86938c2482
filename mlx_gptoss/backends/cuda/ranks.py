"""The ranks that share one model: the sum and the gather that model.py and decode.py call, by torch.distributed.

On GPUs they run on NCCL, whose operations CUDA graphs can capture; on CPUs on gloo.
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
    """shard: this rank's part of the model. A single process has all of it, and then sum and gather return their
    argument."""

    shard: RankShard

    @staticmethod
    def join(shard: RankShard, device: torch.device) -> Ranks:
        """Connect to the other ranks, whose addresses torchrun set. Raises BackendUnavailable."""
        try:
            if not dist.is_initialized():  # it is if this process has loaded a model before
                kind = "nccl" if device.type == "cuda" else "gloo"
                bound = device if device.type == "cuda" else None  # NCCL then connects, and fails, in this call
                dist.init_process_group(kind, rank=shard.rank, world_size=shard.ranks, device_id=bound)
        except (RuntimeError, ValueError) as error:
            raise BackendUnavailable(
                f"torch cannot reach the other ranks ({error}); start all ranks with torchrun"
            ) from error
        return Ranks(shard)

    @property
    def alone(self) -> bool:
        return self.shard.ranks == 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0. Only rank 0 adds o's bias, which every rank has and the sum must count once."""
        return self.shard.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """x, overwritten with the sum of every rank's x."""
        if not self.alone:
            dist.all_reduce(x)
        return x

    def gather(self, logits: Tensor, size: int) -> Tensor:
        """The ranks' parts of the vocabulary concatenated, [..., V / ranks] -> [..., V], where V is `size`."""
        if self.alone:
            return logits
        block = -(-size // self.shard.ranks)
        own = F.pad(logits.reshape(-1, logits.shape[-1]), (0, block - logits.shape[-1])).contiguous()
        parts = own.new_empty((self.shard.ranks, len(own), block))
        dist.all_gather(list(parts), own)
        rows = parts.transpose(0, 1).reshape(len(own), -1)
        return rows[:, :size].view(*logits.shape[:-1], size)

    def leave(self) -> None:
        if not self.alone and dist.is_initialized():
            dist.destroy_process_group()
