"""The engine driven by a small deterministic runner that checks every rule of the seam."""

from __future__ import annotations

import faulthandler
import gc
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gptoss.backends.base import Limits, Row, Sampled
from mlx_gptoss.config import TINY
from mlx_gptoss.engine import Engine, Finished, Request, Stream, Token
from mlx_gptoss.engine.loop import Loop, Ticket
from mlx_gptoss.errors import Busy, GptOssError, InvalidRequest
from mlx_gptoss.sampling import Sampling

VOCAB = TINY.vocab_size
LIMITS = Limits(slots=3, max_context=64, chunk=8)


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A test that hangs ends the run with every thread's stack."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def next_id(history: Sequence[int], seed: int | None) -> int:
    state = 17 if seed is None else seed
    for token in history:
        state = (state * 1000003 + token + 1) % (2**61 - 1)
    return (state >> 11) % VOCAB


def alone(request: Request, limits: Limits = LIMITS) -> tuple[list[int], str]:
    """What a request gives, computed without an engine."""
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
    fresh: int | None = None  # sampled, not yet fed back
    sampled_in: int = -2  # the step it was sampled in
    has_sampled: bool = False


class Step:
    def __init__(self, runner: MockRunner, number: int, rows: tuple[Row, ...], results: list[Sampled | None]) -> None:
        self.runner, self.number, self.rows, self.results = runner, number, rows, results

    def wait(self) -> list[Sampled | None]:
        return self.runner.wait(self)


@dataclass(frozen=True)
class Saved:
    """A span of a history, and the ring's worth of what came before: a sequence goes on from both."""

    start: int
    end: int
    span: tuple[int, ...]
    ring: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return len(self.span) + len(self.ring)


RING = 3


class MockRunner:
    """The next token is a hash of the slot's history and the seed. Breaches of the seam are kept in `breaches`."""

    def __init__(self, limits: Limits = LIMITS, delay: Callable[[], float] = lambda: 0.0) -> None:
        self.config = TINY
        self.limits = limits
        self.delay = delay
        self.thread = threading.get_ident()
        self.slots = [Slot() for _ in range(limits.slots)]
        self.steps: list[tuple[Row, ...]] = []
        self.saved = 0
        self.flying: list[Step] = []
        self.breaches: list[str] = []
        self.closed = False
        self.fail_submit: Callable[[tuple[Row, ...]], Exception | None] = lambda rows: None
        self.fail_wait: Callable[[tuple[Row, ...]], Exception | None] = lambda rows: None
        self.gate = threading.Event()
        self.gate.set()

    def rule(self, holds: bool, text: str) -> None:
        if not holds:
            self.breaches.append(text)

    def on_thread(self) -> None:
        self.rule(threading.get_ident() == self.thread, "called from another thread")
        self.rule(not self.closed, "used after close")

    def submit(self, rows: Sequence[Row]) -> Step:
        self.on_thread()
        rows = tuple(rows)
        number = len(self.steps)
        self.steps.append(rows)
        error = self.fail_submit(rows)
        if error:
            raise error
        self.rule(bool(rows), "an empty step")
        self.rule(len({row.slot for row in rows}) == len(rows), "a slot twice in a step")
        self.rule(sum(len(row.tokens or ()) for row in rows) <= self.limits.chunk, "too much prefill in a step")
        self.rule(len(self.flying) < 2, "more than two steps in flight")
        step = Step(self, number, rows, [self.feed(row, number) for row in rows])
        self.flying.append(step)
        return step

    def feed(self, row: Row, number: int) -> Sampled | None:
        slot = self.slots[row.slot]
        self.rule(row.start == len(slot.history), f"start {row.start} is not the length {len(slot.history)}")
        if row.tokens is None:
            self.rule(slot.fresh is not None and slot.sampled_in == number - 1, "feedback of nothing, or of old news")
            slot.history.append(slot.fresh or 0)
        else:
            self.rule(slot.fresh is None, "tokens given over the slot's own sample")
            slot.history.extend(row.tokens)
        slot.fresh = None
        self.rule(len(slot.history) <= self.limits.max_context, "past the context")
        if row.sampling is None:
            self.rule(row.prompt is None, "a prompt without sampling")
            return None
        first = not slot.has_sampled
        self.rule((row.prompt is not None) == first, "the prompt stands on the first sampled row only")
        self.rule(not first or row.prompt == tuple(slot.history), "another prompt than was fed")
        slot.has_sampled, slot.sampled_in = True, number
        slot.fresh = next_id(slot.history, row.sampling.seed)
        return Sampled(slot.fresh, -float(slot.fresh), ((slot.fresh, -float(slot.fresh)),))

    def wait(self, step: Step) -> list[Sampled | None]:
        self.on_thread()
        self.rule(self.flying[0] is step, "waited out of order")
        self.gate.wait()
        time.sleep(self.delay())
        self.flying.remove(step)
        error = self.fail_wait(step.rows)
        if error:
            raise error
        return step.results

    def release(self, slot: int) -> None:
        self.on_thread()
        touched = any(row.slot == slot for step in self.flying for row in step.rows)
        self.rule(not touched, "released while in flight")
        self.slots[slot] = Slot()

    def save(self, slot: int, start: int, end: int) -> Saved:
        self.on_thread()
        history = self.slots[slot].history
        self.rule(0 <= start < end == len(history), "saved is not where the sequence stands")
        self.saved += 1
        return Saved(start, end, tuple(history[start:end]), tuple(history[-RING:]))

    def restore(self, slot: int, chain: Sequence[Saved]) -> None:
        self.on_thread()
        starts = [0, *(saved.end for saved in chain)]
        self.rule([saved.start for saved in chain] == starts[:-1], "restored with a gap")
        history = [token for saved in chain for token in saved.span]
        self.rule(tuple(history[-RING:]) == chain[-1].ring, "a ring of another place")
        self.slots[slot] = Slot(history)

    def logits(self, ids: Sequence[int]) -> Any:
        self.on_thread()
        return np.zeros((len(ids), VOCAB), np.float32)

    def peak_memory(self) -> int:
        self.on_thread()
        return 42

    def close(self) -> None:
        self.on_thread()
        self.rule(not self.flying, "closed with a step in flight")
        self.closed = True

    @property
    def empty(self) -> bool:
        return all(not slot.history for slot in self.slots)


