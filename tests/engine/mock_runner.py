"""A small deterministic runner that checks every rule of backends/base.py, and engines that use it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from mlx_gptoss.backends.base import Limits, Row, Sampled, stage_count
from mlx_gptoss.config import TINY
from mlx_gptoss.engine import Engine, Request, Stream
from mlx_gptoss.sampling import Sampling

VOCAB = TINY.vocab_size
LIMITS = Limits(slots=3, max_context=64, chunk=8)


def next_id(history: Sequence[int], seed: int | None, mask: bytes | None = None) -> int:
    """The token the mock samples after `history`: a hash of it and the seed. Under a mask, the first allowed one from
    there on; as in a real sampler, a mask changes nothing if it allows the token that is sampled without it."""
    state = 17 if seed is None else seed
    for token in history:
        state = (state * 1000003 + token + 1) % (2**61 - 1)
    first = (state >> 11) % VOCAB
    allowed = (id % VOCAB for id in range(first, first + VOCAB))
    return next(id for id in allowed if mask is None or mask[id >> 3] >> (id & 7) & 1)


def expected(request: Request, limits: Limits = LIMITS) -> tuple[list[int], str]:
    """The tokens and finish reason of a request, computed without an engine."""
    history, ids = list(request.prompt), []
    for _ in range(min(request.max_tokens, limits.max_context - len(request.prompt))):
        ids.append(next_id(history, request.sampling.seed))
        history.append(ids[-1])
        if ids[-1] in request.stop_ids:
            return ids, "stop"
    return ids, "length"


@dataclass
class Slot:
    history: list[int] = field(default_factory=list)
    fresh: int | None = None  # sampled, not fed back yet
    fed: int = 0  # length of the history before the accepted drafts of the last row
    drafted: int = 0  # drafts of the last row
    sampled_in: int = -2  # number of the step that sampled it
    has_sampled: bool = False
    begun: tuple[object, ...] | None = None  # start, tokens, positions to save, next stage of an unfinished chunk
    save_at: tuple[int, ...] = ()  # of the last row


class Step:
    def __init__(self, runner: MockRunner, number: int, rows: tuple[Row, ...], results: list[Sampled | None]) -> None:
        self.runner, self.number, self.rows, self.results = runner, number, rows, results

    def wait(self) -> list[Sampled | None]:
        return self.runner.wait(self)


@dataclass(frozen=True)
class Saved:
    """A snapshot: a span of the history, and the last RING tokens in place of the rings' contents."""

    start: int
    end: int
    span: tuple[int, ...]
    ring: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return len(self.span) + len(self.ring)


RING = 3  # tokens


