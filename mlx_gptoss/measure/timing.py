"""What is timed: `OurEngine` drives a runner as engine/loop.py does, submitting a step before the previous one is read.
With drafts, a step depends on the one before, which is read first. Other engines take turns with it behind the same
`TimedEngine` interface.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Pending, Row, Runner, Sampled
from ..engine.lookup import PromptLookup
from ..sampling import Sampling

GREEDY = Sampling(temperature=0)
WARM_STEPS = 4  # decode steps before the timed ones
REPEATED = 64  # tokens of the passage that a prompt with drafts repeats
CPU_WARM_PROMPT = 32  # tokens; a GPU is warmed up with the whole prompt, because kernels may be compiled for its length


@dataclass(frozen=True)
class Case:
    """One case to time: `batch` sequences, each prefilling `prompt` tokens, and each decoding `generate` tokens after
    `context` tokens."""

    batch: int
    prompt: int
    context: int
    generate: int

    def length(self, repeat: int) -> int:
        """Maximum length of a sequence; each repetition of decoding continues where the previous one ended."""
        return self.context + WARM_STEPS + repeat * self.generate + 1


@dataclass(frozen=True)
class Drafts:
    """What came of decoding with drafts: the steps, the tokens drafted, and how many of those were right."""

    steps: int = 0
    drafted: int = 0
    right: int = 0

    def __add__(self, other: Drafts) -> Drafts:
        return Drafts(self.steps + other.steps, self.drafted + other.drafted, self.right + other.right)


class TimedEngine(Protocol):
    """One loaded model that can be timed, ours or another engine's. begin, prefill, fill and decode are called in this
    order, prefill and decode several times each."""

    engine: str
    backend: str
    device: str
    format: str
    load_s: float

    def begin(self, case: Case) -> None:
        """Warm up."""
        ...

    def prefill(self) -> float:
        """Seconds from the first prompt token to the first sampled token of every sequence."""
        ...

    def fill(self) -> None:
        """Feed the rest of the context after the prompt."""
        ...

    def decode(self) -> float:
        """Seconds until `generate` tokens more are decoded, each fed back: a step for each, or fewer with drafts."""
        ...

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Teacher-forced logits [T, V]."""
        ...

    def peak_memory(self) -> int: ...


