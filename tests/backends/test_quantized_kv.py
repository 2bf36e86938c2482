"""Keys and values in 8 bits, on every backend: what is decoded is what a prompt computes, at little cost."""

from __future__ import annotations

import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss.api import NANO
from mlx_gptoss.backends import BACKENDS
from mlx_gptoss.backends.base import Limits, Row
from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import checkpoint as checkpoints

GREEDY = Sampling(temperature=0)
backends = pytest.mark.parametrize("name", BACKENDS)


@backends
def test_a_cache_in_8_bits_decodes_what_it_prefills(mini, backend_module, device_of, name):
    """One token's scores are products with the codes, a prompt's with the decoded keys. Both give the same numbers,
    for one slot and for several of different lengths."""
    backend, device = backend_module(name), device_of(name)
    checkpoint = checkpoints.open(mini / "mxfp4")
    runner = backend.load(checkpoint, device=device, dtype=None, limits=Limits(3, 400, 64, kv_bits=8))
    prompts = [tuple(np.random.default_rng(n).integers(0, 300, n).tolist()) for n in (60, 30, 7)]
    ids = [[runner.submit([Row(i, 0, p, GREEDY, p)]).wait()[0].token] for i, p in enumerate(prompts)]
    for step in range(12):
        rows = [Row(i, len(p) + step, None, GREEDY) for i, p in enumerate(prompts)]
        for mine, sampled in zip(ids, runner.submit(rows).wait(), strict=True):
            mine.append(sampled.token)
            assert np.isfinite(sampled.logprob)
    for prompt, mine in zip(prompts, ids, strict=True):
        logits = runner.logits([*prompt, *mine])[len(prompt) - 1 : -1]
        margin = np.sort(logits, axis=-1)[:, -1] - np.take_along_axis(logits, np.array(mine)[:, None], -1)[:, 0]
        assert margin.max() < 1e-3
    whole = backend.load(checkpoint, device=device, dtype=None, limits=Limits(1, 400, 64)).logits(prompts[0])
    packed = runner.logits(prompts[0])
    error = np.abs(packed - whole).max() / np.abs(whole).max()
    assert 1e-6 < error < 0.02


@backends
def test_a_cache_in_8_bits_costs_little_quality(backend_module, name):
    backend_module(name)
    (result,) = mlx_gptoss.evaluate(against=NANO, kv_bits=8, backend=name, device="cpu", max_tokens=200)
    assert 0 < result.against[0].kl_mean < 1e-3
    assert result.against[0].top1_agreement > 0.98


@backends
def test_a_snapshot_has_72_bytes_a_vector(mini, backend_module, name):
    """Of full-attention layers, instead of 256 in float32; rings stay as they are."""
    backend = backend_module(name)
    sizes = []
    for bits in (None, 8):
        limits = Limits(1, 64, 64, kv_bits=bits)
        runner = backend.load(checkpoints.open(mini / "mxfp4"), device="cpu", dtype="float32", limits=limits)
        runner.submit([Row(0, 0, tuple(range(60)))]).wait()
        sizes.append(runner.save(0, 0, 60).nbytes)
    config = runner.config
    vectors = 60 * 2 * config.num_key_value_heads * config.full_layers
    assert sizes[0] - sizes[1] == vectors * (64 * 4 - 72)


def test_a_cache_in_other_bits_is_refused(mini):
    with pytest.raises(InvalidRequest, match="kv_bits must be"):
        mlx_gptoss.load(mini / "mxfp4", kv_bits=4, backend="mlx")
