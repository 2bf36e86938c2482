"""The engine with a mock runner: requests become tokens, alone and in batches."""

from __future__ import annotations

import gc
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_runner import (
    VOCAB,
    MockRunner,
    eventually,
    expected,
    ids,
    mock_engine,
    request,
    requests,
)

from mlx_gptoss.backends.base import Limits
from mlx_gptoss.engine import Request, Token
from mlx_gptoss.errors import Busy, InvalidRequest
from mlx_gptoss.sampling import Sampling


def test_a_stream_yields_the_tokens_and_then_how_it_ended() -> None:
    with mock_engine() as (engine, _):
        stream = engine.submit(request(length=20, max_tokens=7))
        tokens = list(stream)
        wanted, _ = expected(request(length=20, max_tokens=7))
        assert [token.id for token in tokens] == wanted
        assert tokens[0] == Token(wanted[0], -float(wanted[0]), ((wanted[0], -float(wanted[0])),))
        done = stream.finished
        assert done is not None
        assert (done.reason, done.prompt_tokens, done.completion_tokens, done.cached_tokens) == ("length", 20, 7, 0)
        assert list(stream) == [] and stream.drain() is done


def test_timings_add_up() -> None:
    with mock_engine(delay=lambda: 0.01) as (engine, _):
        begin = time.perf_counter()
        first = engine.submit(request(length=20, max_tokens=11)).drain()
        wall = time.perf_counter() - begin
        assert first.queue_s >= 0
        assert first.prefill_s >= 0.03  # three chunks of 8, 8, 4
        assert first.decode_s >= 0.1
        assert first.ttft_s == first.queue_s + first.prefill_s
        assert first.ttft_s + first.decode_s <= wall


def test_a_waiting_request_counts_its_queue_time() -> None:
    with mock_engine(Limits(slots=1, max_context=64, chunk=8), delay=lambda: 0.01) as (engine, runner):
        runner.gate.clear()
        first, second = engine.submit(request(max_tokens=10)), engine.submit(request(max_tokens=2))
        runner.gate.set()
        first.drain()
        assert second.drain().queue_s >= 0.08


@settings(max_examples=60, deadline=None)
@given(batch=st.lists(requests, min_size=1, max_size=10), slots=st.integers(1, 4), chunk=st.integers(1, 12))
def test_a_batch_gives_each_request_the_tokens_it_gets_alone(batch: list[Request], slots: int, chunk: int) -> None:
    limits = Limits(slots, max_context=48, chunk=chunk)
    with mock_engine(limits) as (engine, _):
        streams = [engine.submit(one) for one in batch]
        for one, stream in zip(batch, streams, strict=True):
            wanted, reason = expected(one, limits)
            assert ids(stream) == wanted
            assert stream.finished is not None and stream.finished.reason == reason
            assert stream.finished.completion_tokens == len(wanted)


@pytest.mark.parametrize("seed", range(4))
def test_many_threads_submit_cancel_and_abandon_streams(seed: int) -> None:
    def client(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        for _ in range(12):
            one = Request(
                tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))),
                rng.randint(1, 30),
                Sampling(seed=rng.randrange(5)),
                frozenset(rng.sample(range(VOCAB), rng.randrange(20))),
            )
            wanted, reason = expected(one)
            stream = engine.submit(one)
            got = []
            leave_after = rng.randint(0, 30) if rng.random() < 0.5 else 1000
            for token in stream:
                got.append(token.id)
                if len(got) == leave_after:
                    break
            if leave_after == 1000:
                assert (got, stream.drain().reason) == (wanted, reason)
            else:
                assert got == wanted[: len(got)]
                if rng.random() < 0.5:
                    stream.cancel()
                    assert stream.drain().reason in ("cancelled", reason)

    jitter = random.Random(seed)
    with mock_engine(delay=lambda: jitter.random() * 0.0005) as (engine, _), ThreadPoolExecutor(8) as pool:
        for job in [pool.submit(client, number) for number in range(8)]:
            job.result(timeout=60)