class MockRunner:
    """Samples a hash of the slot's history and the seed, and records every broken rule in `violations`.

    delay: seconds that reading a step takes. fail_submit, fail_wait: given a step's rows, the exception to raise there.
    gate: while it is cleared, reading a step blocks.
    """

    def __init__(self, limits: Limits = LIMITS, delay: Callable[[], float] = lambda: 0.0) -> None:
        self.config = TINY
        self.limits = limits
        self.delay = delay
        self.thread = threading.get_ident()
        self.slots = [Slot() for _ in range(limits.slots)]
        self.steps: list[tuple[Row, ...]] = []
        self.saved = 0
        self.in_flight: list[Step] = []
        self.violations: list[str] = []
        self.closed = False
        self.fail_submit: Callable[[tuple[Row, ...]], Exception | None] = lambda rows: None
        self.fail_wait: Callable[[tuple[Row, ...]], Exception | None] = lambda rows: None
        self.gate = threading.Event()
        self.gate.set()

    def check(self, condition: bool, violation: str) -> None:
        if not condition:
            self.violations.append(violation)

    def check_thread(self) -> None:
        self.check(threading.get_ident() == self.thread, "called from another thread")
        self.check(not self.closed, "used after close")

    def submit(self, rows: Sequence[Row]) -> Step:
        self.check_thread()
        rows = tuple(rows)
        number = len(self.steps)
        self.steps.append(rows)
        error = self.fail_submit(rows)
        if error:
            raise error
        self.check(bool(rows), "an empty step")
        self.check(len({row.slot for row in rows}) == len(rows), "a slot twice in a step")
        self.check(sum(len(row.tokens or ()) for row in rows) <= self.limits.chunk, "too much prefill in a step")
        self.check(len(self.in_flight) < 2, "more than two steps in flight")
        for slot in self.slots:
            slot.save_at = ()
        step = Step(self, number, rows, [self.feed(row, number) for row in rows])
        self.in_flight.append(step)
        return step

    def feed(self, row: Row, number: int) -> Sampled | None:
        slot = self.slots[row.slot]
        if not self.completes_chunk(slot, row):
            self.check(row.sampling is None and row.start == len(slot.history), "sampled from an unfinished chunk")
            return None
        inside = range(row.start + 1, row.start + len(row.tokens or ()) + 1)
        self.check(all(at in inside for at in row.save_at), "a snapshot of a position outside of the row")
        self.check(list(row.save_at) == sorted(set(row.save_at)), "positions to save out of order")
        slot.save_at = row.save_at
        if row.tokens is not None and slot.fresh is not None:  # from the host: the fresh token, or the one before it
            back = slot.fed - row.start if row.start < len(slot.history) else 0
            self.check(len(row.tokens) == 1 and back <= 1 + slot.drafted, "stepped back by more than one token")
            known = [*slot.history, slot.fresh][row.start : row.start + 1]
            self.check(known == list(row.tokens), "stepped back to another token, or fed one that was not sampled")
            del slot.history[row.start :]
            slot.fresh = None
        self.check(row.start == len(slot.history), f"start {row.start} is not the length {len(slot.history)}")
        if row.tokens is None:
            self.check(
                slot.fresh is not None and slot.sampled_in == number - 1,
                "feedback without a token sampled in the previous step",
            )
            slot.history.append(slot.fresh or 0)
        else:
            slot.history.extend(row.tokens)
        slot.fresh, slot.fed, slot.drafted = None, len(slot.history), 0
        self.check(len(slot.history) <= self.limits.max_context, "beyond the context")
        if row.sampling is None:
            self.check(row.prompt is None, "a prompt without sampling")
            return None
        first = not slot.has_sampled
        self.check((row.prompt is not None) == first, "the prompt belongs on the first sampled row only")
        self.check(not first or row.prompt == tuple(slot.history), "a prompt other than the one fed")
        slot.has_sampled, slot.sampled_in, slot.drafted = True, number, len(row.drafts)
        self.check(len(row.drafts) <= self.limits.drafts, "too many drafts")
        self.check(not row.drafts or row.mask is None, "drafts under a mask")
        sampled = []
        for draft in (*row.drafts, None):
            slot.fresh = next_id(slot.history, row.sampling.seed, row.mask)
            sampled.append(Sampled(slot.fresh, -float(slot.fresh), ((slot.fresh, -float(slot.fresh)),)))
            if slot.fresh != draft:
                break
            slot.history.append(slot.fresh)
        return replace(sampled[0], accepted=tuple(sampled[1:]))

    def completes_chunk(self, slot: Slot, row: Row) -> bool:
        """Whether the row computes the last stage."""
        tokens, last = row.tokens or (), stage_count(self.config)
        first, end = row.stages or (0, last)
        self.check(row.stages is None or (len(tokens) > 1 and not row.drafts), "stages of another row than a chunk's")
        self.check(0 <= first < end <= last, "stages out of order")
        expected = (row.start, tokens, row.save_at, first) if first else None
        self.check(slot.begun == expected, "a chunk that goes on at another stage, or another row before its end")
        slot.begun = (row.start, tokens, row.save_at, end) if end < last else None
        return end == last

    def wait(self, step: Step) -> list[Sampled | None]:
        self.check_thread()
        self.check(self.in_flight[0] is step, "waited out of order")
        self.gate.wait()
        time.sleep(self.delay())
        self.in_flight.remove(step)
        error = self.fail_wait(step.rows)
        if error:
            raise error
        return step.results

    def release(self, slot: int) -> None:
        self.check_thread()
        touched = any(row.slot == slot for step in self.in_flight for row in step.rows)
        self.check(not touched, "released while in flight")
        self.slots[slot] = Slot()

    def save(self, slot: int, start: int, end: int) -> Saved:
        self.check_thread()
        history, save_at = self.slots[slot].history, self.slots[slot].save_at
        self.check(end == len(history) or end in save_at, "saved elsewhere than its last row allows")
        self.check(0 <= start < end <= len(history), "saved what is not there")
        self.saved += 1
        return Saved(start, end, tuple(history[start:end]), tuple(history[max(0, end - RING) : end]))

    def restore(self, slot: int, chain: Sequence[Saved]) -> None:
        self.check_thread()
        starts = [0, *(saved.end for saved in chain)]
        self.check([saved.start for saved in chain] == starts[:-1], "restored with a gap")
        history = [token for saved in chain for token in saved.span]
        self.check(tuple(history[-RING:]) == chain[-1].ring, "the rings of another position")
        self.slots[slot] = Slot(history)

    def pack(self, snapshot: Saved) -> bytes:
        self.check_thread()
        return np.array([*snapshot.span, *snapshot.ring], np.int32).tobytes()

    def unpack(self, start: int, end: int, data: bytes) -> Saved:
        self.check_thread()
        if len(data) != 4 * (end - start + min(end, RING)):
            raise ValueError(f"a snapshot of the positions {start} to {end} has another size than {len(data)}")
        tokens = tuple(np.frombuffer(data, np.int32).tolist())
        return Saved(start, end, tokens[: end - start], tokens[end - start :])

    def logits(self, ids: Sequence[int], adapter: int | None = None) -> Any:
        self.check_thread()
        return np.zeros((len(ids), VOCAB), np.float32)

    def peak_memory(self) -> int:
        self.check_thread()
        return 42

    def close(self) -> None:
        self.check_thread()
        self.check(not self.in_flight, "closed with a step in flight")
        self.closed = True

    @property
    def empty(self) -> bool:
        return all(not slot.history for slot in self.slots)


@contextmanager
def mock_engine(
    limits: Limits = LIMITS, delay: Callable[[], float] = lambda: 0.0, **options: Any
) -> Iterator[tuple[Engine, MockRunner]]:
    """An engine and its runner. Asserts on exit that every slot is empty and no rule was broken."""
    runners: list[MockRunner] = []

    def make() -> MockRunner:
        runners.append(MockRunner(limits, delay))
        return runners[0]

    with Engine(make, **options) as engine:
        runner = runners[0]
        yield engine, runner
        runner.gate.set()
        eventually(lambda: engine.call(lambda r: runner.empty and not runner.in_flight))
    assert runner.violations == []
    assert runner.closed


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.002)


def ids(stream: Stream) -> list[int]:
    return [token.id for token in stream]


def request(length: int = 5, max_tokens: int = 6, seed: int | None = None, stop: tuple[int, ...] = ()) -> Request:
    return Request(tuple(range(length)), max_tokens, Sampling(seed=seed), frozenset(stop))


requests = st.builds(
    Request,
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40).map(tuple),
    max_tokens=st.integers(1, 40),
    sampling=st.integers(0, 3).map(lambda seed: Sampling(seed=seed)),
    stop_ids=st.frozensets(st.integers(0, VOCAB - 1), max_size=30),
)
