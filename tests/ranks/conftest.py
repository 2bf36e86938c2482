"""Ranks on the loopback or on a slow network. They are started the way mlx.launch and torchrun start them: as processes
with environment variables."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rank_sockets import SECRET, free_ports
from slow_network import DEVICE, SlowNetwork, Unavailable

from mlx_gptoss.ranks.launch import Launch


@pytest.fixture
def launches() -> list[Launch]:
    """Both ranks of a launch of two, on a free port."""
    (port,) = free_ports(1)
    return [Launch("mlx", rank, 2, "127.0.0.1", port, 2, "the key") for rank in range(2)]


class Ranks:
    """The processes of one launch, rank 0 first; on a network, each on its own host."""

    def __init__(
        self, environments: list[dict[str, str]], command: list[str], port: int, network: SlowNetwork | None
    ) -> None:
        self.port = port  # where rank 0 listens for the other ranks
        self.processes = [
            subprocess.Popen(
                [*(network.command_prefix(rank) if network else []), sys.executable, *command],
                env={**os.environ, "OMP_NUM_THREADS": "1", **(SECRET if network else {}), **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, environment in enumerate(environments)
        ]

    def __getitem__(self, rank: int) -> subprocess.Popen[str]:
        return self.processes[rank]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def end(self, seconds: float = 300) -> list[tuple[int, str, str]]:
        """Wait for all ranks to end. Returns exit code, stdout and stderr of each."""
        ended = [process.communicate(timeout=seconds) for process in self.processes]
        return [(p.returncode, out, err) for p, (out, err) in zip(self.processes, ended, strict=True)]


@pytest.fixture
def ring(tmp_path: Path) -> Any:
    """ring(2, "-m", "mlx_gptoss_cli", ...) starts ranks of the mlx backend. Those left at the end are killed."""
    started: list[Ranks] = []

    def start(count: int, *command: str, network: SlowNetwork | None = None) -> Ranks:
        ports = free_ports(count)
        hosts = [network.address(rank) if network else "127.0.0.1" for rank in range(count)]
        hostfile = tmp_path / f"hosts{len(started)}.json"
        hostfile.write_text(json.dumps([[f"{host}:{port}"] for host, port in zip(hosts, ports, strict=True)]))
        each = [{"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)} for rank in range(count)]
        started.append(Ranks(each, list(command), ports[-1] + 1, network))
        return started[-1]

    yield start
    for ranks in started:
        ranks.kill()


@pytest.fixture
def torchrun() -> Any:
    """The same for the cuda backend, on CPUs."""
    started: list[Ranks] = []

    def start(count: int, *command: str, network: SlowNetwork | None = None) -> Ranks:
        port = free_ports(1)[0]
        shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        if network:
            shared |= {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": network.address(0), "GLOO_SOCKET_IFNAME": DEVICE}
        each = [
            {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)} for rank in range(count)
        ]
        started.append(Ranks(each, list(command), port + 1, network))
        return started[-1]

    yield start
    for ranks in started:
        ranks.kill()


@pytest.fixture
def slow_network() -> Any:
    """slow_network(2, delay_s=0.005, loss=0.01) starts a SlowNetwork with two hosts."""
    with contextlib.ExitStack() as stack:

        def start(hosts: int, **settings: float) -> SlowNetwork:
            try:
                return stack.enter_context(SlowNetwork(hosts, **settings))
            except Unavailable as error:
                pytest.skip(str(error))

        yield start
