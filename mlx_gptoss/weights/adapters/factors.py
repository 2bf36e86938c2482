"""An adapter as the backends take it: for a weight W [N, K], thin factors a [R, K] and b [N, R] that add b @ a to it.

At run time y = x @ W^T + (x @ a^T) @ b^T: W stays as it is stored. A LoRA update is mostly smaller than half a step of
a 4-bit code, so merged into codes it would be rounded away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...config import ModelConfig
from ...errors import CheckpointError
from ..params import Param
from ..split import RankShard, split_of
from ..tensor import Array

MAX_RANK = 1024


@dataclass(frozen=True)
class Factors:
    """a [R, K] and b [N, R], or [E, R, K] and [E, N, R] for experts, float32; b includes the adapter's scale."""

    a: Array
    b: Array


@dataclass(frozen=True)
class Entry:
    """What an adapter adds to one parameter.

    source: names the tensors; entries of one source (gate and up, stored fused) have the same a. rank: R. inputs,
    outputs: K and N. experts: E; None for a matrix. scale: multiplies b @ a. read_a, read_b: a [.., R, K] and
    b [.., N, R], as stored. scales: those of single experts where they may differ; read_b has applied them.
    """

    source: str
    rank: int
    inputs: int
    outputs: int
    experts: int | None
    scale: float
    read_a: Callable[[], Array]
    read_b: Callable[[], Array]
    scales: tuple[float, ...] = ()

    def a(self) -> Array:
        """float32. Raises CheckpointError if a value is not finite."""
        return self._finite(self.read_a, 1.0)

    def b(self) -> Array:
        """float32, with the scale. Raises CheckpointError if a value is not finite."""
        return self._finite(self.read_b, self.scale)

    def _finite(self, read: Callable[[], Array], scale: float) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):  # told below
            values: Array = read().astype(np.float32) * np.float32(scale)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.source} has values that are not finite; the training has diverged")
        return values

    def part(self, axis: int, part: range) -> Entry:
        """What one rank holds: some experts, rows of b (axis 0) or columns of a (axis 1)."""
        cut = slice(part.start, part.stop)
        if self.experts is not None:
            a, b = (lambda: self.read_a()[cut]), (lambda: self.read_b()[cut])
            return replace(self, experts=len(part), read_a=a, read_b=b)
        if axis == 0:
            return replace(self, outputs=len(part), read_b=lambda: self.read_b()[cut])
        return replace(self, inputs=len(part), read_a=lambda: self.read_a()[:, cut])


@dataclass(frozen=True)
class Adapter:
    """One adapter, checked against the model it is for.

    config: of the model. name: for messages. entries: by the parameter's name without `.weight`, such as
    `layers.3.experts.gate`. outputs: N of every matrix of the model, by the same names. digest: of everything that the
    adapter's numbers depend on; "" where it is only looked at.
    """

    config: ModelConfig
    name: str
    entries: Mapping[str, Entry]
    outputs: Mapping[str, int]
    digest: str

    def part(self, params: Sequence[Param], shard: RankShard) -> Adapter:
        """The part that one rank holds. params: the whole model's."""
        entries, outputs = dict(self.entries), dict(self.outputs)
        for param in params:
            name, split = param.name.removesuffix(".weight"), split_of(param, self.config, shard)
            if split is not None and name in outputs:
                if split[0] == 0 and len(param.shape) == 2:
                    outputs[name] = len(split[1])
                if name in entries:
                    entries[name] = entries[name].part(*split)
        return replace(self, entries=entries, outputs=outputs)

    def stacked(self, names: Sequence[str]) -> Factors | None:
        """The factors of parameters that share their input, for one product: their a's below each other, and b with
        zeros where a parameter does not use an a. None if the adapter changes none of them."""
        outputs = [self.outputs[name] for name in names]
        entries = [self.entries.get(name) for name in names]
        sources = {entry.source: entry for entry in entries if entry is not None}
        if not sources:
            return None
        a = [entry.a() for entry in sources.values()]
        starts = dict(zip(sources, np.cumsum([0, *(entry.rank for entry in sources.values())]).tolist(), strict=False))
        first = next(iter(sources.values()))
        batch = () if first.experts is None else (first.experts,)
        b = np.zeros((*batch, sum(outputs), sum(entry.rank for entry in sources.values())), np.float32)
        row = 0
        for entry, count in zip(entries, outputs, strict=True):
            if entry is not None:
                at = starts[entry.source]
                b[..., row : row + count, at : at + entry.rank] = entry.b()
            row += count
        return Factors(a[0] if len(a) == 1 else np.concatenate(a, axis=-2), b)

    def delta(self, name: str, experts: slice = slice(None)) -> Array | None:
        """scale * b @ a of one parameter, float32; `experts`: which of them. None if the adapter leaves it as it is."""
        entry = self.entries.get(name)
        if entry is None:
            return None
        a, b = entry.a(), entry.b()
        product: Array = b @ a if entry.experts is None else b[experts] @ a[experts]
        return product

    def first_layers(self, count: int) -> Adapter:
        """What it adds to the first layers, for the model that has only those."""

        def is_first(name: str) -> bool:
            return not name.startswith("layers.") or int(name.split(".")[1]) < count

        entries = {name: entry for name, entry in self.entries.items() if is_first(name)}
        outputs = {name: rows for name, rows in self.outputs.items() if is_first(name)}
        return replace(self, config=self.config.first_layers(count), entries=entries, outputs=outputs)

    def nbytes(self, value_bytes: int) -> int:
        """Bytes of the stacked factors on a device with values of value_bytes."""
        return value_bytes * sum(values for values, _ in self.stacks())

    def stacks(self) -> list[tuple[int, int | None]]:
        """Of the stacked factors for each product: the number of values, and E; None for a matrix."""
        outputs: dict[str, int] = {}
        for name, count in self.outputs.items():
            outputs[_group(name)] = outputs.get(_group(name), 0) + count
        groups: dict[str, list[Entry]] = {}
        for name, entry in self.entries.items():
            groups.setdefault(_group(name), []).append(entry)
        return [(_stacked_size(entries, outputs[group]), entries[0].experts) for group, entries in groups.items()]


def _group(name: str) -> str:
    """The name with which parameters that share their input are stacked."""
    layer, _, kind = name.rpartition(".")
    return f"{layer}.{'qkv' if kind in 'qkv' else 'gate_up' if kind in ('gate', 'up') else kind}"


def _stacked_size(entries: Sequence[Entry], outputs: int) -> int:
    """Values of a and b. outputs: rows of b, those of parameters without an entry included."""
    rank = sum({entry.source: entry.rank for entry in entries}.values())
    return (entries[0].experts or 1) * rank * (entries[0].inputs + outputs)
