"""The engine with a mock runner: prompts with a common prefix, through the prefix cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_runner import (
    LIMITS,
    RING,
    expected,
    ids,
    mock_engine,
    request,
)

from mlx_gptoss.backends.base import Limits
from mlx_gptoss.engine import Request, prefix, scheduler
from mlx_gptoss.sampling import Sampling


def test_a_prompt_with_a_cached_prefix_computes_only_the_rest() -> None:
    """Chunks of 8: the common prefix is cached up to the last chunk that ends before the prompt does."""
    with mock_engine(prefix_bytes=1000) as (engine, runner):
        for prompt, cached in ((40, 0), (40, 32), (41, 32), (20, 16), (8, 0), (9, 8)):
            stream = engine.submit(request(length=prompt, max_tokens=3))
            assert ids(stream) == expected(request(length=prompt, max_tokens=3))[0]
            assert stream.finished is not None and stream.finished.cached_tokens == cached
        assert runner.saved == 5 and engine.status.prefix_bytes == 5 * (8 + RING)
        assert sum(len(row.tokens or ()) for rows in runner.steps for row in rows) == 40 + 8 + 9 + 4 + 8 + 1


def test_equal_prompts_at_the_same_time_are_computed_once() -> None:
    with mock_engine(Limits(slots=3, max_context=64, chunk=24), prefix_bytes=1000) as (engine, runner):
        runner.gate.clear()
        streams = [engine.submit(request(length=50, max_tokens=3, seed=seed)) for seed in range(3)]
        runner.gate.set()
        for seed, stream in enumerate(streams):
            assert ids(stream) == expected(request(length=50, max_tokens=3, seed=seed))[0]
        assert sum(len(row.tokens or ()) for rows in runner.steps for row in rows) == 48 + 3 * 2
        assert sum(stream.finished.cached_tokens for stream in streams if stream.finished) == 2 * 48


@pytest.fixture
def small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of 3 to 8 tokens, of which a chunk has several and may end inside of one."""
    monkeypatch.setattr(prefix, "MIN_SPAN", 3)
    monkeypatch.setattr(scheduler, "MAX_SPAN", 8)


def test_snapshots_are_taken_inside_of_large_chunks(small_spans: None) -> None:
    limits = Limits(slots=3, max_context=64, chunk=20)
    with mock_engine(limits, prefix_bytes=1000) as (engine, runner):
        for prompt, cached, chunks in ((50, 0, [20, 20, 10]), (50, 48, [2]), (31, 24, [7]), (60, 48, [12])):
            first = len(runner.steps)
            stream = engine.submit(request(length=prompt, max_tokens=3))
            assert ids(stream) == expected(request(length=prompt, max_tokens=3), limits)[0]
            assert stream.finished is not None and stream.finished.cached_tokens == cached
            sizes = [len(row.tokens) for rows in runner.steps[first:] for row in rows if row.tokens]
            assert sizes == chunks
        assert runner.saved == 7


def test_message_ends_inside_of_chunks(small_spans: None) -> None:
    """The chunks do not end there; the snapshots do."""
    limits, ends = Limits(slots=3, max_context=64, chunk=20), frozenset({0})
    prompt = (5, 5, 5, 5, 0, 0, 0, 6, 0, *range(1, 30))
    with mock_engine(limits, prefix_bytes=1000) as (engine, runner):
        engine.submit(Request(prompt, 2, message_ends=ends)).drain()
        assert [row.save_at for rows in runner.steps for row in rows if row.tokens] == [(5, 9, 17), (25, 33)]
        stream = engine.submit(Request((*prompt[:9], 1, 1), 2, message_ends=ends))
        assert stream.drain().cached_tokens == 9


def test_equal_prompts_in_large_chunks_are_computed_once(small_spans: None) -> None:
    """But for the tokens after the last snapshot of a chunk, which the next one in turn computes again."""
    limits = Limits(slots=3, max_context=64, chunk=20)
    with mock_engine(limits, prefix_bytes=1000) as (engine, runner):
        runner.gate.clear()
        streams = [engine.submit(request(length=50, max_tokens=3, seed=seed)) for seed in range(3)]
        runner.gate.set()
        for seed, stream in enumerate(streams):
            assert ids(stream) == expected(request(length=50, max_tokens=3, seed=seed), limits)[0]
        computed = [row for rows in runner.steps for row in rows if row.tokens]
        assert runner.saved == 6 and sum(len(row.tokens or ()) for row in computed) <= 48 + 2 * 3 + 2 * 7


overlapping = st.builds(
    Request,
    prompt=st.tuples(st.lists(st.sampled_from([(1,) * 9, (2,) * 7]), max_size=5), st.lists(st.integers(0, 3))).map(
        lambda parts: tuple([token for part in parts[0] for token in part] + parts[1][:5] + [9])
    ),
    max_tokens=st.integers(1, 6),
    sampling=st.integers(0, 3).map(lambda seed: Sampling(seed=seed)),
)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.lists(overlapping, min_size=2, max_size=14),
    max_bytes=st.sampled_from([20, 100, 10_000]),
    chunk=st.sampled_from([8, 11, 20, 64]),
    failures=st.sets(st.integers(0, 40), max_size=3),
    cancelled=st.sets(st.integers(0, 13), max_size=3),
)
def test_the_cache_never_changes_the_tokens_of_a_request(
    batch: list[Request], max_bytes: int, chunk: int, failures: set[int], cancelled: set[int]
) -> None:
    """Requests that neither fail nor are cancelled get the tokens they get alone, whatever is evicted, in chunks of one
    span or of several."""
    limits = replace(LIMITS, chunk=chunk)
    with pytest.MonkeyPatch.context() as patch, mock_engine(limits, prefix_bytes=max_bytes) as (engine, runner):
        patch.setattr(scheduler, "MAX_SPAN", 8)
        count = iter(range(10**9))
        runner.fail_wait = lambda rows: ValueError("broken step") if next(count) in failures else None
        streams = [engine.submit(one) for one in batch]
        for number, (one, stream) in enumerate(zip(batch, streams, strict=True)):
            if number in cancelled:
                stream.cancel()
                continue
            try:
                got = ids(stream)
            except ValueError:
                assert failures
                continue
            assert got == expected(one)[0]
        assert engine.status.prefix_bytes <= max_bytes
