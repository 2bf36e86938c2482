"""Measures what the prefix cache costs a prompt that is new to it: `python tests/engine/first_prompt.py [--backend B]`.

Counts how a prompt is cut into steps with the prefix cache and without, in the chunks of a GPU: steps, the rows that
each expert gets of a step on average, snapshots, and MLX's launches (of 24 layers, counted in the graph). Then times
the first token of new prompts with the cache and without in turns, and prints the median of the ratios, of wall-clock
time and of this process's CPU time. On a busy machine, BLAS threads that wait for each other take CPU time:
OPENBLAS_NUM_THREADS=1 leaves one. The cache has room for one prompt, and is full before the first round: while it still
grows, the bundled model's steps also pay for the first touch of its memory.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass, field, replace
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import mlx_gptoss
from mlx_gptoss import Model
from mlx_gptoss.backends.base import Limits, Row, Sampled
from mlx_gptoss.config import TINY
from mlx_gptoss.engine import Request
from mlx_gptoss.engine.prefix import PrefixCache, SnapshotRunner
from mlx_gptoss.engine.scheduler import Scheduler
from mlx_gptoss.engine.sequence import Step
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights.synthetic import Synthetic

GPU_CHUNK = 2048  # tokens, with Metal
LAYERS, EXPERTS, ACTIVE = 24, 32, 4  # of gpt-oss-20b


@dataclass
class Work:
    """What a prompt makes a runner do. rows: one a step. saves: index of the row, start and end of each
    snapshot."""

    rows: list[Row] = field(default_factory=list)
    saves: list[tuple[int, int, int]] = field(default_factory=list)

    def __str__(self) -> str:
        tokens = sum(len(row.tokens or ()) for row in self.rows)
        rows_per_expert = tokens * ACTIVE / EXPERTS / len(self.rows)
        return f"{len(self.rows)} steps, {rows_per_expert:.0f} rows an expert, {len(self.saves)} snapshots"


def planned(request: Request, chunk: int, prefix_bytes: int) -> Work:
    """The same as the engine plans it for a prompt that runs alone, in chunks of this size."""
    work = Work()

    class Snapshots:
        def save(self, slot: int, start: int, end: int) -> Any:
            work.saves.append((len(work.rows) - 1, start, end))
            return SimpleNamespace(start=start, end=end, nbytes=0)

    prefix = PrefixCache(prefix_bytes, cast(SnapshotRunner, Snapshots())) if prefix_bytes else None
    scheduler = Scheduler(Limits(1, len(request.prompt) + 1, chunk), lambda slot: None, prefix)
    scheduler.add(request)
    while (step := scheduler.plan()) is not None:
        work.rows += step.rows
        scheduler.save_prefixes(step)
        scheduler.process_results(step, [Sampled(1, 0.0) if row.sampling else None for row in step.rows])
    return work


def launches(work: Work) -> tuple[int, int]:
    """Launches on a GPU of a prompt's steps and of its snapshots, with bfloat16 activations. Nothing is run."""
    steps = snapshots = 0
    for index, row in enumerate(work.rows):
        inside = tuple((start - row.start, end - row.start) for at, start, end in work.saves if at == index)
        made = row_launches(len(row.tokens or ()), row.sampling is not None, inside)
        steps, snapshots = steps + made[0], snapshots + made[1]
    return steps, snapshots


