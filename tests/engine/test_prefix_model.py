"""The prompt cache of the bundled model on a failing disk and with damaged files."""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cached_prompts import corrupt, craft, files_in
from faulty_disk import FaultyDisk

import mlx_gptoss
from mlx_gptoss import Sampling

PROMPT = tuple(random.Random(5).choices(range(300), k=600))
REAL_FAULTS = [("read", errno.EIO), ("write", errno.ENOSPC)]
REAL_FAULTS += [
    pytest.param(*fault, marks=pytest.mark.slow) for fault in [("open", errno.EMFILE), ("listdir", errno.ESTALE)]
]


@pytest.fixture(scope="module")
def model_cache(tmp_path_factory):
    """A folder with two chunks of PROMPT by the bundled model, and the tokens that follow it."""
    folder = tmp_path_factory.mktemp("model")
    cached, tokens = ask_model(folder)
    assert cached == 0 and ask_model(folder) == (512, tokens)
    return folder, tokens


def ask_model(folder: Path, started: Callable[[], object] = lambda: None) -> tuple[int, list[int]]:
    """Load the bundled model with a prompt cache. Returns how much of PROMPT was cached, and the tokens after it."""
    options = {"device": "cpu", "max_context": 1024, "prefix_cache": 1 << 26, "prompt_cache": folder}
    with mlx_gptoss.load(None, **options) as model:
        started()
        *_, finished = model.stream_raw(PROMPT, sampling=Sampling(temperature=0), max_tokens=12)
        return finished.usage.cached_tokens, [token.id for token in finished.tokens]


@pytest.mark.parametrize(("call", "error"), REAL_FAULTS)
def test_the_bundled_model_with_a_failing_disk(model_cache, tmp_path, monkeypatch, call, error):
    folder, tokens = tmp_path / "cache", model_cache[1]
    shutil.copytree(model_cache[0], folder)
    disk = FaultyDisk(folder, monkeypatch)
    if call in ("write", "listdir"):  # from the start: nothing is found, or everything is written
        if call == "write":
            shutil.rmtree(folder)
        disk.fail(call, error)
        assert ask_model(folder) == (0, tokens)
    else:
        assert ask_model(folder, started=lambda: disk.fail(call, error)) == (0, tokens)
    assert disk.raised
    disk.mend()
    ask_model(folder)
    assert ask_model(folder) == (512, tokens)


@pytest.mark.parametrize(
    "what", ["longer", "swapped", *(pytest.param(what, marks=pytest.mark.slow) for what in ("shorter", "flipped"))]
)
def test_the_bundled_model_with_damaged_files(model_cache, tmp_path, caplog, what):
    folder, tokens = tmp_path / "cache", model_cache[1]
    shutil.copytree(model_cache[0], folder)
    first, second = files_in(folder)

    def damage() -> None:
        for path in (first, second):
            data = path.read_bytes().partition(b"\n")[2]
            if what in ("longer", "shorter"):
                craft(path, data + bytes(64) if what == "longer" else data[:-64])
            elif what == "flipped":
                path.write_bytes(path.read_bytes()[:-1] + b"\xaa")
        if what == "swapped":
            corrupt(folder, "swap", 0, 0, 1)

    assert ask_model(folder, started=damage) == (0, tokens)
    assert len(caplog.records) == 1
    assert ask_model(folder) == (512, tokens)
