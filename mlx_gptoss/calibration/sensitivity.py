"""What each matrix costs in few bits: measured, in one pass over the network that continues after an interruption.

With a matrix alone in 3 bits, rounded to nearest, the cost is the KL divergence of the model's predictions from the
original's on a short text. Each layer adds a copy of the activations for each of its matrices, and all copies go on to
the next layer. They are on disk, a part of the store for each layer, so a killed run continues after the last one.

Legend: C copies, the first of them the original's, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..config import ModelConfig
from ..weights import quantization
from ..weights.params import Param
from ..weights.tensor import AFFINE, Array, Quantized, Weight, Weights
from .divergence import kl_divergence, log_softmax
from .forward import ROWS, Forward
from .store import PartWriter, Store
from .text import CalibrationText
from .widths import GROUP, WIDTHS, Choice

WINDOWS, WINDOW = 8, 128  # windows of the text that costs are measured on, and tokens of each
TOGETHER = 8  # copies of the activations at once: their weights are decoded once
_LOGITS = 64  # tokens at once whose logits are compared
_CHUNK = 2**23  # weights at once that are made narrow

Group = tuple[Param, ...]
Progress = Callable[[int, int, str], None]  # matrices done, in total, what is being done


def measure_choices(
    source: Weights, groups: Sequence[Group], text: CalibrationText, store: Store, progress: Progress
) -> list[Choice]:
    """The choices for groups of matrices, with their costs on a sample of the text.

    groups: in the order of the network. store: keeps the activations after each layer, and then the costs.
    """
    if not store.is_done("costs"):
        _Measuring(source, groups, text, store, progress).run()
    costs = store.array("costs", "costs")
    return [Choice(group, float(cost)) for group, cost in zip(groups, costs, strict=True)]


def measuring_bytes(config: ModelConfig) -> int:
    """Upper bound of the memory that measuring takes. Activations on disk are not counted."""
    hidden, inner, tokens = config.hidden_size, config.intermediate_size, TOGETHER * WINDOWS * WINDOW
    attention = 4 * tokens * (6 * hidden + 4 * config.q_size + 6 * config.kv_size) + 3 * 4 * hidden * config.q_size
    experts = 4 * tokens * (6 * hidden + 6 * inner) + 6 * 4 * hidden * inner
    rows = (TOGETHER + 1) * _LOGITS
    head = 4 * rows * (config.vocab_size + 3 * hidden) + 4 * 8 * _LOGITS * config.vocab_size + 3 * 4 * ROWS * hidden
    narrow = max(2 * config.num_local_experts * hidden * inner, config.vocab_size * hidden) // 2 + 8 * 4 * _CHUNK
    return max(attention, experts, head) + narrow


def copies_bytes(config: ModelConfig, groups: int) -> int:
    """Upper bound of the disk space of activations before and after a layer."""
    return 2 * 4 * (groups + 1) * WINDOWS * WINDOW * config.hidden_size


class _Measuring:
    def __init__(
        self, source: Weights, groups: Sequence[Group], text: CalibrationText, store: Store, progress: Progress
    ) -> None:
        windows = sample(text)
        self._ids, self._lengths = [id for window in windows for id in window], [len(window) for window in windows]
        self._source, self._groups, self._store, self._progress = source, groups, store, progress
        self._network = Forward(source)
        self._layers = source.config.num_hidden_layers

    def run(self) -> None:
        """Fill in the part "costs" of the store."""
        done = [index for index in range(self._layers + 1) if self._store.is_done(_part(index))]
        if not done:
            self._embed()
        for layer in range(max(done, default=0), self._layers):
            self._layer(layer)
        self._finish()

    def _embed(self) -> None:
        """The activations before the first layer: the original's, and those of a narrow embedding table."""
        groups = self._new(None)
        writer, copies = self._begin(0, 1 + len(groups))
        for copy, network in zip(copies, [self._network, *map(self._narrowed, groups)], strict=True):
            copy[...] = network.embed(self._ids)
        writer.commit()

    def _layer(self, layer: int) -> None:
        before, groups = self._store.array(_part(layer), "copies"), self._new(layer)
        writer, after = self._begin(layer + 1, len(before) + len(groups))
        for part in _parts(len(before)):
            count = len(before[part])
            x = np.concatenate(before[part])  # [copies * T, D]
            after[part] = self._network.layer(layer, x, self._lengths * count).reshape(count, *before.shape[1:])
        for copy, group in zip(after[len(before) :], groups, strict=True):
            copy[...] = self._narrowed(group).layer(layer, np.asarray(before[0]), self._lengths)
        self._source.release()
        writer.commit()
        self._store.remove(_part(layer))

    def _finish(self) -> None:
        """Compare the predictions, some tokens at a time. A narrow lm_head changes no activations."""
        copies, groups = self._store.array(_part(self._layers), "copies"), self._new(self._layers)
        heads = [self._narrowed(group) for group in groups]
        costs = np.zeros(len(self._groups))
        tokens = copies.shape[1]
        for start in range(0, tokens, _LOGITS):
            rows = slice(start, start + _LOGITS)
            original = np.asarray(copies[0, rows])
            wanted = log_softmax(self._network.logits(original))
            for part in _parts(len(copies) - 1):
                x = copies[1:, rows][part]
                logits = self._network.logits(np.concatenate(x)).reshape(*x.shape[:2], -1)
                costs[part] += [kl_divergence(wanted, log_softmax(one)).sum() for one in logits]
            for index, head in enumerate(heads, len(copies) - 1):
                costs[index] += kl_divergence(wanted, log_softmax(head.logits(original))).sum()
        writer = self._store.begin("costs")
        writer.array("costs", np.float64, costs.shape)[...] = costs / tokens
        writer.commit()
        self._store.remove(_part(self._layers))

    def _new(self, layer: int | None) -> list[Group]:
        """The groups that a layer adds; the embedding table is before the first (None), lm_head after the last."""
        head = self._layers
        at = {"embed": None, "lm_head": head}
        return [group for group in self._groups if at.get(group[0].role, group[0].layer) == layer]

    def _narrowed(self, group: Group) -> Forward:
        """The network with these matrices in few bits."""
        self._progress(self._groups.index(group) + 1, len(self._groups), "measuring what each matrix costs")
        return self._network.with_replaced({param.name: narrow(self._source.read(param.name)) for param in group})

    def _begin(self, layer: int, count: int) -> tuple[PartWriter, Array]:
        """The activations [C, T, D] before a layer, to be filled in."""
        writer = self._store.begin(_part(layer))
        return writer, writer.array("copies", np.float32, (count, len(self._ids), self._source.config.hidden_size))


def sample(text: CalibrationText) -> list[tuple[int, ...]]:
    """The beginnings of WINDOWS windows, evenly spaced in the text; of all windows if there are fewer."""
    long_enough = [window for window in text.windows if len(window) > 1]
    step = max(1, len(long_enough) // WINDOWS)
    return [window[:WINDOW] for window in long_enough[::step][:WINDOWS]]


def narrow(weight: Weight) -> Quantized:
    """The weight [rows, K] or [E, rows, K] in 3 bits, some rows or experts at a time."""
    spec = AFFINE[WIDTHS[0], GROUP]
    step = max(1, _CHUNK // int(np.prod(weight.shape[1:])))
    parts = [quantization.to_spec(weight[start : start + step], spec) for start in range(0, weight.shape[0], step)]
    codes, scale, bias = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "scale", "bias")
    )
    return Quantized(spec, codes, scale, bias)


def _part(layer: int) -> str:
    """The name of the part with the activations before a layer."""
    return f"copies-{layer}"


def _parts(count: int) -> Iterator[slice]:
    for start in range(0, count, TOGETHER):
        yield slice(start, min(start + TOGETHER, count))