class OurEngine:
    """Our model behind the TimedEngine interface. Use it from one thread. adapter: that all rows use, as in Row.

    drafts: of each decode(), if the runner's limits allow drafts. They come from prompt lookup, and the prompts repeat
    themselves then.
    """

    backend: str
    device: str
    format: str
    load_s: float

    def __init__(
        self, runner: Runner, backend: str, device: str, format_name: str, load_s: float, engine: str = "mlx-gptoss"
    ) -> None:
        self.engine = engine
        self.backend, self.device, self.format, self.load_s = backend, device, format_name, load_s
        self.adapter: int | None = None
        self._runner = runner
        self._case = Case(0, 0, 0, 0)
        self._tokens: list[tuple[int, ...]] = []
        self._length = 0  # of every sequence
        self._sampled: list[int] = []  # the last token of every sequence
        self._lookups: list[PromptLookup] = []  # with drafts; empty until the first step of decoding
        self.host_seconds: list[float] = []  # that each decode() took to submit its steps
        self.drafts: list[Drafts] = []

    def begin(self, case: Case) -> None:
        self._release()
        self._case = case
        self._tokens = prompts(self._runner.config.vocab_size, case, repeated=self._max_drafts > 0)
        self._sampled = [0] * case.batch
        self._feed(min(case.prompt, CPU_WARM_PROMPT) if self.device == "cpu" else case.prompt)
        self._decode(WARM_STEPS)

    def prefill(self) -> float:
        self._release()
        return _seconds(lambda: self._feed(self._case.prompt))

    def fill(self) -> None:
        self._feed(self._case.context)
        self._decode(WARM_STEPS)

    def decode(self) -> float:
        started = time.perf_counter()
        host, drafts = self._decode(self._case.generate)
        seconds = time.perf_counter() - started
        self.host_seconds.append(host)
        self.drafts += [drafts] if self._max_drafts else []
        return seconds

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return self._runner.logits(ids)

    def peak_memory(self) -> int:
        return self._runner.peak_memory()

    def close(self) -> None:
        self._runner.close()

    @property
    def _max_drafts(self) -> int:
        return self._runner.limits.drafts

    def _release(self) -> None:
        for slot in range(self._case.batch):
            self._runner.release(slot)
        self._length, self._lookups = 0, []

    def _feed(self, end: int) -> None:
        """Feed every sequence's tokens up to `end` and sample the next one."""
        if end > self._length:
            steps = prefill_steps(self._tokens, self._length, end, self._runner.limits.chunk)
            run(self._runner, ([replace(row, adapter=self.adapter) for row in rows] for rows in steps), self._keep)
            self._length = end

    def _keep(self, rows: list[Row], results: list[Sampled | None]) -> None:
        for row, sampled in zip(rows, results, strict=True):
            if sampled is not None:
                self._sampled[row.slot] = sampled.token

    def _decode(self, tokens: int) -> tuple[float, Drafts]:
        """Decode so many tokens of every sequence: seconds that submitting the steps took, and what came of drafts."""
        slots, start = range(len(self._tokens)), self._length
        self._length += tokens
        if self._max_drafts:
            return self._decode_with_drafts(start, tokens)
        host = run(
            self._runner,
            ([Row(s, start + n, None, GREEDY, adapter=self.adapter) for s in slots] for n in range(tokens)),
        )
        return host, Drafts()

    def _decode_with_drafts(self, start: int, tokens: int) -> tuple[float, Drafts]:
        """As `_decode`, from position `start` of every sequence on. A sequence that is done waits for the others."""
        if not self._lookups:
            self._lookups = [
                PromptLookup((*ids[:start], last)) for ids, last in zip(self._tokens, self._sampled, strict=True)
            ]
        left, host, found = dict.fromkeys(range(len(self._tokens)), tokens), 0.0, Drafts()
        while left:
            rows = [self._drafted_row(slot, start + tokens - count, count) for slot, count in left.items()]
            began = time.perf_counter()
            pending = self._runner.submit(rows)
            host += time.perf_counter() - began
            for row, sampled in zip(rows, pending.wait(), strict=True):
                assert sampled is not None
                for token in (sampled, *sampled.accepted):
                    self._lookups[row.slot].add(token.token)
                    self._sampled[row.slot] = token.token
                left[row.slot] -= 1 + len(sampled.accepted)
                found += Drafts(0, len(row.drafts), len(sampled.accepted))
            found += Drafts(1)
            left = {slot: count for slot, count in left.items() if count}
        return host, found

    def _drafted_row(self, slot: int, start: int, left: int) -> Row:
        """The row that feeds a sequence's last token at `start`, with drafts for at most `left` tokens in all."""
        drafts = self._lookups[slot].propose(min(self._max_drafts, left - 1))
        return Row(slot, start, (self._sampled[slot],), GREEDY, drafts=drafts, adapter=self.adapter)


def prompts(vocab: int, case: Case, *, repeated: bool = False) -> list[tuple[int, ...]]:
    """`context` random tokens per sequence, the same for every engine without drafts. repeated: a random passage of
    REPEATED tokens again and again, so that prompt lookup finds drafts."""
    rng = np.random.default_rng(case.batch)
    count = min(REPEATED, case.context) if repeated else case.context
    return [tuple(np.resize(rng.integers(0, vocab, count), case.context).tolist()) for _ in range(case.batch)]


def prefill_steps(tokens: Sequence[tuple[int, ...]], start: int, end: int, chunk: int) -> Iterator[list[Row]]:
    """Steps that feed tokens [start, end) of every sequence, each at most `chunk` tokens and one row per sequence."""
    rows: list[Row] = []
    for slot, ids in enumerate(tokens):
        for at in range(start, end, chunk):
            piece = ids[at : min(at + chunk, end)]
            if rows and (rows[-1].slot == slot or sum(len(row.tokens or ()) for row in rows) + len(piece) > chunk):
                yield rows
                rows = []
            last = at + len(piece) == end
            rows.append(Row(slot, at, piece, GREEDY if last else None, ids[:end] if last else None))
    yield rows


Read = Callable[[list[Row], list[Sampled | None]], None]  # receives the rows of a step and what came of them


def run(runner: Runner, steps: Iterator[list[Row]], read: Read = lambda rows, results: None) -> float:
    """Run steps, submitting each before waiting for the previous one. Returns the seconds that submitting took: what
    the host does for the steps, mostly while the device computes the ones before."""
    pending: tuple[list[Row], Pending] | None = None
    host = 0.0
    for rows in steps:
        started = time.perf_counter()
        ahead = runner.submit(rows)
        host += time.perf_counter() - started
        if pending is not None:
            read(pending[0], pending[1].wait())
        pending = rows, ahead
    if pending is not None:
        read(pending[0], pending[1].wait())
    return host


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
