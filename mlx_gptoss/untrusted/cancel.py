"""Ending long work on a worker thread when nobody waits for its result any more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..errors import Cancelled

_flag: ContextVar[threading.Event | None] = ContextVar("cancel_flag", default=None)


@contextmanager
def cancellable(flag: threading.Event | None = None) -> Iterator[threading.Event]:
    """Yield a flag (a new one, or the one given) for the work that is started in this block. Setting it ends the work
    at its next check.

    Threads belong to the block if they run in a copy of its context, as those of asyncio.to_thread do.
    """
    flag = flag or threading.Event()
    token = _flag.set(flag)
    try:
        yield flag
    finally:
        _flag.reset(token)


def check_cancelled() -> None:
    """Raise Cancelled if the flag of the block that this work belongs to is set."""
    flag = _flag.get()
    if flag is not None and flag.is_set():
        raise Cancelled("nobody waits for the result of this request any more")
