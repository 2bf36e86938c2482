"""Which rank holds what of a model that is spread over several machines or GPUs, written once for every format.

Attention is cut by KV head: rows of q, k and v with their biases, columns of o, sinks. Experts are cut by expert and
lm_head by rows of the vocabulary, all in contiguous ranges that need not be equal. The embeddings, norms, the router
and o's bias are everywhere. So what a rank computes of attention (without o's bias) and of the experts is a part of a
sum, and the ranks' logits stand side by side.

Experts are never cut by rows: 2880 = 45 * 64 cannot be halved where groups of 64 share a scale. Columns of o can be
cut between heads, for every group divides a head's 64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..config import ModelConfig
from ..errors import CheckpointError, InvalidRequest
from .checkpoint import CheckpointLike
from .params import MATRIX_ROLES, Param, Role
from .tensor import Array, Dense, Quantized, Spec, Weight


@dataclass(frozen=True)
class RankShard:
    """What one of several ranks holds: contiguous ranges of query heads, KV heads, experts and token ids.

    With more ranks than KV heads, those that share a KV head hold it each, and a part of its query heads.
    """

    rank: int
    ranks: int
    query_heads: range
    kv_heads: range
    experts: range
    vocabulary: range

    @staticmethod
    def of(config: ModelConfig, rank: int, ranks: int) -> RankShard:
        """Raises InvalidRequest for more ranks than query heads or experts."""
        most = min(config.num_attention_heads, config.num_local_experts)
        if not 1 <= ranks <= most:
            raise InvalidRequest(f"this model can be split over 1 to {most} ranks, not {ranks}")
        queries, kv = _heads(config, rank, ranks)
        block = -(-config.vocab_size // ranks)  # of equal blocks, for a gather wants equal parts; the last is padded
        vocabulary = range(min(rank * block, config.vocab_size), min((rank + 1) * block, config.vocab_size))
        return RankShard(rank, ranks, queries, kv, rank_range(config.num_local_experts, rank, ranks), vocabulary)


def rank_range(count: int, rank: int, ranks: int) -> range:
    """The rank's part of `count` things; of 8 over 3 ranks 2, 3 and 3."""
    return range(count * rank // ranks, count * (rank + 1) // ranks)


def _heads(config: ModelConfig, rank: int, ranks: int) -> tuple[range, range]:
    """Query heads and KV heads."""
    count, each = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    if ranks <= count:
        kv = rank_range(count, rank, ranks)
        return range(kv.start * each, kv.stop * each), kv
    head = next(head for head in range(count) if rank in rank_range(ranks, head, count))
    sharers = rank_range(ranks, head, count)
    mine = rank_range(each, rank - sharers.start, len(sharers))
    return range(head * each + mine.start, head * each + mine.stop), range(head, head + 1)


class RankWeights:
    """One rank's share of a checkpoint: a loader reads no more than that.

    whole: the checkpoint. config: the model's with the rank's own heads; experts and vocabulary are counted whole, as
    the router and who reads the logits see them. size_bytes: of the rank's matrices; what is no matrix, under a
    hundredth, is counted whole.
    """

    def __init__(self, checkpoint: CheckpointLike, shard: RankShard) -> None:
        whole = checkpoint.config
        self.shard = shard
        self.config: ModelConfig = replace(
            whole, num_attention_heads=len(shard.query_heads), num_key_value_heads=len(shard.kv_heads)
        )
        self.format = checkpoint.format
        self.stop_ids = checkpoint.stop_ids
        self.source = checkpoint
        self._cuts = {param.name: _cut(param, whole, shard) for param in checkpoint.params}
        self.params: tuple[Param, ...] = tuple(replace(p, shape=self._shape(p)) for p in checkpoint.params)
        matrices = sum(checkpoint.matrix_bytes(role) - self.matrix_bytes(role) for role in MATRIX_ROLES)
        self.size_bytes = checkpoint.size_bytes - matrices

    def read(self, name: str, rows: range | None = None) -> Weight:
        """As Checkpoint.read, of the rank's part."""
        axis, places = self._cuts[name] or (0, None)
        if axis == 0:
            return self.source.read(name, _within(places, rows))
        assert places is not None
        return _columns(self.source.read(name, rows), places, name)

    def release(self, weight: Weight | None = None) -> None:
        self.source.release(weight)

    def stored_as(self, name: str) -> tuple[Spec | None, str | None]:
        return self.source.stored_as(name)

    def matrix_bytes(self, role: Role) -> int:
        """By the rank's share of the role's numbers."""
        sizes = [
            sum(param.size for param in params if param.role == role and param.is_matrix)
            for params in (self.params, self.source.params)
        ]
        return self.source.matrix_bytes(role) * sizes[0] // sizes[1]

    def fingerprint(self) -> list[list[Any]]:
        return [*self.source.fingerprint(), ["share", self.shard.rank, self.shard.ranks]]

    def _shape(self, param: Param) -> tuple[int, ...]:
        cut = self._cuts[param.name]
        if cut is None:
            return param.shape
        at, places = cut
        return (*param.shape[:at], len(places), *param.shape[at + 1 :])


def _cut(param: Param, config: ModelConfig, shard: RankShard) -> tuple[int, range] | None:
    """The axis along which a parameter is cut, and what the rank has of it; None where every rank has all."""
    dim = config.head_dim
    queries = range(shard.query_heads.start * dim, shard.query_heads.stop * dim)
    kv = range(shard.kv_heads.start * dim, shard.kv_heads.stop * dim)
    cuts = {
        "attention.q": (0, queries),
        "attention.k": (0, kv),
        "attention.v": (0, kv),
        "attention.o.weight": (1, queries),
        "attention.sinks": (0, shard.query_heads),
        "experts": (0, shard.experts),
        "lm_head": (0, shard.vocabulary),
    }
    return next((cut for kind, cut in cuts.items() if f"{param.kind}.".startswith(f"{kind}.")), None)


def _within(places: range | None, rows: range | None) -> range | None:
    """Rows counted in `places`, of the whole."""
    return rows if places is None else places if rows is None else places[rows.start : rows.stop]


def _columns(weight: Weight, places: range, name: str) -> Weight:
    """A range of the last axis, as views. Raises CheckpointError where a group of codes would be cut in two."""
    if isinstance(weight, Dense):
        return replace(weight, values=weight.values[..., places.start : places.stop])
    spec = weight.spec

    def of(array: Array | None, each: int) -> Array | None:
        return None if array is None else array[..., places.start // each : places.stop // each]

    group = max(spec.group, 8 // spec.bits)
    if places.start % group or places.stop % group:
        raise CheckpointError(f"{name} cannot be split between heads: its scales span {group} columns; use one rank")
    codes = of(weight.codes, 8 // spec.bits)
    assert codes is not None
    return Quantized(spec, codes, of(weight.scale, spec.group or 1), of(weight.bias, spec.group or 1), weight.outer)
