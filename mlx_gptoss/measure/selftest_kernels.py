"""The checks of single kernels at the widths of gpt-oss: matrices in every storage, experts, norms, rotations,
attention, and the sampler.

Legend: T tokens, E experts, L queries a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from math import exp

import numpy as np

from ..machine import system_available
from ..sampling import Sampling
from ..weights.tensor import AFFINE4, MXFP4, Spec, Weight
from . import reference
from .reference import AttentionCase, ExpertWeights, random_weight, storage_name
from .selftest import (
    LIMITS,
    REPORT,
    Check,
    Compared,
    Floats,
    Kernels,
    Machine,
    Outcome,
    Skipped,
    relative_error,
    rounded,
)

ROWS = (1, 4, 16, 128)
EXPERTS = 8  # of the layers checked; all 32 of gpt-oss-20b for MXFP4 on a GPU
QUERIES, KEYS = (1, 4, 8, 9), (127, 1023, 1024, 4096, 8192)
CPU_KEYS = 1024  # of the library's own attention on a CPU, where more take minutes
PROMPTS = (127, 300)  # without a past, within a window and across its end
POSITIONS = (0, 4096, 100_000, 131_008)
# A position's angle, up to a radian each, has a relative error of 2^-24 in float32; the largest values are some four
# times their RMS, and the sine of a large angle is less exact on some devices.
ANGLE_ERROR = 8 * 2.0**-24
PACKED_KV = 0.08  # keys and values in 8 bits: steps of 1/40 of their RMS, by up to two of which a value is off
LM_HEAD_ROWS = 4096  # compared in each of three places
MANY_WORDS = 4 << 30  # bytes of free memory for a vocabulary's matrix in bfloat16
DRAWS, LIKELY = 1024, 8
WEIGHTS_ADVICE = f"do not use formats with this storage on this machine (`show MODEL` names them); {REPORT}"
ATTENTION_ADVICE = f"long answers may be wrong: update the backend's package, or use --device cpu; {REPORT}"


def checks(machine: Machine) -> Iterator[Check]:
    """All of them, cheap ones first."""
    k = machine.kernels
    if k.has_custom_kernels:
        yield Check("custom kernels", partial(_custom_kernels, k), f"load() leaves out those that failed; {REPORT}")
    yield Check("RMSNorm", partial(_norm, k))
    yield Check("RoPE", partial(_rope, k))
    for name, window in (("full", None), ("sliding", k.config.sliding_window)):
        yield Check(f"attention, {name}", partial(_attention, k, window, None), ATTENTION_ADVICE)
        yield Check(f"attention, {name}, two sequences", partial(_two_sequences, k, window), ATTENTION_ADVICE)
    yield Check("attention, 8-bit K/V", partial(_packed, k), f"leave out --kv-bits; {REPORT}")
    yield Check("attention, the fused kernel", partial(_fused, k), ATTENTION_ADVICE)
    for spec in k.specs:
        yield Check(f"linear, {storage_name(spec)}", partial(_linear, k, spec), WEIGHTS_ADVICE)
    for spec in k.specs:
        yield Check(f"experts, {storage_name(spec)}", partial(_experts, k, spec), WEIGHTS_ADVICE)
    for spec in (AFFINE4, None):
        yield Check(f"lm_head, {storage_name(spec)}", partial(_lm_head, k, spec), WEIGHTS_ADVICE)
    yield Check("embeddings", partial(_embeddings, k), WEIGHTS_ADVICE)
    yield Check("sampler, likeliest token", partial(_likeliest, k))
    yield Check("sampler, random draws", partial(_draws, k))


def _normal(kernels: Kernels, seed: int, *shape: int) -> Floats:
    return rounded(np.random.default_rng(seed).normal(size=shape), kernels.dtype)


@lru_cache(maxsize=4)
def _past(dtype: str, seed: int, *shape: int) -> Floats:
    """Keys or values, the same numbers in every case."""
    return rounded(np.random.default_rng(seed).normal(size=shape), dtype)


def _unit_rows(kernels: Kernels, seed: int, count: int, width: int) -> Floats:
    """Rows of RMS 1, as a norm makes them."""
    x = np.random.default_rng(seed).normal(size=(count, width))
    return rounded(x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True)), kernels.dtype)


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count > 1)}"


def _custom_kernels(k: Kernels) -> Iterator[Outcome]:
    """Those that load() uses only where they agree with the library's own operations; the verdicts are remembered."""
    for case, error, limit in k.custom_kernels():
        yield Compared(case, error, limit)


