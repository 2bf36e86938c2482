"""The sampler: sampling.py's chain on the device, for all rows of a step at once.

Legend: B rows, V vocabulary. A batch has rows of different requests. Each stage runs only if a row needs it and does
not change the other rows, so a request samples the same tokens in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...sampling import Sampling
from ..base import allowed_tokens
from .transfer import to_device

# SplitMix64 (Steele, Lea and Flood 2014; public domain reference code): the increment and two multipliers.
GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
UNIFORM_BITS = 40


@dataclass
class SamplerState:
    """The sampler state of one slot.

    seed: of the slot's random stream, 64 bits. seen: bool [V], the tokens of the prompt and the output. counts: float32
    [V], how often each token is in the output. Both are None unless the request uses penalties.
    """

    seed: int
    seen: Tensor | None = None
    counts: Tensor | None = None

    @staticmethod
    def begin(
        sampling: Sampling, prompt: Sequence[int], seed: int, vocabulary: int, device: torch.device | str = "cpu"
    ) -> SamplerState:
        state = SamplerState(seed)
        if sampling.penalized:
            state.seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            state.seen.index_fill_(0, to_device(torch.tensor(prompt, dtype=torch.int64), state.seen.device), True)
            state.counts = torch.zeros(vocabulary, dtype=torch.float32, device=device)
        return state

    def add(self, token: Tensor) -> None:
        """Count a sampled token, int64 [1]."""
        if self.seen is not None and self.counts is not None:
            self.seen.index_fill_(0, token, True)
            self.counts.index_add_(0, token, torch.ones_like(token, dtype=torch.float32))


@dataclass(frozen=True)
class SamplerOutput:
    """tokens: int64 [B]. logprobs: float32 [B]. top_ids, top_logprobs: [B, n], where n is the maximum of the rows'
    `logprobs` options; None if it is 0."""

    tokens: Tensor
    logprobs: Tensor
    top_ids: Tensor | None
    top_logprobs: Tensor | None


def sample_tokens(
    logits: Tensor,
    samplings: Sequence[Sampling],
    states: Sequence[SamplerState],
    positions: Sequence[int],
    masks: Sequence[bytes | None] = (),
) -> SamplerOutput:
    """Sample one token per row from raw logits, float32 [B, V].

    positions: the index of this draw in each row's random stream. masks: Row.mask of each row; empty if no row has one.
    """
    shaped = _penalize(_bias(_mask(logits, masks), samplings), samplings, states)
    tokens = shaped.argmax(dim=-1)
    if not all(s.greedy for s in samplings):
        noise = gumbel([h.seed for h in states], positions, logits.shape[-1], logits.device)
        drawn = (_filter(shaped, samplings) + noise).argmax(dim=-1)
        tokens = torch.where(_column(samplings, "temperature", logits)[:, 0] > 0, drawn, tokens)
    for row, state in enumerate(states):
        state.add(tokens[row : row + 1])
    logprobs = logits - logits.logsumexp(dim=-1, keepdim=True)
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
    top_n = max(s.logprobs for s in samplings)
    if not top_n:
        return SamplerOutput(tokens, chosen, None, None)
    values, ids = logprobs.topk(top_n, dim=-1)
    return SamplerOutput(tokens, chosen, ids, values)


def gumbel(seeds: Sequence[int], positions: Sequence[int], vocabulary: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise, float32 [B, V]. The argmax of logits plus this noise is a sample from their softmax.

    Each number depends only on the row's seed, the row's position and the token, on any device. A seed therefore gives
    the same samples in any batch.
    """
    keys = noise_keys(seeds, positions)
    steps = torch.arange(vocabulary, device=device) * _signed(GOLDEN)
    bits = _mix(to_device(torch.tensor(keys), device)[:, None] + steps)
    uniform = (_shift(bits, 64 - UNIFORM_BITS).float() + 0.5) * 2.0**-UNIFORM_BITS
    # log1p is exact for small numbers. They become the largest noise, which decides the argmax.
    return -torch.log(-torch.log1p(-uniform))


def noise_keys(seeds: Sequence[int], positions: Sequence[int]) -> list[int]:
    """The initial SplitMix64 state of each row's noise, as int64."""
    return [_signed(_mixed(_mixed(seed) + position * GOLDEN)) for seed, position in zip(seeds, positions, strict=True)]


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64, whose multiplication wraps like that of unsigned integers."""
    z = (z ^ _shift(z, 30)) * _signed(MIX_1)
    z = (z ^ _shift(z, 27)) * _signed(MIX_2)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's `>>` copies the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(z: int) -> int:
    """_mix for one unsigned Python integer."""
    z &= 2**64 - 1
    z = (z ^ z >> 30) * MIX_1 & 2**64 - 1
    z = (z ^ z >> 27) * MIX_2 & 2**64 - 1
    return z ^ z >> 31


def _signed(z: int) -> int:
    """The int64 with the same 64 bits."""
    return z - 2**64 if z >= 2**63 else z


def _mask(logits: Tensor, masks: Sequence[bytes | None]) -> Tensor:
    if not any(masks):
        return logits
    allowed = to_device(torch.from_numpy(allowed_tokens(masks, logits.shape[-1])), logits.device)
    return logits.masked_fill(~allowed, -torch.inf)


def _bias(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    entries = [(row, t, b) for row, s in enumerate(samplings) for t, b in (s.logit_bias or {}).items()]
    if not entries:
        return logits
    rows, tokens, biases = (to_device(torch.tensor(column), logits.device) for column in zip(*entries, strict=True))
    return logits.index_put((rows, tokens), biases.to(logits.dtype), accumulate=True)


def _penalize(logits: Tensor, samplings: Sequence[Sampling], states: Sequence[SamplerState]) -> Tensor:
    if not any(s.penalized for s in samplings):
        return logits
    return torch.stack([_penalize_row(*row) for row in zip(logits, samplings, states, strict=True)])


def _penalize_row(logits: Tensor, sampling: Sampling, state: SamplerState) -> Tensor:
    if state.seen is None or state.counts is None:
        return logits
    repeated = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    logits = torch.where(state.seen, repeated, logits)
    present = (state.counts > 0).float()
    return logits - sampling.presence_penalty * present - sampling.frequency_penalty * state.counts


def _filter(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Logits divided by the temperature, with every token outside top_k, top_p and min_p at -inf."""
    temperature = _column(samplings, "temperature", logits)
    logits = logits / torch.where(temperature > 0, temperature, 1.0)
    if any(s.top_k or s.top_p < 1.0 for s in samplings):
        logits = _top(logits, samplings)
    if any(s.min_p for s in samplings):
        probabilities = logits.softmax(dim=-1)
        floor = _column(samplings, "min_p", logits) * probabilities.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probabilities < floor, -torch.inf)
    return logits


def _top(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """top_k, then top_p over the remaining tokens: a token is kept if the more likely tokens add up to less than
    top_p."""
    vocabulary = logits.shape[-1]
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    top_k = to_device(torch.tensor([[min(s.top_k or vocabulary, vocabulary)] for s in samplings]), logits.device)
    ranked = ranked.masked_fill(torch.arange(vocabulary, device=logits.device) >= top_k, -torch.inf)
    probabilities = ranked.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    top_p = _column(samplings, "top_p", logits)
    ranked = ranked.masked_fill((before >= top_p) & (top_p < 1.0), -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ranked)


def _column(samplings: Sequence[Sampling], name: str, like: Tensor) -> Tensor:
    """One sampling option of all rows, float32 [B, 1]."""
    values = torch.tensor([[float(getattr(s, name))] for s in samplings], dtype=torch.float32)
    return to_device(values, like.device)
