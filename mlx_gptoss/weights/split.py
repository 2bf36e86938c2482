"""Tensor and expert parallelism: which part of a model each rank holds, the same for every format.

Attention is split by KV head: the rows of q, k and v with their biases, the columns of o, the sinks. Experts are split
by expert and lm_head by rows of the vocabulary. All parts are contiguous ranges, which may differ in size. Every rank
holds the embeddings, the norms, the router and the bias of o. So each rank computes one summand of attention (without
the bias of o) and of the experts, and one segment of the logits.

Experts are never split by rows: 2880 = 45 * 64 cannot be halved where groups of 64 share a scale. Columns of o can be
split between heads, because every group size divides the 64 columns of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..config import ModelConfig
from ..errors import CheckpointError, InvalidRequest
from .checkpoint import CheckpointLike
from .params import MATRIX_ROLES, Param, Role
from .tensor import Dense, Quantized, Spec, Weight


@dataclass(frozen=True)
class RankShard:
    """What one of several ranks holds: contiguous ranges of query heads, KV heads, experts and token ids.

    experts: of a layer with config.num_local_experts of them; of_experts gives those of any layer.

    With more ranks than KV heads, several ranks hold the same KV head, and each of them a part of its query heads.
    """

    rank: int
    ranks: int
    query_heads: range
    kv_heads: range
    experts: range
    vocabulary: range

    @staticmethod
    def of(config: ModelConfig, rank: int, ranks: int) -> RankShard:
        """The shard of one rank. Raises InvalidRequest for more ranks than query heads or experts."""
        max_ranks = min(config.num_attention_heads, *config.experts)
        if not 1 <= ranks <= max_ranks:
            raise InvalidRequest(f"this model can be split over 1 to {max_ranks} ranks, not {ranks}")
        query_heads, kv_heads = _heads(config, rank, ranks)
        experts = rank_range(config.num_local_experts, rank, ranks)
        block = -(-config.vocab_size // ranks)  # equal blocks, as a gather needs them; the last one is padded
        vocabulary = range(min(rank * block, config.vocab_size), min((rank + 1) * block, config.vocab_size))
        return RankShard(rank, ranks, query_heads, kv_heads, experts, vocabulary)

    def of_experts(self, count: int) -> range:
        """The experts of a layer with `count` of them."""
        return rank_range(count, self.rank, self.ranks)


def rank_range(count: int, rank: int, ranks: int) -> range:
    """The rank's part of `count` items. 8 items over 3 ranks are 2, 3 and 3."""
    return range(count * rank // ranks, count * (rank + 1) // ranks)


def _heads(config: ModelConfig, rank: int, ranks: int) -> tuple[range, range]:
    """The query heads and the KV heads of a rank."""
    kv_count = config.num_key_value_heads
    queries_per_kv = config.num_attention_heads // kv_count
    if ranks <= kv_count:
        kv = rank_range(kv_count, rank, ranks)
        return range(kv.start * queries_per_kv, kv.stop * queries_per_kv), kv
    head = next(head for head in range(kv_count) if rank in rank_range(ranks, head, kv_count))
    sharing_ranks = rank_range(ranks, head, kv_count)
    own = rank_range(queries_per_kv, rank - sharing_ranks.start, len(sharing_ranks))
    first = head * queries_per_kv
    return range(first + own.start, first + own.stop), range(head, head + 1)


class RankWeights:
    """One rank's part of a checkpoint. Reading it reads nothing of the other parts.

    source: the whole checkpoint.
    config: the model's config with this rank's number of heads. Experts and vocabulary keep their full size, as the
        router and the readers of the logits see them.
    size_bytes: size of this rank's part. Vectors (norms, sinks, biases) count in full; they are under 1%.
    """

    def __init__(self, checkpoint: CheckpointLike, shard: RankShard) -> None:
        full = checkpoint.config
        self.shard = shard
        self.config: ModelConfig = replace(
            full, num_attention_heads=len(shard.query_heads), num_key_value_heads=len(shard.kv_heads)
        )
        self.format: str = checkpoint.format
        self.stop_ids: tuple[int, ...] = checkpoint.stop_ids
        self.source = checkpoint
        self._splits = {param.name: split_of(param, full, shard) for param in checkpoint.params}
        self.params: tuple[Param, ...] = tuple(replace(p, shape=self._shape(p)) for p in checkpoint.params)
        others = sum(checkpoint.matrix_bytes(role) - self.matrix_bytes(role) for role in MATRIX_ROLES)
        self.size_bytes: int = checkpoint.size_bytes - others

    def read(self, name: str, rows: range | None = None) -> Weight:
        """This rank's part of a weight, as Checkpoint.read. `rows` counts within the part."""
        axis, part = self._splits[name] or (0, None)
        if axis == 0:
            return self.source.read(name, _rows_of_part(part, rows))
        assert part is not None
        return _columns(self.source.read(name, rows), part, name)

    def release(self, weight: Weight | None = None) -> None:
        """As Checkpoint.release."""
        self.source.release(weight)

    def stored_as(self, name: str) -> tuple[Spec | None, str | None]:
        """As Checkpoint.stored_as."""
        return self.source.stored_as(name)

    def scale_dtype(self, name: str) -> str | None:
        """As Checkpoint.scale_dtype."""
        return self.source.scale_dtype(name)

    def unpacked_bytes(self, name: str) -> int:
        """This rank's share of Checkpoint.unpacked_bytes."""
        own, full = (next(p.size for p in params if p.name == name) for params in (self.params, self.source.params))
        return self.source.unpacked_bytes(name) * own // full

    def matrix_bytes(self, role: Role) -> int:
        """Size of this rank's matrices of a role, estimated from its share of their values."""
        own, full = (
            sum(param.size for param in params if param.role == role and param.is_matrix)
            for params in (self.params, self.source.params)
        )
        return self.source.matrix_bytes(role) * own // full

    def fingerprint(self) -> list[list[Any]]:
        """That of the source, with the rank and the number of ranks."""
        return [*self.source.fingerprint(), ["shard", self.shard.rank, self.shard.ranks]]

    def _shape(self, param: Param) -> tuple[int, ...]:
        split = self._splits[param.name]
        if split is None:
            return param.shape
        axis, part = split
        return (*param.shape[:axis], len(part), *param.shape[axis + 1 :])


def split_of(param: Param, config: ModelConfig, shard: RankShard) -> tuple[int, range] | None:
    """The axis along which a parameter is split, and the rank's part of it; None if every rank holds all of it."""
    dim = config.head_dim
    query_rows = range(shard.query_heads.start * dim, shard.query_heads.stop * dim)
    kv_rows = range(shard.kv_heads.start * dim, shard.kv_heads.stop * dim)
    splits = {
        "attention.q": (0, query_rows),
        "attention.k": (0, kv_rows),
        "attention.v": (0, kv_rows),
        "attention.o.weight": (1, query_rows),
        "attention.sinks": (0, shard.query_heads),
        "experts": (0, shard.of_experts(param.shape[0])),
        "lm_head": (0, shard.vocabulary),
    }
    return next((split for kind, split in splits.items() if f"{param.kind}.".startswith(f"{kind}.")), None)


def _rows_of_part(part: range | None, rows: range | None) -> range | None:
    """Rows counted within the part, as rows of the whole weight; None means all rows."""
    if part is None:
        return rows
    return part if rows is None else part[rows.start : rows.stop]


def _columns(weight: Weight, columns: range, name: str) -> Weight:
    """A range of the last axis, as views. Raises CheckpointError if it cuts through a group of codes."""
    if isinstance(weight, Dense):
        return replace(weight, values=weight.values[..., columns.start : columns.stop])
    spec = weight.spec

    group = spec.group or 8 // spec.bits
    if columns.start % group or columns.stop % group:
        raise CheckpointError(f"{name} cannot be split between heads: its scales span {group} columns; use one rank")
    codes = weight.codes[..., columns.start * spec.bits // 8 : columns.stop * spec.bits // 8]
    groups = slice(columns.start // group, columns.stop // group)
    scale, bias = (None if array is None else array[..., groups] for array in (weight.scale, weight.bias))
    return Quantized(spec, codes, scale, bias, weight.outer)
