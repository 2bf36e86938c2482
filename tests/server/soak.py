"""A soak test with random requests, valid and not: `python tests/server/soak.py [10000] [--seed 0]`.

Starts `mlx-gptoss serve` with the bundled model and sends requests from sixteen threads: chat completions, responses
and completions, streamed or not, with random fields; bodies with one invalid value; clients that disconnect; bytes that
are not HTTP. The context is 512 tokens, so that a reply without a limit ends. Prints how the requests ended; fails if
any got a 500 or took a minute, if a slot stays in use, if the server has ended, or if memory ever differs by more than
5% from its median. Memory is taken after each tenth of the requests except for the first, in which the prefix cache of
8 MB fills up. glibc is told to return freed memory at once, so that the figure is what the server holds.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import Any

import httpx
import psutil

SLOTS = 8
RETURN_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/completions")
QUESTIONS = (
    "What is 12 + 30?",
    "Reverse the word planet.",
    "What is the weather in Oslo?",
    "Hi",
    "Ω\ud800 \U0001f999" * 20,
)
INVALID = (None, -1, 10**30, 1e308, "", "x" * 5000, [], [[[]]], {}, {"a": {"b": 1}}, True, "\ud800", float("nan"))
FUNCTION = {"name": "get_weather", "parameters": {"type": "object", "properties": {"location": {"type": "string"}}}}
GARBAGE = (
    b"",
    b"\x16\x03\x01\x02",
    b"GET / HTTP/1.1\r\nHost: ",
    b"POST /v1/responses HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\r\n" * 99,
)


def body(r: random.Random, path: str, response_ids: list[str]) -> dict[str, Any]:
    """A random request, usually valid."""
    text = r.choice(QUESTIONS)
    limit = {"/v1/responses": "max_output_tokens"}.get(path, "max_tokens")
    fields: dict[str, Any] = {limit: r.randint(1, 40), "stream": r.random() < 0.5}
    optional: dict[str, Any] = {
        "temperature": r.choice([0, 0.5, 1, 2]),
        "top_p": r.choice([0.1, 0.9, 1]),
        "top_k": r.randint(0, 50),
        "seed": r.randint(0, 2**40),
        "stop": r.choice(["a", ["=", "the"]]),
        "frequency_penalty": r.uniform(-2, 2),
        "logit_bias": {str(r.randrange(400)): r.randint(-100, 100)},
        "metadata": {"a": "b"},
    }
    if path == PATHS[0]:
        fields["messages"] = [{"role": "user", "content": text}]
        optional |= {"n": r.randint(1, 3), "logprobs": True, "reasoning_effort": r.choice(["low", "high"])}
        optional["tools"] = [{"type": "function", "function": FUNCTION}]
        optional["response_format"] = {"type": "json_object"}
    elif path == PATHS[1]:
        fields["input"] = text
        optional |= {"store": r.random() < 0.5, "previous_response_id": r.choice([*response_ids[-50:], "resp_unknown"])}
        optional["tools"] = [{"type": "function", **FUNCTION}]
    else:
        fields["prompt"] = r.choice([text, [1, 2, 3], [text, "abc"]])
        optional |= {"n": r.randint(1, 3), "logprobs": r.randint(0, 5), "echo": True}
    return fields | {name: optional[name] for name in r.sample(sorted(optional), r.randint(0, 4))}


class Soak:
    """State shared by the threads: how requests ended, and failures."""

    def __init__(self, url: str, seed: int) -> None:
        self.url = url
        self.port = int(url.rpartition(":")[2])
        self.seed = seed
        self.ended: Counter[str] = Counter()
        self.failures: list[str] = []
        self.response_ids: list[str] = []

    def work(self, numbers: queue.SimpleQueue[int]) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while (number := numbers.get()) >= 0:
                r = random.Random(f"{self.seed} {number}")
                try:
                    self.ended[self.one(client, r)] += 1
                except Exception as error:
                    self.failures.append(f"request {number}: {error!r}")

    def one(self, client: httpx.Client, r: random.Random) -> str:
        """Send one request and return how it ended."""
        if r.random() < 0.1:
            return self.garbage(r)
        path = r.choice(PATHS)
        fields = body(r, path, self.response_ids)
        if r.random() < 0.3:
            fields[r.choice([*fields, "nonsense"])] = r.choice(INVALID)
        content = json.dumps(fields).encode()
        if r.random() < 0.05:
            content = content[: r.randrange(len(content))]
        disconnects = r.random() < 0.15
        with client.stream("POST", path, content=content, headers={"Content-Type": "application/json"}) as answer:
            if answer.status_code not in (200, 400, 404, 413, 503):
                raise ValueError(f"{answer.status_code} for {content[:300]!r}: {answer.read()[:300]!r}")
            if disconnects:
                next(answer.iter_raw(), b"")
                return "disconnected"
            text = answer.read().decode()
        if answer.status_code == 200 and path == PATHS[1] and '"object":"response"' in text:
            self.response_ids.append(text.partition('"id":"')[2].partition('"')[0])
        if "internal_error" in text or "engine_error" in text:
            raise ValueError(f"{content[:300]!r}: {text[-300:]}")
        return str(answer.status_code)

    def garbage(self, r: random.Random) -> str:
        data = r.choice([*GARBAGE, r.randbytes(r.randint(1, 5000))])
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(data)
            if r.random() < 0.5:
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass
        return "garbage"

    def run(self, numbers: range) -> None:
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        threads = [threading.Thread(target=self.work, args=(todo,)) for _ in range(2 * SLOTS)]
        for number in [*numbers, *(-1 for _ in threads)]:
            todo.put(number)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def idle(self) -> bool:
        """Whether the server becomes idle within ten seconds."""
        for _ in range(100):
            lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
            if {"mlx_gptoss_running 0.0", "mlx_gptoss_waiting 0.0"} <= set(lines):
                return True
            time.sleep(0.1)
        return False


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("count", type=int, nargs="?", default=10_000)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    command = [
        sys.executable,
        "-m",
        "mlx_gptoss_cli",
        "serve",
        "--port",
        "0",
        "--slots",
        str(SLOTS),
        "--max-context",
        "512",
    ]
    process = subprocess.Popen(
        [*command, "--backend", "mlx", "--prefix-cache", "8"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **RETURN_MEMORY},
    )
    assert process.stderr is not None
    soak = Soak(process.stderr.readline().split(" at ")[1].split(",")[0], given.seed)
    memory = psutil.Process(process.pid).memory_info
    started, sizes = time.monotonic(), []
    for tenth in range(10):
        soak.run(range(tenth * given.count // 10, (tenth + 1) * given.count // 10))
        sizes.append(memory().rss)
        print(
            f"{tenth + 1}/10: {dict(soak.ended)}, {sizes[-1] / 1e6:.0f} MB, {time.monotonic() - started:.0f} s",
            flush=True,
        )
    idle, alive = soak.idle(), process.poll() is None
    process.terminate()
    errors = process.stderr.read()
    code = process.wait(30)
    drift = max(abs(size / statistics.median(sizes[1:]) - 1) for size in sizes[1:])
    print(f"alive {alive}, idle {idle}, exit {code}, memory within {drift:.1%}, failures {len(soak.failures)}")
    print(*soak.failures[:20], errors[-3000:], sep="\n")
    sys.exit(not (alive and idle and code == 0 and drift <= 0.05 and not soak.failures))


if __name__ == "__main__":
    main()
