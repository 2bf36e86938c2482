"""The mixture of experts against float64: one token and many, experts without tokens, idle rows, every Spec."""

from __future__ import annotations

import pytest
import torch

from mlx_gptoss.backends.cuda.kernels import moe as kernels
from mlx_gptoss.backends.cuda.kernels import routing
from mlx_gptoss.backends.cuda.layers import ExpertLinear, Experts

A, LIMIT, ALPHA, EPS = 4, 7.0, 1.702, 1e-5
D, I, E = 192, 64, 6
KINDS = ["bfloat16", "mxfp4", "nvfp4", "mxfp8", "fp8", "affine4", "affine8"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Layer:
    """One layer's experts on the device, and the same layer in float64."""

    def __init__(self, stored, device, kind: str, dtype=torch.float32, experts: int = E) -> None:
        self.gate_up, self.down = stored(kind, experts, 2 * I, D, seed=1), stored(kind, experts, D, I, seed=2)
        self.biases = random(experts, 2 * I, seed=3).to(dtype), random(experts, D, seed=4).to(dtype)
        gate_up, down = (
            ExpertLinear((part.matrix,), bias.to(device))
            for part, bias in zip((self.gate_up, self.down), self.biases, strict=True)
        )
        self.experts = Experts(gate_up, down, A, LIMIT, ALPHA, range(experts))

    def oracle(self, x: torch.Tensor, normed: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        scores, chosen = logits.double().cpu().topk(A, dim=-1)
        weights = scores.softmax(dim=-1)
        y = x.double().cpu().clone()
        for t in range(len(x)):
            for weight, e in zip(weights[t], chosen[t].tolist(), strict=True):
                both = self.gate_up.values[e] @ normed[t].double().cpu() + self.biases[0][e].double()
                gate, up = both[:I].clamp(max=LIMIT), both[I:].clamp(-LIMIT, LIMIT)
                hidden = gate * torch.sigmoid(ALPHA * gate) * (up + 1)
                y[t] += weight * (self.down.values[e] @ hidden + self.biases[1][e].double())
        return y


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double().cpu()
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double().cpu()


def nan(*shape: int, device, dtype=torch.float32) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def empty_groups(tokens: int, device, experts: int = E) -> routing.Groups:
    """Groups filled with values that must not be read."""
    pairs = tokens * A
    order, starts = (torch.full((n,), 1 << 20, dtype=torch.int32, device=device) for n in (pairs, experts + 1))
    return routing.Groups(order, starts, nan(pairs, device=device))


@pytest.mark.parametrize("kind", ["bfloat16", "affine8"])
@pytest.mark.parametrize("with_norm", [False, True])
def test_router(stored, close, device, kind, with_norm):
    weight = stored(kind, E, D)
    x, gain, bias = random(3, D), random(D, seed=1), random(E, seed=2)
    out = nan(3, E, device=device)
    norm = gain.to(device) if with_norm else None
    routing.router(x.to(device), weight.matrix, bias.to(device), out, norm=norm, eps=EPS)
    wanted = rms_norm(x, gain) if with_norm else x.double()
    close(out, wanted @ weight.values.T + bias.double(), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_token(stored, close, device, kind):
    layer = Layer(stored, device, kind)
    x, gain, logits = random(1, D).to(device), random(D, seed=5).to(device), random(1, E, seed=6).to(device)
    wanted = layer.oracle(x, rms_norm(x, gain), logits)
    kernels.forward_one_token(x, logits, layer.experts, nan(A, I, device=device), gain, EPS)
    close(x, wanted, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [2, 17])
def test_many_tokens(stored, close, device, kind, tokens):
    """Every token chooses the first expert, none the last. The second row is idle and stays unchanged."""
    layer = Layer(stored, device, kind)
    x, normed, logits = random(tokens, D), random(tokens, D, seed=5), random(tokens, E, seed=6)
    logits[:, 0], logits[:, E - 1] = 9.0, -9.0
    positions = torch.arange(tokens, dtype=torch.int32)
    positions[1] = -1
    out, groups = x.clone().to(device), empty_groups(tokens, device)
    routing.sort_pairs(logits.to(device), positions.to(device), A, groups)
    scratch = nan(tokens * A, I, device=device), nan(tokens * A, D, device=device)
    kernels.forward_grouped(out, normed.to(device), groups, layer.experts, *scratch, out, positions.to(device))
    wanted = layer.oracle(x, normed, logits)
    wanted[1] = x[1]
    close(out, wanted, 1e-4)
    assert groups.starts.tolist()[-2:] == [4 * (tokens - 1)] * 2


@pytest.mark.parametrize("tokens", [1, 150])
def test_prefill(stored, close, device, tokens):
    """Pairs sorted by torch; with 150 tokens, expert 2 has more of them than one block holds."""
    layer = Layer(stored, device, "mxfp4")
    x, normed, logits = random(tokens, D), random(tokens, D, seed=5), random(tokens, E, seed=6)
    logits[:, 2] = 9.0
    out = nan(tokens, D, device=device)
    scratch = nan(tokens * A, I, device=device), nan(tokens * A, D, device=device)
    groups = routing.sort_many_pairs(logits.to(device), A)
    kernels.forward_grouped(x.to(device), normed.to(device), groups, layer.experts, *scratch, out)
    close(out, layer.oracle(x, normed, logits), 1e-4)


@pytest.mark.parametrize("tokens", [1, 5])
def test_bfloat16_activations(stored, close, device, tokens):
    layer = Layer(stored, device, "mxfp4", torch.bfloat16)
    x, logits = random(tokens, D).bfloat16(), random(tokens, E, seed=6)
    gain, hidden = torch.ones(D).bfloat16(), nan(tokens * A, I, device=device, dtype=torch.bfloat16)
    normed = rms_norm(x, gain).bfloat16()
    out = x.clone().to(device)
    if tokens == 1:
        kernels.forward_one_token(out, logits.to(device), layer.experts, hidden, gain.to(device), EPS)
    else:
        groups = routing.sort_many_pairs(logits.to(device), A)
        parts = nan(tokens * A, D, device=device, dtype=torch.bfloat16)
        kernels.forward_grouped(out, normed.to(device), groups, layer.experts, hidden, parts, out)
    close(out, layer.oracle(x, normed, logits), 2e-2)


@pytest.mark.parametrize("experts", [6, 32, 128])
@pytest.mark.parametrize("tokens", [1, 2, 33, 64])
def test_sorting_is_stable_and_complete(device, tokens, experts):
    logits = random(tokens, experts, seed=tokens).to(device)
    groups = empty_groups(tokens, device, experts)
    routing.sort_pairs(logits, torch.zeros(tokens, dtype=torch.int32, device=device), A, groups)
    wanted = routing.sort_many_pairs(logits, A)
    assert torch.equal(groups.order, wanted.order) and torch.equal(groups.starts, wanted.starts)
    assert torch.allclose(groups.weights, wanted.weights, atol=1e-6)
