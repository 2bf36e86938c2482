"""Throughput and latency of the server under load: `python tests/server/load.py [--mlx-lm] [--clients 64] [--slots 8]`.

Starts `mlx-gptoss serve` with the bundled model and, with --mlx-lm, mlx-lm's server in turns with it on the same
weights (mlx-mxfp4; in mlx-lm's copy bfloat16 tensors are float32, so that both compute in float32 on a CPU, where its
bfloat16 is many times slower). Both get the same prompts through /v1/completions and generate the same number of
tokens, since the tokens that end a reply are forbidden; every stream is read to its end. Prints tokens per second with
one stream and with eight, and the time to first token with many clients at once, for those that were served.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

import mlx_gptoss
from mlx_gptoss.api import NANO

OURS, THEIRS = "mlx-gptoss", "mlx-lm"


@contextlib.contextmanager
def serving(name: str, folder: Path, slots: int) -> Iterator[str]:
    """A server in a process of its own; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = ["--model", str(folder), "--port", str(port)]
    arguments = {
        OURS: ["-m", "mlx_gptoss_cli", "serve", *common, "--backend", "mlx", "--slots", str(slots)],
        THEIRS: [
            "-m",
            "mlx_lm",
            "server",
            *common,
            "--decode-concurrency",
            str(slots),
            "--prompt-concurrency",
            str(slots),
        ],
    }[name]
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{url}/health", timeout=1)
                break
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


async def stream(
    client: httpx.AsyncClient, model: str, prompt: str, tokens: int, bias: dict[str, int]
) -> tuple[int, float]:
    """Read one stream to its end. Returns its tokens and the seconds to its first chunk."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "logit_bias": bias,
    }
    started, first, used = time.perf_counter(), 0.0, 0
    body["stream_options"] = {"include_usage": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, (await answer.aread()).decode()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - started
                used = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", used)
    return used, first


async def run_all(
    url: str, model: str, prompts: list[str], tokens: int, bias: dict[str, int]
) -> tuple[float, list[float]]:
    """Send all prompts at once. Returns tokens per second over all of them, and seconds to the first chunk of each."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        started = time.perf_counter()
        requests = [stream(client, model, prompt, tokens, bias) for prompt in prompts]
        results = await asyncio.gather(*requests, return_exceptions=True)
        seconds = time.perf_counter() - started
    served = [one for one in results if not isinstance(one, BaseException)]
    assert all(used == tokens for used, _ in served), results
    return sum(used for used, _ in served) / seconds, [first for _, first in served]


def upcast_copy(folder: Path, copy: Path) -> Path:
    """Copy a checkpoint with its bfloat16 tensors in float32."""
    import mlx.core as mx

    shutil.copytree(folder, copy)
    for file in copy.glob("*.safetensors"):
        tensors = mx.load(str(file))
        upcast = {name: t.astype(mx.float32) if t.dtype == mx.bfloat16 else t for name, t in tensors.items()}
        mx.save_safetensors(str(file), upcast, {"format": "mlx"})
    return copy


def prompts(count: int) -> list[str]:
    return [f"{index + 10} + {3 * index + 7} = " for index in range(count)]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--mlx-lm", action="store_true")
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--slots", type=int, default=8)
    options.add_argument("--tokens", type=int, default=200)
    options.add_argument("--repeat", type=int, default=3)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "nano"
        mlx_gptoss.convert(NANO, folder, to="mlx-mxfp4")
        upcast = upcast_copy(folder, Path(scratch) / "float32") if given.mlx_lm else folder
        with mlx_gptoss.load() as model:
            bias = {str(id): -100 for id in model.tokenizer.specials.values()}  # no reply ends before max_tokens
        for round in range(given.repeat):
            for name in (OURS, THEIRS) if given.mlx_lm else (OURS,):
                weights = upcast if name == THEIRS else folder
                with serving(name, weights, given.slots) as url:
                    measure(f"{round} {name}", url, str(weights), given.clients, given.tokens, bias)


def measure(name: str, url: str, model: str, clients: int, tokens: int, bias: dict[str, int]) -> None:
    asyncio.run(run_all(url, model, prompts(8), 8, bias))  # warm up
    one, _ = asyncio.run(run_all(url, model, prompts(1), tokens, bias))
    eight, _ = asyncio.run(run_all(url, model, prompts(8), tokens, bias))
    _, first = asyncio.run(run_all(url, model, prompts(clients), 50, bias))
    p50, p99 = (statistics.quantiles(first, n=100)[percent - 1] for percent in (50, 99))
    print(
        f"{name}: one stream {one:.0f} tok/s, eight {eight:.0f} tok/s ({eight / one:.2f}x); "
        f"{len(first)} of {clients} clients: first token p50 {p50:.2f} s, p99 {p99:.2f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