@contextmanager
def mock_engine(
    limits: Limits = LIMITS, delay: Callable[[], float] = lambda: 0.0, **options: Any
) -> Iterator[tuple[Engine, MockRunner]]:
    """An engine and its runner; on the way out, no slot is left occupied and no rule of the seam was broken."""
    made: list[MockRunner] = []

    def make() -> MockRunner:
        made.append(MockRunner(limits, delay))
        return made[0]

    with Engine(make, **options) as engine:
        runner = made[0]
        yield engine, runner
        runner.gate.set()
        eventually(lambda: engine.call(lambda r: runner.empty and not runner.flying))
    assert runner.breaches == []
    assert runner.closed


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
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


def test_a_request_gives_its_tokens_and_how_it_ended() -> None:
    with mock_engine() as (engine, _):
        stream = engine.submit(request(length=20, max_tokens=7))
        tokens = list(stream)
        expected, _ = alone(request(length=20, max_tokens=7))
        assert [token.id for token in tokens] == expected
        assert tokens[0] == Token(expected[0], -float(expected[0]), ((expected[0], -float(expected[0])),))
        done = stream.finished
        assert done is not None
        assert (done.reason, done.prompt_tokens, done.completion_tokens, done.cached_tokens) == ("length", 20, 7, 0)
        assert list(stream) == [] and stream.drain() is done


def test_timings_add_up() -> None:
    with mock_engine(delay=lambda: 0.01) as (engine, _):
        begin = time.perf_counter()
        first = engine.submit(request(length=20, max_tokens=11)).drain()
        wall = time.perf_counter() - begin
        assert first.queue_s < 0.5
        assert 0.03 <= first.prefill_s < 1  # three chunks of 8, 8, 4
        assert 0.1 <= first.decode_s < 2
        assert first.ttft_s == first.queue_s + first.prefill_s
        assert first.ttft_s + first.decode_s <= wall


def test_a_waiting_request_counts_its_queue_time() -> None:
    with mock_engine(Limits(slots=1, max_context=64, chunk=8), delay=lambda: 0.01) as (engine, _):
        first, second = engine.submit(request(max_tokens=10)), engine.submit(request(max_tokens=2))
        first.drain()
        assert second.drain().queue_s >= 0.08


