"""The runner behind the seam, of every backend on the CPU: slots do not touch each other, windows bite, a batch gives
what each gives alone."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mlx_gptoss.backends import BACKENDS
from mlx_gptoss.backends.base import Limits, Row
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import checkpoint as checkpoints

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request, backend_module):
    return backend_module(request.param)


@pytest.fixture(scope="module")
def runner(backend, mini):
    return backend.load(checkpoints.open(mini / "mxfp4"), device="cpu", dtype="float32", limits=Limits(4, 700, 2048))


def prompt_of(length: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(300), k=length))


def alone(runner, prompt, n, sampling=GREEDY, slot=0):
    tokens = [runner.submit([Row(slot, 0, prompt, sampling, prompt)]).wait()[0].token]
    for i in range(n - 1):
        tokens.append(runner.submit([Row(slot, len(prompt) + i, None, sampling)]).wait()[0].token)
    runner.release(slot)
    return tokens


def test_continuing_is_the_same_as_recomputing(runner):
    """Past the window and past a growth of the full layers' arrays."""
    prompt = prompt_of(250, 1)
    tokens = alone(runner, prompt, 20)
    logits = runner.logits([*prompt, *tokens])
    assert logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist() == tokens


def test_rows_of_a_batch_do_not_touch_each_other(runner):
    """Four sequences of different lengths, joining and leaving at different steps, in slots used before."""
    prompts = [prompt_of(length, length) for length in (3, 40, 9, 1)]
    steps = [25, 7, 18, 30]
    expected = [alone(runner, p, n, slot=3 - i) for i, (p, n) in enumerate(zip(prompts, steps, strict=True))]
    got = [[] for _ in prompts]
    for step in range(40):
        rows, owners = [], []
        for i, prompt in enumerate(prompts):
            done = len(got[i])
            if step < 2 * i or done == steps[i]:
                continue
            first = done == 0
            tokens = prompt if first else None
            start = 0 if first else len(prompt) + done - 1
            rows.append(Row(i, start, tokens, GREEDY, prompt if first else None))
            owners.append(i)
        for i, sampled in zip(owners, runner.submit(rows).wait() if rows else [], strict=True):
            got[i].append(sampled.token)
    assert got == expected


def test_steps_may_be_submitted_before_the_last_is_read(runner):
    prompt = prompt_of(12, 5)
    expected = alone(runner, prompt, 10)
    pending = [runner.submit([Row(2, 0, prompt, GREEDY, prompt)])]
    pending += [runner.submit([Row(2, len(prompt) + i, None, GREEDY)]) for i in range(9)]
    assert [p.wait()[0].token for p in pending] == expected


def test_seeds_reproduce_in_any_batch(runner):
    sampling = Sampling(seed=11, top_p=0.9, presence_penalty=0.5, logprobs=3)
    prompt, other = prompt_of(10, 6), prompt_of(31, 7)
    expected = alone(runner, prompt, 12, sampling, slot=1)
    first = runner.submit([Row(0, 0, other, Sampling(), other), Row(3, 0, prompt, sampling, prompt)]).wait()
    got = [first[1].token]
    for i in range(11):
        rows = [Row(0, 31 + i, None, Sampling()), Row(3, 10 + i, None, sampling)]
        sampled = runner.submit(rows).wait()[1]
        got.append(sampled.token)
        assert len(sampled.top) == 3 and sampled.top[0][1] >= sampled.logprob - 1e-6
    assert got == expected


def test_the_same_seed_in_another_slot_later_gives_the_same(runner):
    """Also 64-bit seeds, and a slot's next request does not go on with the last one's stream."""
    prompt = prompt_of(5, 10)
    sampling = Sampling(seed=2**64 - 1)
    first = alone(runner, prompt, 8, sampling, slot=2)
    assert alone(runner, prompt, 8, Sampling(seed=12), slot=2) != first
    assert alone(runner, prompt, 8, sampling, slot=0) == first


def test_a_prefill_chunk_samples_nothing(runner):
    assert runner.submit([Row(0, 0, (1, 2, 3))]).wait() == [None]
    runner.release(0)


def test_logprobs_belong_to_the_logits(runner):
    prompt = prompt_of(20, 8)
    sampled = runner.submit([Row(0, 0, prompt, Sampling(temperature=0, logprobs=5), prompt)]).wait()[0]
    runner.release(0)
    logits = runner.logits(prompt)[-1].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum())
    assert abs(sampled.logprob - logprobs.max()) < 1e-4
    assert [i for i, _ in sampled.top] == np.argsort(-logprobs)[:5].tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_activations_stay_close(backend, mini, dtype):
    checkpoint = checkpoints.open(mini / "mxfp4")
    prompt = prompt_of(30, 9)
    exact = backend.load(checkpoint, device="cpu", dtype="float32", limits=Limits(1, 64, 64)).logits(prompt)
    narrow = backend.load(checkpoint, device="cpu", dtype=dtype, limits=Limits(1, 64, 64)).logits(prompt)
    assert np.corrcoef(exact.ravel(), narrow.ravel())[0, 1] > 0.98
