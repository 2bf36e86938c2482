"""With short memory, embeddings are read from the mapped file and unused rows of lm_head are not loaded. The numbers
stay the same."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss import api
from mlx_gptoss.backends import mlx as backend
from mlx_gptoss.backends.base import Limits, Row
from mlx_gptoss.loading.recommend import mappable_bytes
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import checkpoint as checkpoints

GREEDY = Sampling(temperature=0)
PROMPT = tuple(np.random.default_rng(3).integers(0, 300, 40).tolist())
USED = 250  # of 320


def load(folder, resident_vocab):
    limits = Limits(1, 200, 64, resident_vocab=resident_vocab)
    return backend.load(checkpoints.open(folder), device="cpu", dtype=None, limits=limits)


def generate(runner, sampling, tokens=30):
    ids = [runner.submit([Row(0, 0, PROMPT, sampling, PROMPT)]).wait()[0].token]
    for step in range(tokens - 1):
        ids.append(runner.submit([Row(0, len(PROMPT) + step, None, sampling)]).wait()[0].token)
    return ids


@pytest.mark.parametrize("name", ["mxfp4", "mlx-4bit", "fp8-dynamic", "nvfp4"])
def test_logits_of_all_ids_are_the_same(mini, name):
    whole = load(mini / name, None).logits(PROMPT)
    assert np.abs(load(mini / name, USED).logits(PROMPT) - whole).max() < 1e-5 * np.abs(whole).max()


def test_unused_ids_are_never_sampled(mini):
    unused = dict.fromkeys(range(USED, 320), 100.0)
    whole, short = load(mini / "mxfp4", None), load(mini / "mxfp4", USED)
    pushed = Sampling(seed=1, logit_bias=unused, presence_penalty=0.5)
    assert min(generate(whole, pushed)) >= USED
    assert max(generate(short, pushed)) < USED
    without = Sampling(temperature=0, logit_bias=dict.fromkeys(unused, -100.0))
    assert generate(short, GREEDY) == generate(whole, without)


def test_the_embeddings_take_no_memory(mini):
    def resident(vocab):
        mx.synchronize()
        before = mx.get_active_memory()
        runner = load(mini / "mxfp4", vocab)
        size = mx.get_active_memory() - before + runner._host_bytes
        runner.close()
        return size

    row = 192 * 2  # bfloat16
    # Buffers are rounded up, and those of an earlier test may only now be freed.
    assert resident(None) - resident(USED) == pytest.approx(320 * row + (320 - USED) * row, rel=0.15)


def test_load_does_so_if_the_model_does_not_fit_otherwise(mini, monkeypatch):
    checkpoint = checkpoints.open(mini / "mxfp4")
    left = mappable_bytes(checkpoint)
    assert left >= 320 * 192 * 2
    with mlx_gptoss.load(mini / "mxfp4", backend="mlx", device="cpu", max_context=2048) as model:
        assert model.plan.mapped_bytes == 0
        expected = model.complete(PROMPT, max_tokens=20, sampling=GREEDY).ids
    monkeypatch.setattr(backend, "available_memory", lambda device=None: 0)
    least = api.memory_plan(checkpoint, backend, device="cpu", max_context=2048).needed_bytes
    monkeypatch.setattr(backend, "available_memory", lambda device=None: least - left)
    with mlx_gptoss.load(mini / "mxfp4", backend="mlx", device="cpu", max_context=2048) as model:
        assert model.plan.mapped_bytes == left
        assert model.complete(PROMPT, max_tokens=20, sampling=GREEDY).ids == expected
