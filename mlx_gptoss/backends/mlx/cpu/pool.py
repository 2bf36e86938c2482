"""Threads that share work and sleep when there is none, and BLAS with one thread inside of it.

A barrier that spins, as OpenBLAS and OpenMP have it, waits for a core that another program may have for some
milliseconds. Here the caller works as well, and at the end it waits only for threads that have begun.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

Work = Callable[[int], None]  # receives the thread's number, 0 for the caller; each takes pieces until none is left


class _Job:
    """One call of Pool.run. Threads that come when the caller is done find it closed, and empty: it may stay in the
    queue for a while, and must not hold what it computed with."""

    def __init__(self, work: Work) -> None:
        self.error: BaseException | None = None
        self._work: Work | None = work
        self._lock, self._ended = Lock(), Lock()
        self._active = 0

    def join(self, thread: int) -> None:
        """Work, unless the job is closed."""
        with self._lock:
            if self._work is None:
                return
            work = self._work
            self._active += 1
        try:
            work(thread)
        except BaseException as error:
            self.error = error
        del work
        with self._lock:
            self._active -= 1
            if self._work is None and not self._active:
                self._ended.release()

    def close(self) -> None:
        """Let no more threads begin, and wait for those that have."""
        with self._lock:
            self._work = None
            if not self._active:
                return
            self._ended.acquire()
        self._ended.acquire()


class Pool:
    """`threads` threads, the caller among them. Calls come from one thread at a time."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._workers = [
            Thread(target=self._serve, args=(number,), name=f"mlx-gptoss-{number}", daemon=True)
            for number in range(1, threads)
        ]
        for worker in self._workers:
            worker.start()

    def run(self, work: Work) -> None:
        """Call `work` on every thread that comes before the caller's own call has returned. Raises what one raises."""
        job = _Job(work)
        for _ in self._workers:
            self._jobs.put(job)
        try:
            work(0)
        finally:
            job.close()
        if job.error is not None:
            raise job.error

    def each(self, pieces: Sequence[Callable[[], None]]) -> None:
        """Call all pieces, in any order, with one BLAS thread each."""
        numbers = count()

        def work(thread: int) -> None:
            while (number := next(numbers)) < len(pieces):
                pieces[number]()

        with one_blas_thread():
            if len(pieces) > 1:
                self.run(work)
            else:
                work(0)

    def close(self) -> None:
        """End the threads."""
        for _ in self._workers:
            self._jobs.put(None)
        for worker in self._workers:
            worker.join()
        self._workers = []

    def _serve(self, number: int) -> None:
        while (job := self._jobs.get()) is not None:
            job.join(number)
            del job  # it holds what it computes with


_blas_lock = Lock()
_blas_users = 0
_blas_limit: Any = None


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """numpy's BLAS has one thread, in the whole process, until the last thread has left this. Then it is as before."""
    global _blas_users, _blas_limit
    with _blas_lock:
        _blas_users += 1
        if _blas_users == 1:
            _blas_limit = _blas().limit(limits=1, user_api="blas")
    try:
        yield
    finally:
        with _blas_lock:
            _blas_users -= 1
            if not _blas_users:
                _blas_limit.restore_original_limits()


@lru_cache(1)
def _blas() -> Any:
    """Finds the libraries that are loaded by now, numpy's among them."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")
