"""Threads that share work: nothing is lost, nothing is left running, and numpy gets its threads back."""

from __future__ import annotations

import threading
import weakref
from functools import partial

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from mlx_gptoss.backends.mlx.cpu.pool import Pool, one_blas_thread


@pytest.fixture
def pool():
    before = set(threading.enumerate())
    made = Pool(3)
    yield made
    made.close()
    assert not any(thread.name.startswith("mlx-gptoss-") for thread in set(threading.enumerate()) - before)


def blas_threads():
    return [library.num_threads for library in ThreadpoolController().select(user_api="blas").lib_controllers]


def test_every_piece_runs_once(pool):
    for count in (0, 1, 2, 50):
        done = []
        pool.each([partial(done.append, n) for n in range(count)])
        assert sorted(done) == list(range(count))


def test_every_thread_may_work(pool):
    """All three meet in one call; without one of them the barrier would break."""
    barrier, seen = threading.Barrier(3, timeout=60), []

    def work(thread):
        barrier.wait()
        seen.append(thread)

    pool.run(work)
    assert sorted(seen) == [0, 1, 2]


def test_a_thread_that_comes_late_is_not_waited_for(pool):
    """The other threads are held by one job; the next job ends without them."""
    hold, held = threading.Event(), threading.Barrier(3, timeout=60)

    def first(thread):
        held.wait()
        if thread:
            hold.wait(60)

    caller = threading.Thread(target=pool.run, args=(first,))
    caller.start()
    held_again, done = threading.Event(), []

    def second():
        pool.run(done.append)
        held_again.set()

    threading.Thread(target=second).start()
    assert held_again.wait(60) and done[0] == 0
    hold.set()
    caller.join(60)


def test_a_job_in_the_queue_holds_nothing():
    pool = Pool(1)  # nobody takes from its queue
    pool._workers = [threading.Thread()]
    array = np.zeros(3)
    held = weakref.ref(array)
    pool.run(partial(lambda array, thread: None, array))
    del array
    assert pool._jobs.qsize() == 1 and held() is None


def test_an_error_of_any_thread_is_raised(pool):
    barrier = threading.Barrier(3, timeout=60)

    def work(thread):
        barrier.wait()
        if thread == 2:
            raise ValueError("a piece failed")

    with pytest.raises(ValueError, match="a piece failed"):
        pool.run(work)
    pool.each([lambda: None] * 5)  # it still works


def test_blas_has_its_threads_again():
    before = blas_threads()
    with one_blas_thread():
        assert set(blas_threads()) == {1}
        with one_blas_thread():
            np.ones((64, 64)) @ np.ones((64, 64))
        assert set(blas_threads()) == {1}
    assert blas_threads() == before
