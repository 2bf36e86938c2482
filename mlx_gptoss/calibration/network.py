"""The network in numpy, one operation at a time, for activations of whole texts: float32, on a CPU.

Legend: T tokens of all windows together, D hidden, H query heads, K key/value heads, E experts, A experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.rope import yarn_frequencies
from ..config import ModelConfig

Floats = NDArray[Any]  # float32
Integers = NDArray[Any]

QUERIES = 256  # queries at once: their scores for all heads of 20b and 2048 keys take 134 MB


def rms_norm(x: Floats, weight: Floats, epsilon: float) -> Floats:
    """x [T, D] divided by its root mean square over D, times weight [D]"""
    scale = 1 / np.sqrt(np.einsum("td,td->t", x, x) / np.float32(x.shape[1]) + np.float32(epsilon))
    return np.asarray(x * scale[:, None] * weight)


def attend(
    q: Floats, k: Floats, v: Floats, sinks: Floats, lengths: Sequence[int], config: ModelConfig, window: int | None
) -> Floats:
    """Causal attention inside each window of a text -> [T, H * 64]

    q [T, H * 64], k and v [T, K * 64], not rotated; sinks [H], one more score of each head; lengths: tokens of each
    window of text; window: a key is seen iff query - key < window, None sees all before it.
    """
    out, start = np.empty_like(q), 0
    for length in lengths:
        rows = slice(start, start + length)
        out[rows] = _attend_one(q[rows], k[rows], v[rows], sinks, config, window)
        start += length
    return out


def _attend_one(q: Floats, k: Floats, v: Floats, sinks: Floats, config: ModelConfig, window: int | None) -> Floats:
    """One window of L tokens: q [L, H * 64], k and v [L, K * 64] -> [L, H * 64]"""
    length, heads, kv_heads, dim = len(q), config.num_attention_heads, config.num_key_value_heads, config.head_dim
    angles = np.multiply.outer(np.arange(length), yarn_frequencies(config.yarn, dim))
    factor = config.yarn.concentration
    cos, sin = ((f(angles) * factor).astype(np.float32)[:, None] for f in (np.cos, np.sin))
    query = _rotate(q.reshape(length, heads, dim), cos, sin) * np.float32(dim**-0.5)
    query = query.reshape(length, kv_heads, heads // kv_heads, dim).transpose(1, 2, 0, 3)  # [K, H / K, L, 64]
    keys = _rotate(k.reshape(length, kv_heads, dim), cos, sin).transpose(1, 2, 0)[:, None]  # [K, 1, 64, L]
    values = v.reshape(length, kv_heads, dim).transpose(1, 0, 2)[:, None]  # [K, 1, L, 64]
    sink = sinks.reshape(kv_heads, -1, 1, 1)
    out = np.empty((length, kv_heads, heads // kv_heads, dim), np.float32)
    for first in range(0, length, QUERIES):
        end = min(first + QUERIES, length)
        begin = 0 if window is None else max(0, first - window + 1)
        scores = query[:, :, first:end] @ keys[..., begin:end]
        age = np.arange(first, end)[:, None] - np.arange(begin, end)
        scores[..., (age < 0) if window is None else (age < 0) | (age >= window)] = -np.inf
        top = np.maximum(scores.max(axis=-1, keepdims=True), sink)
        scores -= top
        np.exp(scores, out=scores)
        mixed = scores @ values[..., begin:end, :]
        mixed /= scores.sum(axis=-1, keepdims=True) + np.exp(sink - top)
        out[first:end] = mixed.transpose(2, 0, 1, 3)
    return out.reshape(length, heads * dim)


def _rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """x [L, heads, 64], whose pairs are (i, i + 32), rotated by its position; cos and sin [L, 1, 32]"""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def route(scores: Floats, active: int) -> tuple[Integers, Floats]:
    """The experts of each token by the router's scores [T, E], and the softmax over theirs, [T, A] each"""
    chosen = np.argsort(-scores, axis=-1, kind="stable")[:, :active]
    best = np.take_along_axis(scores, chosen, axis=-1)
    share = np.exp(best - best[:, :1])
    share /= share.sum(axis=-1, keepdims=True)
    return chosen, share


def swiglu(gate: Floats, up: Floats, limit: float, alpha: float) -> Floats:
    """gate * sigmoid(alpha * gate) * (up + 1), gate clamped from above and up on both sides; [T, I] each"""
    gate = np.minimum(gate, np.float32(limit))
    up = np.clip(up, np.float32(-limit), np.float32(limit))
    with np.errstate(over="ignore"):  # a gate of -100 is multiplied by exp(-170), which is 0
        return np.asarray(gate / (1 + np.exp(np.float32(-alpha) * gate)) * (up + 1))
