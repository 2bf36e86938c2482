"""One loaded model on one device, behind the seam of backends/base.py. All calls come from one thread."""

from __future__ import annotations

import resource
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...config import ModelConfig
from ...sampling import Sampling
from ..base import Limits, Row, Sampled, Snapshot, stage_count, used_adapters, verified
from .cache import Cache, FullCache, SlotSnapshot, Span
from .model import GptOss
from .sample import SamplerOutput, SamplerState, noise_keys, sample_tokens
from .transfer import to_device

if TYPE_CHECKING:
    from .decode import Decoder

LOGITS_CHUNK = 256  # positions whose logits are on the device at once in logits()
MAX_ROWS = 64  # of one step of decode.py
WARM_UP_LENGTHS = (2048, 1024, 512, 256, 64, 32, 16)  # lengths of prompts for which kernels/tiles.py has other tiles
SHORT_PROMPTS = (2, 4, 8, 16, 32, 64)  # lengths after which attention splits keys among other numbers of programs
GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class SampledRow:
    """The entries of a sampler's output on the host that belong to one row: [first, first + 1 + len(drafts))."""

    output: SamplerOutput
    first: int
    sampling: Sampling
    drafts: tuple[int, ...]

    def read(self) -> Sampled:
        """The sampled token, followed by one more token for each draft that was right. Each token is drawn as it would
        be without drafts, so drafts change only the speed."""
        return verified(self.drafts, lambda index: _sampled(self.output, self.first + index, self.sampling))


@dataclass(frozen=True)
class Step:
    """A step in progress on the device.

    done: set once the copies to the host are complete; None on a CPU, where nothing is asynchronous.
    """

    rows: tuple[SampledRow | None, ...]
    done: torch.cuda.Event | None

    def wait(self) -> list[Sampled | None]:
        if self.done is not None:
            self.done.synchronize()
        return [None if row is None else row.read() for row in self.rows]


@dataclass(frozen=True)
class Draw:
    """One token to sample: for a row, or for one of its drafts. position: of the token in its sequence."""

    row: Row
    sampling: Sampling
    state: SamplerState
    position: int


