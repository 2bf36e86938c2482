"""Ranks on the loopback, started as mlx.launch and torchrun start them: processes with an environment."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def free_ports(count: int) -> list[int]:
    """Ports in a row, and one behind them, on which nobody listens."""
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


class Ranks:
    """Processes of one launch, rank 0 first."""

    def __init__(self, environments: list[dict[str, str]], command: list[str], port: int) -> None:
        self.port = port  # where rank 0 listens for the others
        self.processes = [
            subprocess.Popen(
                [sys.executable, *command],
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for environment in environments
        ]

    def __getitem__(self, rank: int) -> subprocess.Popen[str]:
        return self.processes[rank]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def end(self, seconds: float = 120) -> list[tuple[int, str, str]]:
        """Exit code, stdout and stderr of each."""
        ended = [process.communicate(timeout=seconds) for process in self.processes]
        return [(p.returncode, out, err) for p, (out, err) in zip(self.processes, ended, strict=True)]


@pytest.fixture
def ring(tmp_path: Path) -> Any:
    """ring(2, "-m", "mlx_gptoss_cli", ...): ranks of the mlx backend. Whatever of them is left is killed."""
    started: list[Ranks] = []

    def start(count: int, *command: str, more: Callable[[int], dict[str, str]] = lambda rank: {}) -> Ranks:
        ports = free_ports(count)
        hostfile = tmp_path / f"hosts{len(started)}.json"
        hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        each = [{"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile), **more(rank)} for rank in range(count)]
        started.append(Ranks(each, list(command), ports[-1] + 1))
        return started[-1]

    yield start
    for ranks in started:
        ranks.kill()


@pytest.fixture
def torchrun() -> Any:
    """The same of the cuda backend, on CPUs."""
    started: list[Ranks] = []

    def start(count: int, *command: str) -> Ranks:
        port = free_ports(1)[0]
        shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        each = [
            {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)} for rank in range(count)
        ]
        started.append(Ranks(each, list(command), port + 1))
        return started[-1]

    yield start
    for ranks in started:
        ranks.kill()
