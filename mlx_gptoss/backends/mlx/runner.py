"""One loaded model on one device, behind the seam of backends/base.py. All calls come from one thread."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ...memory import working_space
from ...sampling import Sampling
from ..base import Limits, Row, Sampled
from .cache import Cache, Span
from .model import GptOss
from .sample import Choice, History, choose

LOGITS_ROWS = 256  # positions of the vocabulary-wide output held at once by logits()
CLEAR_EVERY = 512  # steps between emptying MLX's buffer cache, which otherwise grows with every new length


@dataclass(frozen=True)
class Step:
    """A step under way: for each row of the step, which entry of which choice is its own.

    last: what the step computes last; waiting for it keeps a prefill, which samples nothing, from running far ahead
    of the device. arrays: everything else that the step changes.
    """

    rows: tuple[tuple[Choice, int, Sampling] | None, ...]
    last: mx.array
    arrays: tuple[mx.array, ...]

    def wait(self) -> list[Sampled | None]:
        mx.eval(self.last)
        return [None if row is None else _sampled(*row) for row in self.rows]


class MlxRunner:
    """`submit` builds the step's graph and starts it; nothing here waits for the device but `wait` and `logits`."""

    def __init__(self, model: GptOss, limits: Limits, device: mx.Device) -> None:
        self.config = model.config
        self.limits = limits
        self._model = model
        self._elementwise = model.elementwise
        self._vocabulary = min(limits.resident_vocab or model.config.vocab_size, model.config.vocab_size)
        self._device = device
        self._cache = Cache(model.config, limits.slots, limits.max_context, model.dtype, limits.kv_bits)
        self._last: dict[int, mx.array] = {}  # slot -> the token it sampled last, int32 [1]
        self._histories: dict[int, History] = {}
        self._steps = 0
        # Freed buffers that MLX keeps for reuse: what one prefill step needs, as the memory plan counts it.
        room = working_space(model.config, limits.chunk, limits.slots, model.dtype.size)
        self._former_cache_limit = mx.set_cache_limit(room)

    def submit(self, rows: Sequence[Row]) -> Step:
        with mx.stream(self._device):
            step = self.build(rows)
            mx.async_eval(step.last, step.arrays)  # type: ignore[no-untyped-call]
            self._steps += 1
            if self._steps % CLEAR_EVERY == 0:
                mx.clear_cache()
            return step

    def build(self, rows: Sequence[Row]) -> Step:
        """The step's graph, not started."""
        results: list[tuple[Choice, int, Sampling] | None] = [None] * len(rows)
        single = [i for i, row in enumerate(rows) if row.tokens is None or len(row.tokens) == 1]
        single.sort(key=lambda i: rows[i].slot)
        groups = [single] if single else []
        groups += [[i] for i in range(len(rows)) if i not in set(single)]
        last = [self._forward([rows[i] for i in group], group, results) for group in groups][-1]
        choices = {id(entry[0]): entry[0] for entry in results if entry is not None}
        arrays = [a for choice in choices.values() for a in vars(choice).values() if a is not None]
        kept = [a for h in self._histories.values() for a in (h.seen, h.counts) if a is not None]
        return Step(tuple(results), last, (*arrays, *kept, *self._cache.arrays))

    def release(self, slot: int) -> None:
        self._last.pop(slot, None)
        self._histories.pop(slot, None)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        with mx.stream(self._device):
            cache = Cache(self.config, 1, len(ids), self._model.dtype, self.limits.kv_bits)
            out = np.empty((len(ids), self.config.vocab_size), dtype=np.float32)
            step = min(self.limits.chunk, LOGITS_ROWS)
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
        mx.set_cache_limit(self._former_cache_limit)

    def _forward(
        self, rows: Sequence[Row], places: Sequence[int], results: list[tuple[Choice, int, Sampling] | None]
    ) -> mx.array:
        """Either any number of one-token rows, or one row of several tokens. Returns what is computed last."""
        ids = mx.stack([self._tokens(row) for row in rows])  # [B, L]
        span = Span.of(self.config, [row.slot for row in rows], [row.start for row in rows], ids.shape[1])
        hidden = self._model(ids, self._cache, span, 1)[:, 0]  # [B, D]
        wanted = [(b, row, row.sampling) for b, row in enumerate(rows) if row.sampling is not None]
        if not wanted:
            return hidden
        last = hidden if len(wanted) == len(rows) else hidden[mx.array([b for b, _, _ in wanted])]
        samplings = [sampling for _, _, sampling in wanted]
        histories = [self._history(row, sampling) for _, row, sampling in wanted]
        positions = [row.start + span.length for _, row, _ in wanted]
        choice = choose(self._model.logits(last), samplings, histories, positions, self._elementwise)
        for n, (b, row, sampling) in enumerate(wanted):
            self._last[row.slot] = choice.tokens[n : n + 1]
            results[places[b]] = (choice, n, sampling)
        return choice.tokens

    def _tokens(self, row: Row) -> mx.array:
        return self._last[row.slot] if row.tokens is None else mx.array(row.tokens, dtype=mx.int32)

    def _history(self, row: Row, sampling: Sampling) -> History:
        if row.prompt is not None:
            seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
            self._histories[row.slot] = History.begin(sampling, row.prompt, seed, self._vocabulary)
        return self._histories[row.slot]


def _sampled(choice: Choice, n: int, sampling: Sampling) -> Sampled:
    top: tuple[tuple[int, float], ...] = ()
    if sampling.logprobs and choice.top_ids is not None and choice.top_logprobs is not None:
        ids, values = np.array(choice.top_ids[n]), np.array(choice.top_logprobs[n])
        top = tuple((int(i), float(v)) for i, v in zip(ids, values, strict=True))[: sampling.logprobs]
    return Sampled(int(np.array(choice.tokens[n])), float(np.array(choice.logprobs[n])), top)
