"""Reads what `mlx.launch` or `torchrun` put in the environment: this process's rank, their number, rank 0's address."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ..errors import GptOssError

JOIN_TIMEOUT_S = 60.0  # how long ranks wait for each other to connect
BACKLOG = 128  # connections that may wait until a listening rank accepts them
SECRET_VARIABLE = "MLX_GPTOSS_SECRET"  # environment variable: a secret that all ranks share
SECRET_FILE_VARIABLE = "MLX_GPTOSS_SECRET_FILE"  # environment variable: a file with it
MIN_SECRET = 16  # characters: who has overheard two ranks can try secrets without being seen
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Launch:
    """One rank's place in a launch.

    backend: "mlx" or "cuda", whose collectives the launcher has prepared.
    rank, ranks: this process's rank and the number of ranks.
    host, port: where rank 0 listens for the other ranks; on the loopback if all are on one machine.
    ranks_on_host: number of ranks on this machine.
    key: shared by all ranks, which prove to each other that they know it (handshake.py). It is derived from the launch
        and the secret. The secret is optional if all ranks are on one machine; without one, anyone who knows the
        launch can derive the key.
    hosts: address of each rank, as the rank before it reaches it; empty if the launcher does not give them.
    """

    backend: str
    rank: int
    ranks: int
    host: str
    port: int
    ranks_on_host: int
    key: str = field(repr=False)
    hosts: tuple[str, ...] = ()


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """The launch that this process belongs to; None if it runs alone. Raises GptOssError if it is incomplete, or if
    rank 0 would listen beyond the loopback without a secret."""
    found = _mlx(environment) if "MLX_RANK" in environment else _torchrun(environment)
    if found is None or found.ranks == 1:
        return None
    if not is_loopback(found.host) and not _secret(environment):
        raise GptOssError(
            f"rank 0 listens for the other ranks on {found.host}, which other machines can reach, and that needs a "
            f"secret: set {SECRET_VARIABLE} to the same random value on all ranks (openssl rand -hex 32 prints one), "
            f"or {SECRET_FILE_VARIABLE} or --ranks-secret-file to a file with it"
        )
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address. A name other than localhost may be any machine's."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _mlx(environment: Mapping[str, str]) -> Launch | None:
    """A launch by mlx.launch.

    The hostfile lists each rank's addresses. JACCL's device file has one row per rank, each on its own machine. Rank 0
    listens on the port after the last one that the launcher has assigned.
    """
    rank, secret = int(environment["MLX_RANK"]), _secret(environment)
    if "MLX_JACCL_COORDINATOR" in environment:
        host, port = _parse_address(environment["MLX_JACCL_COORDINATOR"])
        devices = _read_list(environment, "MLX_IBV_DEVICES")
        return Launch("mlx", rank, len(devices), host, port + 1, 1, _key(devices, host, port, secret))
    hosts = _read_list(environment, "MLX_HOSTFILE") if environment.get("MLX_HOSTFILE") else []
    if len(hosts) < 2:
        return None
    addresses = [[_parse_address(address) for address in host] for host in hosts]
    first = tuple(host[0][0] for host in addresses)
    if len(set(first)) == 1:
        first = (LOOPBACK,) * len(first)
    port, key = max(port for host in addresses for _, port in host) + 1, _key(hosts, secret)
    return Launch("mlx", rank, len(hosts), first[0], port, first.count(first[rank]), key, first)


def _torchrun(environment: Mapping[str, str]) -> Launch | None:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
    if not all(name in environment for name in names):
        return None
    rank, ranks, host, port, ranks_on_host = (environment[name] for name in names)
    key = _key(host, port, environment.get("TORCHELASTIC_RUN_ID"), _secret(environment))
    host = LOOPBACK if ranks_on_host == ranks else host
    return Launch("cuda", int(rank), int(ranks), host, int(port) + 1, int(ranks_on_host), key)


def _secret(environment: Mapping[str, str]) -> str:
    """The secret that all ranks share; empty if there is none. Raises GptOssError if it is too short to be one."""
    secret, where = environment.get(SECRET_VARIABLE), SECRET_VARIABLE
    if secret is None and (path := environment.get(SECRET_FILE_VARIABLE)):
        where = f"the file {path}"
        try:
            secret = Path(path).read_text().strip()
        except (OSError, ValueError) as error:
            raise GptOssError(f"the secret of the ranks cannot be read from {path} ({error})") from error
    if secret is not None and len(secret) < MIN_SECRET:
        raise GptOssError(
            f"the secret in {where} is shorter than {MIN_SECRET} characters; openssl rand -hex 32 prints a good one"
        )
    return secret or ""


def _key(*values: Any) -> str:
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
