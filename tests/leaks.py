"""Load and close a model many times, and see what stays: `python tests/leaks.py [400] [--guided] [--backend cuda]`.

Prints memory, threads and descriptors of the process every 50 rounds, and fails if the last half of the rounds added
5 MB, a thread or a descriptor. A round loads the bundled model, lets it write, and closes it. With --guided it also
writes under a JSON schema and calls a function; with --careless it leaves streams open and models unclosed.

glibc keeps an arena for each thread that was alive at once, and which of them a new thread takes is chance. By default
there is one arena, so that the figure is what the program holds; `--arenas` leaves their number alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

import psutil

import mlx_gptoss

EVERY = 50
MAX_GROWTH = 5e6  # bytes, in the last half of the rounds
SCHEMA = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA}}
LOCATION = {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": LOCATION}}

Round = Callable[[str], None]


def load(backend: str) -> mlx_gptoss.Model:
    return mlx_gptoss.load(None, backend=backend, device="cpu", max_context=512)


def plain(backend: str) -> None:
    with load(backend) as model:
        model.generate("Hi", max_tokens=4)
        model.logits([1, 2, 3])


def guided(backend: str) -> None:
    with load(backend) as model:
        model.generate("What is 12 + 30?", response_format=FORMAT, max_tokens=4)
        model.generate("What is the weather in Oslo?", tools=[WEATHER], tool_choice="required", max_tokens=4)


def careless(backend: str) -> None:
    """A stream that is dropped half-way, one that is never read, one that outlives its closed model; then a model that
    is not closed."""
    with load(backend) as model:
        next(model.stream("Hi", max_tokens=200))
        model.stream("Hi", max_tokens=200)
        kept = model.stream("Hi", max_tokens=200)
    del model, kept
    load(backend).stream("Hi", max_tokens=200)


ROUNDS: dict[str, Round] = {"plain": plain, "guided": guided, "careless": careless}


def settled(process: psutil.Process, threads: int) -> int:
    """The number of threads of the process, once it is at most `threads` or a second has passed: a thread that was
    joined may be counted for a moment."""
    until = time.monotonic() + 1
    while process.num_threads() > threads and time.monotonic() < until:
        time.sleep(0.01)
    return process.num_threads()


def measure(one: Round, backend: str, rounds: int) -> list[str]:
    """Run the rounds. Returns what has grown."""
    process = psutil.Process()
    halfway = (0, sys.maxsize, sys.maxsize)
    for done in range(rounds + 1):
        if done % EVERY == 0 or done == rounds:
            threads = settled(process, halfway[1])
            now = (process.memory_info().rss, threads, process.num_fds())
            print(f"{done:5} rounds  {now[0] / 1e6:6.1f} MB  {now[1]:3} threads  {now[2]:3} descriptors", flush=True)
            if done <= rounds // 2:
                halfway = now
        if done < rounds:
            one(backend)
    grown = [f"{now[0] - halfway[0]} bytes"] if now[0] - halfway[0] > MAX_GROWTH else []
    names = ("threads", "descriptors")
    return grown + [f"{b - a} {name}" for name, a, b in zip(names, halfway[1:], now[1:], strict=True) if b > a]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("rounds", nargs="?", type=int, default=400)
    parser.add_argument("--backend", choices=("mlx", "cuda"), default="mlx")
    parser.add_argument("--arenas", action="store_true", help="leave glibc's number of arenas as it is")
    for name in ROUNDS:
        parser.add_argument(f"--{name}", dest="how", action="store_const", const=name, default="plain")
    options = parser.parse_args()
    if not options.arenas and "MALLOC_ARENA_MAX" not in os.environ:  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_ARENA_MAX": "1"})
    grown = measure(ROUNDS[options.how], options.backend, options.rounds)
    sys.exit(f"the last half of the rounds left {' and '.join(grown)}" if grown else 0)


if __name__ == "__main__":
    main()
