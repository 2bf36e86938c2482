"""Check the numbers of a model before timing it: compare its logits with a second computation on the same weights."""

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
from ..weights.adapters import Adapter
from ..weights.tensor import Weight, Weights
from .evaluation import kl_divergence, log_softmax

LAYERS = 4  # compared; two of each kind
PROMPT = 136  # tokens; longer than the sliding window
DECODED = 8
# The largest differences that rounding explains, by the activations' dtype: mean KL divergence in nats, and mean
# difference of decoded tokens' log-probabilities. In a narrow dtype the router sometimes selects another expert.
TOLERANCE = {"float32": (1e-5, 1e-2), "bfloat16": (0.05, 0.5), "float16": (0.05, 0.5)}
GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Agreement:
    """Our logits compared with another computation's, over `tokens` positions of the first `layers` layers.

    relative_error: the largest error over a position's vocabulary divided by its largest logit, median over positions.
    worst_error: the same for the worst position, where rounding may have chosen another expert.
    kl: mean KL(other || ours) in nats. top1: how often both rank the same token first.
    decode_error: mean difference between our log-probabilities of tokens decoded one per step in a batch and the
        other's of the same tokens, for the worst batch; None if only whole prompts were compared.
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
        self.config: ModelConfig = source.config.first_layers(count)
        self._source = source

    def read(self, name: str) -> Weight:
        return self._source.read(name)

    def release(self) -> None:
        self._source.release()


def with_cpu_float32(
    module: Backend,
    source: Weights,
    backend: str,
    device: str | None,
    dtype: str,
    batches: Sequence[int],
    adapter: Adapter | None = None,
) -> Agreement:
    """compare_with_cpu over the first layers. Raises GptOssError if they differ by more than rounding explains."""
    found = compare_with_cpu(module, source, backend, device, dtype, batches, adapter)
    _require(found, dtype)
    return found


def compare_with_cpu(
    module: Backend,
    source: Weights,
    backend: str,
    device: str | None,
    dtype: str,
    batches: Sequence[int],
    adapter: Adapter | None = None,
) -> Agreement:
    """Compare a backend on `device` in `dtype` with the same backend on the CPU in float32: a prompt's logits, and
    tokens decoded in batches of each size, over the first layers. adapter: that both use."""
    first = FirstLayers(source, LAYERS)
    rng = np.random.default_rng(0)
    # One sequence is longer than the window; the others are short, and neighbours have different lengths.
    lengths = [PROMPT, *(5 + slot % 7 for slot in range(1, max(batches)))]
    prompts = [tuple(rng.integers(0, source.config.vocab_size, length).tolist()) for length in lengths]
    limits = Limits(max(batches), PROMPT + DECODED, min(PROMPT, module.prefill_chunk(device)))
    adapters, used = ((), None) if adapter is None else ((adapter.first_layers(LAYERS),), 0)
    runner = module.load(first, device=device, dtype=dtype, limits=limits, adapters=adapters)
    try:
        ours = runner.logits(prompts[0], used)
        decoded = [_decode(runner, prompts[:batch], used) for batch in batches]
    finally:
        runner.close()
    oracle = module.load(first, device="cpu", dtype="float32", limits=Limits(1, 1, limits.chunk), adapters=adapters)
    try:
        errors = [
            np.mean([_decode_errors(oracle, prompts[slot], done[slot], used) for slot in _sample_slots(len(done))])
            for done in decoded
        ]
        found = compare(ours, oracle.logits(prompts[0], used), f"{backend} on the CPU in float32", first.config)
    finally:
        oracle.close()
    return replace(found, decode_error=float(np.max(errors)))


def with_other_engine(ours: HasLogits, other: Other, dtype: str, config: ModelConfig, *, require: bool) -> Agreement:
    """Compare our logits of a short prompt with another engine's. With require, raises GptOssError if they disagree."""
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 48).tolist()
    found = compare(ours.logits(ids), other.logits(ids), f"{other.engine} ({other.backend})", config)
    if require:
        _require(found, dtype)
    return found


def compare(ours: NDArray[np.float32], other: NDArray[np.float32], against: str, config: ModelConfig) -> Agreement:
    """Compare logits [T, V] with logits [T, V]. Raises GptOssError if ours are NaN or infinite."""
    if not np.isfinite(ours).all():
        raise GptOssError("some logits are NaN or infinite: the device computes wrongly; nothing was timed")
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
            f"the logits disagree with {found.against}: KL {found.kl:.3g} nats, allowed in {dtype} {kl:g}, "
            f"relative error {found.relative_error:.3g}, at worst {found.worst_error:.3g}{decoded}; nothing was timed: "
            "please report this"
        )


def _decode(runner: Runner, prompts: Sequence[tuple[int, ...]], adapter: int | None) -> list[list[tuple[int, float]]]:
    """(token, log-probability) of each decoded token, by slot. The first comes from the prompt, the others from batched
    steps that feed tokens back on the device."""
    found: list[list[tuple[int, float]]] = []
    for slot, ids in enumerate(prompts):
        (sampled,) = runner.submit([Row(slot, 0, ids, GREEDY, ids, adapter=adapter)]).wait()
        assert sampled is not None
        found.append([(sampled.token, sampled.logprob)])
    for step in range(DECODED - 1):
        rows = [Row(slot, len(ids) + step, None, GREEDY, adapter=adapter) for slot, ids in enumerate(prompts)]
        for row, sampled in zip(rows, runner.submit(rows).wait(), strict=True):
            assert sampled is not None
            found[row.slot].append((sampled.token, sampled.logprob))
    for slot in range(len(prompts)):
        runner.release(slot)
    return found


def _decode_errors(
    oracle: Runner, ids: tuple[int, ...], decoded: list[tuple[int, float]], adapter: int | None
) -> NDArray[np.float64]:
    tokens = [token for token, _ in decoded]
    rows = log_softmax(oracle.logits((*ids, *tokens[:-1]), adapter)[len(ids) - 1 :])
    ours = np.array([logprob for _, logprob in decoded])
    errors: NDArray[np.float64] = np.abs(ours - rows[np.arange(len(tokens)), tokens])
    return errors


def _sample_slots(batch: int) -> list[int]:
    """The first, a middle and the last slot."""
    return sorted({0, batch // 2, batch - 1})
