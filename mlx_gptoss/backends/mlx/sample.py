"""The sampler: sampling.py's chain on the device, for all rows of a step at once.

Legend: B rows, V vocabulary. A batch has rows of different requests. Each stage runs only if a row needs it and does
not change the other rows, so a request samples the same tokens in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ...sampling import Sampling
from ..base import allowed_tokens
from .elementwise import UNCOMPILED, Elementwise


@dataclass
class SamplerState:
    """The sampler state of one slot.

    key: of the slot's random stream, two 32-bit integers on the host. seen: bool [V], the tokens of the prompt and the
    output. counts: float32 [V], how often each token is in the output. Both are None unless the request uses penalties.
    """

    key: tuple[int, int]
    seen: mx.array | None = None
    counts: mx.array | None = None

    @staticmethod
    def begin(sampling: Sampling, prompt: Sequence[int], seed: int, vocabulary: int) -> SamplerState:
        # Hashed once, because nearby seeds would otherwise give shifted copies of one stream. The CPU gives the same
        # numbers as the device and does not wait for the step in progress there.
        key = np.array(mx.random.split(mx.random.key(seed), stream=mx.cpu)[0])
        state = SamplerState((int(key[0]), int(key[1])))
        if sampling.penalized:
            seen = mx.zeros((vocabulary,), dtype=mx.bool_)
            seen[mx.array([token for token in prompt if token < vocabulary])] = True
            state.seen, state.counts = seen, mx.zeros((vocabulary,), dtype=mx.float32)
        return state

    def add(self, token: mx.array) -> None:
        """Count a sampled token, an int32 scalar."""
        if self.seen is not None and self.counts is not None:
            self.seen[token] = True
            self.counts = self.counts.at[token].add(1.0)


@dataclass(frozen=True)
class SamplerOutput:
    """tokens: int32 [B]. logprobs: float32 [B]. top_ids, top_logprobs: [B, n], where n is the maximum of the rows'
    `logprobs` options; None if it is 0."""

    tokens: mx.array
    logprobs: mx.array
    top_ids: mx.array | None
    top_logprobs: mx.array | None


def sample_tokens(
    logits: mx.array,
    samplings: Sequence[Sampling],
    states: Sequence[SamplerState],
    positions: Sequence[int],
    masks: Sequence[bytes | None] = (),
    elementwise: Elementwise = UNCOMPILED,
) -> SamplerOutput:
    """Sample one token per row from raw logits, float32 [B, V].

    positions: the index of this draw in each row's random stream. masks: Row.mask of each row; empty if no row has one.
    """
    shaped = _penalize(_bias(_mask(logits, masks), samplings), samplings, states)
    if not all(s.greedy for s in samplings):
        keys = [(h.key[0], (h.key[1] + position) % 2**32) for h, position in zip(states, positions, strict=True)]
        temperature = _column(samplings, "temperature")
        shaped = elementwise.add_gumbel_noise(_filter(shaped, samplings), temperature, mx.array(keys, dtype=mx.uint32))
    tokens = mx.argmax(shaped, axis=-1).view(mx.int32)
    for row, state in enumerate(states):
        state.add(tokens[row])
    normalizer = mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, tokens[:, None], axis=-1) - normalizer
    top_n = max(s.logprobs for s in samplings)
    if not top_n:
        return SamplerOutput(tokens, chosen[:, 0], None, None)
    ids = mx.argpartition(-logits, kth=top_n - 1, axis=-1)[:, :top_n]
    ids = mx.take_along_axis(ids, mx.argsort(-mx.take_along_axis(logits, ids, axis=-1), axis=-1), axis=-1)
    return SamplerOutput(tokens, chosen[:, 0], ids, mx.take_along_axis(logits, ids, axis=-1) - normalizer)


def _mask(logits: mx.array, masks: Sequence[bytes | None]) -> mx.array:
    if not any(masks):
        return logits
    return mx.where(mx.array(allowed_tokens(masks, logits.shape[-1])), logits, -mx.inf)


def _bias(logits: mx.array, samplings: Sequence[Sampling]) -> mx.array:
    """Logits plus each row's `logit_bias`. Ids whose row of lm_head is not resident are never sampled and ignored."""
    entries = [
        (row, t, b) for row, s in enumerate(samplings) for t, b in (s.logit_bias or {}).items() if t < logits.shape[-1]
    ]
    if not entries:
        return logits
    rows, tokens, biases = zip(*entries, strict=True)
    return logits.at[mx.array(rows), mx.array(tokens)].add(mx.array(biases, dtype=mx.float32))


def _penalize(logits: mx.array, samplings: Sequence[Sampling], states: Sequence[SamplerState]) -> mx.array:
    if not any(s.penalized for s in samplings):
        return logits
    rows = [_penalize_row(row, s, h) for row, s, h in zip(logits, samplings, states, strict=True)]
    return mx.stack(rows)


def _penalize_row(logits: mx.array, sampling: Sampling, state: SamplerState) -> mx.array:
    if state.seen is None or state.counts is None:
        return logits
    repeated = mx.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    logits = mx.where(state.seen, repeated, logits)
    return logits - sampling.presence_penalty * (state.counts > 0) - sampling.frequency_penalty * state.counts


def _filter(logits: mx.array, samplings: Sequence[Sampling]) -> mx.array:
    """Logits with every token outside top_k, top_p and min_p at -inf. Probabilities are at the row's temperature."""
    if any(s.top_k or s.top_p < 1.0 for s in samplings):
        logits = _top(logits, samplings)
    if any(s.min_p for s in samplings):
        probabilities = mx.softmax(_scaled(logits, samplings), axis=-1)
        floor = _column(samplings, "min_p") * probabilities.max(axis=-1, keepdims=True)
        logits = mx.where(probabilities < floor, -mx.inf, logits)
    return logits


def _top(logits: mx.array, samplings: Sequence[Sampling]) -> mx.array:
    """top_k, then top_p over the remaining tokens: a token is kept if the more likely tokens add up to less than
    top_p."""
    vocabulary = logits.shape[-1]
    order = mx.argsort(-logits, axis=-1)
    ranked = mx.take_along_axis(logits, order, axis=-1)
    top_k = mx.array([[min(s.top_k or vocabulary, vocabulary)] for s in samplings])
    ranked = mx.where(mx.arange(vocabulary) < top_k, ranked, -mx.inf)
    probabilities = mx.softmax(_scaled(ranked, samplings), axis=-1)
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    top_p = _column(samplings, "top_p")
    ranked = mx.where((before < top_p) | (top_p >= 1.0), ranked, -mx.inf)
    return mx.put_along_axis(logits, order, ranked, axis=-1)


def _scaled(logits: mx.array, samplings: Sequence[Sampling]) -> mx.array:
    temperature = _column(samplings, "temperature")
    return logits / mx.where(temperature > 0, temperature, 1.0)


def _column(samplings: Sequence[Sampling], name: str) -> mx.array:
    """One sampling option of all rows, float32 [B, 1]."""
    return mx.array([[float(getattr(s, name))] for s in samplings])
