"""The engine with a mock runner: errors, closing, Ctrl-C and garbage collection."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

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

from mlx_gptoss.backends.base import Limits, Row
from mlx_gptoss.engine import Engine, Finished, Request
from mlx_gptoss.engine.loop import Loop, RequestHandle
from mlx_gptoss.errors import GptOssError


def test_an_error_in_submit_fails_only_the_streams_of_that_step() -> None:
    boom = GptOssError("out of memory; use a smaller context")
    with mock_engine() as (engine, runner):
        runner.fail_submit = lambda rows: boom if any(row.prompt and len(row.prompt) == 7 for row in rows) else None
        runner.gate.clear()
        good = engine.submit(Request((1,) * 10, 1))  # two chunks; the second is read while the bad step is rejected
        bad = engine.submit(request(length=7, seed=3))
        runner.gate.set()
        with pytest.raises(GptOssError, match="out of memory"):
            list(bad)
        with pytest.raises(GptOssError, match="out of memory"):
            next(bad)
        with pytest.raises(GptOssError, match="out of memory"):
            bad.drain()
        assert good.drain().completion_tokens == 1
        assert ids(engine.submit(request())) == expected(request())[0]


def test_an_error_in_wait_fails_the_streams_of_that_step_and_the_engine_goes_on() -> None:
    with mock_engine() as (engine, runner):
        burnt = False

        def fail(rows: tuple[Row, ...]) -> Exception | None:
            nonlocal burnt
            if burnt or len(rows) < 3:  # all three streams have a row
                return None
            burnt = True
            return ValueError("the device is on fire")

        runner.fail_wait = fail
        streams = [engine.submit(request(max_tokens=50, seed=seed)) for seed in range(3)]
        for stream in streams:
            with pytest.raises(ValueError, match="on fire"):
                list(stream)
        assert ids(engine.submit(request())) == expected(request())[0]


def test_a_runner_that_raises_stop_iteration_does_not_end_the_stream_in_silence() -> None:
    with mock_engine() as (engine, runner):
        runner.fail_wait = lambda rows: StopIteration("no more")
        with pytest.raises(RuntimeError, match="no more"):
            list(engine.submit(request()))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.lists(requests, min_size=1, max_size=8),
    failures=st.sets(st.integers(0, 40), max_size=5),
    in_wait=st.booleans(),
)
def test_random_errors_cause_no_hang_no_leak_and_no_wrong_token(
    batch: list[Request], failures: set[int], in_wait: bool
) -> None:
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
            assert got == expected(one)[0]


def test_an_error_in_release_closes_the_engine() -> None:
    class BrokenRunner(MockRunner):
        def release(self, slot: int) -> None:
            raise OSError("lost the device")

    runner: list[MockRunner] = []

    def make() -> MockRunner:
        runner.append(BrokenRunner())
        return runner[0]

    engine = Engine(make)
    with pytest.raises(GptOssError, match=r"stopped after an error .*lost the device"):
        engine.submit(request()).drain()
    eventually(lambda: runner[0].closed)
    with pytest.raises(GptOssError, match=r"stopped after an error .*lost the device"):
        engine.submit(request())
    with pytest.raises(GptOssError, match="lost the device"):
        engine.call(lambda r: 1)
    with pytest.raises(GptOssError, match="lost the device"):
        engine.close()
    engine.close()


def test_an_error_in_make_runner_is_raised_to_the_caller() -> None:
    def make() -> MockRunner:
        raise GptOssError("no such checkpoint")

    before = threading.active_count()
    with pytest.raises(GptOssError, match="no such checkpoint"):
        Engine(make)
    eventually(lambda: threading.active_count() == before)


def test_close_fails_open_streams_and_joins_the_thread() -> None:
    runner: list[MockRunner] = []

    def make() -> MockRunner:
        runner.append(MockRunner(Limits(1, 5000, 8), lambda: 0.01))
        return runner[0]

    before = threading.active_count()
    engine = Engine(make)
    running, waiting = engine.submit(request(max_tokens=4000)), engine.submit(request())
    next(running)
    engine.close()
    assert threading.active_count() == before and runner[0].closed and runner[0].violations == []
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
                job.result(timeout=60)


def test_a_request_submitted_while_the_thread_ends_fails() -> None:
    def make() -> MockRunner:
        raise GptOssError("no such checkpoint")

    loop = Loop()
    handle = RequestHandle(request())
    result: Future[object] = Future()
    loop.post_unless_closed(partial(loop.admit, handle))
    loop.post_unless_closed(partial(loop.call, lambda r: 1, result))
    loop.run(make, Future())
    assert "closed" in str(handle.queue.get_nowait())
    with pytest.raises(GptOssError, match="closed"):
        result.result(timeout=0)


def test_call_runs_on_the_engine_thread_and_raises_its_errors() -> None:
    with mock_engine() as (engine, runner):
        assert engine.call(lambda r: r.peak_memory()) == 42
        assert engine.call(lambda r: r.logits((1, 2))).shape == (2, VOCAB)
        with pytest.raises(ZeroDivisionError):
            engine.call(lambda r: 1 // 0)
        with pytest.raises(RuntimeError, match="wait for itself"):
            engine.call(lambda r: engine.call(lambda r: 1))
        assert runner.violations == []


def test_an_idle_engine_does_not_spin() -> None:
    with mock_engine() as (engine, _):
        engine.submit(request()).drain()
        before = engine.call(lambda r: time.thread_time())  # of the engine's thread
        time.sleep(0.3)
        assert engine.call(lambda r: time.thread_time()) - before < 0.05


def test_an_unreferenced_engine_ends_its_thread_but_an_open_stream_keeps_it() -> None:
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
    assert ids(stream) == expected(request())[0]
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
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            next(stream)  # no token comes before the gate opens
        timer.join()
        stream.cancel()
        runner.gate.set()
        assert isinstance(stream.drain(), Finished)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_ctrl_c_while_loading_closes_the_runner_once_it_has_loaded() -> None:
    go = threading.Event()
    runner: list[MockRunner] = []

    def make() -> MockRunner:
        go.wait(60)
        runner.append(MockRunner())
        return runner[0]

    timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        Engine(make)
    timer.join()
    go.set()
    eventually(lambda: bool(runner) and runner[0].closed)


def test_a_forked_process_is_told_to_load_the_model_itself() -> None:
    with mock_engine() as (engine, _):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:  # nothing here may return to pytest
            answers = []
            for use in (lambda: engine.submit(request()), lambda: engine.call(lambda runner: None)):
                try:
                    use()
                except GptOssError as error:
                    answers.append(str(error))
            os.write(write, "\n".join(answers).encode())
            os._exit(0)
        os.waitpid(child, 0)
        answers = os.read(read, 4096).decode().splitlines()
        assert len(answers) == 2 and all("load it in this process" in answer for answer in answers)
        assert ids(engine.submit(request())) == expected(request())[0]
