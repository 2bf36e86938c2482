"""The sampler of every backend, on the CPU, compared with a plain numpy implementation of the chain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mlx_gptoss.backends import BACKENDS
from mlx_gptoss.sampling import Sampling

VOCABULARY = 24


def logits_for(seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=VOCABULARY) * 2).astype(np.float32)


@dataclass(frozen=True)
class Sampler:
    """One backend's sampler; `array` makes its logits."""

    module: Any
    array: Callable[[np.ndarray], Any]

    def begin(self, sampling: Sampling, prompt=(1, 2), seed: int | None = None):
        return self.module.SamplerState.begin(sampling, prompt, seed or sampling.seed or 0, VOCABULARY)

    def sample(self, logits: np.ndarray, *step):
        return self.module.sample_tokens(self.array(logits), *step)

    def draw(self, logits: np.ndarray, sampling: Sampling, state, position: int = 0, mask=None) -> int:
        return self.sample(logits[None], [sampling], [state], [position], [mask]).tokens.item()


@pytest.fixture(scope="module", params=BACKENDS)
def sampler(request, backend_module) -> Sampler:
    module = import_module(".sample", backend_module(request.param).__name__)
    return Sampler(module, import_module("mlx.core").array if request.param == "mlx" else import_module("torch").tensor)


def expected_distribution(logits: np.ndarray, s: Sampling, mask: bytes | None) -> np.ndarray:
    logits = logits.astype(np.float64).copy()
    if mask is not None:
        logits[[t for t in range(VOCABULARY) if t // 8 >= len(mask) or not mask[t // 8] >> t % 8 & 1]] = -np.inf
    for token, bias in (s.logit_bias or {}).items():
        logits[token] += bias
    logits /= s.temperature
    order = np.argsort(-logits)
    if s.top_k:
        logits[order[s.top_k :]] = -np.inf
    p = np.exp(logits - logits.max())
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= s.top_p]] = 0
    p[p < s.min_p * p.max()] = 0
    return p / p.sum()


WHOLE_CHAIN = Sampling(temperature=1.5, top_k=10, top_p=0.8, min_p=0.05, logit_bias={0: 3.0, 5: -100.0})
MASK = b"\xa7\x11"  # ends before the vocabulary


@pytest.mark.parametrize(
    ("sampling", "mask"),
    [
        (Sampling(), None),
        (Sampling(temperature=0.5), None),
        (Sampling(top_k=3), None),
        (Sampling(top_p=0.6), None),
        (Sampling(min_p=0.2), None),
        (WHOLE_CHAIN, None),
        (Sampling(), MASK),
        (WHOLE_CHAIN, MASK),
    ],
    ids=str,
)
def test_draws_follow_the_chain(sampler, sampling, mask):
    logits = logits_for(1)
    state = sampler.begin(sampling, seed=7)
    n = 3000
    counts = np.bincount([sampler.draw(logits, sampling, state, i, mask) for i in range(n)], minlength=VOCABULARY)
    expected = expected_distribution(logits, sampling, mask)
    assert counts[expected == 0].sum() == 0
    inside = expected > 0
    chi2 = ((counts[inside] - n * expected[inside]) ** 2 / (n * expected[inside])).sum()
    degrees = max(inside.sum() - 1, 1)
    assert chi2 < degrees + 6 * np.sqrt(2 * degrees) + 6


def test_greedy_is_argmax_and_ignores_the_seed(sampler):
    logits = logits_for(2)
    for seed in range(5):
        assert (
            sampler.draw(logits, Sampling(temperature=0, seed=seed), sampler.begin(Sampling(temperature=0, seed=seed)))
            == logits.argmax()
        )