class CudaRunner:
    """The Runner of the cuda backend. `submit` starts the step's kernels and the copy of the sampled tokens; only
    `Step.wait` and `logits` wait for the device.

    kernels: run rows of one given token, with its drafts, through decode.py's step. Otherwise they go through model.py,
        as prompts do.
    """

    def __init__(self, model: GptOss, limits: Limits, device: torch.device, *, kernels: bool) -> None:
        self.config: ModelConfig = model.config
        self.limits = limits
        self._model = model
        self._device = device
        with torch.inference_mode():
            self._cache = self._make_cache(limits.slots, limits.max_context, whole=device.type == "cuda")
            self._last = torch.zeros(limits.slots, dtype=torch.int64, device=device)  # the last token of each slot
            self._decoder: Decoder | None = self._make_decoder() if kernels else None
        self._states: dict[int, SamplerState] = {}
        self._hidden: dict[int, Tensor] = {}  # slot -> hidden states of an unfinished chunk, [1, L, D]

    @torch.inference_mode()
    def submit(self, rows: Sequence[Row]) -> Step:
        self._cache.drop_kept(unless=self._hidden)  # of chunks that are not finished
        results: list[SampledRow | None] = [None] * len(rows)
        single = [i for i, row in enumerate(rows) if row.tokens is None or len(row.tokens) == 1]
        if self._decoder is None:
            single = [i for i in single if not rows[i].drafts]
        single.sort(key=lambda i: rows[i].slot)
        if self._decoder is not None:
            for group in _groups(single, rows):
                self._decode(self._decoder, [rows[i] for i in group], group, results)
        elif single:
            self._forward([rows[i] for i in single], single, results)
        for i in sorted(set(range(len(rows))) - set(single)):
            self._forward([rows[i]], [i], results)
        return Step(tuple(results), self._record_event())

    def release(self, slot: int) -> None:
        self._states.pop(slot, None)
        self._hidden.pop(slot, None)
        self._cache.release(slot)

    @torch.inference_mode()
    def save(self, slot: int, start: int, end: int) -> SlotSnapshot:
        return self._cache.save(slot, start, end)

    @torch.inference_mode()
    def restore(self, slot: int, chain: Sequence[Snapshot]) -> None:
        self._cache.restore(slot, [saved for saved in chain if isinstance(saved, SlotSnapshot)])

    def pack(self, snapshot: Snapshot) -> bytes:
        assert isinstance(snapshot, SlotSnapshot)
        parts = [part for pair in snapshot.parts for part in pair]
        return b"".join(part.cpu().contiguous().view(torch.uint8).numpy().tobytes() for part in parts)

    @torch.inference_mode()
    def unpack(self, start: int, end: int, data: bytes) -> SlotSnapshot:
        return self._cache.unpack(start, end, data)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], adapter: int | None = None) -> NDArray[np.float32]:
        cache = self._make_cache(1, len(ids))
        out = np.empty((len(ids), self.config.vocab_size), dtype=np.float32)
        step = min(self.limits.chunk, LOGITS_CHUNK)
        for start in range(0, len(ids), step):
            piece = self._ids([ids[start : start + step]])
            uses = [] if adapter is None else [(adapter, None)]
            hidden = self._model(piece, cache, Span.of([0], [start], piece.shape[1], self._device, uses))
            out[start : start + step] = self._model.logits(hidden[0]).cpu().numpy()
        return out

    def peak_memory(self) -> int:
        """On a CPU, the peak of the whole process, because torch does not count CPU allocations."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def close(self) -> None:
        self._decoder = None  # first its graphs: NCCL waits for those that captured its operations
        self._model.ranks.leave()
        self._model.lm_head.ops.close()
        del self._model, self._cache, self._last
        self._states.clear()
        self._hidden.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _make_cache(self, slots: int, max_context: int, *, whole: bool = False) -> Cache:
        pack = self._model.lm_head.ops.pack if self.limits.kv_bits == 8 else None
        c, dtype, slack = self.config, self._model.dtype, self.limits.drafts
        return Cache(c, slots, max_context, dtype, self._device, whole=whole, pack=pack, slack=slack)

    def _make_decoder(self) -> Decoder:
        from .decode import Decoder  # imports triton
        from .kernels.launch import compiling

        decoder = Decoder(self._model, self._cache, self._last, self.limits.max_context)
        if self._device.type == "cuda":  # so that no request waits for compilation
            rows = step_rows(self.limits)
            with compiling():
                decoder.compile(rows)
                warm_up(self._model, self._cache)
            decoder.prepare(rows)
            warm_up(self._model, self._cache)
            torch.cuda.synchronize(self._device)
        return decoder

    def _forward(self, rows: Sequence[Row], places: Sequence[int], results: list[SampledRow | None]) -> None:
        """Run either any number of one-token rows, or one row of several tokens, through model.py."""
        ids = torch.cat([self._tokens(row) for row in rows])  # [B, L]
        slots, starts = [row.slot for row in rows], [row.start for row in rows]
        span = Span.of(slots, starts, ids.shape[1], self._device, used_adapters(rows), rows[0].saves_inside)
        if rows[0].stages is None:
            hidden = self._model(ids, self._cache, span)
        else:
            hidden = self._run_stages(rows[0].slot, rows[0].stages, ids, span)
        wanted = [b for b, row in enumerate(rows) if row.sampling is not None]
        if wanted:
            last = hidden[:, -1 - len(rows[0].drafts) :]  # several rows have one position each
            last = last if len(wanted) == len(rows) else self._picked(last, wanted)
            self._choose(self._model.logits(last.flatten(0, 1)), wanted, rows, places, results)

    def _run_stages(self, slot: int, stages: tuple[int, int], ids: Tensor, span: Span) -> Tensor:
        """Run some stages of a chunk, ids [1, L]. Hidden states [1, L, D]."""
        first, end = stages
        x = self._hidden.pop(slot) if first else self._model.embedded(ids)
        x = self._model.run(range(first, end), x, self._cache, span)
        if end < stage_count(self.config):
            self._hidden[slot] = x
        return x

    def _decode(
        self, decoder: Decoder, rows: Sequence[Row], places: Sequence[int], results: list[SampledRow | None]
    ) -> None:
        """Run rows of one given token, with its drafts, through decode.py, which also samples for requests with plain
        sampling options."""
        fed, keys, temperatures, firsts = list[Row](), list[int](), list[float](), list[int]()
        for row in rows:
            sampling = row.sampling if row.sampling and sampled_in_graph(row) else GREEDY
            seed = 0 if sampling.greedy else self._state(row, sampling).seed
            firsts.append(len(fed))
            fed += _single_tokens(row)
            count = 1 + len(row.drafts)
            keys += noise_keys([seed] * count, range(row.start + 1, row.start + 1 + count))
            temperatures += [sampling.temperature] * count
        buffers, count = decoder.step(fed, keys, temperatures), len(fed)
        drawn = self._fetch(SamplerOutput(buffers.tokens[:count], buffers.logprobs[:count], None, None))
        others = []
        for b, (row, place, first) in enumerate(zip(rows, places, firsts, strict=True)):
            if row.sampling is None:
                continue
            if sampled_in_graph(row):
                results[place] = SampledRow(drawn, first, row.sampling, row.drafts)
            else:
                others.append(b)
        if others:
            picked = [firsts[b] + n for b in others for n in range(1 + len(rows[b].drafts))]
            self._choose(self._picked(buffers.logits, picked), others, rows, places, results)

    def _choose(
        self,
        logits: Tensor,
        wanted: Sequence[int],
        rows: Sequence[Row],
        places: Sequence[int],
        results: list[SampledRow | None],
    ) -> None:
        """Sample the next token of rows[b] for each b in `wanted`, and the tokens after its drafts, from float32 logits
        [N, V] of them all."""
        draws, firsts = list[Draw](), list[int]()
        for row in (rows[b] for b in wanted):
            sampling = row.sampling or GREEDY
            state, position = self._state(row, sampling), row.start + max(1, len(row.tokens or ()))
            firsts.append(len(draws))
            draws += [Draw(row, sampling, state, position + n) for n in range(1 + len(row.drafts))]
        output = sample_tokens(
            logits,
            [draw.sampling for draw in draws],
            [draw.state for draw in draws],
            [draw.position for draw in draws],
            [draw.row.mask for draw in draws],
        )
        on_host = self._fetch(output)
        if any(not draw.row.drafts for draw in draws):  # of the others, none is fed back
            slots = torch.tensor([draw.row.slot for draw in draws])
            self._last[to_device(slots, self._device)] = output.tokens
        for b, first in zip(wanted, firsts, strict=True):
            results[places[b]] = SampledRow(on_host, first, rows[b].sampling or GREEDY, rows[b].drafts)

    def _tokens(self, row: Row) -> Tensor:
        """int64 [1, L]"""
        return self._last[None, row.slot : row.slot + 1] if row.tokens is None else self._ids([row.tokens + row.drafts])

    def _ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        return to_device(torch.tensor(ids, dtype=torch.int64), self._device)

    def _picked(self, values: Tensor, rows: Sequence[int]) -> Tensor:
        """Some rows of values [B, N], a copy."""
        return values.index_select(0, to_device(torch.tensor(rows), self._device))

    def _state(self, row: Row, sampling: Sampling) -> SamplerState:
        """The sampler state of the row's slot, reset by the first sampled row of a request."""
        if row.prompt is not None:
            seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
            self._states[row.slot] = SamplerState.begin(
                sampling, row.prompt, seed, self.config.vocab_size, self._device
            )
        return self._states[row.slot]

    def _fetch(self, output: SamplerOutput) -> SamplerOutput:
        """A copy of the output on the host, complete when the step's event is recorded as done. Reading the device
        tensors later would also wait for the next step, which has been submitted by then."""

        def fetch(values: Tensor) -> Tensor:
            if self._device.type == "cpu":
                return values.clone()
            return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)

        top_ids = None if output.top_ids is None else fetch(output.top_ids)
        top_logprobs = None if output.top_logprobs is None else fetch(output.top_logprobs)
        return SamplerOutput(fetch(output.tokens), fetch(output.logprobs), top_ids, top_logprobs)

    def _record_event(self) -> torch.cuda.Event | None:
        if self._device.type == "cpu":
            return None
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self._device))
        return done


