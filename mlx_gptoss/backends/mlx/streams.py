"""MLX's streams on a CPU, lent to one model at a time.

MLX starts a thread for each CPU stream and never ends it. That includes the default stream of every thread: entering
`mx.stream` creates it, and emptying the buffer cache waits for it, which starts its thread. So a model returns its
streams when it is closed, and the next model computes on them.
"""

from __future__ import annotations

import os
from contextlib import suppress

import mlx.core as mx

from ...errors import BackendUnavailable

_free: list[mx.Stream] = []  # several engine threads use it; append, extend and pop are atomic
_process: int | None = None  # the process that loaded the first model


class CpuStreams:
    """The CPU streams of one model."""

    def __init__(self) -> None:
        self._taken: list[mx.Stream] = []

    def make_default(self) -> mx.Stream:
        """Return the first stream, now the default one of this thread. That is the engine's, which ends with the
        model."""
        stream = self.first(1)[0]
        mx.set_default_stream(stream)
        return stream

    def first(self, count: int) -> tuple[mx.Stream, ...]:
        """Return `count` streams, the same ones at every call. They are taken when first needed."""
        while len(self._taken) < count:
            try:
                self._taken.append(_free.pop())
            except IndexError:
                self._taken.append(mx.new_thread_unsafe_stream(mx.cpu))
        return tuple(self._taken[:count])

    def close(self) -> None:
        """Wait for what runs on the streams, and let other models have them."""
        for stream in self._taken:
            with suppress(RuntimeError):  # the error of a step, which the stream keeps until it is raised once more
                mx.synchronize(stream)
        _free.extend(reversed(self._taken))
        self._taken = []


def check_process() -> None:
    """Raise BackendUnavailable in a forked process if its parent has loaded a model: MLX waits for all streams that
    there ever were, and their threads do not exist there."""
    global _process
    if _process is None:
        _process = os.getpid()
    elif _process != os.getpid():
        raise BackendUnavailable(
            "MLX has computed before this process was forked, and cannot compute in it; start processes with "
            "multiprocessing's 'spawn'"
        )
