"""Measures how the time of a decoded token grows with the network's delay, in delays, for the bundled model on several
ranks, and prints the number predicted from the messages that wait for each other.

usage, as root on Linux: python tests/ranks/time_latency.py [RANKS [mlx|cuda]]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

from slow_network import DEVICE, SlowNetwork

import mlx_gptoss
from mlx_gptoss import Sampling
from mlx_gptoss.chat.reply import TextDelta

DELAYS_S, PORT, TOKENS, WINDOW = (0.0, 0.001, 0.002, 0.005), 32400, 100, 10
ENDLESS = Sampling(temperature=0, logit_bias={339: -100, 340: -100})


def messages(ranks: int, layers: int, backend: str) -> int:
    """Number of messages per token that wait for each other.

    In a ring, a sum takes 2 (N - 1) steps and a gather N - 1; a token has two sums per layer and one gather. With gloo,
    the sender of each step first waits until the receiver is ready.
    """
    steps = 2 * layers * 2 * (ranks - 1) + (ranks - 1)
    return steps if backend == "mlx" else 2 * steps


def rank() -> None:
    with mlx_gptoss.load(device="cpu", max_context=256) as model:  # returns on rank 0 only
        moments, count = [], 0
        for event in model.stream_raw(b"abc", sampling=ENDLESS, max_tokens=TOKENS):
            if isinstance(event, TextDelta):
                moments.append((time.perf_counter(), count := count + len(event.tokens)))
        windows = zip(
            moments, moments[WINDOW:], strict=False
        )  # other programs only add time, so take the fastest window
        fastest = min((end - begin) / (last - first) for (begin, first), (end, last) in windows)
        print(json.dumps({"layers": model.config.num_hidden_layers, "token_s": fastest}))


def start(network: SlowNetwork, ranks: int, backend: str, hosts: str) -> dict:
    """Start all ranks and return what rank 0 prints."""
    processes = []
    for n in range(ranks):
        variables = {"MLX_RANK": str(n), "MLX_HOSTFILE": hosts}
        if backend == "cuda":
            variables = {"RANK": str(n), "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": "1"}
            variables |= {"MASTER_ADDR": network.address(0), "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": DEVICE}
        command = [*network.command_prefix(n), sys.executable, __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    printed = [process.communicate()[0] for process in processes]
    return json.loads(printed[0])


def main(ranks: int = 2, backend: str = "mlx") -> None:
    found = []
    for delay_s in DELAYS_S:
        with SlowNetwork(ranks, delay_s) as network, tempfile.NamedTemporaryFile("w", suffix=".json") as hosts:
            json.dump([[f"{network.address(n)}:{PORT + n}"] for n in range(ranks)], hosts)
            hosts.flush()
            report = start(network, ranks, backend, hosts.name)
            found.append((network.count().mean_delay_s, report["token_s"]))
        predicted = messages(ranks, report["layers"], backend)
        line = f"delay {found[-1][0] * 1e3:6.3f} ms: {found[-1][1] * 1e3:6.1f} ms a token"
        if delay_s:
            delay_added, time_added = (now - first for now, first in zip(found[-1], found[0], strict=True))
            line += f", {time_added / delay_added:5.1f} delays more than without a delay; predicted {predicted}"
        print(line, flush=True)


if __name__ == "__main__":
    if "MLX_RANK" in os.environ or "RANK" in os.environ:
        rank()
    else:
        main(*map(int, sys.argv[1:2]), *sys.argv[2:])
