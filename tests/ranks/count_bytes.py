"""Counts the bytes that each rank sends per decoded token, on a loopback of its own, and prints the formula's too.

usage, as root on Linux: unshare -n python tests/ranks/count_bytes.py [RANKS]

The median over tokens counts: on a busy machine TCP sends a few packets twice.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from mlx_gptoss.backends.base import Limits, Row
from mlx_gptoss.config import PRESETS
from mlx_gptoss.loading.plan import LoadRequest, open_source, plan_load
from mlx_gptoss.ranks import find_launch
from mlx_gptoss.sampling import Sampling

PORT, TOKENS, PRESET = 32400, 20, ("tiny", 8, "mxfp4")
HEADERS = 20 + 32  # bytes of an IP header and of a TCP header with timestamps


def on_loopback() -> int:
    """Bytes sent over the loopback so far, without headers."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    size, packets = (int(number) for number in line.split()[9:11])
    return size - HEADERS * packets


def formula(ranks: int, layers: int, hidden: int, vocabulary: int, width: int) -> float:
    """Bytes per rank and token in a ring: 2 (N - 1) / N of two sums a layer, and a block of logits N - 1 times.

    width: bytes of an activation.
    """
    return 2 * layers * hidden * width * 2 * (ranks - 1) / ranks + (ranks - 1) * -(-vocabulary // ranks) * width


def rank() -> None:
    launch = find_launch()
    request = LoadRequest(synthetic=PRESET, backend="mlx", device="cpu", dtype="float32", max_context=64)
    assert launch is not None
    runner = plan_load(request, open_source(request), launch.rank, launch.ranks).load(Limits(1, 64, 32))
    greedy, counts = Sampling(temperature=0), []
    runner.submit([Row(0, 0, (1, 2, 3), greedy, (1, 2, 3))]).wait()
    for n in range(TOKENS + 1):
        counts.append(on_loopback())
        runner.submit([Row(0, 3 + n, None, greedy)]).wait()
    if launch.rank == 0:
        config = PRESETS[PRESET[0]]
        expected = formula(launch.ranks, PRESET[1], config.hidden_size, config.vocab_size, 4)
        counted = statistics.median(after - before for before, after in pairwise(counts)) / launch.ranks
        print(json.dumps({"counted": counted, "formula": expected}))


def start(ranks: int) -> int:
    with socket.socket() as any_socket:  # what `ip link set lo up` does
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 0x49))
    with tempfile.NamedTemporaryFile("w", suffix=".json") as hosts:
        json.dump([[f"127.0.0.1:{PORT + n}"] for n in range(ranks)], hosts)
        hosts.flush()
        environments = [{**os.environ, "MLX_RANK": str(n), "MLX_HOSTFILE": hosts.name} for n in range(ranks)]
        processes = [subprocess.Popen([sys.executable, __file__], env=environment) for environment in environments]
        return max(process.wait() for process in processes)


if __name__ == "__main__":
    if "MLX_RANK" in os.environ:
        rank()
    else:
        sys.exit(start(int(sys.argv[1]) if len(sys.argv) > 1 else 2))
