"""The engine thread: it creates the runner and is the only thread that uses it.

Callers post functions to an inbox, and the thread runs them between two steps. Steps are double-buffered: while the
device computes step k, the thread plans and submits step k+1, and then waits for step k and delivers its tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from queue import SimpleQueue
from time import perf_counter

from ..backends.base import Pending, Runner, stage_count
from ..errors import Busy, GptOssError
from .prefix import PrefixCache
from .prefix_files import PrefixFiles
from .request import Finished, FinishReason, Request, Status, Token
from .scheduler import Scheduler
from .sequence import Output, Sequence, Step

CLOSED = "the engine is closed; load the model again"


@dataclass(eq=False)
class RequestHandle:
    """One request's state shared by its caller and the engine thread. Times are perf_counter() seconds.

    queue: tokens for the caller, then one Finished or exception. on_arrival: called on the engine thread after every
    item. on_end: called on the engine thread after the last item.
    """

    request: Request
    queue: SimpleQueue[Token | Finished | BaseException] = field(default_factory=SimpleQueue)
    submitted_at: float = field(default_factory=perf_counter)
    started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    sequence: Sequence | None = None
    on_arrival: Callable[[], None] | None = None
    on_end: Callable[[RequestHandle], None] | None = None

    def put(self, item: Token | Finished | BaseException) -> None:
        """Deliver a token, or the end of the stream. Called on the engine thread."""
        self.queue.put(item)
        if not isinstance(item, Token) and self.on_end is not None:
            self.on_end(self)
        if self.on_arrival is not None:
            self.on_arrival()

    def finish(self, reason: FinishReason) -> None:
        """Deliver the Finished of this request."""
        now = perf_counter()
        started = self.started_at or now
        first = self.first_token_at or (now if self.started_at else started)
        self.put(
            Finished(
                reason,
                prompt_tokens=len(self.request.prompt),
                completion_tokens=self.sequence.delivered if self.sequence else 0,
                cached_tokens=self.sequence.cached_tokens if self.sequence else 0,
                drafted=self.sequence.drafted if self.sequence else 0,
                accepted=self.sequence.accepted if self.sequence else 0,
                queue_s=started - self.submitted_at,
                prefill_s=first - started,
                decode_s=(self.last_token_at or first) - first,
            )
        )


@dataclass
class InFlight:
    """A step that the device is computing. seconds: that the engine thread has spent on it so far."""

    step: Step
    pending: Pending
    seconds: float


class Loop:
    """Schedules, submits and reads steps. Everything runs on the engine thread, except post(), post_unless_closed(),
    submit() and status, which any thread may call.

    failure: the exception that stopped the thread, if one did.
    """

    def __init__(self, prefix_bytes: int = 0, prefix_files: PrefixFiles | None = None) -> None:
        self._prefix_bytes, self._prefix_files = prefix_bytes, prefix_files
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._closing = False
        self._runner: Runner
        self._scheduler: Scheduler
        self._prefix: PrefixCache | None = None
        self._unfinished = 0  # requests accepted and not ended
        self._mean_request_s = 1.0  # moving average of the time from a request's first step to its end
        self._in_flight: InFlight | None = None
        self._handles: dict[Sequence, RequestHandle] = {}
        self.failure: BaseException | None = None

    def post(self, message: Callable[[], None]) -> None:
        """Run `message` on the engine thread between two steps; it is dropped if the thread has ended.

        Takes no lock, so a finalizer may call it from wherever the garbage collector runs.
        """
        self._inbox.put(message)

    def post_unless_closed(self, message: Callable[[], None]) -> None:
        """Like post(), but raises GptOssError if the engine thread has ended or is ending."""
        with self._lock:
            if self._closed:
                raise self.closed_error()
            self._inbox.put(message)

    def submit(self, handle: RequestHandle, max_open: int | None) -> None:
        """Accept a request. Raises Busy if max_open requests are unfinished, and GptOssError if closed."""
        with self._lock:
            if self._closed:
                raise self.closed_error()
            if max_open is not None and self._unfinished >= max_open:
                seconds = self._mean_request_s * (self._unfinished + 1) / self._runner.limits.slots
                raise Busy(
                    f"{self._unfinished} requests are running or waiting, which is the maximum; try again later",
                    retry_after_s=min(max(1, ceil(seconds)), 60),
                )
            self._unfinished += 1
            handle.on_end = self._on_request_end
            self._inbox.put(partial(self.admit, handle))

    def _on_request_end(self, handle: RequestHandle) -> None:
        with self._lock:
            self._unfinished -= 1
            if handle.started_at is not None:
                self._mean_request_s += 0.1 * (perf_counter() - handle.started_at - self._mean_request_s)

    @property
    def status(self) -> Status:
        with self._lock:
            if self._closed:
                raise self.closed_error()
            running, waiting = self._scheduler.counts
            sequences = list(self._handles)
            prompts = [each for each in sequences if not each.delivered]
            return Status(
                self._runner.limits.slots,
                running,
                waiting,
                self._prefix.nbytes if self._prefix else 0,
                sum(len(each.request.prompt) for each in prompts),
                sum(each.prefilled for each in prompts),
                sum(each.delivered for each in sequences),
            )

    def run(self, make_runner: Callable[[], Runner], ready: Future[Runner]) -> None:
        """Body of the engine thread: create the runner, run steps until close(), close the runner.

        `ready` receives the runner, or the exception that make_runner raised.
        """
        try:
            self._runner = make_runner()
        except BaseException as error:
            self._shut_down()
            ready.set_exception(error)
            return
        if self._prefix_bytes:
            self._prefix = PrefixCache(self._prefix_bytes, self._runner, self._prefix_files)
        stages = stage_count(self._runner.config)
        self._scheduler = Scheduler(self._runner.limits, self._runner.release, self._prefix, stages)
        ready.set_result(self._runner)
        try:
            self._run_steps()
        except BaseException as error:
            self.failure = error
        finally:
            self._shut_down()
            self._close_runner()

    # Messages that callers post.

    def admit(self, handle: RequestHandle) -> None:
        """Hand a submitted request to the scheduler."""
        if self._closed:
            handle.put(self.closed_error())
            return
        try:
            handle.sequence = self._scheduler.add(handle.request)
        except GptOssError as error:
            handle.put(error)
            return
        self._handles[handle.sequence] = handle

    def cancel(self, handle: RequestHandle) -> None:
        """End a request with reason "cancelled", unless it has ended."""
        if handle.sequence in self._handles:
            self._scheduler.end(handle.sequence)
            self._finish(handle.sequence, "cancelled")

    def call(self, function: Callable[[Runner], object], result: Future[object]) -> None:
        """Set `result` to what function(runner) returns or raises."""
        if self._closed:
            result.set_exception(self.closed_error())
            return
        try:
            result.set_result(function(self._runner))
        except BaseException as error:
            result.set_exception(error)

    def close(self) -> None:
        """Have the thread end before its next step."""
        self._closing = True

    # Steps.

    def _run_steps(self) -> None:
        """Handle messages, submit step k+1, read step k, until close()."""
        while True:
            if self._in_flight is None and self._scheduler.idle:
                self._inbox.get()()  # block until there is work
            while not self._inbox.empty():
                self._inbox.get()()
            if self._closing:
                return
            next_step = self._submit_step()
            self._read_step()
            self._in_flight = next_step
            self._save_prefixes()

    def _submit_step(self) -> InFlight | None:
        """Plan and submit the next step; None if there is nothing to do.

        If the runner raises an exception, the requests of the step fail with it and the engine goes on.
        """
        step = self._scheduler.plan()
        if step is None:
            return None
        now = perf_counter()
        for sequence in step.sequences:
            handle = self._handles[sequence]
            if handle.started_at is None:
                handle.started_at = now
        try:
            for slot, chain in step.restores:
                self._runner.restore(slot, chain)
            pending = self._runner.submit(step.rows)
            return InFlight(step, pending, perf_counter() - now)
        except Exception as error:
            self._fail_step(step, error)
            return None

    def _save_prefixes(self) -> None:
        """Save the prompt chunks of the step in flight. This may wait for it, so the previous one is read first."""
        flight = self._in_flight
        if flight is None or self._prefix is None:
            return
        started = perf_counter()
        try:
            self._scheduler.save_prefixes(flight.step)
        except Exception as error:
            self._fail_step(flight.step, error)
            self._in_flight = None
        flight.seconds += perf_counter() - started

    def _read_step(self) -> None:
        """Wait for the step in flight, if there is one, and deliver its tokens."""
        flight, self._in_flight = self._in_flight, None
        if flight is None:
            return
        started = perf_counter()
        try:
            results = flight.pending.wait()
        except Exception as error:
            self._fail_step(flight.step, error)
            return
        now = perf_counter()
        self._scheduler.record_cost(flight.step, flight.seconds + now - started)
        for output in self._scheduler.process_results(flight.step, results):
            self._deliver(output, now)

    def _deliver(self, output: Output, now: float) -> None:
        handle, sampled = self._handles[output.sequence], output.sampled
        if handle.first_token_at is None:
            handle.first_token_at = now
        handle.last_token_at = now
        handle.put(Token(sampled.token, sampled.logprob, sampled.top))
        if isinstance(output.end_reason, GptOssError):
            self._handles.pop(output.sequence).put(output.end_reason)
        elif output.end_reason is not None:
            self._finish(output.sequence, output.end_reason)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._handles.pop(sequence).finish(reason)

    def _fail_step(self, step: Step, error: Exception) -> None:
        """Fail the requests of a step. Results they still have in flight are dropped when they are read."""
        if isinstance(error, StopIteration):  # raised by a stream's iterator, it would look like the stream's end
            error = RuntimeError(f"the runner raised {error!r}")
        for sequence in step.sequences:
            handle = self._handles.pop(sequence, None)
            if handle is not None:
                handle.put(error)
        self._scheduler.fail(step)

    # Shutdown.

    def _shut_down(self) -> None:
        """Refuse new messages and fail all open requests, so that no caller waits for a thread that has ended."""
        with self._lock:
            self._closed = True
        while not self._inbox.empty():
            self._inbox.get()()
        for handle in self._handles.values():
            handle.put(self.closed_error())
        self._handles.clear()

    def _close_runner(self) -> None:
        try:
            if self._in_flight is not None:
                self._in_flight.pending.wait()
        except Exception as error:
            self.failure = self.failure or error
        finally:
            self._in_flight = None
            if self._prefix is not None:
                self._prefix.close()
            try:
                self._runner.close()
            except Exception as error:
                self.failure = self.failure or error
            self._prefix = None
            del self._runner, self._scheduler

    def closed_error(self) -> GptOssError:
        """Why the engine cannot be used: it was closed, or an error stopped it."""
        if self.failure is None:
            return GptOssError(CLOSED)
        error = GptOssError(f"the engine stopped after an error ({self.failure!r}); load the model again")
        error.__cause__ = self.failure
        return error
