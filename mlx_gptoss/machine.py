"""What this machine's processor has and does: cores, and how fast it copies memory."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

COPIED = 128 << 20  # bytes: more than caches hold
TRIES = 10


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ram_copy_bandwidth() -> float:
    """Bytes a second of a copy by all cores, read and written counted; the best of TRIES."""
    import numpy as np

    threads = cores()
    source = np.ones((threads, COPIED // threads), np.uint8)
    target = np.zeros_like(source)

    def copy(thread: int) -> None:
        np.copyto(target[thread], source[thread])

    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(TRIES):
            started = time.perf_counter()
            list(pool.map(copy, range(threads)))
            best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best