def warm_up(model: GptOss, cache: Cache) -> None:
    """Launch every kernel that prompts can need: prompts of each length for which kernels/tiles.py has other tiles,
    with the logits of their last token, without an adapter and with each; and short prompts after a long context. Slot
    0 of the cache must be free."""
    config, device = model.config, cache.layers[0].arrays[0].device
    adapters = range(len(model.blocks[0].attention.qkv_adapters))
    for length in WARM_UP_LENGTHS:
        for uses in ([], *([(index, None)] for index in adapters)):
            scratch = Cache(config, 1, length, model.dtype, device, pack=cache.pack)
            ids = torch.zeros((1, length), dtype=torch.int64, device=device)
            model.logits(model(ids, scratch, Span.of([0], [0], length, device, uses))[:, -1])
    for block, layer in zip(model.blocks, cache.layers, strict=True):
        if isinstance(layer, FullCache):
            keys, values, at = layer.keys[:1], layer.values[:1], block.attention
            for queries in SHORT_PROMPTS:
                shape = (1, at.config.num_attention_heads, min(queries, keys.shape[2]), config.head_dim)
                q = torch.zeros(shape, dtype=model.dtype, device=device)
                at.ops.attend_causal(q, keys, values, at.sinks, at.scale)
            return  # the other layers' kernels are the same