@settings(max_examples=60, deadline=None)
@given(batch=st.lists(requests, min_size=1, max_size=10), slots=st.integers(1, 4), chunk=st.integers(1, 12))
def test_a_batch_gives_each_request_what_it_gets_alone(batch: list[Request], slots: int, chunk: int) -> None:
    limits = Limits(slots, max_context=48, chunk=chunk)
    with mock_engine(limits) as (engine, _):
        streams = [engine.submit(one) for one in batch]
        for one, stream in zip(batch, streams, strict=True):
            expected, reason = alone(one, limits)
            assert ids(stream) == expected
            assert stream.finished is not None and stream.finished.reason == reason
            assert stream.finished.completion_tokens == len(expected)


@pytest.mark.parametrize("seed", range(4))
def test_many_threads_submitting_cancelling_and_walking_away(seed: int) -> None:
    def client(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        for _ in range(12):
            one = Request(
                tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))),
                rng.randint(1, 30),
                Sampling(seed=rng.randrange(5)),
                frozenset(rng.sample(range(VOCAB), rng.randrange(20))),
            )
            expected, reason = alone(one)
            stream = engine.submit(one)
            got = []
            leave_after = rng.randint(0, 30) if rng.random() < 0.5 else 1000
            for token in stream:
                got.append(token.id)
                if len(got) == leave_after:
                    break
            if leave_after == 1000:
                assert (got, stream.drain().reason) == (expected, reason)
            else:
                assert got == expected[: len(got)]
                if rng.random() < 0.5:
                    stream.cancel()
                    assert stream.drain().reason in ("cancelled", reason)

    jitter = random.Random(seed)
    with mock_engine(delay=lambda: jitter.random() * 0.0005) as (engine, _), ThreadPoolExecutor(8) as pool:
        for job in [pool.submit(client, number) for number in range(8)]:
            job.result(timeout=60)


def test_a_stop_id_ends_the_stream_and_is_its_last_token() -> None:
    expected, _ = alone(request(max_tokens=20))
    with mock_engine() as (engine, runner):
        stream = engine.submit(request(max_tokens=20, stop=(expected[4],)))
        assert ids(stream) == expected[:5]
        assert stream.finished is not None and stream.finished.reason == "stop"
        eventually(lambda: engine.call(lambda r: runner.empty))
        assert len(runner.steps) == 6  # one row was already in flight; no more


def test_a_known_length_wastes_no_step() -> None:
    with mock_engine() as (engine, runner):
        engine.submit(request(max_tokens=9)).drain()
        assert len(runner.steps) == 9


def test_the_next_step_is_submitted_before_the_last_one_is_read() -> None:
    with mock_engine() as (engine, runner):
        runner.gate.clear()
        stream = engine.submit(request(max_tokens=5))
        eventually(lambda: len(runner.steps) == 2)
        time.sleep(0.02)
        assert len(runner.steps) == 2
        runner.gate.set()
        stream.drain()


def test_generation_ends_where_the_context_ends() -> None:
    with mock_engine() as (engine, _):
        done = engine.submit(request(length=60, max_tokens=100)).drain()
        assert (done.reason, done.completion_tokens) == ("length", 4)
        assert engine.submit(request(length=63, max_tokens=100)).drain().completion_tokens == 1


def test_requests_that_cannot_be_honoured_are_refused_by_submit() -> None:
    with mock_engine() as (engine, runner):
        with pytest.raises(InvalidRequest, match=r"64 tokens and the context holds 64"):
            engine.submit(request(length=64))
        with pytest.raises(InvalidRequest, match=rf"token id {VOCAB}; this model's ids go from 0 to {VOCAB - 1}"):
            engine.submit(Request((1, VOCAB), 3))
        with pytest.raises(InvalidRequest, match="token id -1"):
            engine.submit(Request((-1,), 3))
        with pytest.raises(InvalidRequest, match="logit_bias"):
            engine.submit(Request((1,), 3, Sampling(logit_bias={VOCAB: 1.0})))
        with pytest.raises(InvalidRequest, match="empty"):
            Request((), 3)
        with pytest.raises(InvalidRequest, match="at least 1, not 0"):
            Request((1,), 0)
        assert runner.steps == []


