"""A network of its own for each rank, with a delay and a loss between them: for Linux, as root.

Every host is a network namespace with a TUN device, through which a process of its own passes IP packets on, each after
the same time. TUN offloads nothing, so that these are real segments with real checksums. The namespaces have no names:
they are gone with that process, and it goes with the one that started it.
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
    """Such a network cannot be made here; the message says why."""


class Count(NamedTuple):
    """taken_s: the mean of the times that those which arrived were on the way."""

    arrived: int
    lost: int
    taken_s: float


class SlowNetwork:
    """hosts: how many. delay_s: one way. loss: the share of packets that is lost, drawn with `seed`."""

    def __init__(self, hosts: int, delay_s: float = 0.0, loss: float = 0.0, seed: int = 0) -> None:
        """Raises Unavailable."""
        if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("nsenter") is None:
            raise Unavailable("a network for ranks needs root on Linux, and nsenter")
        settings = json.dumps({"hosts": hosts, "delay_s": delay_s, "loss": loss, "seed": seed})
        self._process = subprocess.Popen(
            [sys.executable, __file__, settings], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        said = json.loads(self._read())
        if "unavailable" in said:
            self.close()
            raise Unavailable(f"no network for ranks here: {said['unavailable']}")
        self._namespaces = [f"/proc/{self._process.pid}/fd/{number}" for number in said["namespaces"]]

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def inside(self, host: int) -> list[str]:
        """What stands before a command that is to run there."""
        return ["nsenter", f"--net={self._namespaces[host]}"]

    def cut(self, *paths: tuple[int, int]) -> None:
        """From now on nothing goes between these pairs of hosts, in either direction."""
        self._say({"cut": paths})

    def count(self) -> Count:
        """Of all packets so far."""
        return self._say({})

    def _say(self, command: dict) -> Count:
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return Count(*json.loads(self._read()))

    def _read(self) -> str:
        if not (line := self._process.stdout.readline()):
            self.close()
            raise RuntimeError("the network has ended; see what it printed")
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
    """A namespace, and the device in it, as open files."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot make a network namespace")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    for command in ("link set lo up", f"address add {address}/24 dev {DEVICE}", f"link set {DEVICE} up"):
        subprocess.run(["ip", *command.split()], check=True)
    return os.open("/proc/self/ns/net", os.O_RDONLY), device


def forward(devices: list[int], delay_s: float, loss: float, seed: int) -> None:
    """Until stdin ends. Hosts are told apart by the last byte of their address."""
    chance, severed = random.Random(seed), set[tuple[int, int]]()
    under_way: deque[tuple[float, int, bytes]] = deque()  # when it has left, where it goes, and the packet
    arrived, lost, taken_s = 0, 0, 0.0
    with contextlib.suppress(PermissionError):  # ranks may want more cores than there are, and wait for this process
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    while True:
        wait = max(0.0, under_way[0][0] + delay_s - time.monotonic()) if under_way else None
        ready, _, _ = select.select([0, *devices], [], [], wait)
        if 0 in ready:
            if not (line := sys.stdin.readline()):
                return
            severed |= {(one, other) for pair in json.loads(line).get("cut", ()) for one, other in (pair, pair[::-1])}
            print(json.dumps([arrived, lost, taken_s / max(1, arrived)]), flush=True)
        for source, device in enumerate(devices):
            if device in ready:
                packet = os.read(device, 65536)
                target = packet[19] - 1 if packet[0] >> 4 == 4 else -1  # IPv6 looks for routers that there are not
                if target not in range(len(devices)) or (source, target) in severed:
                    continue
                if chance.random() < loss:
                    lost += 1
                else:
                    under_way.append((time.monotonic(), target, packet))
        while under_way and under_way[0][0] + delay_s <= time.monotonic():
            left, target, packet = under_way.popleft()
            os.write(devices[target], packet)
            arrived, taken_s = arrived + 1, taken_s + time.monotonic() - left


def main(hosts: int, **settings: float) -> None:
    try:
        made = [make_host(f"10.77.0.{host + 1}") for host in range(hosts)]
    except OSError as error:  # no right to namespaces, no TUN, no `ip`
        print(json.dumps({"unavailable": str(error)}), flush=True)
        return
    print(json.dumps({"namespaces": [namespace for namespace, _ in made]}), flush=True)
    forward([device for _, device in made], **settings)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
