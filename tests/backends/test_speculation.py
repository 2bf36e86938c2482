"""Speculation changes only the speed: the same greedy and seeded text, samples from the same distribution, and no
effect of rejected drafts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss.api import NANO
from mlx_gptoss.backends import BACKENDS
from mlx_gptoss.backends.base import Limits, Row
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import checkpoint as checkpoints

GREEDY = Sampling(temperature=0)
REPEATING = [*range(40, 60)] * 4


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request, backend_module):
    return backend_module(request.param)


@pytest.fixture(scope="module")
def name(backend):
    return backend.__name__.rpartition(".")[2]


@pytest.fixture(scope="module", params=[None, 8], ids=["whole cache", "cache in 8 bits"])
def runner(request, backend, name, mini, device_of):
    limits = Limits(2, 300, 64, drafts=3, kv_bits=request.param)
    return backend.load(checkpoints.open(mini / "mxfp4"), device=device_of(name), dtype=None, limits=limits)


def begin(runner, prompt, sampling, slot=0) -> int:
    return runner.submit([Row(slot, 0, tuple(prompt), sampling, tuple(prompt))]).wait()[0].token


def test_stepping_back_is_exact_at_every_position(runner):
    """Three wrong drafts after each token, while the ring (window 8, slack 3) fills and wraps several times: each token
    and its probability are those of a slot without speculation."""
    prompt = REPEATING[:3]
    token = begin(runner, prompt, GREEDY)
    assert begin(runner, prompt, GREEDY, slot=1) == token
    for position in range(len(prompt), len(prompt) + 60):
        (plain,) = runner.submit([Row(1, position, (token,), GREEDY)]).wait()
        wrong = tuple((plain.token + step) % 320 for step in (1, 2, 3))
        (drafted,) = runner.submit([Row(0, position, (token,), GREEDY, drafts=wrong)]).wait()
        assert (drafted.token, drafted.accepted) == (plain.token, ())
        # A verified key may round otherwise, and then take the other of two 8-bit codes.
        assert drafted.logprob == pytest.approx(plain.logprob, abs=1e-4 if runner.limits.kv_bits is None else 3e-3)
        token = plain.token


@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_exactly_the_right_drafts_are_accepted(runner, right):
    prompt = REPEATING[:30]
    first = begin(runner, prompt, GREEDY)
    expected, token = [], first
    for step in range(6):
        (sampled,) = runner.submit([Row(0, 30 + step, (token,), GREEDY)]).wait()
        expected.append(token := sampled.token)
    assert begin(runner, prompt, GREEDY, slot=1) == first
    drafts = tuple(t if i < right else (t + 1) % 320 for i, t in enumerate(expected[:3]))
    (got,) = runner.submit([Row(1, 30, (first,), GREEDY, drafts=drafts)]).wait()
    assert [got.token, *(sampled.token for sampled in got.accepted)] == expected[: right + 1]
    (after,) = runner.submit([Row(1, 31 + right, (expected[right],), GREEDY)]).wait()
    assert after.token == expected[right + 1]


@pytest.mark.parametrize("runner", [None, pytest.param(8, marks=pytest.mark.slow)], indirect=True)
def test_drafted_draws_follow_the_distribution(runner):
    """First tokens follow their probabilities; second tokens after a right draft follow theirs given that draft."""
    prompt, hot = tuple(REPEATING[:20]), 0.7
    logits = runner.logits(prompt)[-1].astype(np.float64) / hot
    draft = int(logits.argmax())
    given = runner.logits([*prompt, draft])[-1].astype(np.float64) / hot
    firsts, seconds = [], []
    runner.submit([Row(0, 0, prompt[:-1])]).wait()
    for seed in range(1000):
        sampling = Sampling(temperature=hot, seed=seed)
        row = Row(0, 19, prompt[-1:], sampling, prompt, drafts=(draft, 5))
        (sampled,) = runner.submit([row]).wait()
        firsts.append(sampled.token)
        if sampled.token == draft:
            seconds.append(sampled.accepted[0].token)
        else:
            assert sampled.accepted == ()
    assert len(seconds) > 100
    for drawn, scores in ((firsts, logits), (seconds, given)):
        p = np.exp(scores - scores.max())
        p /= p.sum()
        likely = np.flatnonzero(p * len(drawn) >= 5)
        counts = np.array([np.count_nonzero(np.equal(drawn, token)) for token in likely])
        counts, p = np.append(counts, len(drawn) - counts.sum()), np.append(p[likely], 1 - p[likely].sum())
        chi2 = ((counts - len(drawn) * p) ** 2 / (len(drawn) * p)).sum()
        assert chi2 < len(likely) + 5 * np.sqrt(2 * len(likely)) + 5


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.6, seed=4, logprobs=2)], ids=["greedy", "seeded"])
@pytest.mark.parametrize("folder", ["mxfp4", None], ids=["random", "bundled"])
def test_the_text_is_the_same_and_some_drafts_are_accepted(mini, name, folder, sampling):
    results = []
    for speculate in (False, True):
        source = None if folder is None else mini / folder
        with mlx_gptoss.load(source, backend=name, device="cpu", speculate=speculate, max_context=400) as model:
            ids = model.tokenizer.encode("a b c a b c a b c") if folder is None else REPEATING
            never_end = replace(sampling, logit_bias=dict.fromkeys(checkpoints.open(source or NANO).stop_ids, -100.0))
            *_, finished = model.stream_raw(ids, max_tokens=150, sampling=never_end)
            results.append(finished)
    plain, fast = results
    assert [t.id for t in fast.tokens] == [t.id for t in plain.tokens]
    assert fast.finish_reason == plain.finish_reason
    assert np.allclose([t.logprob for t in fast.tokens], [t.logprob for t in plain.tokens], atol=1e-3)
    assert plain.drafted == 0 < fast.drafted
    # Sampled text of random weights has few repetitions to draft from.
    assert fast.accepted > 0 or (folder is not None and not sampling.greedy)


def test_several_sequences_speculate_side_by_side(mini, name):
    prompts = [REPEATING, REPEATING[:7], [9, 8, 7] * 5]
    texts = []
    for speculate, slots in ((False, 1), (True, 3)):
        with mlx_gptoss.load(
            mini / "mxfp4", backend=name, device="cpu", speculate=speculate, slots=slots, max_context=300
        ) as model:
            streams = [model.stream_raw(p, max_tokens=40 + i, sampling=GREEDY) for i, p in enumerate(prompts)]
            texts.append([[t.id for t in list(stream)[-1].tokens] for stream in streams])
    assert texts[0] == texts[1]
    assert all(text for text in texts[0])


def test_penalized_requests_get_no_drafts(mini, name):
    with mlx_gptoss.load(mini / "mxfp4", backend=name, device="cpu", speculate=True, max_context=300) as model:
        penalized = Sampling(temperature=0, frequency_penalty=0.5)
        *_, finished = model.stream_raw(REPEATING, max_tokens=60, sampling=penalized)
    assert finished.drafted == 0
