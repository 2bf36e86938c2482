"""The kernels draw the same tokens, with the same log-probabilities, as `sample_tokens` in sample.py."""

from __future__ import annotations

import pytest
import torch

from mlx_gptoss.backends.cuda import sample
from mlx_gptoss.backends.cuda.kernels import sample as kernels
from mlx_gptoss.sampling import Sampling


@pytest.mark.parametrize("vocabulary", [320, kernels.BLOCK, 2 * kernels.BLOCK + 7])
def test_draw_matches_sample_tokens(device, vocabulary):
    """Greedy and sampled rows in one batch. The last row is idle and does not write its slot."""
    samplings = [Sampling(temperature=0), Sampling(seed=1), Sampling(temperature=0.6, seed=2), Sampling()]
    states = [sample.SamplerState(seed) for seed in (0, 1, 2**64 - 1, 3)]
    positions = [7, 8, 9, -1]
    for seed in range(20):
        logits = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
        wanted = sample.sample_tokens(logits, samplings, states, positions)
        tokens, last = torch.full((4,), -1, device=device), torch.full((6,), -1, device=device)
        logprobs = torch.full((4,), torch.nan, device=device)
        kernels.draw(
            logits.to(device),
            torch.tensor([s.temperature for s in samplings], device=device),
            torch.tensor(sample.noise_keys([h.seed for h in states], positions), device=device),
            torch.tensor([3, 0, 5, 1], dtype=torch.int32, device=device),
            torch.tensor(positions, dtype=torch.int32, device=device),
            tokens,
            logprobs,
            last,
            kernels.scratch(4, vocabulary, device),
        )
        assert tokens.tolist() == wanted.tokens.tolist()
        assert torch.allclose(logprobs.cpu(), wanted.logprobs, atol=1e-5)
        a, b, c, _ = tokens.tolist()
        assert last.tolist() == [b, -1, -1, a, -1, c]


def test_ties_go_to_the_first_token(device):
    logits = torch.zeros(1, 2 * kernels.BLOCK, device=device)
    logits[0, [5, kernels.BLOCK + 1]] = 1.0
    tokens, logprobs = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, device=device)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    parts = kernels.scratch(1, 2 * kernels.BLOCK, device)
    last = torch.zeros(1, dtype=torch.int64, device=device)
    kernels.draw(logits, torch.zeros(1, device=device), last.clone(), zero, zero, tokens, logprobs, last, parts)
    assert tokens.tolist() == last.tolist() == [5]


@pytest.mark.cuda
def test_logits_that_are_not_numbers_draw_a_token_that_exists(device):
    """The embedding of the next step reads the row of this token. Triton's interpreter has no argmax of NaNs alone."""
    if device.type != "cuda":
        pytest.skip("torch finds no GPU")
    vocabulary = kernels.BLOCK + 3
    tokens, logprobs = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, device=device)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    last = torch.zeros(1, dtype=torch.int64, device=device)
    for temperature in (0.0, 1.0):
        logits = torch.full((1, vocabulary), torch.nan, device=device)
        parts = kernels.scratch(1, vocabulary, device)
        temperatures = torch.full((1,), temperature, device=device)
        kernels.draw(logits, temperatures, last.clone(), zero, zero, tokens, logprobs, last, parts)
        assert 0 <= int(tokens) < vocabulary
