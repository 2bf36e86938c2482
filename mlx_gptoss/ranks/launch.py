"""What `mlx.launch` or `torchrun` have told this process: which rank it is, of how many, and where rank 0 is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import GptOssError

JOIN_TIMEOUT_S = 60.0  # how long ranks wait for each other to come
SECRET_VARIABLE = (
    "MLX_GPTOSS_SECRET"  # an environment variable that strangers on the network do not know, if anyone sets it
)


@dataclass(frozen=True)
class Launch:
    """backend: whose collectives the launcher has prepared. host, port: where rank 0 listens for the others.
    ranks_on_host: ranks on this machine. token: what ranks show each other, so that nobody is let in by accident;
    whoever knows the launch can make it, but for SECRET_VARIABLE. hosts: where the rank before each reaches it; empty if
    the launcher does not say."""

    backend: str
    rank: int
    ranks: int
    host: str
    port: int
    ranks_on_host: int
    token: str = field(repr=False)
    hosts: tuple[str, ...] = ()


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """The launch that this process is part of; None for one that runs alone. Raises GptOssError for half of one."""
    found = _mlx(environment) if "MLX_RANK" in environment else _torchrun(environment)
    return None if found is None or found.ranks == 1 else found


def _mlx(environment: Mapping[str, str]) -> Launch | None:
    """The hostfile lists each rank's addresses; JACCL's device file has a row for each rank, a machine of its own.
    Rank 0 listens behind the last port that the launcher has given away."""
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


def _token(*known: Any) -> str:
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _read_list(environment: Mapping[str, str], name: str) -> list[Any]:
    try:
        found = json.loads(Path(environment[name]).read_text() or "[]")
    except (KeyError, OSError, ValueError) as error:
        raise GptOssError(f"MLX_RANK is set, but {name} leads to no hostfile; start ranks by mlx.launch") from error
    if not isinstance(found, list):
        raise GptOssError(f"{name} does not list hosts; start ranks by mlx.launch")
    return found


def _parse_address(text: str) -> tuple[str, int]:
    host, _, port = str(text).rpartition(":")
    if not host or not port.isdigit():
        raise GptOssError(f"{text!r} is no address with a port; start ranks by mlx.launch")
    return host, int(port)
