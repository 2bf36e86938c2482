"""Attention of one token of each of several rows, compiled for the processor at hand. It needs llvmlite.

A piece is a KV head of a row: its queries and its key are rotated, key and value are written to the cache, and the
queries attend to all that they see there. Keys are read in blocks; what the earlier ones gave is scaled when a block
has a larger score (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). All values are float32.

Legend: H query heads, K KV heads, G = H / K, D dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from llvmlite import ir

from .emit import F32, I32, NAME, Function, Target, Value
from .storages import Heads

# The table of a call, int64 each, then the fields of each row. head_stride: from KV head to KV head of a cache.
# scale: of the scores, a float32's bits. A row sees `count` places of its cache from `first` on, and the `rest` from 0
# on; `place` is where its own key and value go.
CALL = ("counter", "rows", "kv_heads", "head_stride", "sinks", "scale")
ROW = ("qkv", "cos", "sin", "keys", "values", "place", "first", "count", "rest", "out")
BLOCK_KEYS = 256  # whose values stay in the second cache until they are summed
TOGETHER = 4  # queries whose values are summed at a time


def attention_module(heads: Heads, target: Target) -> ir.Module:
    """NAME(table, scratch): all pieces that are left. scratch: G * (D + BLOCK_KEYS) float32 of this thread."""
    module = ir.Module()
    f = Function(module, NAME, ("table", "scratch"), target)
    table, queries = f.arguments["table"], f.arguments["scratch"]
    call = f.fields(table, CALL)
    with f.pieces(call["counter"], f.times(call["rows"], call["kv_heads"])) as number:
        row = f.fields(f.sum(table, 8 * len(CALL), f.times(f.over(number, call["kv_heads"]), 8 * len(ROW))), ROW)
        head = f.b.urem(number, call["kv_heads"])
        keys, values = (f.sum(row[name], f.times(head, call["head_stride"])) for name in ("keys", "values"))
        size = 4 * heads.group * heads.dim
        out = f.sum(row["out"], f.times(head, size))
        piece = _Piece(f, heads.group, heads.dim, keys, values, queries, f.sum(queries, size), out)
        piece.write(call, row, head)
        piece.attend(row, f.sum(call["sinks"], f.times(head, 4 * heads.group)))
    f.finish()
    return module


@dataclass(frozen=True)
class _Piece:
    """Emits a piece. keys, values: addresses of the head's cache, [places, D] each. queries [G, D], scores [BLOCK_KEYS,
    G], out [G, D]: addresses of these."""

    f: Function
    group: int
    dim: int
    keys: Value
    values: Value
    queries: Value
    scores: Value
    out: Value

    @property
    def width(self) -> int:
        """Queries whose scores are in one vector."""
        return min(self.group, self.f.lanes)

    def vectors(self, floats: int) -> range:
        """Where the vectors of so many float32 begin, in bytes."""
        return range(0, 4 * floats, 4 * self.f.lanes)

    def write(self, call: dict[str, Value], row: dict[str, Value], head: Value) -> None:
        """Write the queries, rotated and scaled, and key and value to the cache."""
        f, size = self.f, 4 * self.dim
        here, scale = f.times(row["place"], size), f.everywhere(f.b.bitcast(f.b.trunc(call["scale"], I32), F32))
        halves = self.vectors(self.dim // 2)
        turns = [(f.floats(f.sum(row["cos"], at)), f.floats(f.sum(row["sin"], at))) for at in halves]

        def rotate(source: Value, target: Value, factor: Value | None = None) -> None:
            for at, (cos, sin) in zip(halves, turns, strict=True):
                low, high = f.floats(f.sum(source, at)), f.floats(f.sum(source, at + size // 2))
                first = f.b.fsub(f.multiply(low, cos), f.multiply(high, sin))
                second = f.multiply_add(low, sin, f.multiply(high, cos))
                for half, value in enumerate((first, second)):
                    f.store(f.multiply(value, factor) if factor else value, f.sum(target, at + half * (size // 2)))

        with f.loop(0, self.group * size, size) as at:
            rotate(f.sum(row["qkv"], f.times(head, self.group * size), at), f.sum(self.queries, at), scale)
        key = f.sum(row["qkv"], f.times(f.sum(f.times(call["kv_heads"], self.group), head), size))
        rotate(key, f.sum(self.keys, here))
        value = f.sum(key, f.times(call["kv_heads"], size))
        for at in self.vectors(self.dim):
            f.store(f.floats(f.sum(value, at)), f.sum(self.values, here, at))

    def attend(self, row: dict[str, Value], sinks: Value) -> None:
        """out = softmax(scores) values, where a sink [G] has a score and no value."""
        f, starts = self.f, range(0, self.group, self.width)
        tops = [f.variable(f.load(f.sum(sinks, 4 * g), F32, self.width, vector=True)) for g in starts]
        totals = [f.variable(f.constant(F32, 1.0, self.width)) for _ in starts]
        with f.loop(self.out, f.sum(self.out, 4 * self.group * self.dim), 4 * f.lanes) as at:
            f.store(f.constant(F32, 0.0), at)
        for first, count in ((row["first"], row["count"]), (f.integer(0), row["rest"])):
            with f.loop(0, count, BLOCK_KEYS) as start:
                number = f.smaller(f.b.sub(count, start), BLOCK_KEYS)
                keys, values = (
                    f.sum(of, f.times(f.sum(first, start), 4 * self.dim)) for of in (self.keys, self.values)
                )
                before = [f.b.load(top) for top in tops]
                self._score(keys, values, number, tops)
                for g, top, total, old in zip(starts, tops, totals, before, strict=True):
                    shrunk = f.exponential(f.b.fsub(old, f.b.load(top)))
                    f.b.store(f.multiply(f.b.load(total), shrunk), total)
                    self._scale(g, shrunk)
                self._weigh(number, tops, totals)
                self._sum_values(values, keys, number)
        for g, total in zip(starts, totals, strict=True):
            self._scale(g, f.b.fdiv(f.constant(F32, 1.0, self.width), f.b.load(total)))

    def _score(self, keys: Value, values: Value, number: Value, tops: Sequence[Value]) -> None:
        """The scores of a block of keys, and the largest so far in `tops`. Fetches the block's values."""
        f, size = self.f, 4 * self.dim
        with f.loop(0, number) as n:
            self._prefetch(f.sum(values, f.times(n, size)))
            parts = [f.floats(f.sum(keys, f.times(n, size), at)) for at in self.vectors(self.dim)]
            for i, top in enumerate(tops):
                sums = []
                for g in range(i * self.width, (i + 1) * self.width):
                    query = [f.floats(f.sum(self.queries, g * size + at)) for at in self.vectors(self.dim)]
                    sums.append(f.tree([f.multiply(*both) for both in zip(parts, query, strict=True)]))
                found, largest = f.totals(sums), f.b.load(top)
                f.store(found, f.sum(self.scores, f.times(n, 4 * self.group), 4 * i * self.width))
                f.b.store(f.b.select(f.b.fcmp_ordered(">", found, largest), found, largest), top)

    def _weigh(self, number: Value, tops: Sequence[Value], totals: Sequence[Value]) -> None:
        """A block's scores become exponentials, which are added to the totals."""
        f = self.f
        with f.loop(0, f.times(number, 4 * self.group), 4 * self.group) as at:
            for i, (top, total) in enumerate(zip(tops, totals, strict=True)):
                place = f.sum(self.scores, at, 4 * i * self.width)
                weight = f.exponential(f.b.fsub(f.load(place, F32, self.width, vector=True), f.b.load(top)))
                f.store(weight, place)
                f.b.store(f.add(f.b.load(total), weight), total)

    def _sum_values(self, values: Value, keys: Value, number: Value) -> None:
        """out += weights times values of a block, as many sums at a time as registers hold. Fetches the next block's
        keys."""
        f, together, span = self.f, min(TOGETHER, self.group), self.f.target.rows * self.f.lanes
        spans = [range(at, min(at + span, self.dim), f.lanes) for at in range(0, self.dim, span)]
        for i, (g, parts) in enumerate(product(range(0, self.group, together), spans)):
            places = {(h, d): f.sum(self.out, 4 * ((g + h) * self.dim + d)) for h, d in product(range(together), parts)}
            sums = {key: f.variable(f.floats(place)) for key, place in places.items()}
            with f.loop(0, number) as n:
                at = f.times(n, 4 * self.dim)
                if i == 0:
                    self._prefetch(f.sum(keys, at, 4 * self.dim * BLOCK_KEYS))
                vectors = {d: f.floats(f.sum(values, at, 4 * d)) for d in parts}
                for h in range(together):
                    place = f.sum(self.scores, f.times(n, 4 * self.group), 4 * (g + h))
                    weight = f.everywhere(f.load(place, F32))
                    for d, vector in vectors.items():
                        f.accumulate(vector, weight, sums[h, d])
            for key, place in places.items():
                f.store(f.b.load(sums[key]), place)

    def _scale(self, first: int, factors: Value) -> None:
        """Rows of out, from `first` on, times a vector of factors."""
        f = self.f
        for i in range(factors.type.count):
            factor = f.everywhere(f.b.extract_element(factors, ir.Constant(I32, i)))
            for at in self.vectors(self.dim):
                place = f.sum(self.out, 4 * (first + i) * self.dim + at)
                f.store(f.multiply(f.floats(place), factor), place)

    def _prefetch(self, row: Value) -> None:
        for line in range(0, 4 * self.dim, 64):
            self.f.prefetch(self.f.sum(row, line))
