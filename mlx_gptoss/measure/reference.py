"""What selftest compares kernels with: random weights in every storage, and each operation in numpy on the CPU.

Products and attention are computed in float32, rotations in float64.

Legend: T tokens, D in, N out, I intermediate, E experts, A experts active per token, B rows, L queries a row, C keys,
H query heads, K key/value heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..backends.rope import yarn_frequencies
from ..config import Yarn
from ..weights import codecs
from ..weights.tensor import MXFP4, MXFP8, NVFP4, Array, Dense, Quantized, Spec, Weight

Floats = NDArray[np.float32]
SCALE_ONE = {"e8m0": 127, "e4m3": 56}  # the codes of 1.0


def storage_name(spec: Spec | None) -> str:
    """What people call this storage of a matrix; None is bfloat16."""
    if spec is None:
        return "bfloat16"
    names = {MXFP4: "mxfp4", NVFP4: "nvfp4", MXFP8: "mxfp8"}
    if spec in names:
        return names[spec]
    return f"affine {spec.bits}-bit, groups of {spec.group}" if spec.element == "uint" else "fp8, one scale a row"


def random_weight(spec: Spec | None, shape: tuple[int, ...], seed: int) -> Weight:
    """A matrix [..., N, D] with random codes, whose output has an RMS of about 1 for input of RMS 1."""
    rng = np.random.default_rng(seed)
    size = shape[-1] ** -0.5
    if spec is None:
        exponent = round(np.log2(size / 1.5)) + 127  # of all values: they are from 1 to 2 times a power of two
        bits = _bits(rng, shape, np.uint16)
        bits &= np.uint16(0x807F)
        bits |= np.uint16(exponent << 7)
        return Dense(bits.view(codecs.BFLOAT16))
    codes = _bits(rng, (*shape[:-1], shape[-1] * spec.bits // 8), np.uint8)
    if spec.element == "e4m3":
        codes[(codes & 127) == 127] = 0  # the codes of NaN
    values = codecs.dequantize(Quantized(spec, codes.reshape(-1, codes.shape[-1])[:8], *_unit_scales(spec, 8, shape)))
    step = size / float(np.sqrt(np.mean(np.square(values - values.mean(), dtype=np.float64))))
    if spec.scale == "none":
        outer = rng.uniform(0.5 * step, 1.5 * step, (*shape[:-1], 1)).astype(np.float32)
        return Quantized(spec, codes, outer=outer)
    grouped = (*shape[:-1], shape[-1] // spec.group)
    if spec.scale == "float":
        scale = rng.uniform(0.5 * step, 1.5 * step, grouped).astype(np.float32).astype(codecs.BFLOAT16)
        middle = np.float32((1 - 2**spec.bits) / 2)
        return Quantized(spec, codes, scale, (scale.astype(np.float32) * middle).astype(codecs.BFLOAT16))
    if spec.scale == "e8m0":
        exponent = round(np.log2(step)) + 127
        return Quantized(spec, codes, rng.integers(exponent - 1, exponent + 2, grouped, np.uint8))
    scale = rng.integers(SCALE_ONE["e4m3"] - 8, SCALE_ONE["e4m3"] + 9, grouped, np.uint8)  # 0.5 to 2
    outer = np.full((shape[0],) + (1,) * (len(shape) - 1) if len(shape) > 2 else (), step, np.float32)
    return Quantized(spec, codes, scale, outer=outer)


def _unit_scales(spec: Spec, rows: int, shape: tuple[int, ...]) -> tuple[Array | None, Array | None]:
    """Scales of 1 and no bias for `rows` rows."""
    if spec.scale == "none":
        return None, None
    grouped = (rows, shape[-1] // spec.group)
    if spec.scale == "float":
        return np.ones(grouped, np.float32), np.zeros(grouped, np.float32)
    return np.full(grouped, SCALE_ONE[spec.scale], np.uint8), None


def _bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: type[np.unsignedinteger]) -> Array:
    count = int(np.prod(shape))
    words = np.random.SFC64(rng.integers(1 << 63)).random_raw(-(-count * np.dtype(dtype).itemsize // 8))
    return words.view(dtype)[:count].reshape(shape)


def product(x: Floats, weight: Weight) -> Floats:
    """x [T, D] times a matrix [N, D], transposed -> [T, N]"""
    out = np.empty((len(x), weight.shape[0]), np.float32)
    step = max(1, (1 << 23) // weight.shape[-1])
    for start in range(0, weight.shape[0], step):
        out[:, start : start + step] = x @ codecs.dequantize(weight[start : start + step]).T
    return out


@dataclass(frozen=True)
class ExpertWeights:
    """gate, up [E, I, D] and down [E, D, I], with biases float32 [E, I], [E, I] and [E, D]."""

    gate: Weight
    up: Weight
    down: Weight
    bias_gate: Floats
    bias_up: Floats
    bias_down: Floats

    @staticmethod
    def random(spec: Spec | None, experts: int, hidden: int, intermediate: int, seed: int) -> ExpertWeights:
        rng = np.random.default_rng(seed)

        def bias(width: int) -> Floats:
            return (np.round(rng.normal(size=(experts, width)) * 32) / 256).astype(np.float32)  # exact in bfloat16

        return ExpertWeights(
            random_weight(spec, (experts, intermediate, hidden), seed + 1),
            random_weight(spec, (experts, intermediate, hidden), seed + 2),
            random_weight(spec, (experts, hidden, intermediate), seed + 3),
            bias(intermediate),
            bias(intermediate),
            bias(hidden),
        )


def mixture(x: Floats, scores: Floats, weights: ExpertWeights, active: int, limit: float, alpha: float) -> Floats:
    """x [T, D] through each token's A likeliest experts by scores [T, E] -> [T, D]: the SwiGLU of openai/gpt-oss,
    gate clamped from above and up on both sides, weighted by the softmax over the A scores."""
    chosen = np.argsort(-scores, axis=-1)[:, :active]
    best = np.take_along_axis(scores, chosen, axis=-1)
    share = np.exp(best - best.max(axis=-1, keepdims=True))
    share /= share.sum(axis=-1, keepdims=True)
    out = np.zeros_like(x)
    for expert in np.unique(chosen).tolist():
        tokens, place = np.nonzero(chosen == expert)
        gate = np.minimum(product(x[tokens], weights.gate[expert]) + weights.bias_gate[expert], limit)
        up = np.clip(product(x[tokens], weights.up[expert]) + weights.bias_up[expert], -limit, limit)
        hidden = gate / (1 + np.exp(-alpha * gate)) * (up + 1)
        y = product(hidden, weights.down[expert]) + weights.bias_down[expert]
        out[tokens] += y * share[tokens, place][:, None]
    return out


def rotated(x: Floats, positions: Sequence[int], yarn: Yarn) -> Floats:
    """x [..., L, 64], each of the L vectors rotated by its position, in float64."""
    angles = np.multiply.outer(np.asarray(positions, np.float64), _frequencies(yarn, x.shape[-1]))
    a, b = np.split(x.astype(np.float64), 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(np.float32)


@lru_cache
def _frequencies(yarn: Yarn, dim: int) -> NDArray[np.float64]:
    return yarn_frequencies(yarn, dim)


@dataclass(frozen=True)
class AttentionCase:
    """B rows, each with L new positions after its own number of past ones (`starts`), as one step of the engine has
    them: several rows have one new position each.

    past_keys, past_values: [B, K, max(starts), 64], keys rotated already. q, k, v: not rotated, [B, heads, L, 64].
    window: a key is seen iff query - key < window; None sees all. scale: of the scores. yarn: None rotates nothing.
    kv_bits: 8 for a cache in 8 bits.
    """

    starts: tuple[int, ...]
    past_keys: Floats
    past_values: Floats
    q: Floats
    k: Floats
    v: Floats
    sinks: Floats
    window: int | None
    scale: float
    yarn: Yarn | None
    kv_bits: int | None = None

    @property
    def joined(self) -> tuple[Floats, Floats]:
        """Past and new keys and values of rows with equal starts, [B, K, start + L, 64] each."""
        start = self.starts[0]
        past = (self.past_keys[:, :, :start], self.past_values[:, :, :start])
        keys, values = (np.concatenate(pair, axis=2) for pair in zip(past, (self.k, self.v), strict=True))
        return keys, values

    @property
    def qkv(self) -> Floats:
        """The output of the projection, [B, L, (H + 2 K) * 64]"""
        joined = np.concatenate([self.q, self.k, self.v], axis=1).swapaxes(1, 2)
        return np.ascontiguousarray(joined).reshape(*joined.shape[:2], -1)


def attention(case: AttentionCase) -> tuple[Floats, Floats]:
    """Softmax attention with a sink as one more score of each head, and the same means of the absolute values, which
    roundings are relative to where values cancel -> [B, L, H * 64] each"""
    (B, H, L, dim), K = case.q.shape, case.k.shape[1]
    out = np.empty((2, B, L, H, dim), np.float32)
    for row, start in enumerate(case.starts):
        positions = range(start, start + L)
        q, k = (a[row] if case.yarn is None else rotated(a[row], positions, case.yarn) for a in (case.q, case.k))
        keys = np.concatenate([case.past_keys[row, :, :start], k], axis=1)
        values = np.concatenate([case.past_values[row, :, :start], case.v[row]], axis=1)
        query = q.reshape(K, H // K * L, dim)
        scores = (query * np.float32(case.scale) @ keys.swapaxes(1, 2)).reshape(H, L, -1)
        age = np.asarray(positions)[:, None] - np.arange(start + L)
        seen = (age >= 0) if case.window is None else (age >= 0) & (age < case.window)
        scores = np.where(seen, scores, -np.inf)
        sinks = case.sinks[:, None, None]
        top = np.maximum(scores.max(axis=-1, keepdims=True), sinks)
        weights = np.exp(scores - top)
        both = np.concatenate([values, np.abs(values)], axis=-1)
        y = (weights.reshape(K, H // K * L, -1) @ both).reshape(H, L, 2 * dim)
        y /= weights.sum(axis=-1, keepdims=True) + np.exp(sinks - top)
        out[:, row] = y.reshape(H, L, 2, dim).transpose(2, 1, 0, 3)
    exact, size = out.reshape(2, B, L, H * dim)
    return exact, size
