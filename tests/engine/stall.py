"""Measures what a long prompt costs other streams: `python tests/engine/stall.py [--model M] [--backend B]`.

Loads a model (the bundled one by default) and measures, on one engine: streams that decode alone; one prompt alone,
large and small; the same streams during the prompt, and during two such prompts at once. Prints the gaps
between tokens of the streams (median, 99th percentile, maximum), the time to first token of the prompts, and the tokens
per second of all together. The prompts differ, so that none is found in the prefix cache. The times are those at which
the engine delivers; HTTP is not in them.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import threading
import time
from dataclasses import dataclass, field

import mlx_gptoss
from mlx_gptoss.engine import Engine, Request, Stream
from mlx_gptoss.sampling import Sampling

SMALL = 64  # tokens of a short prompt after a cached one
SPAN = 256  # tokens between two snapshots of the prefix cache
QUIET_S = 4.0  # how long the streams decode alone


@dataclass
class Gaps:
    """When the tokens of one stream arrived, in perf_counter() seconds."""

    stream: Stream
    times: list[float] = field(default_factory=list)

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._read, daemon=True)
        thread.start()
        return thread

    def _read(self) -> None:
        for _ in self.stream:
            self.times.append(time.perf_counter())

    def between(self, start: float, end: float) -> list[float]:
        """The gaps that ended from `start` to `end`."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [after - before for before, after in pairs if start <= after <= end]


@dataclass(frozen=True)
class Phase:
    """What was measured over one span of time. ttft_s: of each prompt. Times in seconds."""

    seconds: float
    gaps: list[float]
    ttft_s: list[float]
    tokens_per_s: float

    @property
    def p50(self) -> float:
        return statistics.median(self.gaps)

    @property
    def p99(self) -> float:
        return sorted(self.gaps)[int(0.99 * (len(self.gaps) - 1))]

    def __str__(self) -> str:
        gaps = f"gaps p50 {1e3 * self.p50:.1f} p99 {1e3 * self.p99:.1f} max {1e3 * max(self.gaps):.1f} ms"
        prompts = ", ".join(f"{ttft:.2f}" for ttft in self.ttft_s)
        return f"{gaps}; prompts' first token after {prompts or '-'} s; {self.tokens_per_s:.0f} tokens/s in all"


def prompt_of(engine: Engine, length: int, seed: int, after: tuple[int, ...] = ()) -> Request:
    ids = random.Random(seed).choices(range(32, min(engine.config.vocab_size, 300)), k=length)
    return Request((*after, *ids), 1, Sampling(temperature=0))


def time_prompt(engine: Engine, length: int, seed: int, after: tuple[int, ...] = ()) -> float:
    """Seconds to the first token of a prompt that runs alone. after: tokens before it."""
    started = time.perf_counter()
    engine.submit(prompt_of(engine, length, seed, after)).drain()
    return time.perf_counter() - started


def time_beside(engine: Engine, streams: list[Gaps], lengths: list[int], seed: int) -> Phase:
    """Run prompts of these lengths while streams go on, until each has its first token; without any, for QUIET_S."""
    started, finished = time.perf_counter(), []
    before = sum(len(stream.times) for stream in streams)
    if not lengths:
        time.sleep(QUIET_S)
    for stream in [engine.submit(prompt_of(engine, length, seed + n)) for n, length in enumerate(lengths)]:
        finished.append(stream.drain())
    ended = time.perf_counter()
    made = sum(len(stream.times) for stream in streams) - before + sum(lengths)
    gaps = [gap for stream in streams for gap in stream.between(started, ended)]
    return Phase(ended - started, gaps, [one.ttft_s for one in finished], made / (ended - started))


def measure(engine: Engine, streams: int, length: int) -> dict[str, Phase | float]:
    """All figures, by name."""
    time_prompt(engine, length, seed=1)  # warm up
    figures: dict[str, Phase | float] = {"prompt alone": time_prompt(engine, length, seed=2)}
    cached = prompt_of(engine, length, seed=2).prompt[: length // SPAN * SPAN]
    small = [time_prompt(engine, SMALL, seed=10 + n, after=cached) for n in range(5)]
    figures[f"{SMALL} tokens after {len(cached)} in the prefix cache"] = statistics.median(small)
    room = engine.limits.max_context - 64
    sampling = Sampling(temperature=1.0, seed=0)
    readers = [Gaps(engine.submit(Request((65 + n, 66), room, sampling))) for n in range(streams)]
    threads = [reader.start() for reader in readers]
    while any(len(reader.times) < 20 for reader in readers):
        time.sleep(0.05)
    figures["streams alone"] = time_beside(engine, readers, [], 0)
    figures["with one prompt"] = time_beside(engine, readers, [length], 20)
    figures["with two prompts"] = time_beside(engine, readers, [length, length], 30)
    figures["with one long and one short prompt"] = time_beside(engine, readers, [length, SMALL], 40)
    for reader in readers:
        reader.stream.cancel()
    for thread in threads:
        thread.join()
    return figures


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--model", default=None)
    options.add_argument("--backend", default="auto")
    options.add_argument("--streams", type=int, default=3)
    options.add_argument("--length", type=int, default=6000, help="tokens of the long prompt")
    options.add_argument("--repeat", type=int, default=1)
    options.add_argument("--no-cache", action="store_true", help="without the prefix cache")
    given = options.parse_args()
    cache = {"prefix_cache": 0} if given.no_cache else {}
    context = max(16384, given.length + 4096)
    with mlx_gptoss.load(
        given.model, backend=given.backend, slots=given.streams + 2, max_context=context, **cache
    ) as model:
        for _ in range(given.repeat):
            print(f"load average {os.getloadavg()[0]:.2f}; chunk {model._engine.limits.chunk}", flush=True)
            for name, figure in measure(model._engine, given.streams, given.length).items():
                print(f"  {name}: {figure if isinstance(figure, Phase) else f'{1e3 * figure:.1f} ms'}", flush=True)


if __name__ == "__main__":
    main()
