"""The sampler: sampling.py's chain on the device, for all rows of a step at once.

Legend: B rows, V vocabulary. A batch has rows of different requests. Each stage runs only if a row needs it and does
not change the other rows, so a request samples the same tokens in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ...sampling import Sampling
from ..base import allowed_tokens
from .elementwise import UNCOMPILED, Elementwise

SORT_BLOCK = 2048  # numbers that one threadgroup sorts on Metal
MAX_CANDIDATES = 64  # tokens to which the usual top_k values narrow the vocabulary down before top_p


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
        # numbers as the device and does not wait for the step in progress there; indexing the pair there would.
        key = np.array(mx.random.split(mx.random.key(seed), stream=mx.cpu))[0]
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
    """What a step samples, on the device or, after on_host, in numpy arrays.

    tokens: int32 [B]. logits: float32 [B], raw ones of the tokens. normalizers: float32 [B], the logarithm of the sum
    of all exponentials. top_ids, top_logits: [B, n], where n is the maximum of the rows' `logprobs` options; None if
    it is 0.
    """

    tokens: Any
    logits: Any
    normalizers: Any
    top_ids: Any
    top_logits: Any

    def on_host(self) -> SamplerOutput:
        """The same in numpy arrays, once they are computed."""
        return SamplerOutput(*(None if array is None else np.array(array) for array in vars(self).values()))

    @property
    def logprobs(self) -> Any:
        """Log-probabilities of the tokens, float32 [B]. Subtracted on the host, they cost no launch."""
        return self.logits - self.normalizers

    @property
    def top_logprobs(self) -> Any:
        """Log-probabilities of top_ids, float32 [B, n]"""
        return None if self.top_ids is None else self.top_logits - self.normalizers[:, None]


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
        shaped = elementwise.add_gumbel_noise(
            _filter(shaped, samplings, elementwise), temperature, mx.array(keys, dtype=mx.uint32)
        )
    tokens = mx.argmax(shaped, axis=-1).view(mx.int32)
    for row, state in enumerate(states):
        state.add(tokens[row])
    chosen = mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    normalizers = elementwise.logsumexp(logits)
    top_n = max(s.logprobs for s in samplings)
    if not top_n:
        return SamplerOutput(tokens, chosen, normalizers, None, None)
    ids = largest(logits, top_n)
    return SamplerOutput(tokens, chosen, normalizers, ids, mx.take_along_axis(logits, ids, axis=-1))


def largest(values: mx.array, count: int) -> mx.array:
    """Indices of the largest of values [B, V], largest first and the first of equal ones first: uint32 [B, count].

    Blocks that one threadgroup of a Metal GPU sorts in one launch, then the same among what leads in each block: all
    201,088 tokens at once take 15 launches."""
    return _smallest(-values, min(count, values.shape[-1]))


def _smallest(values: mx.array, count: int) -> mx.array:
    """As `largest`, of the smallest values."""
    rows, size = values.shape
    blocks = -(-size // SORT_BLOCK)
    if blocks == 1 or count > SORT_BLOCK // 2:
        return mx.argsort(values, axis=-1)[:, :count]
    blocks = next((n for n in range(blocks, 2 * blocks) if size % n == 0), blocks)
    width = -(-size // blocks)
    if blocks * width > size:
        values = mx.pad(values, [(0, 0), (0, blocks * width - size)], constant_values=mx.inf)
    values = values.reshape(rows, blocks, width)
    order = mx.argsort(values, axis=-1)[..., :count]
    leading = mx.take_along_axis(values, order, axis=-1).reshape(rows, -1)
    starts = mx.array(np.arange(blocks, dtype=np.uint32)[:, None] * np.uint32(width))
    return mx.take_along_axis((order + starts).reshape(rows, -1), _smallest(leading, count), axis=-1)


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


def _filter(logits: mx.array, samplings: Sequence[Sampling], elementwise: Elementwise) -> mx.array:
    """Logits with every token outside top_k, top_p and min_p at -inf. Probabilities are at the row's temperature."""
    if any(s.top_k or s.top_p < 1.0 for s in samplings):
        logits = _top(logits, samplings, elementwise)
    if any(s.min_p for s in samplings):
        probabilities = mx.softmax(_scaled(logits, samplings), axis=-1)
        floor = _column(samplings, "min_p") * probabilities.max(axis=-1, keepdims=True)
        logits = mx.where(probabilities < floor, -mx.inf, logits)
    return logits


def _top(logits: mx.array, samplings: Sequence[Sampling], elementwise: Elementwise) -> mx.array:
    """top_k, then top_p over the remaining tokens: a token is kept if the more likely tokens add up to less than
    top_p of all."""
    vocabulary = logits.shape[-1]
    limits = [min(s.top_k or vocabulary, vocabulary) for s in samplings]
    filtered = [s.top_k > 0 or s.top_p < 1.0 for s in samplings]
    few = max(limit for limit, is_filtered in zip(limits, filtered, strict=True) if is_filtered) <= MAX_CANDIDATES
    order = largest(logits, MAX_CANDIDATES if few else vocabulary)
    ranked = mx.take_along_axis(logits, order, axis=-1)
    ranks = mx.array(np.arange(ranked.shape[-1], dtype=np.int32))
    top_k, top_p = mx.array(np.array(limits, np.int32)[:, None]), _column(samplings, "top_p")
    weights = elementwise.weights(ranked, ranked[:, :1], _temperatures(samplings), ranks, top_k)
    kept = elementwise.nucleus(ranked, weights, mx.cumsum(weights, axis=-1), ranks, top_k, top_p)
    if not few:
        return mx.put_along_axis(logits, order, kept, axis=-1)
    kept = mx.put_along_axis(mx.full(logits.shape, -mx.inf), order, kept, axis=-1)
    return kept if all(filtered) else mx.where(mx.array(filtered)[:, None], kept, logits)


def _scaled(logits: mx.array, samplings: Sequence[Sampling]) -> mx.array:
    return logits / _temperatures(samplings)


def _temperatures(samplings: Sequence[Sampling]) -> mx.array:
    """float32 [B, 1]; 1 for a greedy row."""
    return mx.array([[s.temperature or 1.0] for s in samplings])


def _column(samplings: Sequence[Sampling], name: str) -> mx.array:
    """One sampling option of all rows, float32 [B, 1]."""
    return mx.array([[float(getattr(s, name))] for s in samplings])