@cache
def row_launches(tokens: int, samples: bool, saves: tuple[tuple[int, int], ...], before: int = 512) -> tuple[int, int]:
    """The same of one row after some tokens. saves: start and end of each snapshot, counted from the row's start."""
    import mlx.core as mx

    from mlx_gptoss.backends.mlx.elementwise import compiled
    from mlx_gptoss.backends.mlx.launches import count, traced
    from mlx_gptoss.backends.mlx.load import load_model
    from mlx_gptoss.backends.mlx.runner import MlxRunner

    config = replace(TINY, num_hidden_layers=LAYERS, layer_types=(), layer_experts=(), layer_windows=())
    cpu, greedy = mx.Device(mx.cpu), Sampling(temperature=0)
    limits = Limits(1, before + tokens, tokens)
    with mx.stream(cpu), traced():
        runner = MlxRunner(load_model(Synthetic(config, "mxfp4"), mx.bfloat16, compiled()), limits, cpu)
        made = list(runner.build([Row(0, before + tokens - 1, (1,))]).arrays)  # the cache has its full size
        counts = [count(made)]
        row = Row(0, before, (1,) * tokens, *((greedy, (1,) * (before + tokens)) if samples else ()))
        if saves and saves[0][1] < tokens:
            row = replace(row, save_at=tuple(before + end for _, end in saves))
        step = runner.build([row])
        made += [*step.arrays, step.last]
        counts.append(count(made))
        for start, end in saves:
            for layer in runner._cache.layers:
                made += [mx.contiguous(part) for part in layer.part(0, before + start, before + end)]
        counts.append(count(made))
        runner.close()
    return counts[1] - counts[0], counts[2] - counts[1]


def prompt_of(tokens: int, seed: int) -> Request:
    return Request(tuple(random.Random(seed).choices(range(32, 300), k=tokens)), 1, Sampling(temperature=0))


def time_prompt(model: Model, request: Request) -> tuple[float, float]:
    """Seconds to the first token: of the clock, and of this process on all processors."""
    started, used = time.perf_counter(), time.process_time()
    finished = model._engine.submit(request).drain()
    assert finished.cached_tokens == 0
    return time.perf_counter() - started, time.process_time() - used


def snapshot_share(model: Model, request: Request) -> float:
    """The part of a new prompt's CPU time that goes into saving snapshots. The rest is the work of the same steps as
    without the cache."""
    scheduler, seconds = model._engine._loop._scheduler, 0.0
    save = scheduler.save_prefixes

    def timed(step: Step) -> None:
        nonlocal seconds
        started = time.process_time()
        save(step)
        seconds += time.process_time() - started

    scheduler.save_prefixes = timed  # type: ignore[method-assign]
    try:
        used = time_prompt(model, request)[1]
        return seconds / used
    finally:
        scheduler.save_prefixes = save  # type: ignore[method-assign]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--backend", default="mlx")
    options.add_argument("--model", default=None)
    options.add_argument("--tokens", type=int, default=20_000)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--cache-mb", type=int, default=80, help="room for one prompt of the bundled model")
    given = options.parse_args()
    where = {"backend": given.backend, "max_context": given.tokens + 1}
    kinds = {"with the cache": given.cache_mb << 20, "without": 0}
    models = {name: mlx_gptoss.load(given.model, prefix_cache=size, **where) for name, size in kinds.items()}
    for name, model in models.items():
        work = planned(prompt_of(given.tokens, given.rounds), GPU_CHUNK, kinds[name])
        counted = "{} launches and {} for snapshots".format(*launches(work))
        print(f"{name}: chunks of {GPU_CHUNK}: {work}, {counted}", flush=True)
        time_prompt(model, prompt_of(given.tokens, given.rounds))  # warm up
    share = snapshot_share(models["with the cache"], prompt_of(given.tokens, given.rounds + 1))
    print(f"snapshots take {100 * share:.2f}% of the CPU time of a new prompt", flush=True)
    ratios: list[tuple[float, float]] = []
    for seed in range(given.rounds):
        order = list(models) if seed % 2 else list(reversed(models))
        times = {name: time_prompt(models[name], prompt_of(given.tokens, seed)) for name in order}
        (wall, cpu), (plain_wall, plain_cpu) = times["with the cache"], times["without"]
        ratios.append((wall / plain_wall, cpu / plain_cpu))
        print(f"  {wall:.1f} s against {plain_wall:.1f} s; CPU {cpu:.1f} s against {plain_cpu:.1f} s", flush=True)
    wall, cpu = (statistics.median(each) for each in zip(*ratios, strict=True))
    print(f"with the cache / without, median of {given.rounds}: {wall:.3f}; CPU time {cpu:.3f}")
    for model in models.values():
        model.close()


if __name__ == "__main__":
    main()