def step_rows(limits: Limits) -> int:
    """The most rows of one step of decode.py: a token of every slot, with its drafts."""
    return min(limits.slots * (1 + limits.drafts), MAX_ROWS)


def _groups(single: Sequence[int], rows: Sequence[Row]) -> Iterator[list[int]]:
    """The rows of one given token, by their indices, for each of the steps of at most MAX_ROWS tokens."""
    group, size = list[int](), 0
    for i in single:
        count = 1 + len(rows[i].drafts)
        if size + count > MAX_ROWS:
            yield group
            group, size = [], 0
        group.append(i)
        size += count
    if group:
        yield group


def _single_tokens(row: Row) -> list[Row]:
    """A row of one token, and a row for each of its drafts."""
    if not row.drafts:
        return [row]
    tokens = (row.tokens or ()) + row.drafts
    return [replace(row, start=row.start + n, tokens=(token,), drafts=()) for n, token in enumerate(tokens)]


def sampled_in_graph(row: Row) -> bool:
    """Whether decode.py's step can sample the row: greedy or at a temperature, without other options."""
    sampling = row.sampling
    if sampling is None or row.mask is not None:
        return False
    plain = sampling.top_p == 1 and not sampling.top_k and not sampling.min_p and not sampling.logit_bias
    return plain and not sampling.penalized and not sampling.logprobs


def _sampled(output: SamplerOutput, n: int, sampling: Sampling) -> Sampled:
    top: tuple[tuple[int, float], ...] = ()
    if sampling.logprobs and output.top_ids is not None and output.top_logprobs is not None:
        ids, values = output.top_ids[n].tolist(), output.top_logprobs[n].tolist()
        top = tuple(zip(ids, values, strict=True))[: sampling.logprobs]
    return Sampled(int(output.tokens[n]), float(output.logprobs[n]), top)
