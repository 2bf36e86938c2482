"""What is timed: `OurEngine` drives a runner as engine/loop.py does, submitting a step before the previous one is read.
Other engines take turns with it behind the same `TimedEngine` interface.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Pending, Row, Runner
from ..sampling import Sampling

GREEDY = Sampling(temperature=0)
WARM_STEPS = 4  # decode steps before the timed ones
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
        """Seconds of `generate` steps, each feeding back the token that the previous one sampled."""
        ...

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Teacher-forced logits [T, V]."""
        ...

    def peak_memory(self) -> int: ...


class OurEngine:
    """Our model behind the TimedEngine interface. Use it from one thread. adapter: that all rows use, as in Row."""

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
        self.host_seconds: list[float] = []  # that each decode() took to submit its steps

    def begin(self, case: Case) -> None:
        self._release()
        self._case = case
        self._tokens = prompts(self._runner.config.vocab_size, case)
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
        self.host_seconds.append(self._decode(self._case.generate))
        return time.perf_counter() - started

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return self._runner.logits(ids)

    def peak_memory(self) -> int:
        return self._runner.peak_memory()

    def close(self) -> None:
        self._runner.close()

    def _release(self) -> None:
        for slot in range(self._case.batch):
            self._runner.release(slot)
        self._length = 0

    def _feed(self, end: int) -> None:
        """Feed every sequence's tokens up to `end` and sample the next one."""
        if end > self._length:
            steps = prefill_steps(self._tokens, self._length, end, self._runner.limits.chunk)
            run(self._runner, ([replace(row, adapter=self.adapter) for row in rows] for rows in steps))
            self._length = end

    def _decode(self, steps: int) -> float:
        """Seconds that submitting the steps took."""
        slots, start = range(len(self._tokens)), self._length
        host = run(
            self._runner, ([Row(s, start + n, None, GREEDY, adapter=self.adapter) for s in slots] for n in range(steps))
        )
        self._length += steps
        return host


def prompts(vocab: int, case: Case) -> list[tuple[int, ...]]:
    """`context` random tokens per sequence, the same for every engine."""
    rng = np.random.default_rng(case.batch)
    return [tuple(rng.integers(0, vocab, case.context).tolist()) for _ in range(case.batch)]


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


def run(runner: Runner, steps: Iterator[list[Row]]) -> float:
    """Run steps, submitting each before waiting for the previous one. Returns the seconds that submitting took: what
    the host does for the steps, mostly while the device computes the ones before."""
    pending: Pending | None = None
    host = 0.0
    for rows in steps:
        started = time.perf_counter()
        ahead = runner.submit(rows)
        host += time.perf_counter() - started
        if pending is not None:
            pending.wait()
        pending = ahead
    if pending is not None:
        pending.wait()
    return host


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