def _norm(k: Kernels) -> Iterator[Outcome]:
    weight = _normal(k, 1, k.config.hidden_size)
    for count in ROWS:
        x = 3 * _normal(k, 2, count, k.config.hidden_size)
        x = rounded(x, k.dtype)
        mean = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
        wanted = (x / np.sqrt(mean + k.config.rms_norm_eps) * weight).astype(np.float32)
        yield Compared(_rows(count), relative_error(k.norm(x, weight), wanted), LIMITS[k.dtype])


def _rope(k: Kernels) -> Iterator[Outcome]:
    x = _normal(k, 3, k.config.num_attention_heads, 64, k.config.head_dim)
    for start in POSITIONS:
        positions = range(start, start + 64)
        error = relative_error(k.rotate(x, start), reference.rotated(x, positions, k.config.yarn))
        yield Compared(f"position {start}", error, LIMITS[k.dtype] + ANGLE_ERROR * positions[-1])


def _case(
    k: Kernels, starts: Sequence[int], length: int, window: int | None, kv_bits: int | None = None
) -> AttentionCase:
    c, batch, past = k.config, len(starts), max(starts)
    heads, kv, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    return AttentionCase(
        tuple(starts),
        past_keys=_past(k.dtype, 4, batch, kv, max(KEYS), dim)[:, :, :past],
        past_values=_past(k.dtype, 5, batch, kv, max(KEYS), dim)[:, :, :past],
        q=_normal(k, 6, batch, heads, length, dim),
        k=_normal(k, 7, batch, kv, length, dim),
        v=_normal(k, 8, batch, kv, length, dim),
        sinks=_normal(k, 9, heads),
        window=window,
        scale=dim**-0.5 * c.yarn.concentration**2,
        yarn=c.yarn,
        kv_bits=kv_bits,
    )


def _attend(k: Kernels, what: str, case: AttentionCase, limit: float) -> Compared:
    found = k.attention(case.starts, case.past_keys, case.past_values, case.qkv, case.sinks, case.window, case.kv_bits)
    limit += ANGLE_ERROR * (max(case.starts) + case.q.shape[2])
    return Compared(what, relative_error(found, *reference.attention(case)), limit)


def _attention(k: Kernels, window: int | None, kv_bits: int | None) -> Iterator[Outcome]:
    """One sequence: `length` new positions, the last of `keys`. One of them is a decode step, more are a prompt."""
    for keys in KEYS:
        for length in QUERIES:
            case = _case(k, [keys - length], length, window, kv_bits)
            yield _attend(k, f"{length} of {keys} keys", case, LIMITS[k.dtype])
    for length in PROMPTS:
        yield _attend(k, f"{length} of {length} keys", _case(k, [0], length, window, kv_bits), LIMITS[k.dtype])


