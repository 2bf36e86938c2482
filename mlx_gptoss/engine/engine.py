"""The engine's public interface: submit a request and iterate over its tokens."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from queue import Empty
from types import TracebackType
from typing import TypeVar, cast

from ..backends.base import Limits, Runner
from ..config import ModelConfig
from ..errors import GptOssError, InvalidRequest
from .loop import Loop, RequestHandle
from .prefix_files import PrefixFiles
from .request import Finished, Request, Status, Token
from .scheduler import max_new_tokens

T = TypeVar("T")

EXIT_GRACE_S = 5.0  # an engine that was never closed delays the end of the process by at most this
WAKE_S = 0.2


class Engine:
    """Runs one runner on its own thread and serves any number of callers at once.

    make_runner: called once, on the engine thread; the runner is used only there. An exception it raises is raised
        from this constructor.
    max_waiting: maximum number of requests queued for a slot; None means no limit.
    prefix_bytes: device memory for the prefix cache's snapshots; 0 disables the cache.
    prefix_files: also keeps snapshots on disk, beyond prefix_bytes and across processes.

    A single stream runs as fast as a bare loop, because the next step is submitted before the last one is read. An
    exception in a step fails the streams of that step with it, and the engine goes on. An exception that leaves the
    runner's state unknown (in release(), or results that do not match their step) closes the engine.
    """

    def __init__(
        self,
        make_runner: Callable[[], Runner],
        *,
        max_waiting: int | None = None,
        prefix_bytes: int = 0,
        prefix_files: PrefixFiles | None = None,
    ) -> None:
        self._loop = Loop(prefix_bytes, prefix_files)
        ready: Future[Runner] = Future()
        self._thread = threading.Thread(
            target=self._loop.run, args=(make_runner, ready), name="mlx-gptoss engine", daemon=True
        )
        self._thread.start()
        # Also runs at interpreter exit: a thread in native code during shutdown can crash the process.
        self._finalizer = weakref.finalize(self, _stop, self._loop, self._thread, EXIT_GRACE_S)
        try:
            runner = ready.result()
        except BaseException:  # also Ctrl-C while loading; the thread then closes the runner once it has loaded
            self._finalizer.detach()
            self._loop.post(self._loop.close)
            raise
        self._process = os.getpid()
        self.config: ModelConfig = runner.config
        self.limits: Limits = runner.limits
        self._max_open = None if max_waiting is None else runner.limits.slots + max_waiting

    def submit(self, request: Request) -> Stream:
        """Queue a request and return its stream at once.

        Raises InvalidRequest if the prompt fills the context or an id is not in the vocabulary, Busy if slots +
        max_waiting requests are open already, and GptOssError if the engine is closed.
        """
        self.check_process()
        max_new_tokens(request, self.limits)
        self._check_ids("the prompt", request.prompt)
        self._check_ids("logit_bias", request.sampling.logit_bias or ())
        handle = RequestHandle(request)
        self._loop.submit(handle, self._max_open)
        return Stream(self, handle, partial(self._loop.post, partial(self._loop.cancel, handle)))

    @property
    def status(self) -> Status:
        """Current load. Any thread may read it. Raises GptOssError if the engine is closed."""
        self.check_process()
        return self._loop.status

    @property
    def failure(self) -> BaseException | None:
        """The error that stopped the engine; None while it runs, and after close()."""
        return self._loop.failure

    def call(self, function: Callable[[Runner], T]) -> T:
        """Run function(runner) on the engine thread between two steps, e.g. for runner.logits or runner.peak_memory.

        Returns its result or raises its exception; raises GptOssError if the engine is closed, and RuntimeError if
        called on the engine thread.
        """
        self.check_process()
        if threading.current_thread() is self._thread:
            raise RuntimeError("Engine.call on the engine thread would wait for itself; use the runner passed to you")
        result: Future[object] = Future()
        self._loop.post_unless_closed(partial(self._loop.call, function, result))
        return cast(T, result.result())

    def close(self) -> None:
        """Fail open streams, close the runner and wait for the thread. The first time, raises GptOssError from the
        error that stopped the engine, if there was one. Does nothing in a forked process, which has no thread."""
        if os.getpid() != self._process:
            self._finalizer.detach()
            return
        first = self._finalizer.detach() is not None
        _stop(self._loop, self._thread, None)
        if first and self._loop.failure is not None:
            raise self._loop.closed_error()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def check_process(self) -> None:
        """Raise GptOssError in a forked process, which has no engine thread: a request would wait for ever."""
        if os.getpid() != self._process:
            raise GptOssError(
                "the model was loaded before this process was forked; load it in this process, started with "
                "multiprocessing's 'spawn'"
            )

    def _check_ids(self, what: str, ids: Iterable[int]) -> None:
        size = self.config.vocab_size
        wrong = next((i for i in (min(ids, default=0), max(ids, default=0)) if not 0 <= i < size), None)
        if wrong is not None:
            raise InvalidRequest(f"{what} contains token id {wrong}; this model's ids go from 0 to {size - 1}")


class Stream(Iterator[Token]):
    """Iterator over the tokens of one request, as they arrive.

    After the last token, `finished` holds the reason, counts and timings. If the request failed, every further next()
    raises its error. A stream that is garbage-collected before its end is cancelled. Any thread may iterate or cancel.
    """

    def __init__(self, engine: Engine, handle: RequestHandle, cancel: Callable[[], None]) -> None:
        self._engine = engine  # an open stream keeps its engine alive
        self._handle = handle
        self._cancel = cancel
        self.finished: Finished | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Token:
        self._engine.check_process()
        item = self._wait()
        if isinstance(item, Token):
            return item
        self._handle.queue.put(item)  # keep it for further calls, from this thread or another
        if isinstance(item, BaseException):
            raise item
        self.finished = item
        raise StopIteration

    def _wait(self) -> Token | Finished | BaseException:
        while True:
            try:
                # SIGINT may be delivered to another thread, which does not wake this one: it looks by itself.
                return self._handle.queue.get(timeout=WAKE_S)
            except Empty:
                continue

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens in the prompt."""
        return len(self._handle.request.prompt)

    def ready(self) -> list[Token]:
        """The tokens that have arrived and are not read yet; does not block.

        Call it until it returns an empty list: the end comes after the tokens, and that call sets `finished` or
        raises the error.
        """
        self._engine.check_process()
        tokens: list[Token] = []
        while not self._handle.queue.empty():
            try:
                tokens.append(next(self))
            except StopIteration:
                break
            except BaseException:
                if not tokens:
                    raise
                break
        return tokens

    def on_arrival(self, callback: Callable[[], None]) -> None:
        """Call `callback` now, and then on the engine thread after every new item. It must not block."""
        self._engine.check_process()
        self._handle.on_arrival = callback
        callback()

    def cancel(self) -> None:
        """End the stream within one step. Tokens already delivered remain; does nothing to an ended stream."""
        self._cancel()

    def drain(self) -> Finished:
        """Skip to the end of the stream and return how it ended."""
        for _ in self:
            pass
        assert self.finished is not None
        return self.finished

    def __del__(self) -> None:
        if self.finished is None:
            self._cancel()


def _stop(loop: Loop, thread: threading.Thread, timeout: float | None) -> None:
    """End the engine thread. Holds no reference to the Engine, so an unused one can be garbage-collected."""
    loop.post(loop.close)
    if thread is not threading.current_thread():
        thread.join(timeout)
