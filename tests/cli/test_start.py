"""What the start costs: seconds from the shell, and which packages are imported for them."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

FIRST_TOKEN = ["generate", "Hi", "--max-tokens", "1", "--backend", "mlx", "--device", "cpu"]


def best_seconds(words: list[str], tries: int = 5) -> float:
    """Of whole processes, on a machine that may have other things to do."""

    def once() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mlx_gptoss_cli", *words], capture_output=True, check=True)
        return time.perf_counter() - started

    return min(once() for _ in range(tries))


def test_the_first_token_of_the_bundled_model_within_a_second_and_a_half():
    assert best_seconds(FIRST_TOKEN) < 1.5


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["--version"]], ids=" ".join)
def test_help_within_three_tenths(words):
    assert best_seconds(words) < 0.3


@pytest.mark.parametrize(
    ("words", "packages"),
    [
        (["--help"], {"click"}),
        (["generate", "--help"], {"click"}),
        (FIRST_TOKEN, {"click", "rich", "numpy", "ml_dtypes", "tokenizers", "mlx"}),
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
