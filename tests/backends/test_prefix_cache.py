"""The prefix cache with real models: a conversation's next turn computes only its new tokens, with the same results.

A cached prefix was computed in other chunks than a whole prompt is, so its numbers are the same up to rounding: 1e-5 in
float32.
"""

from __future__ import annotations

import pytest

import mlx_gptoss
from mlx_gptoss.sampling import Sampling

GREEDY = Sampling(temperature=0)
QUESTION = "What is 17 + 25?"
BACKENDS = [pytest.param({"backend": "mlx"}, id="mlx"), pytest.param({"backend": "cuda", "device": "cpu"}, id="torch")]
LONG = "\n".join(f"Note {i}: the value is {i * i}." for i in range(20))


def load(where, **options):
    return mlx_gptoss.load(**where, dtype="float32", max_context=4096, **options)


def ask(model, messages, **options):
    return model.generate(messages, sampling=GREEDY, max_tokens=24, **options)


def turns(model):
    """Three turns of one conversation; reasoning is dropped from the second prompt on."""
    messages, replies = [{"role": "system", "content": LONG}, {"role": "user", "content": QUESTION}], []
    for question in ("And 18 + 25?", "Thank you."):
        reply = ask(model, messages)
        replies.append(reply)
        messages += [
            {"role": "assistant", "content": reply.text or "-", "reasoning": reply.reasoning},
            {"role": "user", "content": question},
        ]
    return [*replies, ask(model, messages)]


def assert_same(reply, other):
    """The same tokens, and their log-probabilities but for rounding."""
    assert reply.ids == other.ids
    logprobs, others = ([token.logprob for token in each.logprobs] for each in (reply, other))
    assert logprobs == pytest.approx(others, rel=0, abs=1e-5)


@pytest.mark.parametrize("where", BACKENDS)
def test_later_turns_compute_what_is_new_and_the_same(where):
    with load(where, prefix_cache=1 << 30) as model:
        replies = turns(model)
    first, second, third = (reply.usage for reply in replies)
    assert first.cached_tokens == 0 and first.prompt_tokens > 400
    assert second.prompt_tokens - second.cached_tokens < 128 + len(replies[0].ids)
    assert third.cached_tokens >= second.cached_tokens
    with load(where, prefix_cache=0) as model:
        again = turns(model)
    assert all(reply.usage.cached_tokens == 0 for reply in again)
    for reply, other in zip(replies, again, strict=True):
        assert_same(reply, other)


def test_a_prompt_that_no_snapshot_fits_in_memory_is_computed_all_the_same():
    with load({"backend": "mlx"}, prefix_cache=1) as model:
        assert [ask(model, LONG).usage.cached_tokens for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("where", BACKENDS)
def test_another_process_goes_on_from_the_folder(where, tmp_path):
    messages = [{"role": "system", "content": LONG}, {"role": "user", "content": QUESTION}]
    with load(where, prefix_cache=1 << 30, prompt_cache=tmp_path) as model:
        written = ask(model, messages)
    with load(where, prefix_cache=1 << 30, prompt_cache=tmp_path) as model:
        read = ask(model, messages)
    assert written.usage.cached_tokens == 0 and read.usage.cached_tokens > 400
    assert_same(read, written)
    with load(where, prefix_cache=1 << 30, prompt_cache=tmp_path, slots=2, quantize="mlx-4bit") as model:
        assert ask(model, messages).usage.cached_tokens == 0  # other numbers, so another fingerprint


def test_choices_of_one_prompt_share_it_and_stay_apart():
    with load({"backend": "mlx"}, prefix_cache=1 << 30, slots=4) as model:
        samplings = [Sampling(seed=seed) for seed in range(4)]
        streams = [model.stream(LONG, sampling=sampling, max_tokens=8) for sampling in samplings]
        together = [list(stream)[-1] for stream in streams]
        alone = [list(model.stream(LONG, sampling=sampling, max_tokens=8))[-1] for sampling in samplings]
    assert [t.id for f in together for t in f.tokens] == [t.id for f in alone for t in f.tokens]
    assert sum(finished.usage.cached_tokens for finished in together) > 2.5 * together[0].usage.prompt_tokens


def test_without_it_nothing_is_kept():
    with load({"backend": "mlx"}, prefix_cache=0) as model:
        assert [ask(model, LONG).usage.cached_tokens for _ in range(2)] == [0, 0]