def test_cancel_takes_effect_within_one_step() -> None:
    with mock_engine() as (engine, runner):
        stream = engine.submit(request(max_tokens=50))
        next(stream)
        runner.gate.clear()
        time.sleep(0.02)
        steps = len(runner.steps)
        stream.cancel()
        runner.gate.set()
        done = stream.drain()
        assert done.reason in ("cancelled", "length")
        if done.reason == "cancelled":
            assert len(runner.steps) <= steps + 1


def test_cancel_while_waiting_while_prefilling_and_after_the_end() -> None:
    with mock_engine(Limits(slots=1, max_context=64, chunk=2)) as (engine, runner):
        runner.gate.clear()
        prefilling = engine.submit(request(length=40))
        waiting = engine.submit(request(seed=1))
        waiting.cancel()
        runner.gate.set()
        assert list(waiting) == []
        done = waiting.finished
        assert done is not None and (done.reason, done.completion_tokens, done.prefill_s) == ("cancelled", 0, 0.0)
        runner.gate.clear()
        prefilling.cancel()
        runner.gate.set()
        assert prefilling.drain().reason in ("cancelled", "length")
        ended = engine.submit(request())
        assert ended.drain().reason == "length"
        ended.cancel()
        ended.cancel()
        assert ended.drain().reason == "length"
        assert ids(engine.submit(request())) == alone(request())[0]


def test_an_abandoned_stream_gives_its_slot_back() -> None:
    with mock_engine(Limits(slots=1, max_context=2000, chunk=8), delay=lambda: 0.001) as (engine, runner):
        for token in engine.submit(request(max_tokens=1900)):
            assert token.id >= 0
            break
        gc.collect()
        assert ids(engine.submit(request())) == alone(request())[0]
        assert len(runner.steps) < 200


def test_an_error_in_submit_fails_the_streams_of_that_step_only() -> None:
    boom = GptOssError("out of memory; use a smaller context")
    with mock_engine() as (engine, runner):
        runner.fail_submit = lambda rows: boom if any(row.prompt and len(row.prompt) == 7 for row in rows) else None
        runner.gate.clear()
        good = engine.submit(Request((1,) * 10, 1))  # two chunks; its last step is read while the bad one is refused
        bad = engine.submit(request(length=7, seed=3))
        runner.gate.set()
        with pytest.raises(GptOssError, match="out of memory"):
            list(bad)
        with pytest.raises(GptOssError, match="out of memory"):
            next(bad)
        with pytest.raises(GptOssError, match="out of memory"):
            bad.drain()
        assert good.drain().completion_tokens == 1
        assert ids(engine.submit(request())) == alone(request())[0]


def test_an_error_in_wait_fails_the_streams_of_that_step_and_the_engine_goes_on() -> None:
    with mock_engine() as (engine, runner):
        fuse = [5]

        def fail(rows: tuple[Row, ...]) -> Exception | None:
            fuse[0] -= 1
            return ValueError("the device is on fire") if fuse[0] == 0 else None

        runner.fail_wait = fail
        streams = [engine.submit(request(max_tokens=20, seed=seed)) for seed in range(3)]
        for stream in streams:
            with pytest.raises(ValueError, match="on fire"):
                list(stream)
        assert ids(engine.submit(request())) == alone(request())[0]


@settings(max_examples=40, deadline=None)
@given(
    batch=st.lists(requests, min_size=1, max_size=8),
    failures=st.sets(st.integers(0, 40), max_size=5),
    in_wait=st.booleans(),
)
def test_random_errors_never_hang_nor_leak_nor_corrupt(batch: list[Request], failures: set[int], in_wait: bool) -> None:
    with mock_engine() as (engine, runner):
        count = iter(range(10**9))

        def fail(rows: tuple[Row, ...]) -> Exception | None:
            return ValueError("broken step") if next(count) in failures else None

        if in_wait:
            runner.fail_wait = fail
        else:
            runner.fail_submit = fail
        streams = [engine.submit(one) for one in batch]
        for one, stream in zip(batch, streams, strict=True):
            got: list[int] = []
            try:
                got.extend(token.id for token in stream)
            except ValueError:
                assert failures
                continue
            assert got == alone(one)[0]


