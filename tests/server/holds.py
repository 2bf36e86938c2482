"""What keeps other requests waiting, in CPU time, which other programs on the machine do not change.

Two things do: a callback of the event loop, and one call into C on any thread, since it holds the interpreter's lock
from its beginning to its end unless it releases it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

# Calls that let other threads run: they wait, or release the lock.
RELEASING = {"encode_batch_fast", "acquire", "poll", "select", "recv", "send", "wait", "sleep", "get", "run", "join"}


@dataclass
class Holds:
    """callback: the longest callback of an event loop. call: the longest call into C. Both with their seconds."""

    callback: tuple[float, str] = (0.0, "")
    call: tuple[float, str] = (0.0, "")

    def reset(self) -> None:
        self.callback = self.call = (0.0, "")


@contextmanager
def holds() -> Iterator[Holds]:
    """Measure the threads that start in this block."""
    found, stacks = Holds(), threading.local()
    run = asyncio.Handle._run

    def timed_run(handle: asyncio.Handle) -> None:
        begin = time.thread_time()
        try:
            run(handle)
        finally:
            seconds = time.thread_time() - begin
            if seconds > found.callback[0]:
                found.callback = seconds, repr(handle)[:300]

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        """Time the calls into C that call no Python: between two lines of Python others may run."""
        if event == "c_call":
            stacks.begin = time.thread_time()
        elif event in ("c_return", "c_exception") and getattr(stacks, "begin", None) is not None:
            seconds, stacks.begin = time.thread_time() - stacks.begin, None
            name = getattr(argument, "__name__", "?")
            if seconds > found.call[0] and name not in RELEASING:
                found.call = seconds, f"{name} in {frame.f_code.co_filename}:{frame.f_lineno}"
        else:
            stacks.begin = None

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                found.call = max(found.call, (time.thread_time() - begin, name))

        return call

    loads, dumps = json.loads, json.dumps  # the profiler does not see the objects that do the work in C
    json.loads, json.dumps = timed("json.loads", loads), timed("json.dumps", dumps)
    asyncio.Handle._run = timed_run  # type: ignore[method-assign]
    gc.collect()
    gc.freeze()  # as `mlx-gptoss serve` does
    threading.setprofile(profile)
    try:
        yield found
    finally:
        threading.setprofile(None)
        gc.unfreeze()
        json.loads, json.dumps = loads, dumps
        asyncio.Handle._run = run  # type: ignore[method-assign]
        sys.setprofile(None)
