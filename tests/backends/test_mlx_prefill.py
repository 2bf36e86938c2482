"""Prefill on the MLX backend does no unnecessary work, counted in the products that it requests from MLX."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.backends.base import Limits, Row
from mlx_gptoss.backends.mlx import host, load
from mlx_gptoss.backends.mlx.layers import ExpertLinear
from mlx_gptoss.backends.mlx.model import GptOss
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import checkpoint as checkpoints

GREEDY = Sampling(temperature=0)


@pytest.fixture
def work(monkeypatch):
    """The work requested since the last reset. scores: queries times keys (padding included), a list per layer. pairs:
    token-expert pairs, a list per layer. logits: rows."""
    seen = SimpleNamespace(scores=[], pairs=[], logits=0)
    monkeypatch.setattr(host, "enabled", lambda **_: False)  # numpy's products are counted at the same calls
    attend, gather, logits = mx.fast.scaled_dot_product_attention, ExpertLinear.__call__, GptOss.logits

    def counted_attend(q, k, v, **options):
        seen.scores.append(q.shape[0] * q.shape[2] * k.shape[2])
        return attend(q, k, v, **options)

    def counted_gather(self, x, experts, tokens):
        seen.pairs.append(experts.size)
        return gather(self, x, experts, tokens)

    def counted_logits(self, x):
        seen.logits += x.size // x.shape[-1]
        return logits(self, x)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", counted_attend)
    monkeypatch.setattr(ExpertLinear, "__call__", counted_gather)
    monkeypatch.setattr(GptOss, "logits", counted_logits)
    return seen


def prefill(mini, length: int, chunk: int):
    """Run one prompt, in the scheduler's chunks, through a model with one sliding layer (window 8) and one full."""
    runner = load(checkpoints.open(mini / "mxfp4"), device="cpu", dtype=None, limits=Limits(1, length + 8, chunk))
    prompt = tuple(np.random.default_rng(0).integers(0, 300, length).tolist())
    for start in range(0, length, chunk):
        piece = prompt[start : start + chunk]
        ends = start + len(piece) == length
        runner.submit([Row(0, start, piece, GREEDY if ends else None, prompt if ends else None)]).wait()
    return runner


def test_a_sliding_layers_work_per_token_does_not_grow_with_the_chunk(mini, work):
    for chunk in (16, 64, 256):
        work.scores.clear()
        prefill(mini, 256, chunk)
        sliding = sum(work.scores[::2])
        assert sliding == 256 * (8 + 8), chunk  # a query sees its own block of keys and the one before


def test_the_last_layer_and_the_vocabulary_see_only_the_last_token(mini, work):
    prefill(mini, 256, 64)
    gate_up_and_down = [work.pairs[i : i + 4] for i in range(0, len(work.pairs), 4)]  # of both layers, a list a chunk
    assert gate_up_and_down == [[64 * 4, 64 * 4, 4, 4]] * 4
    assert work.logits == 1


def test_scores_are_bounded_where_attention_is_not_fused(mini, work, monkeypatch):
    whole = prefill(mini, 200, 200).logits(list(range(200)))
    monkeypatch.setattr("mlx_gptoss.backends.mlx.MAX_SCORES_CPU", 4 * 10 * 200)
    work.scores.clear()
    runner = prefill(mini, 200, 200)
    full = work.scores[1:]
    assert len(full) == 20 and max(full) <= 10 * 200
    assert sum(full) < 0.6 * 200 * 200  # keys that no query of the part sees are skipped
    assert np.allclose(runner.logits(list(range(200))), whole, atol=1e-4)
