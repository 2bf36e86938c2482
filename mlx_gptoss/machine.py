"""What this machine has and does: cores, how fast it copies memory, sockets, folders brought to the disk."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """A socket that listens there. Raises OSError or OverflowError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
