"""Ports, connections to rank 0 and the secret of the tests that start ranks or pretend to be one."""

from __future__ import annotations

import socket
import time

SECRET = {"MLX_GPTOSS_SECRET": "ranks of the tests"}  # needed beyond the loopback


def free_ports(count: int) -> list[int]:
    """Consecutive free ports, followed by another free one."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = probe.getsockname()[1]
        try:
            for port in range(first, first + count + 1):
                with socket.socket() as other:
                    other.bind(("127.0.0.1", port))
        except OSError:
            continue
        return list(range(first, first + count))


def connect(port: int) -> socket.socket:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=60)
        except ConnectionRefusedError:
            time.sleep(0.01)
    raise AssertionError("rank 0 does not listen")
