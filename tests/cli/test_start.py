"""The cost of starting a command: seconds (a benchmark), CPU time, and the packages imported."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

HELP = [["--help"], ["generate", "--help"], ["--version"]]
FIRST_TOKEN = ["generate", "Hi", "--max-tokens", "1", "--backend", "mlx", "--device", "cpu"]
PRODUCTS = ("threadpoolctl", "llvmlite")  # of a CPU without Apple's BLAS


def best_seconds(words: list[str], tries: int = 5) -> float:
    """The best time of several whole processes, because the machine may be busy."""

    def once() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mlx_gptoss_cli", *words], capture_output=True, check=True)
        return time.perf_counter() - started

    return min(once() for _ in range(tries))


def cpu_seconds(*arguments: str) -> float:
    """User and system time of a Python process."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_utime + used.ru_stime


@pytest.mark.benchmark
def test_the_first_token_of_the_bundled_model_within_a_second_and_a_half():
    assert best_seconds(FIRST_TOKEN) < 1.5


@pytest.mark.benchmark
@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help_within_three_tenths(words):
    assert best_seconds(words) < 0.3


@pytest.mark.parametrize(
    ("words", "imports", "ratio"),
    [*((words, "click", 4) for words in HELP), (FIRST_TOKEN, "mlx.core, numpy, rich.console, tokenizers", 12)],
    ids=[*map(" ".join, HELP), "first token"],
)
def test_the_start_takes_little_more_cpu_time_than_its_imports(words, imports, ratio):
    """Compares the best of five runs, in turns. Usual ratios are 1.2 and 4."""
    turns = [(cpu_seconds("-m", "mlx_gptoss_cli", *words), cpu_seconds("-c", f"import {imports}")) for _ in range(5)]
    ours, theirs = map(min, zip(*turns, strict=True))
    assert ours < ratio * theirs


@pytest.mark.parametrize(
    ("words", "packages"),
    [
        (["--help"], {"click"}),
        (["generate", "--help"], {"click"}),
        (FIRST_TOKEN, {"click", "rich", "numpy", "ml_dtypes", "tokenizers", "mlx", *PRODUCTS}),
    ],
    ids=["help", "generate help", "first token"],
)
def test_nothing_is_imported_that_is_not_needed(words, packages):
    code = (
        "import sys; before = set(sys.modules); sys.argv = ['mlx-gptoss', *sys.argv[1:]]\n"
        "from mlx_gptoss_cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "print(*(new - {'mlx_gptoss', 'mlx_gptoss_cli'}), file=sys.stderr)"
    )
    out = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    imported = {name for name in out.stderr.splitlines()[-1].split() if not name.startswith("_")}
    assert imported <= packages
