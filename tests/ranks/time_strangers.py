"""Measures how long two ranks take to start while other connections to rank 0's port say nothing.

usage: python tests/ranks/time_strangers.py [CONNECTIONS [RUNS]]; prints seconds from the start of rank 1 to the first
token, without such connections and with them
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from rank_sockets import free_ports

PROGRAM = """
import mlx_gptoss
with mlx_gptoss.load(backend="mlx", max_context=256) as model:
    next(iter(model.stream("Hello")))
    print("token", flush=True)
"""


def start_rank(rank: int, hostfile: Path) -> subprocess.Popen[str]:
    environment = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )


def connect(port: int) -> socket.socket:
    """A connection, once something listens."""
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.01)


def measure(connections: int) -> float | str:
    """Seconds from the start of rank 1 to the first token, or how rank 0 has failed."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ports = free_ports(2)
        hostfile = Path(folder) / "hosts.json"
        hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        first = start_rank(0, hostfile)
        connect(ports[-1] + 1).close()
        for _ in range(connections):
            stack.enter_context(connect(ports[-1] + 1))
        started = time.perf_counter()
        second = start_rank(1, hostfile)
        assert first.stdout is not None
        line = first.stdout.readline()
        taken = time.perf_counter() - started
        for process in (second, first):
            process.kill() if not line else process.wait(60)
            process.communicate()
        return taken if line else f"no token after {taken:.1f} s"


def main(connections: int = 30, runs: int = 1) -> None:
    for count in (0, connections):
        results = [measure(count) for _ in range(runs)]
        print(f"{count} silent connections:", *(f"{x:.1f} s" if isinstance(x, float) else x for x in results), sep=" ")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
