"""The engine as callers see it: submit a request, iterate over its tokens."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import TypeVar, cast

from ..backends.base import Runner
from ..errors import InvalidRequest
from .loop import Loop, RequestHandle
from .prefix_files import PrefixFiles
from .request import Finished, Request, Status, Token
from .scheduler import max_new_tokens

T = TypeVar("T")

EXIT_GRACE_S = 5.0  # how long an engine that nobody closed may hold up the end of the process


class Engine:
    """One runner on one thread of its own, serving any number of callers at once.

    make_runner: called on the engine thread, where the runner then stays. What it raises is raised here.
    max_waiting: requests that may wait for a slot; None sets no bound.
    prefix_bytes: of snapshots that the prefix cache may hold on the device; 0 keeps none. prefix_files: where they are
        kept beyond that.

    A single stream costs what a bare loop costs, for the next step is submitted before the last one is read. An
    error inside a step fails the streams that were in it, with that error, and the engine goes on; an error that
    leaves the runner in doubt (in release, or a result that does not match its step) closes the engine.
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
        # Also runs at exit: a thread in native code while the interpreter goes down can crash the process.
        self._finalizer = weakref.finalize(self, _stop, self._loop, self._thread, EXIT_GRACE_S)
        try:
            runner = ready.result()
        except BaseException:  # Ctrl-C while loading, too: then the thread closes the runner as soon as it has it
            self._finalizer.detach()
            self._loop.post(self._loop.close)
            raise
        self.config = runner.config
        self.limits = runner.limits
        self._max_open = None if max_waiting is None else runner.limits.slots + max_waiting

    def submit(self, request: Request) -> Stream:
        """Queue a request and return at once.

        Raises InvalidRequest if the prompt leaves no room in the context or an id is not in the vocabulary, Busy if too
        many wait already, and GptOssError if the engine is closed.
        """
        max_new_tokens(request, self.limits)
        self._check_ids("the prompt", request.prompt)
        self._check_ids("logit_bias", request.sampling.logit_bias or ())
        handle = RequestHandle(request)
        self._loop.submit(handle, self._max_open)
        return Stream(self, handle, partial(self._loop.post, partial(self._loop.cancel, handle)))

    @property
    def status(self) -> Status:
        """Of any thread. Raises GptOssError if the engine is closed."""
        return self._loop.status

    def call(self, function: Callable[[Runner], T]) -> T:
        """function(runner) on the engine thread, between two steps: for runner.logits and runner.peak_memory.

        Returns or raises what it does; GptOssError if the engine is closed. Not to be called on the engine thread.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("Engine.call would wait for itself; use the runner that the outer call was given")
        result: Future[object] = Future()
        self._loop.post_unless_closed(partial(self._loop.call, function, result))
        return cast(T, result.result())

    def close(self) -> None:
        """Fail open streams, close the runner, and wait for the thread. Raises what closing the runner raised."""
        first = self._finalizer.detach() is not None
        _stop(self._loop, self._thread, None)
        if first and self._loop.failure is not None:
            raise self._loop.failure

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _check_ids(self, what: str, ids: Iterable[int]) -> None:
        size = self.config.vocab_size
        wrong = next((i for i in (min(ids, default=0), max(ids, default=0)) if not 0 <= i < size), None)
        if wrong is not None:
            raise InvalidRequest(f"{what} holds the token id {wrong}; this model's ids go from 0 to {size - 1}")


class Stream(Iterator[Token]):
    """The tokens of one request, as they arrive. Ends after the last one; then `finished` says why and how fast.

    Raises what failed the request, on every further next(). A stream that is garbage-collected before its end is
    cancelled. Any thread may iterate or cancel.
    """

    def __init__(self, engine: Engine, handle: RequestHandle, cancel: Callable[[], None]) -> None:
        self._engine = engine  # an open stream keeps its engine
        self._handle = handle
        self._cancel = cancel
        self.finished: Finished | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Token:
        item = self._handle.queue.get()
        if isinstance(item, Token):
            return item
        self._handle.queue.put(item)  # stays for the next call, of this thread or another
        if isinstance(item, BaseException):
            raise item
        self.finished = item
        raise StopIteration

    def ready(self) -> list[Token]:
        """The tokens that are there and not read yet; never waits. Call it again until it gives none: what ended the
        stream comes after its tokens, and then sets `finished` or is raised."""
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
        """Have `callback()` called, at once and then on the engine thread whenever there is more; it must not wait."""
        self._handle.on_arrival = callback
        callback()

    def cancel(self) -> None:
        """End the stream within one step. Tokens that were read before remain; does nothing to an ended stream."""
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
    """End the engine thread. Holds on to no Engine, so that a forgotten one can be collected."""
    loop.post(loop.close)
    if thread is not threading.current_thread():
        thread.join(timeout)