def test_a_prompt_that_begins_alike_goes_on_from_what_is_known() -> None:
    """In chunks of 8: what a later prompt has in common with an earlier one, up to the last cut before its end."""
    with mock_engine(prefix_bytes=1000) as (engine, runner):
        for prompt, cached in ((40, 0), (40, 32), (41, 32), (20, 16), (8, 0), (9, 8)):
            stream = engine.submit(request(length=prompt, max_tokens=3))
            assert ids(stream) == alone(request(length=prompt, max_tokens=3))[0]
            assert stream.finished is not None and stream.finished.cached_tokens == cached
        assert runner.saved == 5 and engine.status.prefix_bytes == 5 * (8 + RING)
        assert sum(len(row.tokens or ()) for rows in runner.steps for row in rows) == 40 + 8 + 9 + 4 + 8 + 1


def test_equal_prompts_at_once_are_computed_once() -> None:
    with mock_engine(Limits(slots=3, max_context=64, chunk=24), prefix_bytes=1000) as (engine, runner):
        runner.gate.clear()
        streams = [engine.submit(request(length=50, max_tokens=3, seed=seed)) for seed in range(3)]
        runner.gate.set()
        for seed, stream in enumerate(streams):
            assert ids(stream) == alone(request(length=50, max_tokens=3, seed=seed))[0]
        assert sum(len(row.tokens or ()) for rows in runner.steps for row in rows) == 48 + 3 * 2
        assert sum(stream.finished.cached_tokens for stream in streams if stream.finished) == 2 * 48


alike = st.builds(
    Request,
    prompt=st.tuples(st.lists(st.sampled_from([(1,) * 9, (2,) * 7]), max_size=5), st.lists(st.integers(0, 3))).map(
        lambda parts: tuple([token for part in parts[0] for token in part] + parts[1][:5] + [9])
    ),
    max_tokens=st.integers(1, 6),
    sampling=st.integers(0, 3).map(lambda seed: Sampling(seed=seed)),
)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.lists(alike, min_size=2, max_size=14),
    room=st.sampled_from([20, 100, 10_000]),
    failures=st.sets(st.integers(0, 40), max_size=3),
    cancelled=st.sets(st.integers(0, 13), max_size=3),
)
def test_no_request_sees_another_through_the_cache(
    batch: list[Request], room: int, failures: set[int], cancelled: set[int]
) -> None:
    """Whatever is evicted, fails or is given up meanwhile: what is not gives what it gives alone."""
    with mock_engine(prefix_bytes=room) as (engine, runner):
        count = iter(range(10**9))
        runner.fail_wait = lambda rows: ValueError("broken step") if next(count) in failures else None
        streams = [engine.submit(one) for one in batch]
        for number, (one, stream) in enumerate(zip(batch, streams, strict=True)):
            if number in cancelled:
                stream.cancel()
                continue
            try:
                got = ids(stream)
            except ValueError:
                assert failures
                continue
            assert got == alone(one)[0]
        assert engine.status.prefix_bytes <= room


def test_requests_beyond_the_bound_are_refused_and_told_when_to_come_back() -> None:
    with mock_engine(Limits(slots=1, max_context=64, chunk=8), max_waiting=2) as (engine, runner):
        runner.gate.clear()
        streams = [engine.submit(request(seed=seed)) for seed in range(3)]
        with pytest.raises(Busy, match="3 requests are being served or wait") as refused:
            engine.submit(request())
        assert 1 <= refused.value.retry_after_s <= 60
        eventually(lambda: engine.status.running == 1 and engine.status.waiting == 2)
        streams[2].cancel()
        runner.gate.set()
        assert streams[2].drain().reason == "cancelled"
        streams.append(engine.submit(request(seed=3)))
        for seed in (0, 1, 3):
            assert ids(streams[seed]) == alone(request(seed=seed))[0]
        assert ids(engine.submit(request())) == alone(request())[0]


def test_an_error_that_leaves_the_runner_in_doubt_closes_the_engine() -> None:
    class Lost(MockRunner):
        def release(self, slot: int) -> None:
            raise OSError("lost the device")

    runner: list[MockRunner] = []

    def make() -> MockRunner:
        runner.append(Lost())
        return runner[0]

    engine = Engine(make)
    with pytest.raises(GptOssError, match=r"stopped after an error .*lost the device"):
        engine.submit(request()).drain()
    eventually(lambda: runner[0].closed)
    with pytest.raises(GptOssError, match=r"stopped after an error .*lost the device"):
        engine.submit(request())
    with pytest.raises(GptOssError, match="lost the device"):
        engine.call(lambda r: 1)
    with pytest.raises(OSError, match="lost the device"):
        engine.close()
    engine.close()


