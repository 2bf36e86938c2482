"""A prompt that the prefix cache does not know costs what it costs without the cache. Counted, not timed, except for
the benchmark at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from first_prompt import Work, launches, main, planned, prompt_of

import mlx_gptoss
from mlx_gptoss import Model
from mlx_gptoss.backends.base import Row


@contextmanager
def recorded(model: Model) -> Iterator[Work]:
    """What the model's runner does meanwhile."""
    work = Work()

    def record(runner: Any) -> None:
        submit, save = runner.submit, runner.save

        def recording_submit(rows: Sequence[Row]) -> Any:
            work.rows += rows
            return submit(rows)

        def recording_save(slot: int, start: int, end: int) -> Any:
            work.saves.append((len(work.rows) - 1, start, end))
            return save(slot, start, end)

        runner.submit, runner.save = recording_submit, recording_save

    def stop(runner: Any) -> None:
        del runner.submit, runner.save

    model._engine.call(record)
    try:
        yield work
    finally:
        model._engine.call(stop)


def test_a_new_prompt_has_the_same_steps_with_the_cache_as_without() -> None:
    found = []
    for size in (1 << 28, 0):
        with mlx_gptoss.load(backend="mlx", device="cpu", max_context=4096, prefix_cache=size) as model:
            with recorded(model) as work:
                model._engine.submit(prompt_of(1100, 1)).drain()
            found.append([(row.start, len(row.tokens or ())) for row in work.rows])
            saved = [(0, 256), (256, 512), (512, 768), (768, 1024)] if size else []
            assert [(start, end) for _, start, end in work.saves] == saved
    assert found[0] == found[1] == [(0, 512), (512, 512), (1024, 76)]


def test_a_large_chunk_launches_what_a_small_one_does() -> None:
    """So chunks of 2048 tokens launch an eighth of what those of 256 do, but for the snapshots', which are as many."""
    prompt = prompt_of(4096, 1)
    (small, _), (large, snapshots) = (launches(planned(prompt, chunk, 1 << 30)) for chunk in (256, 2048))
    plain, _ = launches(planned(prompt, 2048, 0))
    assert large == plain < 1.3 * small / 8
    assert 0 < snapshots < large


@pytest.mark.benchmark
def test_the_first_token_of_a_new_prompt_comes_as_soon(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["first_prompt.py"])
    main()
    assert float(capsys.readouterr().out.splitlines()[-1].split()[-1]) < 1.05  # CPU time
