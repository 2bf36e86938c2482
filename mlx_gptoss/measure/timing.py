"""What is timed, and what can be: `Ours` drives a runner through the seam as the engine drives it, a step submitted
before the one before it is read; other programs take turns with it behind the same `Contender` interface.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Pending, Row, Runner
from ..sampling import Sampling

GREEDY = Sampling(temperature=0)
WARM_STEPS = 4  # decoding steps before those that count
CPU_WARM_PROMPT = 32  # tokens; a GPU is warmed up with the whole prompt, for kernels may be made for its length


@dataclass(frozen=True)
class Case:
    """What is timed: `batch` sequences, each with a prompt of `prompt` tokens, each decoding `generate` tokens once
    there are `context` tokens before it."""

    batch: int
    prompt: int
    context: int
    generate: int

    def length(self, repeat: int) -> int:
        """Tokens that a sequence may reach: repeated decoding goes on where the last left off."""
        return self.context + WARM_STEPS + repeat * self.generate + 1


class Contender(Protocol):
    """One loaded model that can be timed, ours or another program's. The four calls come in this order, `prefill` and
    `decode` several times each."""

    engine: str
    backend: str
    device: str
    format: str
    load_s: float

    def begin(self, case: Case) -> None:
        """Warm up."""
        ...

    def prefill(self) -> float:
        """Seconds from no token to the first sampled one of every sequence."""
        ...

    def fill(self) -> None:
        """Feed the rest of the context after the prompt."""
        ...

    def decode(self) -> float:
        """Seconds of `generate` steps, each feeding back what the one before chose."""
        ...

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Teacher-forced logits [T, V]."""
        ...

    def peak_memory(self) -> int: ...


class Ours:
    """Our model behind the Contender interface. To be used from one thread."""

    def __init__(
        self, runner: Runner, backend: str, device: str, form: str, load_s: float, engine: str = "mlx-gptoss"
    ) -> None:
        self.engine = engine
        self.backend, self.device, self.format, self.load_s = backend, device, form, load_s
        self._runner = runner
        self._case = Case(0, 0, 0, 0)
        self._tokens: list[tuple[int, ...]] = []
        self._length = 0  # of every sequence

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
        return _seconds(lambda: self._decode(self._case.generate))

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
        """Every sequence's tokens up to `end`; the last one's successor is sampled."""
        if end > self._length:
            run(self._runner, prefill_steps(self._tokens, self._length, end, self._runner.limits.chunk))
            self._length = end

    def _decode(self, steps: int) -> None:
        slots, start = range(len(self._tokens)), self._length
        run(self._runner, ([Row(s, start + n, None, GREEDY) for s in slots] for n in range(steps)))
        self._length += steps


def prompts(vocab: int, case: Case) -> list[tuple[int, ...]]:
    """The tokens before decoding, `context` random ones of each sequence; the same for every contender."""
    rng = np.random.default_rng(case.batch)
    return [tuple(rng.integers(0, vocab, case.context).tolist()) for _ in range(case.batch)]


def prefill_steps(tokens: Sequence[tuple[int, ...]], start: int, end: int, chunk: int) -> Iterator[list[Row]]:
    """Steps that feed tokens [start, end) of every sequence, of at most `chunk` tokens and one row a sequence."""
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


def run(runner: Runner, steps: Iterator[list[Row]]) -> None:
    """Run steps, each submitted before the one before it is waited for."""
    pending: Pending | None = None
    for rows in steps:
        ahead = runner.submit(rows)
        if pending is not None:
            pending.wait()
        pending = ahead
    if pending is not None:
        pending.wait()


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
