"""The sampler: sampling.py's chain on the device, for all rows of a step at once.

Legend: B rows, V vocabulary. Rows of different requests sit in one batch; each stage runs only when a row needs it,
and leaves the other rows as they were, so that a request draws the same token alone and in company.
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
class History:
    """What one slot's sampler remembers. key: of the slot's random stream, two 32-bit integers on the host.

    seen (prompt or output) bool [V], counts (output) float32 [V]: kept only for penalized requests.
    """

    key: tuple[int, int]
    seen: mx.array | None = None
    counts: mx.array | None = None

    @staticmethod
    def begin(sampling: Sampling, prompt: Sequence[int], seed: int, vocabulary: int) -> History:
        # Hashed once, so that nearby seeds do not give streams that are shifted copies of each other. On the CPU: the
        # same numbers, without waiting for the step that the device may be at.
        key = np.array(mx.random.split(mx.random.key(seed), stream=mx.cpu)[0])
        history = History((int(key[0]), int(key[1])))
        if sampling.penalized:
            seen = mx.zeros((vocabulary,), dtype=mx.bool_)
            seen[mx.array([token for token in prompt if token < vocabulary])] = True
            history.seen, history.counts = seen, mx.zeros((vocabulary,), dtype=mx.float32)
        return history

    def add(self, token: mx.array) -> None:
        """token: int32 scalar, just sampled."""
        if self.seen is not None and self.counts is not None:
            self.seen[token] = True
            self.counts = self.counts.at[token].add(1.0)


@dataclass(frozen=True)
class Choice:
    """tokens int32 [B]; logprobs float32 [B]; top ids and logprobs [B, n], n the most that any row asked for."""

    tokens: mx.array
    logprobs: mx.array
    top_ids: mx.array | None
    top_logprobs: mx.array | None


def choose(
    logits: mx.array,
    samplings: Sequence[Sampling],
    histories: Sequence[History],
    positions: Sequence[int],
    masks: Sequence[bytes | None] = (),
    elementwise: Elementwise = UNCOMPILED,
) -> Choice:
    """One token a row from raw logits, float32 [B, V]. `positions` number the draws of each row's random stream;
    `masks` are the rows' (backends.base.Row), or empty if none has one."""
    shaped = _penalize(_bias(_mask(logits, masks), samplings), samplings, histories)
    if not all(s.greedy for s in samplings):
        keys = [(h.key[0], (h.key[1] + position) % 2**32) for h, position in zip(histories, positions, strict=True)]
        temperature = _column(samplings, "temperature")
        shaped = elementwise.add_gumbel_noise(_filter(shaped, samplings), temperature, mx.array(keys, dtype=mx.uint32))
    tokens = mx.argmax(shaped, axis=-1).view(mx.int32)
    for row, history in enumerate(histories):
        history.add(tokens[row])
    normalizer = mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, tokens[:, None], axis=-1) - normalizer
    top_n = max(s.logprobs for s in samplings)
    if not top_n:
        return Choice(tokens, chosen[:, 0], None, None)
    ids = mx.argpartition(-logits, kth=top_n - 1, axis=-1)[:, :top_n]
    ids = mx.take_along_axis(ids, mx.argsort(-mx.take_along_axis(logits, ids, axis=-1), axis=-1), axis=-1)
    return Choice(tokens, chosen[:, 0], ids, mx.take_along_axis(logits, ids, axis=-1) - normalizer)


def _mask(logits: mx.array, masks: Sequence[bytes | None]) -> mx.array:
    if not any(masks):
        return logits
    return mx.where(mx.array(allowed_tokens(masks, logits.shape[-1])), logits, -mx.inf)


def _bias(logits: mx.array, samplings: Sequence[Sampling]) -> mx.array:
    """A bias on an id that is never sampled, for its row is not resident, does nothing."""
    entries = [
        (row, t, b) for row, s in enumerate(samplings) for t, b in (s.logit_bias or {}).items() if t < logits.shape[-1]
    ]
    if not entries:
        return logits
    rows, tokens, biases = zip(*entries, strict=True)
    return logits.at[mx.array(rows), mx.array(tokens)].add(mx.array(biases, dtype=mx.float32))


def _penalize(logits: mx.array, samplings: Sequence[Sampling], histories: Sequence[History]) -> mx.array:
    if not any(s.penalized for s in samplings):
        return logits
    rows = [_penalize_row(row, s, h) for row, s, h in zip(logits, samplings, histories, strict=True)]
    return mx.stack(rows)


def _penalize_row(logits: mx.array, sampling: Sampling, history: History) -> mx.array:
    if history.seen is None or history.counts is None:
        return logits
    repeated = mx.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    logits = mx.where(history.seen, repeated, logits)
    return logits - sampling.presence_penalty * (history.counts > 0) - sampling.frequency_penalty * history.counts


def _filter(logits: mx.array, samplings: Sequence[Sampling]) -> mx.array:
    """Logits with everything outside top_k, top_p and min_p, at the row's temperature, at -inf."""
    if any(s.top_k or s.top_p < 1.0 for s in samplings):
        logits = _top(logits, samplings)
    if any(s.min_p for s in samplings):
        probabilities = mx.softmax(_scaled(logits, samplings), axis=-1)
        floor = _column(samplings, "min_p") * probabilities.max(axis=-1, keepdims=True)
        logits = mx.where(probabilities < floor, -mx.inf, logits)
    return logits


def _top(logits: mx.array, samplings: Sequence[Sampling]) -> mx.array:
    """top_k, then top_p of what is left: a token stays when those likelier than it hold less than top_p."""
    vocabulary = logits.shape[-1]
    order = mx.argsort(-logits, axis=-1)
    ranked = mx.take_along_axis(logits, order, axis=-1)
    top_k = mx.array([[s.top_k or vocabulary] for s in samplings])
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
    """One field of every row, float32 [B, 1]."""
    return mx.array([[float(getattr(s, name))] for s in samplings])