def test_a_stop_id_ends_the_stream_and_is_its_last_token() -> None:
    wanted, _ = expected(request(max_tokens=20))
    with mock_engine() as (engine, runner):
        stream = engine.submit(request(max_tokens=20, stop=(wanted[4],)))
        assert ids(stream) == wanted[:5]
        assert stream.finished is not None and stream.finished.reason == "stop"
        eventually(lambda: engine.call(lambda r: runner.empty))
        assert len(runner.steps) == 6  # one more row was in flight already


def test_a_request_that_ends_by_length_wastes_no_step() -> None:
    with mock_engine() as (engine, runner):
        engine.submit(request(max_tokens=9)).drain()
        assert len(runner.steps) == 9


def test_the_next_step_is_submitted_before_the_previous_one_is_read() -> None:
    with mock_engine() as (engine, runner):
        runner.gate.clear()
        stream = engine.submit(request(max_tokens=5))
        eventually(lambda: len(runner.steps) == 2)
        time.sleep(0.02)
        assert len(runner.steps) == 2
        runner.gate.set()
        stream.drain()


def test_generation_ends_when_the_context_is_full() -> None:
    with mock_engine() as (engine, _):
        done = engine.submit(request(length=60, max_tokens=100)).drain()
        assert (done.reason, done.completion_tokens) == ("length", 4)
        assert engine.submit(request(length=63, max_tokens=100)).drain().completion_tokens == 1


def test_submit_rejects_invalid_requests() -> None:
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
        with pytest.raises(InvalidRequest, match="an integer of at least 1, not 0"):
            Request((1,), 0)
        for wrong in (2.5, float("nan"), "3", True, None):
            with pytest.raises(InvalidRequest, match="an integer of at least 1"):
                Request((1,), wrong)  # type: ignore[arg-type]
        assert runner.steps == []


def stop_at(runner: MockRunner, step: int) -> None:
    """Close the runner's gate just before it reads this step."""

    def delay() -> float:
        nonlocal step
        step -= 1
        if step == 1:
            runner.gate.clear()
        return 0.0

    runner.delay = delay


def test_cancel_takes_effect_within_one_step() -> None:
    with mock_engine() as (engine, runner):
        stop_at(runner, step=3)
        stream = engine.submit(request(max_tokens=50))
        next(stream)
        eventually(lambda: not runner.gate.is_set())
        steps = len(runner.steps)  # one is being read and the next one is in flight
        stream.cancel()
        runner.gate.set()
        assert stream.drain().reason == "cancelled"
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
        assert ids(engine.submit(request())) == expected(request())[0]


def test_an_abandoned_stream_frees_its_slot() -> None:
    with mock_engine(Limits(slots=1, max_context=2000, chunk=8)) as (engine, runner):
        stop_at(runner, step=3)
        for token in engine.submit(request(max_tokens=1900)):
            assert token.id >= 0
            break
        eventually(lambda: not runner.gate.is_set())
        gc.collect()
        runner.gate.set()
        assert ids(engine.submit(request())) == expected(request())[0]
        assert len(runner.steps) < 20


def test_requests_over_max_waiting_are_rejected_with_a_retry_time() -> None:
    with mock_engine(Limits(slots=1, max_context=64, chunk=8), max_waiting=2) as (engine, runner):
        runner.gate.clear()
        streams = [engine.submit(request(seed=seed)) for seed in range(3)]
        with pytest.raises(Busy, match="3 requests are running or waiting") as refused:
            engine.submit(request())
        assert 1 <= refused.value.retry_after_s <= 60
        eventually(lambda: engine.status.running == 1 and engine.status.waiting == 2)
        streams[2].cancel()
        runner.gate.set()
        assert streams[2].drain().reason == "cancelled"
        streams.append(engine.submit(request(seed=3)))
        for seed in (0, 1, 3):
            assert ids(streams[seed]) == expected(request(seed=seed))[0]
        assert ids(engine.submit(request())) == expected(request())[0]
