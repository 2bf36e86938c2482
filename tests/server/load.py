"""Speed of a server under load: `python tests/server/load.py [--mlx-lm] [--clients 64] [--slots 8]`.

Starts `mlx-gptoss serve` with the bundled model, and with --mlx-lm, in turns with it, mlx-lm's own server on the same
weights (mlx-mxfp4; what is bfloat16 there is float32 in mlx-lm's copy, so that it computes as we do on a CPU, where its
bfloat16 is many times slower). Both get the same prompts through /v1/completions, as many tokens to generate, and no
end before them; every stream is read to its end. Prints tokens a second with one stream and with eight, and the time
to the first token with many clients at once, of those that were not turned away.
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
    """A server in a process of its own; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = ["--model", str(folder), "--port", str(port)]
    words = {
        OURS: ["-m", "mlx_gptoss_cli", "serve", *where, "--backend", "mlx", "--slots", str(slots)],
        THEIRS: [
            "-m",
            "mlx_lm",
            "server",
            *where,
            "--decode-concurrency",
            str(slots),
            "--prompt-concurrency",
            str(slots),
        ],
    }[name]
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
    """One reply read to its end: tokens, and seconds to the first piece."""
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


async def together(
    url: str, model: str, prompts: list[str], tokens: int, bias: dict[str, int]
) -> tuple[float, list[float]]:
    """All at once: tokens a second over all of them, and each one's seconds to the first piece."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        started = time.perf_counter()
        asked = [stream(client, model, prompt, tokens, bias) for prompt in prompts]
        got = await asyncio.gather(*asked, return_exceptions=True)
        seconds = time.perf_counter() - started
    served = [one for one in got if not isinstance(one, BaseException)]
    assert all(used == tokens for used, _ in served), got
    return sum(used for used, _ in served) / seconds, [first for _, first in served]


def widen(folder: Path, wide: Path) -> Path:
    """A copy of a checkpoint, its bfloat16 tensors in float32."""
    import mlx.core as mx

    shutil.copytree(folder, wide)
    for file in wide.glob("*.safetensors"):
        tensors = mx.load(str(file))
        wider = {name: t.astype(mx.float32) if t.dtype == mx.bfloat16 else t for name, t in tensors.items()}
        mx.save_safetensors(str(file), wider, {"format": "mlx"})
    return wide


def prompts(count: int) -> list[str]:
    return [f"{place + 10} + {3 * place + 7} = " for place in range(count)]


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
        upcast = widen(folder, Path(scratch) / "float32") if given.mlx_lm else folder
        with mlx_gptoss.load() as model:
            bias = {str(id): -100 for id in model.tokenizer.specials.values()}  # no end before max_tokens
        for turn in range(given.repeat):
            for name in (OURS, THEIRS) if given.mlx_lm else (OURS,):
                weights = upcast if name == THEIRS else folder
                with serving(name, weights, given.slots) as url:
                    measure(f"{turn} {name}", url, str(weights), given.clients, given.tokens, bias)


def measure(name: str, url: str, model: str, clients: int, tokens: int, bias: dict[str, int]) -> None:
    asyncio.run(together(url, model, prompts(8), 8, bias))  # warm
    one, _ = asyncio.run(together(url, model, prompts(1), tokens, bias))
    eight, _ = asyncio.run(together(url, model, prompts(8), tokens, bias))
    _, first = asyncio.run(together(url, model, prompts(clients), 50, bias))
    p50, p99 = (statistics.quantiles(first, n=100)[place - 1] for place in (50, 99))
    print(
        f"{name}: one stream {one:.0f} tok/s, eight {eight:.0f} tok/s ({eight / one:.2f}x); "
        f"{len(first)} of {clients} clients: first token p50 {p50:.2f} s, p99 {p99:.2f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