def test_a_seed_gives_the_same_draws_alone_and_in_company(sampler):
    options = [
        Sampling(seed=3),
        Sampling(temperature=0),
        Sampling(seed=4, top_p=0.5),
        Sampling(seed=3, frequency_penalty=1),
    ]
    logits = np.stack([logits_for(i) for i in range(4)])
    alone = [
        [sampler.draw(logits[i], s, h, p) for p in range(20)]
        for i, s in enumerate(options)
        for h in [sampler.begin(s, seed=s.seed or 0)]
    ]
    states = [sampler.begin(s, seed=s.seed or 0) for s in options]
    together = [sampler.sample(logits, options, states, [p] * 4).tokens.tolist() for p in range(20)]
    assert [list(column) for column in zip(*together, strict=True)] == alone


def test_nearby_seeds_are_unrelated(sampler):
    flat = np.zeros(VOCABULARY, dtype=np.float32)
    streams = [
        [sampler.draw(flat, Sampling(), sampler.begin(Sampling(), seed=seed), p) for p in range(64)]
        for seed in range(4)
    ]
    for shift in range(4):
        for a, b in pairwise(streams):
            same = np.mean([x == y for x, y in zip(a[shift:], b, strict=False)])
            assert same < 0.3


def test_penalties(sampler):
    logits = np.zeros(VOCABULARY, dtype=np.float32)
    logits[:4] = [3.0, 2.9, 2.8, -1.0]
    sampling = Sampling(temperature=0, frequency_penalty=0.15)
    state = sampler.begin(sampling)
    assert [sampler.draw(logits, sampling, state) for _ in range(4)] == [0, 1, 0, 2]
    sampling = Sampling(temperature=0, presence_penalty=0.15)
    state = sampler.begin(sampling)
    # after 0 and 1 were sampled: 2.85, 2.75, 2.8, so 0 leads again and stays first
    assert [sampler.draw(logits, sampling, state) for _ in range(4)] == [0, 1, 0, 0]
    sampling = Sampling(temperature=0, repetition_penalty=2.0)
    assert sampler.draw(logits, sampling, sampler.begin(sampling, prompt=(0, 1))) == 2  # the prompt counts
    negative = np.full(VOCABULARY, -2.0, dtype=np.float32)
    negative[0] = -1.5
    assert sampler.draw(negative, sampling, sampler.begin(sampling, prompt=(0,))) == 1  # -1.5 became -3


def test_logprobs_are_of_the_raw_logits(sampler):
    logits = logits_for(5)
    sampling = Sampling(temperature=0, logprobs=4, logit_bias={7: 50.0})
    output = sampler.sample(logits[None], [sampling], [sampler.begin(sampling)], [0])
    raw = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    order = np.argsort(-raw)[:4]
    assert output.tokens.item() == 7
    assert np.isclose(output.logprobs.item(), raw[7], atol=1e-5)
    assert output.top_ids[0].tolist() == order.tolist()
    assert np.allclose(output.top_logprobs[0].tolist(), raw[order], atol=1e-5)


def test_a_mask_is_its_row_s_alone_and_leaves_logprobs_raw(sampler):
    logits = np.stack([logits_for(6)] * 3)
    samplings = [Sampling(temperature=0, presence_penalty=1.0), Sampling(temperature=0), Sampling(seed=1)]
    masks = [b"\x00\x80\x00", None, b"\x04"]
    states = [sampler.begin(s, seed=s.seed or 0) for s in samplings]
    output = sampler.sample(logits, samplings, states, [0] * 3, masks)
    assert output.tokens.tolist() == [15, logits[1].argmax(), 2]
    raw = logits[0] - np.log(np.exp(logits[0].astype(np.float64)).sum())
    assert np.allclose(output.logprobs.tolist(), raw[output.tokens.tolist()], atol=1e-5)


def test_a_mask_that_allows_what_would_be_drawn_changes_nothing(sampler):
    sampling, logits = Sampling(top_p=0.9), logits_for(7)
    state = sampler.begin(sampling, seed=3)
    free = [sampler.draw(logits, sampling, state, i) for i in range(50)]
    assert [sampler.draw(logits, sampling, state, i, b"\xff" * 3) for i in range(50)] == free