def test_what_make_runner_raises_is_raised_to_the_caller() -> None:
    def make() -> MockRunner:
        raise GptOssError("no such checkpoint")

    before = threading.active_count()
    with pytest.raises(GptOssError, match="no such checkpoint"):
        Engine(make)
    eventually(lambda: threading.active_count() == before)


def test_close_fails_what_is_open_and_joins() -> None:
    runner: list[MockRunner] = []

    def make() -> MockRunner:
        runner.append(MockRunner(Limits(1, 5000, 8), lambda: 0.001))
        return runner[0]

    before = threading.active_count()
    engine = Engine(make)
    running, waiting = engine.submit(request(max_tokens=4000)), engine.submit(request())
    next(running)
    engine.close()
    assert threading.active_count() == before and runner[0].closed and runner[0].breaches == []
    for stream in (running, waiting):
        with pytest.raises(GptOssError, match="the engine is closed"):
            list(stream)
    with pytest.raises(GptOssError, match="the engine is closed"):
        engine.submit(request())
    with pytest.raises(GptOssError, match="the engine is closed"):
        engine.call(lambda r: 1)
    with pytest.raises(GptOssError, match="the engine is closed"):
        _ = engine.status
    engine.close()


def test_submitting_while_closing_never_hangs() -> None:
    for _ in range(20):
        engine = Engine(MockRunner)

        def client(engine: Engine = engine) -> None:
            for _ in range(1000):
                try:
                    engine.submit(request(max_tokens=3)).drain()
                    engine.call(lambda r: r.peak_memory())
                except GptOssError:
                    return

        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(client) for _ in range(4)]
            time.sleep(0.003)
            engine.close()
            for job in jobs:
                job.result(timeout=10)


def test_a_request_that_slips_in_while_the_thread_ends_is_failed() -> None:
    def make() -> MockRunner:
        raise GptOssError("no such checkpoint")

    loop = Loop()
    ticket = Ticket(request())
    result: Future[object] = Future()
    loop.post_unless_closed(partial(loop.admit, ticket))
    loop.post_unless_closed(partial(loop.call, lambda r: 1, result))
    loop.run(make, Future())
    assert "closed" in str(ticket.box.get_nowait())
    with pytest.raises(GptOssError, match="closed"):
        result.result(timeout=0)


def test_call_runs_on_the_engine_thread_and_passes_errors_on() -> None:
    with mock_engine() as (engine, runner):
        assert engine.call(lambda r: r.peak_memory()) == 42
        assert engine.call(lambda r: r.logits((1, 2))).shape == (2, VOCAB)
        with pytest.raises(ZeroDivisionError):
            engine.call(lambda r: 1 // 0)
        with pytest.raises(RuntimeError, match="wait for itself"):
            engine.call(lambda r: engine.call(lambda r: 1))
        assert runner.breaches == []


def test_an_idle_engine_does_not_spin() -> None:
    with mock_engine() as (engine, _):
        engine.submit(request()).drain()
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.05


def test_a_forgotten_engine_ends_its_thread_and_an_open_stream_keeps_it() -> None:
    runner: list[MockRunner] = []

    def make() -> MockRunner:
        runner.append(MockRunner())
        return runner[0]

    before = threading.active_count()
    engine = Engine(make)
    watch = weakref.ref(engine)
    stream = engine.submit(request())
    del engine
    gc.collect()
    assert watch() is not None
    assert ids(stream) == alone(request())[0]
    del stream
    gc.collect()
    assert watch() is None and runner[0].closed
    eventually(lambda: threading.active_count() == before)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_ctrl_c_interrupts_a_blocked_iteration() -> None:
    with mock_engine() as (engine, runner):
        runner.gate.clear()
        stream = engine.submit(request())
        timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        assert time.monotonic() - begin < 2
        timer.join()
        stream.cancel()
        runner.gate.set()
        assert isinstance(stream.drain(), Finished)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_ctrl_c_while_loading_closes_the_runner_once_it_is_there() -> None:
    go = threading.Event()
    runner: list[MockRunner] = []

    def make() -> MockRunner:
        go.wait(5)
        runner.append(MockRunner())
        return runner[0]

    timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        Engine(make)
    timer.join()
    go.set()
    eventually(lambda: bool(runner) and runner[0].closed)
