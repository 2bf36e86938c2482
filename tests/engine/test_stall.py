"""A long prompt while other streams decode, on the bundled model: what the streams get meanwhile, and that the prompt's
result is that of the prompt alone. Counted, not timed, except for the benchmark at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
from stall import Gaps, Phase, measure, prompt_of

import mlx_gptoss
from mlx_gptoss.backends.base import Row
from mlx_gptoss.engine import Engine, Request, Token
from mlx_gptoss.ranks.wire import row_from_json, row_to_json
from mlx_gptoss.sampling import Sampling

LENGTH, CHUNKS = 1500, 3  # of up to 512 tokens


@pytest.fixture
def engine() -> Iterator[Engine]:
    """The bundled model with room for three streams and a prompt, without a prefix cache: a prompt is computed anew."""
    with mlx_gptoss.load(slots=4, max_context=16384, prefix_cache=0) as model:
        yield model._engine


def first_token(engine: Engine, request: Request) -> Token:
    (token,) = engine.submit(request)
    return token


def test_streams_go_on_beside_a_prompt_whose_result_stays_the_same(engine: Engine) -> None:
    request = replace(prompt_of(engine, LENGTH, seed=3), sampling=Sampling(temperature=0, logprobs=5))
    alone = first_token(engine, request)
    endless = [Request((65 + n, 66), 16000, Sampling(seed=n)) for n in range(3)]
    readers = [Gaps(engine.submit(one)) for one in endless]
    threads = [reader.start() for reader in readers]
    while any(len(reader.times) < 20 for reader in readers):
        threads[0].join(0.01)
    before = [len(reader.times) for reader in readers]
    beside = first_token(engine, request)
    got = [len(reader.times) - count for reader, count in zip(readers, before, strict=True)]
    for reader in readers:
        reader.stream.cancel()
    for thread in threads:
        thread.join()
    # Whole chunks would give each stream a token a chunk.
    assert min(got) >= 4 * CHUNKS
    assert beside == alone  # the logprobs too, bit for bit


def test_other_ranks_are_told_the_stages() -> None:
    row = Row(1, 256, (5, 6, 7), stages=(2, 5))
    assert row_from_json(json.loads(json.dumps(row_to_json(row)))) == row


@pytest.mark.benchmark
def test_the_gaps_of_streams_beside_a_prompt() -> None:
    with mlx_gptoss.load(slots=5, max_context=16384) as model:
        figures = measure(model._engine, streams=3, length=6000)
    alone, beside, two = (figures[name] for name in ("streams alone", "with one prompt", "with two prompts"))
    small = next(figure for name, figure in figures.items() if "in the prefix cache" in name)
    assert isinstance(alone, Phase) and isinstance(beside, Phase) and isinstance(two, Phase)
    assert isinstance(small, float) and isinstance(figures["prompt alone"], float)
    for phase in (beside, two):
        assert phase.p99 < 1.5 * (2 * alone.p50 + small)
    assert beside.ttft_s[0] < 4 * figures["prompt alone"]
