"""One loaded model on one device, behind the seam of backends/base.py. All calls come from one thread."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ...config import ModelConfig
from ...sampling import Sampling
from ..base import Limits, Row, Sampled, Snapshot, working_space
from .cache import Cache, SlotSnapshot, Span
from .model import GptOss
from .sample import Choice, History, choose

LOGITS_CHUNK = 256  # positions of the vocabulary-wide output held at once by logits()
CLEAR_CACHE_STEPS = 512  # steps between emptying MLX's buffer cache, which otherwise grows with every new length


HostChoice = dict[str, NDArray[Any]]  # a Choice's arrays on the host, by their names


@dataclass(frozen=True)
class SampledRow:
    """What one row sampled: the entries [first, first + 1 + len(drafts)) of a choice."""

    choice: Choice
    first: int
    sampling: Sampling
    drafts: tuple[int, ...]

    def read(self, numbers: HostChoice) -> Sampled:
        """The token and, with drafts, each token after one that the draft foresaw. All of them are drawn as they would
        be one by one, so that drafts change nothing but the speed."""
        tokens = []
        for place, draft in enumerate((*self.drafts, None), self.first):
            tokens.append(_sampled(numbers, place, self.sampling))
            if tokens[-1].token != draft:
                break
        return replace(tokens[0], accepted=tuple(tokens[1:])) if self.drafts else tokens[0]


@dataclass(frozen=True)
class Step:
    """A step under way.

    last: what the step computes last; waiting for it keeps a prefill, which samples nothing, from running far ahead
    of the device. arrays: everything else that the step changes.
    """

    rows: tuple[SampledRow | None, ...]
    last: mx.array
    arrays: tuple[mx.array, ...]

    def wait(self) -> list[Sampled | None]:
        mx.eval(self.last)
        # Read whole: indexing on the device would be work behind the step that is already under way.
        read = {id(row.choice): _to_host(row.choice) for row in self.rows if row is not None}
        return [None if row is None else row.read(read[id(row.choice)]) for row in self.rows]


class MlxRunner:
    """`submit` builds the step's graph and starts it; nothing here waits for the device but `wait` and `logits`."""

    def __init__(self, model: GptOss, limits: Limits, device: mx.Device) -> None:
        self.config: ModelConfig = model.config
        self.limits = limits
        self._model = model
        self._elementwise = model.elementwise
        self._vocabulary = min(limits.resident_vocab or model.config.vocab_size, model.config.vocab_size)
        self._device = device
        self._cache = Cache(model.config, limits.slots, limits.max_context, model.dtype, limits.kv_bits, limits.drafts)
        self._last: dict[int, mx.array] = {}  # slot -> the token it sampled last, int32 [1]
        self._histories: dict[int, History] = {}
        self._steps = 0
        # Freed buffers that MLX keeps for reuse: what one prefill step needs, as the memory plan counts it.
        room = working_space(model.config, limits.chunk, limits.slots, model.dtype.size)
        self._previous_cache_limit = mx.set_cache_limit(room)

    def submit(self, rows: Sequence[Row]) -> Step:
        with mx.stream(self._device):
            step = self.build(rows)
            mx.async_eval(step.last, step.arrays)  # type: ignore[no-untyped-call]
            self._steps += 1
            if self._steps % CLEAR_CACHE_STEPS == 0:
                mx.clear_cache()
            return step

    def build(self, rows: Sequence[Row]) -> Step:
        """The step's graph, not started."""
        results: list[SampledRow | None] = [None] * len(rows)
        single = [i for i, row in enumerate(rows) if not row.drafts and (row.tokens is None or len(row.tokens) == 1)]
        single.sort(key=lambda i: rows[i].slot)
        groups = [single] if single else []
        groups += [[i] for i in range(len(rows)) if i not in set(single)]
        for group in groups:
            last = self._forward([rows[i] for i in group], group, results)
            if not self._model.ranks.alone:  # all ranks sum in the order of the groups, not in one of MLX's making
                mx.async_eval(last, self._cache.arrays)  # type: ignore[no-untyped-call]
        choices = {id(drawn.choice): drawn.choice for drawn in results if drawn is not None}
        arrays = [a for choice in choices.values() for a in vars(choice).values() if a is not None]
        kept = [a for h in self._histories.values() for a in (h.seen, h.counts) if a is not None]
        return Step(tuple(results), last, (*arrays, *kept, *self._cache.arrays))

    def release(self, slot: int) -> None:
        self._last.pop(slot, None)
        self._histories.pop(slot, None)

    def save(self, slot: int, start: int, end: int) -> SlotSnapshot:
        with mx.stream(self._device):
            return self._cache.save(slot, start, end)

    def restore(self, slot: int, chain: Sequence[Snapshot]) -> None:
        with mx.stream(self._device):
            self._cache.restore(slot, [saved for saved in chain if isinstance(saved, SlotSnapshot)])
            mx.async_eval(self._cache.arrays)  # type: ignore[no-untyped-call]

    def pack(self, snapshot: Snapshot) -> bytes:
        assert isinstance(snapshot, SlotSnapshot)
        return b"".join(np.array(array.view(mx.uint8)).tobytes() for array in snapshot.arrays)

    def unpack(self, start: int, end: int, data: bytes) -> SlotSnapshot:
        with mx.stream(self._device):
            return self._cache.unpack(start, end, data)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        with mx.stream(self._device):
            cache = Cache(self.config, 1, len(ids), self._model.dtype, self.limits.kv_bits)
            out = np.empty((len(ids), self.config.vocab_size), dtype=np.float32)
            step = min(self.limits.chunk, LOGITS_CHUNK)
            for start in range(0, len(ids), step):
                piece = mx.array(list(ids[start : start + step]))[None]
                hidden = self._model(piece, cache, Span.of(self.config, [0], [start], piece.shape[1]), len(piece[0]))
                out[start : start + step] = np.array(self._model.all_logits(hidden[0]))
            return out

    def peak_memory(self) -> int:
        return int(mx.get_peak_memory())

    def close(self) -> None:
        del self._model, self._cache
        self._last.clear()
        self._histories.clear()
        mx.clear_cache()
        mx.set_cache_limit(self._previous_cache_limit)

    def _forward(self, rows: Sequence[Row], places: Sequence[int], results: list[SampledRow | None]) -> mx.array:
        """Either any number of one-token rows, or one row of several tokens. Returns what is computed last."""
        ids = mx.stack([self._tokens(row) for row in rows])  # [B, L]
        starts = [row.start for row in rows]
        span = Span.of(self.config, [row.slot for row in rows], starts, ids.shape[1], self.limits.drafts)
        outputs = 1 + len(rows[0].drafts)
        hidden = self._model(ids, self._cache, span, outputs)  # [B, outputs, D]
        wanted = [(b, row, row.sampling) for b, row in enumerate(rows) if row.sampling is not None]
        if not wanted:
            return hidden
        if len(wanted) < len(rows):
            hidden = hidden[mx.array([b for b, _, _ in wanted])]
        draws = [(row, sampling, i) for _, row, sampling in wanted for i in range(outputs)]
        choice = choose(
            self._model.logits(hidden.reshape(len(draws), -1)),
            [sampling for _, sampling, _ in draws],
            [self._history(row, sampling) for row, sampling, _ in draws],
            [row.start + span.length - outputs + 1 + i for row, _, i in draws],
            [row.mask for row, _, _ in draws],
            self._elementwise,
        )
        for n, (b, row, sampling) in enumerate(wanted):
            if not row.drafts:
                self._last[row.slot] = choice.tokens[n : n + 1]
            results[places[b]] = SampledRow(choice, n * outputs, sampling, row.drafts)
        return choice.tokens

    def _tokens(self, row: Row) -> mx.array:
        """The ids that the row feeds, int32 [L]"""
        return self._last[row.slot] if row.tokens is None else mx.array(row.tokens + row.drafts, dtype=mx.int32)

    def _history(self, row: Row, sampling: Sampling) -> History:
        if row.prompt is not None:
            seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
            self._histories[row.slot] = History.begin(sampling, row.prompt, seed, self._vocabulary)
        return self._histories[row.slot]


def _to_host(choice: Choice) -> HostChoice:
    return {name: np.array(array) for name, array in vars(choice).items() if array is not None}


def _sampled(numbers: HostChoice, n: int, sampling: Sampling) -> Sampled:
    top: tuple[tuple[int, float], ...] = ()
    if sampling.logprobs:
        pairs = zip(numbers["top_ids"][n].tolist(), numbers["top_logprobs"][n].tolist(), strict=True)
        top = tuple(pairs)[: sampling.logprobs]
    return Sampled(int(numbers["tokens"][n]), float(numbers["logprobs"][n]), top)
