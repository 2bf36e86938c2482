"""How soon a key appears: a benchmark, through a real pseudo-terminal."""

from __future__ import annotations

import statistics
import time

import pytest
from chat_terminal import Terminal

KEYS = "What is the weather in Paris today, and will it rain tomorrow? "


def echo_ms(terminal: Terminal, keys: str = KEYS * 3) -> list[float]:
    """Milliseconds from writing each key to the arrival of the first byte that the program answers with."""
    terminal.prompt()
    while terminal.read():
        pass
    taken = []
    for key in keys:
        started = time.perf_counter()
        terminal.send(key)
        while not terminal.read():
            pass
        taken.append(1000 * (time.perf_counter() - started))
        while terminal.read(0.02):
            pass
    return taken


@pytest.mark.benchmark
def test_a_key_is_echoed_within_twenty_milliseconds(tmp_path, capsys):
    with Terminal(MLX_GPTOSS_HISTORY=str(tmp_path / "history"), columns=120) as terminal:
        taken = echo_ms(terminal)
    median, slow = statistics.median(taken), statistics.quantiles(taken, n=20)[-1]
    with capsys.disabled():
        print(f"\necho of a key: median {median:.2f} ms, 95th percentile {slow:.2f} ms, slowest {max(taken):.2f} ms")
    assert median < 20 and slow < 20
