"""Whether a model that is about to be timed computes what it should: held against a second computation on the same
weights. Speed without it means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend, Limits, Row, Runner
from ..config import ModelConfig
from ..errors import GptOssError
from ..sampling import Sampling
from ..weights.tensor import Weight, Weights
from .evaluation import kl_divergence, log_softmax

LAYERS = 4  # that are compared, of each kind two
PROMPT = 136  # tokens: with those decoded, beyond the sliding window
DECODED = 8
# The most that rounding explains, by the activations' dtype: mean KL divergence in nats, and mean difference of decoded
# tokens' log-probabilities. A narrow dtype now and then takes another expert where two are nearly as good.
TOLERANCE = {"float32": (1e-5, 1e-2), "bfloat16": (0.05, 0.5), "float16": (0.05, 0.5)}
GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Agreement:
    """Our logits against another computation's, over `tokens` positions of `layers` layers.

    relative_error: largest error over a position's vocabulary by its largest logit, the median of all positions;
        worst_error: the same of the worst, which may be one where rounding decided between two experts.
    kl: KL(other || ours) in nats, the mean. top1: how often both find the same token the likeliest.
    decode_error: mean difference between the log-probabilities of tokens that we decoded, one a step in a batch, and
        the other's of the same tokens, for the worst batch; None if only whole prompts were compared.
    """

    against: str
    layers: int
    tokens: int
    relative_error: float
    worst_error: float
    kl: float
    top1: float
    decode_error: float | None = None


class HasLogits(Protocol):
    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]: ...


class Other(HasLogits, Protocol):
    engine: str
    backend: str


class FirstLayers:
    """The same model with only its first `count` layers."""

    def __init__(self, source: Weights, count: int) -> None:
        kinds = source.config.layer_types[:count]
        self.config: ModelConfig = replace(source.config, num_hidden_layers=len(kinds), layer_types=kinds)
        self._source = source

    def read(self, name: str) -> Weight:
        return self._source.read(name)

    def release(self) -> None:
        self._source.release()


def with_float32(
    module: Backend, source: Weights, backend: str, device: str | None, dtype: str, batches: Sequence[int]
) -> Agreement:
    """A backend on `device` in `dtype` against the same backend on the CPU in float32: a prompt's logits, and tokens
    that it decodes in each of the `batches`, as the benchmark will. Raises GptOssError if they are further apart than
    rounding puts them."""
    first = FirstLayers(source, LAYERS)
    rng = np.random.default_rng(0)
    # One sequence reaches beyond the window; the others are short, and no two lengths the same in a row.
    lengths = [PROMPT, *(5 + slot % 7 for slot in range(1, max(batches)))]
    asked = [tuple(rng.integers(0, source.config.vocab_size, length).tolist()) for length in lengths]
    limits = Limits(max(batches), PROMPT + DECODED, min(PROMPT, module.prefill_chunk(device)))
    runner = module.load(first, device=device, dtype=dtype, limits=limits)
    try:
        ours = runner.logits(asked[0])
        decoded = [_decode(runner, asked[:batch]) for batch in batches]
    finally:
        runner.close()
    oracle = module.load(first, device="cpu", dtype="float32", limits=Limits(1, 1, limits.chunk))
    try:
        errors = [
            np.mean([_decode_errors(oracle, asked[slot], done[slot]) for slot in _some(len(done))]) for done in decoded
        ]
        found = compare(ours, oracle.logits(asked[0]), f"{backend} on the CPU in float32", first.config)
    finally:
        oracle.close()
    found = replace(found, decode_error=float(np.max(errors)))
    _require(found, dtype)
    return found


def of_logits(ours: HasLogits, other: Other, dtype: str, config: ModelConfig, *, require: bool) -> Agreement:
    """Our logits of a short prompt against another program's. Raises GptOssError if they have to agree and do not."""
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 48).tolist()
    found = compare(ours.logits(ids), other.logits(ids), f"{other.engine} ({other.backend})", config)
    if require:
        _require(found, dtype)
    return found


def compare(ours: NDArray[np.float32], other: NDArray[np.float32], against: str, config: ModelConfig) -> Agreement:
    """Logits [T, V] against logits [T, V]. Raises GptOssError if ours are not numbers."""
    if not np.isfinite(ours).all():
        raise GptOssError("some logits are NaN or infinite: the device computes nonsense; nothing was timed")
    error = np.abs(ours - other).max(axis=-1) / np.abs(other).max(axis=-1)
    kl = kl_divergence(log_softmax(other), log_softmax(ours))
    top1 = np.mean(ours.argmax(axis=-1) == other.argmax(axis=-1))
    return Agreement(
        against,
        config.num_hidden_layers,
        len(ours),
        float(np.median(error)),
        float(error.max()),
        float(kl.mean()),
        float(top1),
    )


def _require(found: Agreement, dtype: str) -> None:
    kl, decode = TOLERANCE[dtype]
    if not (found.kl <= kl and (found.decode_error or 0) <= decode):
        decoded = "" if found.decode_error is None else f", decoded log-probabilities off by {found.decode_error:.3g}"
        raise GptOssError(
            f"the logits disagree with {found.against}: KL {found.kl:.3g} nats where {kl:g} is the most in {dtype}, "
            f"relative error {found.relative_error:.3g}, at worst {found.worst_error:.3g}{decoded}; nothing was timed: "
            "please report this"
        )


def _decode(runner: Runner, asked: Sequence[tuple[int, ...]]) -> list[list[tuple[int, float]]]:
    """(token, log-probability) of each decoded token, by slot: the first from the prompt, the others from batched steps
    whose tokens are fed back on the device."""
    found: list[list[tuple[int, float]]] = []
    for slot, ids in enumerate(asked):
        (sampled,) = runner.submit([Row(slot, 0, ids, GREEDY, ids)]).wait()
        assert sampled is not None
        found.append([(sampled.token, sampled.logprob)])
    for step in range(DECODED - 1):
        rows = [Row(slot, len(ids) + step, None, GREEDY) for slot, ids in enumerate(asked)]
        for row, sampled in zip(rows, runner.submit(rows).wait(), strict=True):
            assert sampled is not None
            found[row.slot].append((sampled.token, sampled.logprob))
    for slot in range(len(asked)):
        runner.release(slot)
    return found


def _decode_errors(oracle: Runner, ids: tuple[int, ...], decoded: list[tuple[int, float]]) -> NDArray[np.float64]:
    tokens = [token for token, _ in decoded]
    rows = log_softmax(oracle.logits((*ids, *tokens[:-1]))[len(ids) - 1 :])
    ours = np.array([logprob for _, logprob in decoded])
    errors: NDArray[np.float64] = np.abs(ours - rows[np.arange(len(tokens)), tokens])
    return errors


def _some(batch: int) -> list[int]:
    """The first, the last, and one between."""
    return sorted({0, batch // 2, batch - 1})
