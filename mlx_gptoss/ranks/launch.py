"""Reads what `mlx.launch` or `torchrun` put in the environment: this process's rank, their number, rank 0's address."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import GptOssError

JOIN_TIMEOUT_S = 60.0  # how long ranks wait for each other to connect
SECRET_VARIABLE = "MLX_GPTOSS_SECRET"  # optional environment variable: a secret that all ranks share


@dataclass(frozen=True)
class Launch:
    """One rank's place in a launch.

    backend: "mlx" or "cuda", whose collectives the launcher has prepared.
    rank, ranks: this process's rank and the number of ranks.
    host, port: where rank 0 listens for the other ranks.
    ranks_on_host: number of ranks on this machine.
    token: what ranks show each other when they connect, so that no other process is accepted by accident. It is
        derived from the launch, so whoever knows the launch can derive it too, unless SECRET_VARIABLE is set.
    hosts: address of each rank, as the rank before it reaches it; empty if the launcher does not give them.
    """

    backend: str
    rank: int
    ranks: int
    host: str
    port: int
    ranks_on_host: int
    token: str = field(repr=False)
    hosts: tuple[str, ...] = ()


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """The launch that this process belongs to; None if it runs alone. Raises GptOssError if it is incomplete."""
    found = _mlx(environment) if "MLX_RANK" in environment else _torchrun(environment)
    return None if found is None or found.ranks == 1 else found


def _mlx(environment: Mapping[str, str]) -> Launch | None:
    """A launch by mlx.launch.

    The hostfile lists each rank's addresses. JACCL's device file has one row per rank, each on its own machine. Rank 0
    listens on the port after the last one that the launcher has assigned.
    """
    rank, secret = int(environment["MLX_RANK"]), environment.get(SECRET_VARIABLE, "")
    if "MLX_JACCL_COORDINATOR" in environment:
        host, port = _parse_address(environment["MLX_JACCL_COORDINATOR"])
        devices = _read_list(environment, "MLX_IBV_DEVICES")
        return Launch("mlx", rank, len(devices), host, port + 1, 1, _token(devices, host, port, secret))
    hosts = _read_list(environment, "MLX_HOSTFILE") if environment.get("MLX_HOSTFILE") else []
    if len(hosts) < 2:
        return None
    addresses = [[_parse_address(address) for address in host] for host in hosts]
    first = tuple(host[0][0] for host in addresses)
    port, token = max(port for host in addresses for _, port in host) + 1, _token(hosts, secret)
    return Launch("mlx", rank, len(hosts), first[0], port, first.count(first[rank]), token, first)


def _torchrun(environment: Mapping[str, str]) -> Launch | None:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
    if not all(name in environment for name in names):
        return None
    rank, ranks, host, port, ranks_on_host = (environment[name] for name in names)
    token = _token(host, port, environment.get("TORCHELASTIC_RUN_ID"), environment.get(SECRET_VARIABLE, ""))
    return Launch("cuda", int(rank), int(ranks), host, int(port) + 1, int(ranks_on_host), token)


def _token(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _read_list(environment: Mapping[str, str], name: str) -> list[Any]:
    """The JSON list in the file that an environment variable names; an empty file is an empty list."""
    try:
        found = json.loads(Path(environment[name]).read_text() or "[]")
    except (KeyError, OSError, ValueError) as error:
        raise GptOssError(
            f"MLX_RANK is set, but {name} does not name a readable JSON file; start ranks with mlx.launch"
        ) from error
    if not isinstance(found, list):
        raise GptOssError(f"the file in {name} is not a list of hosts; start ranks with mlx.launch")
    return found


def _parse_address(text: str) -> tuple[str, int]:
    host, _, port = str(text).rpartition(":")
    if not host or not port.isdigit():
        raise GptOssError(f"{text!r} is not an address with a port; start ranks with mlx.launch")
    return host, int(port)