def _two_sequences(k: Kernels, window: int | None) -> Iterator[Outcome]:
    """A decode step of two sequences, as long as each other and not."""
    for keys in KEYS:
        for other in (keys, keys // 2):
            case = _case(k, [keys - 1, other - 1], 1, window)
            yield _attend(k, f"{keys} and {other} keys", case, LIMITS[k.dtype])


def _packed(k: Kernels) -> Iterator[Outcome]:
    limit = LIMITS[k.dtype] + PACKED_KV
    for keys, length in ((1, 1), (4, 4), (9, 9), *((keys, length) for keys in KEYS for length in (1, 4, 9))):
        case = _case(k, [keys - length], length, None, kv_bits=8)
        yield _attend(k, f"{length} of {keys} keys", case, limit)


def _fused(k: Kernels) -> Iterator[Outcome]:
    """The library's own attention with sinks: one sequence and two of the same length, both kinds of mask. It has been
    reported wrong beyond 1024 keys on some M3 Max (ml-explore/mlx#4022)."""
    if not k.masks:
        yield Skipped("all", "this backend has no attention kernel of a library")
        return
    for keys in KEYS:
        if keys > CPU_KEYS and not k.on_gpu:
            yield Skipped(f"{keys} keys", "it takes minutes on a CPU")
            continue
        for length in QUERIES:
            for batch in (1, 2):
                case = replace(_case(k, [keys - length] * batch, length, None), yarn=None)
                wanted, size = reference.attention(case)
                shape = (batch, length, k.config.num_attention_heads, k.config.head_dim)
                for mask in k.masks:
                    found = k.fused_attention(case.q, *case.joined, case.sinks, case.scale, mask)
                    error = relative_error(found, *(a.reshape(shape).swapaxes(1, 2) for a in (wanted, size)))
                    yield Compared(f"{length} of {keys} keys, {batch} x, {mask}", error, LIMITS[k.dtype])


def _linear(k: Kernels, spec: Spec | None) -> Iterator[Outcome]:
    """The projection of queries, keys and values."""
    c = k.config
    weight = random_weight(spec, (c.q_size + 2 * c.kv_size, c.hidden_size), 10)
    multiply = k.linear(weight)
    x = _unit_rows(k, 11, max(ROWS), c.hidden_size)
    wanted = reference.product(x, weight)
    for count in ROWS:
        yield Compared(_rows(count), relative_error(multiply(x[:count]), wanted[:count]), LIMITS[k.dtype])


def _experts(k: Kernels, spec: Spec | None) -> Iterator[Outcome]:
    """A layer's experts with the router's choice given, so that rounding cannot choose others."""
    c = k.config
    count = c.num_local_experts if k.on_gpu and spec == MXFP4 else EXPERTS
    weights = ExpertWeights.random(spec, count, c.hidden_size, c.intermediate_size, 12)
    bias = np.concatenate([weights.bias_gate, weights.bias_up, weights.bias_down], axis=1)
    layer = k.experts(weights.gate, weights.up, weights.down, bias)
    x = _unit_rows(k, 13, max(ROWS), c.hidden_size)
    rng = np.random.default_rng(14)
    scores = np.stack([rng.permutation(count) for _ in x]).astype(np.float32) * np.float32(0.25)  # exact in every dtype
    wanted = reference.mixture(x, scores, weights, c.num_experts_per_tok, c.swiglu_limit, c.swiglu_alpha)
    for rows in ROWS:
        for way, most in k.ways.items():
            case = f"{_rows(rows)}, {way}"
            if most is not None and rows > most:
                yield Skipped(case, f"no step gives it more than {_rows(most)} here")
                continue
            error = relative_error(layer(x[:rows], scores[:rows], way), wanted[:rows])
            yield Compared(case, error, 2 * LIMITS[k.dtype])  # two products, one after the other


def _lm_head(k: Kernels, spec: Spec | None) -> Iterator[Outcome]:
    """The whole vocabulary, compared in three places."""
    c = k.config
    if spec is None and system_available() < MANY_WORDS:
        yield Skipped("all", f"it takes {MANY_WORDS >> 30} GB of free memory")
        return
    weight = random_weight(spec, (c.vocab_size, c.hidden_size), 15)
    multiply = k.linear(weight)
    x = _unit_rows(k, 16, 4, c.hidden_size)
    n = LM_HEAD_ROWS
    places = [slice(start, start + n) for start in (0, (c.vocab_size - n) // 2, c.vocab_size - n)]
    wanted = np.concatenate([reference.product(x, weight[place]) for place in places], axis=1)
    for count in (1, 4):
        y = multiply(x[:count])
        found = np.concatenate([y[:, place] for place in places], axis=1)
        yield Compared(_rows(count), relative_error(found, wanted[:count]), LIMITS[k.dtype])


def _embeddings(k: Kernels) -> Iterator[Outcome]:
    ids = [0, 1, 777, 4095, 777]
    for spec in k.specs:
        weight: Weight = random_weight(spec, (4096, k.config.hidden_size), 17)
        wanted = reference.product(np.eye(k.config.hidden_size, dtype=np.float32), weight[np.array(ids)]).T
        yield Compared(storage_name(spec), relative_error(k.rows(weight, ids), wanted), LIMITS[k.dtype])


def _likeliest(k: Kernels) -> Iterator[Outcome]:
    """What has one right answer, for rows of different requests in one step: the number of wrong tokens, and the
    log-probabilities."""
    vocabulary = k.config.vocab_size
    logits = np.random.default_rng(18).normal(size=(7, vocabulary)).astype(np.float32) * 3
    best = logits.argmax(axis=-1)
    second = np.argsort(-logits, axis=-1)[:, 1]
    mask = np.packbits(np.arange(vocabulary) == 4321, bitorder="little").tobytes()
    samplings = [
        Sampling(temperature=0),
        Sampling(temperature=1, top_k=1, seed=1),
        Sampling(temperature=1, top_p=1e-6, seed=2),
        Sampling(temperature=1, min_p=0.999, seed=3),
        Sampling(temperature=0, logit_bias={77: 100.0}),
        Sampling(temperature=0, repetition_penalty=10.0),
        Sampling(temperature=0),
    ]
    prompts: list[Sequence[int]] = [[] for _ in samplings]
    prompts[5] = [int(best[5])]
    masks = [None] * 6 + [mask]
    wanted = [*best[:4].tolist(), 77, int(second[5]), 4321]
    tokens, logprobs = k.sample(logits, samplings, prompts, range(7), masks)
    yield Compared("tokens that differ", _different(tokens, wanted), 0.5)
    wide = logits.astype(np.float64)
    exact = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    errors = np.abs(np.asarray(logprobs) - exact[range(7), wanted])
    yield Compared("log-probabilities", float(errors.max()), 1e-3)
    plain, _ = k.sample(logits, [Sampling(temperature=0)] * 7, [[]] * 7, range(7))
    yield Compared("greedy tokens that differ", _different(plain, best.tolist()), 0.5)


def _different(found: Sequence[int], wanted: Sequence[int]) -> float:
    return float(sum(a != b for a, b in zip(found, wanted, strict=True)))


def _draws(k: Kernels) -> Iterator[Outcome]:
    """How often each of a few likely tokens is drawn, against its probability; other tokens have next to none."""
    vocabulary, rows = 4096, 64
    logits = np.full((rows, vocabulary), -30.0, np.float32)
    places = np.linspace(5, vocabulary - 7, LIKELY).astype(int)
    logits[:, places] = np.arange(LIKELY) / 4
    for temperature in (1.0, 0.5):
        counts = dict.fromkeys(places.tolist(), 0)
        strange = 0
        for step in range(DRAWS // rows):
            samplings = [Sampling(temperature=temperature, seed=row) for row in range(rows)]
            tokens, _ = k.sample(logits, samplings, [[]] * rows, [step] * rows)
            for token in tokens:
                if token in counts:
                    counts[token] += 1
                else:
                    strange += 1
        weights = [exp(n / 4 / temperature) for n in range(LIKELY)]
        expected = [DRAWS * weight / sum(weights) for weight in weights]
        # Pearson's chi-square with 7 degrees of freedom is above 40 in one of 800,000 cases.
        chi = sum((n - e) ** 2 / e for n, e in zip(counts.values(), expected, strict=True))
        yield Compared(f"temperature {temperature}: chi-square of {DRAWS} draws", chi, 40.0)
        yield Compared(f"temperature {temperature}: tokens without probability", float(strange), 0.5)
