"""One loaded model on one device, behind the seam of backends/base.py. All calls come from one thread."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ...config import ModelConfig
from ...sampling import Sampling
from ..base import Limits, Row, Sampled, Snapshot, stage_count, used_adapters, verified, working_space
from .cache import Cache, SlotSnapshot, Span
from .model import GptOss
from .sample import SamplerOutput, SamplerState, sample_tokens
from .streams import CpuStreams

LOGITS_CHUNK = 256  # positions whose logits are on the device at once in logits()
CLEAR_CACHE_STEPS = 512  # steps between emptying MLX's buffer cache, which otherwise grows with every new length


@dataclass(frozen=True)
class SampledRow:
    """The entries of a sampler's output that belong to one row: [first, first + 1 + len(drafts))."""

    output: SamplerOutput
    first: int
    sampling: Sampling
    drafts: tuple[int, ...]

    def read(self, output: SamplerOutput) -> Sampled:
        """The sampled token, followed by one more token for each draft that was right. Each token is drawn as it would
        be without drafts, so drafts change only the speed. output: this row's, on the host."""
        return verified(self.drafts, lambda index: _sampled(output, self.first + index, self.sampling))


@dataclass(frozen=True)
class Step:
    """A step in progress on the device.

    last: the array that the step computes last. `wait` waits for it, so that a prefill, which samples nothing, does not
    run far ahead of the device. arrays: all other arrays that the step changes, until it is submitted: while one is
    held, the next step cannot write in place.
    """

    rows: tuple[SampledRow | None, ...]
    last: mx.array
    arrays: tuple[mx.array, ...]

    def wait(self) -> list[Sampled | None]:
        mx.eval(self.last)
        # Copied whole: indexing on the device would queue behind the next step, which has been submitted by now.
        read = {id(row.output): row.output.on_host() for row in self.rows if row is not None}
        return [None if row is None else row.read(read[id(row.output)]) for row in self.rows]


