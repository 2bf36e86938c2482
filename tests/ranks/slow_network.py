"""An emulated network with a host for each rank, delay and packet loss. Needs root on Linux.

Every host is a network namespace with a TUN device. A forwarding process passes IP packets between them, each after
the same delay. TUN does no offloading, so these are real segments with real checksums. The namespaces have no names:
they end with the forwarding process, and that ends with the process that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import time
from collections import deque
from typing import NamedTuple

DEVICE = "net0"  # in every namespace
CLONE_NEWNET, TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x40000000, 0x400454CA, 0x0001, 0x1000


class Unavailable(Exception):
    """The network cannot be created here; the message says why."""


class PacketCount(NamedTuple):
    """Packets so far. mean_delay_s: mean time between sending and arrival."""

    arrived: int
    lost: int
    mean_delay_s: float


class SlowNetwork:
    """hosts: number of hosts. delay_s: one way. loss: fraction of packets lost, at random with `seed`."""

    def __init__(self, hosts: int, delay_s: float = 0.0, loss: float = 0.0, seed: int = 0) -> None:
        """Raises Unavailable if the network cannot be created."""
        if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("nsenter") is None:
            raise Unavailable("a network for ranks needs root on Linux, and nsenter")
        settings = json.dumps({"hosts": hosts, "delay_s": delay_s, "loss": loss, "seed": seed})
        self._process = subprocess.Popen(
            [sys.executable, __file__, settings], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        reply = json.loads(self._read())
        if "unavailable" in reply:
            self.close()
            raise Unavailable(f"no network for ranks here: {reply['unavailable']}")
        self._namespaces = [f"/proc/{self._process.pid}/fd/{number}" for number in reply["namespaces"]]

    def address(self, host: int) -> str:
        """IP address of a host."""
        return f"10.77.0.{host + 1}"

    def command_prefix(self, host: int) -> list[str]:
        """What to put before a command to run it on a host."""
        return ["nsenter", f"--net={self._namespaces[host]}"]

    def cut(self, *paths: tuple[int, int]) -> None:
        """Drop all packets between these pairs of hosts from now on, in both directions."""
        self._command({"cut": paths})

    def count(self) -> PacketCount:
        """Packets so far."""
        return self._command({})

    def _command(self, command: dict) -> PacketCount:
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return PacketCount(*json.loads(self._read()))

    def _read(self) -> str:
        if not (line := self._process.stdout.readline()):
            self.close()
            raise RuntimeError("the forwarding process has ended; see its output")
        return line

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def __enter__(self) -> SlowNetwork:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_host(address: str) -> tuple[int, int]:
    """Create a namespace with a TUN device. Returns file descriptors of both."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot create a network namespace")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    for command in ("link set lo up", f"address add {address}/24 dev {DEVICE}", f"link set {DEVICE} up"):
        subprocess.run(["ip", *command.split()], check=True)
    return os.open("/proc/self/ns/net", os.O_RDONLY), device


def forward(devices: list[int], delay_s: float, loss: float, seed: int) -> None:
    """Forward packets until stdin ends. The last byte of an address identifies the host."""
    rng, severed = random.Random(seed), set[tuple[int, int]]()
    in_transit: deque[tuple[float, int, bytes]] = deque()  # time sent, target, packet
    arrived, lost, total_s = 0, 0, 0.0
    with contextlib.suppress(PermissionError):  # ranks may use all cores, and then wait for this process
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    while True:
        wait = max(0.0, in_transit[0][0] + delay_s - time.monotonic()) if in_transit else None
        ready, _, _ = select.select([0, *devices], [], [], wait)
        if 0 in ready:
            if not (line := sys.stdin.readline()):
                return
            severed |= {(one, other) for pair in json.loads(line).get("cut", ()) for one, other in (pair, pair[::-1])}
            print(json.dumps([arrived, lost, total_s / max(1, arrived)]), flush=True)
        for source, device in enumerate(devices):
            if device in ready:
                packet = os.read(device, 65536)
                target = packet[19] - 1 if packet[0] >> 4 == 4 else -1  # IPv6 looks for routers; there are none
                if target not in range(len(devices)) or (source, target) in severed:
                    continue
                if rng.random() < loss:
                    lost += 1
                else:
                    in_transit.append((time.monotonic(), target, packet))
        while in_transit and in_transit[0][0] + delay_s <= time.monotonic():
            sent, target, packet = in_transit.popleft()
            os.write(devices[target], packet)
            arrived, total_s = arrived + 1, total_s + time.monotonic() - sent


def main(hosts: int, **settings: float) -> None:
    try:
        namespaces_and_devices = [make_host(f"10.77.0.{host + 1}") for host in range(hosts)]
    except OSError as error:  # namespaces not permitted, no TUN, no `ip`
        print(json.dumps({"unavailable": str(error)}), flush=True)
        return
    print(json.dumps({"namespaces": [namespace for namespace, _ in namespaces_and_devices]}), flush=True)
    forward([device for _, device in namespaces_and_devices], **settings)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