class MlxRunner:
    """The Runner of the mlx backend. `submit` builds a step's graph and starts it; only `Step.wait` and `logits` wait
    for the device."""

    def __init__(
        self,
        model: GptOss,
        limits: Limits,
        where: mx.Device | mx.Stream,
        streams: CpuStreams | None = None,
        *,
        in_turn: bool = False,
        on_close: Callable[[], None] | None = None,
        host_bytes: int = 0,
    ) -> None:
        """where: the device or the stream that computes. streams: closed with the runner. in_turn: a step is only
        submitted when the one before it has ended (command_buffers.py). on_close: called last. host_bytes: of weights
        in memory outside of MLX."""
        self._host_bytes = host_bytes
        self._in_turn, self._on_close = in_turn, on_close
        self._submitted: Step | None = None
        self.config: ModelConfig = model.config
        self.limits = limits
        self._model = model
        self._elementwise = model.elementwise
        self._vocabulary = min(limits.resident_vocab or model.config.vocab_size, model.config.vocab_size)
        self._where = where
        self._streams = streams
        self._cache = Cache(model.config, limits.slots, limits.max_context, model.dtype, limits.kv_bits, limits.drafts)
        self._last: dict[int, mx.array] = {}  # slot -> the token it sampled last, int32 [1]
        self._hidden: dict[int, mx.array] = {}  # slot -> hidden states of an unfinished chunk, [1, L, D]
        self._states: dict[int, SamplerState] = {}
        self._steps = 0
        # MLX keeps freed buffers for reuse, up to this limit: what the memory plan counts for one prefill step.
        cache_limit = working_space(model.config, limits.chunk, limits.slots, model.dtype.size)
        self._previous_cache_limit = mx.set_cache_limit(cache_limit)

    def submit(self, rows: Sequence[Row]) -> Step:
        if self._in_turn and self._submitted is not None:
            mx.eval(self._submitted.last)
        with mx.stream(self._where):
            self._cache.drop_kept(unless=self._hidden)  # of chunks that are not finished
            step = self.build(rows)
            self._submitted = step if self._in_turn else None
            mx.async_eval(step.last, step.arrays)  # type: ignore[no-untyped-call]
            self._steps += 1
            if self._steps % CLEAR_CACHE_STEPS == 0:
                mx.clear_cache()
            return replace(step, arrays=())

    def build(self, rows: Sequence[Row]) -> Step:
        """Build the step's graph without starting it."""
        results: list[SampledRow | None] = [None] * len(rows)
        single = [i for i, row in enumerate(rows) if not row.drafts and (row.tokens is None or len(row.tokens) == 1)]
        single.sort(key=lambda i: rows[i].slot)
        groups = [single] if single else []
        groups += [[i] for i in range(len(rows)) if i not in set(single)]
        for group in groups:
            last = self._forward([rows[i] for i in group], group, results)
            # All ranks must run their sums in the same order: group by group. And while a group is not begun, it holds
            # the cache, which the next one would have to copy to write into it.
            if not self._model.ranks.alone or len(groups) > 1:
                mx.async_eval(last, self._cache.arrays)  # type: ignore[no-untyped-call]
        outputs = {id(drawn.output): drawn.output for drawn in results if drawn is not None}
        arrays = [a for output in outputs.values() for a in vars(output).values() if a is not None]
        kept = [a for h in self._states.values() for a in (h.seen, h.counts) if a is not None]
        return Step(tuple(results), last, (*arrays, *kept, *self._cache.arrays))

    def release(self, slot: int) -> None:
        self._last.pop(slot, None)
        self._hidden.pop(slot, None)
        self._cache.release(slot)
        self._states.pop(slot, None)

    def save(self, slot: int, start: int, end: int) -> SlotSnapshot:
        with mx.stream(self._where):
            return self._cache.save(slot, start, end)

    def restore(self, slot: int, chain: Sequence[Snapshot]) -> None:
        with mx.stream(self._where):
            self._cache.restore(slot, [saved for saved in chain if isinstance(saved, SlotSnapshot)])
            mx.async_eval(self._cache.arrays)  # type: ignore[no-untyped-call]

    def pack(self, snapshot: Snapshot) -> bytes:
        assert isinstance(snapshot, SlotSnapshot)
        return b"".join(np.array(array.view(mx.uint8)).tobytes() for array in snapshot.arrays)

    def unpack(self, start: int, end: int, data: bytes) -> SlotSnapshot:
        with mx.stream(self._where):
            return self._cache.unpack(start, end, data)

    def logits(self, ids: Sequence[int], adapter: int | None = None) -> NDArray[np.float32]:
        with mx.stream(self._where):
            cache = Cache(self.config, 1, len(ids), self._model.dtype, self.limits.kv_bits)
            out = np.empty((len(ids), self.config.vocab_size), dtype=np.float32)
            step = min(self.limits.chunk, LOGITS_CHUNK)
            for start in range(0, len(ids), step):
                piece = mx.array(list(ids[start : start + step]))[None]
                uses = [] if adapter is None else [(adapter, None)]
                span = Span.of(self.config, [0], [start], piece.shape[1], adapters=uses)
                hidden = self._model(piece, cache, span, len(piece[0]))
                out[start : start + step] = np.array(self._model.all_logits(hidden[0]))
            return out

    def peak_memory(self) -> int:
        return self._host_bytes + int(mx.get_peak_memory())

    def close(self) -> None:
        del self._model, self._cache
        self._submitted = None
        self._last.clear()
        self._hidden.clear()
        self._states.clear()
        if self._streams is not None:
            self._streams.close()
        mx.clear_cache()
        mx.set_cache_limit(self._previous_cache_limit)
        if self._on_close is not None:
            self._on_close()

    def _forward(self, rows: Sequence[Row], places: Sequence[int], results: list[SampledRow | None]) -> mx.array:
        """Run either any number of one-token rows, or one row of several tokens. Returns the array computed last."""
        ids = mx.stack([self._tokens(row) for row in rows])  # [B, L]
        starts = [row.start for row in rows]
        slots, adapters = [row.slot for row in rows], used_adapters(rows)
        span = Span.of(
            self.config,
            slots,
            starts,
            ids.shape[1],
            self.limits.drafts,
            adapters,
            mask_heads=self._model.mask_heads,
            saves_inside=rows[0].saves_inside,
        )
        samples = 1 + len(rows[0].drafts)  # per row
        if rows[0].stages is None:
            hidden = self._model(ids, self._cache, span, samples)  # [B, samples, D]
        else:
            hidden = self._run_stages(rows[0].slot, rows[0].stages, ids, span)
        wanted = [(b, row, row.sampling) for b, row in enumerate(rows) if row.sampling is not None]
        if not wanted:
            return hidden
        if len(wanted) < len(rows):
            hidden = hidden[mx.array([b for b, _, _ in wanted])]
        draws = [(row, sampling, i) for _, row, sampling in wanted for i in range(samples)]
        output = sample_tokens(
            self._model.logits(hidden.reshape(len(draws), -1)),
            [sampling for _, sampling, _ in draws],
            [self._state(row, sampling) for row, sampling, _ in draws],
            [row.start + span.length - samples + 1 + i for row, _, i in draws],
            [row.mask for row, _, _ in draws],
            self._elementwise,
        )
        for n, (b, row, sampling) in enumerate(wanted):
            if not row.drafts:
                self._last[row.slot] = output.tokens[n : n + 1]
            results[places[b]] = SampledRow(output, n * samples, sampling, row.drafts)
        last: mx.array = output.tokens
        return last

    def _run_stages(self, slot: int, stages: tuple[int, int], ids: mx.array, span: Span) -> mx.array:
        """Run some stages of a chunk, ids [1, L]. Hidden states [1, L, D], or [1, 1, D] after the last stage."""
        first, end = stages
        x = self._hidden.pop(slot) if first else self._model.embed.rows(ids, self._model.dtype)
        x = self._model.run(range(first, end), x, self._cache, span, 1)
        if end < stage_count(self.config):
            self._hidden[slot] = x
        return x

    def _tokens(self, row: Row) -> mx.array:
        """The ids that the row feeds, int32 [L]"""
        return self._last[row.slot] if row.tokens is None else mx.array(row.tokens + row.drafts, dtype=mx.int32)

    def _state(self, row: Row, sampling: Sampling) -> SamplerState:
        """The sampler state of the row's slot, reset by the first sampled row of a request."""
        if row.prompt is not None:
            seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
            self._states[row.slot] = SamplerState.begin(sampling, row.prompt, seed, self._vocabulary)
        return self._states[row.slot]


def _sampled(output: SamplerOutput, n: int, sampling: Sampling) -> Sampled:
    top: tuple[tuple[int, float], ...] = ()
    if sampling.logprobs:
        pairs = zip(output.top_ids[n].tolist(), output.top_logprobs[n].tolist(), strict=True)
        top = tuple(pairs)[: sampling.logprobs]
    return Sampled(int(output.tokens[n]), float(output.logits[n] - output.normalizers[n]), top)
