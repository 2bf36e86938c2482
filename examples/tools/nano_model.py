"""The bundled model in PyTorch, for training only.

Legend: B rows, L tokens, T = B * L, D hidden, H query heads, K kv heads, E experts, A active experts, I intermediate,
V vocabulary.
Every training step runs inside `on_grid`, with the experts' weights rounded to MXFP4 (a straight-through estimator), so
the exported file loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from requires import torch
from torch import Tensor, nn
from torch.nn import functional as F

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@dataclass(frozen=True)
class Shape:
    vocab: int
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    experts: int = 8
    active: int = 4
    intermediate: int = 128
    window: int = 128
    head_dim: int = 64


def exponents(blocks: Tensor) -> Tensor:
    """The exponents e [..., 1] such that the largest magnitude of each block [..., 32] is in [4, 8) * 2**e."""
    return torch.frexp(blocks.abs().amax(-1, keepdim=True).clamp_min(2.0**-100)).exponent - 3


def mxfp4_round(w: Tensor) -> Tensor:
    """w [..., in] with every block of 32 rounded to MXFP4 values; values on the MXFP4 grid stay as they are."""
    blocks = w.unflatten(-1, (-1, 32))
    scale = torch.exp2(exponents(blocks).float())
    x = blocks / scale
    magnitude = x.abs()
    spacing = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return ((x / spacing).round_() * spacing).clamp_(-6, 6).mul_(scale).flatten(-2)


def mxfp4_codes(w: Tensor) -> tuple[Tensor, Tensor]:
    """(codes uint8 [..., in], e8m0 scales uint8 [..., in/32]) of w [..., in], rounded as `mxfp4_round` does."""
    blocks = mxfp4_round(w).unflatten(-1, (-1, 32))
    exponent = exponents(blocks)
    codes = torch.searchsorted(E2M1, torch.ldexp(blocks.abs(), -exponent)) + 8 * (blocks < 0)
    return codes.flatten(-2).to(torch.uint8), (exponent.squeeze(-1) + 127).to(torch.uint8)


def mxfp4_values(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 weights [..., in] that `mxfp4_codes` wrote as codes [..., in] and e8m0 scales [..., in/32]."""
    magnitude = E2M1[(codes & 7).long()]
    values = torch.where(codes < 8, magnitude, -magnitude).unflatten(-1, (-1, 32))
    return torch.ldexp(values, scales.int().unsqueeze(-1) - 127).flatten(-2)


@contextmanager
def on_grid(model: Nano) -> Iterator[None]:
    """Round the experts' weights to MXFP4 inside the block; gradients computed there apply to the exact weights."""
    weights = [w for layer in model.layers for w in (layer.mlp.gate_up, layer.mlp.down)]
    exact = [w.data for w in weights]
    for w in weights:
        w.data = mxfp4_round(w.data)
    yield
    for w, data in zip(weights, exact, strict=True):
        w.data = data


def yarn(head_dim: int, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [L, head_dim / 2] of gpt-oss's YaRN: theta 150000, factor 32, correction range not rounded."""
    theta, factor, original = 150000.0, 32.0, 4096
    half = np.arange(head_dim // 2, dtype=np.float64)
    plain = theta ** (-2 * half / head_dim)

    def dimension(rotations: float) -> float:
        return float(head_dim * np.log(original / (rotations * 2 * np.pi)) / (2 * np.log(theta)))

    low, high = dimension(32.0), dimension(1.0)
    ramp = np.clip((half - low) / (high - low), 0, 1)
    angles = np.outer(np.arange(length), plain / factor * ramp + plain * (1 - ramp))
    scale = 0.1 * np.log(factor) + 1
    return torch.tensor(np.cos(angles) * scale).float(), torch.tensor(np.sin(angles) * scale).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation of x [B, H, L, 64]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.q_proj = nn.Linear(s.hidden, s.heads * s.head_dim)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim)
        self.o_proj = nn.Linear(s.heads * s.head_dim, s.hidden)
        self.sinks = nn.Parameter(torch.zeros(s.heads))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        s, (rows, length, _) = self.shape, x.shape
        q = self.q_proj(x).view(rows, length, s.heads, s.head_dim).transpose(1, 2)  # [B, H, L, 64]
        k = self.k_proj(x).view(rows, length, s.kv_heads, s.head_dim).transpose(1, 2)  # [B, K, L, 64]
        v = self.v_proj(x).view(rows, length, s.kv_heads, s.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin) * s.head_dim**-0.5, rotate(k, cos, sin)
        groups = s.heads // s.kv_heads
        q = q.reshape(rows, s.kv_heads, groups * length, s.head_dim)  # the query heads of one kv head are adjacent
        scores = (q @ k.transpose(-1, -2)).view(rows, s.heads, length, length) + mask
        sink = self.sinks.view(1, -1, 1, 1)
        top = torch.maximum(scores.amax(-1, keepdim=True), sink).detach()
        weights = torch.exp(scores - top)
        weights = weights / (weights.sum(-1, keepdim=True) + torch.exp(sink - top))
        out = weights.view(rows, s.kv_heads, groups * length, length) @ v
        out = out.view(rows, s.heads, length, s.head_dim).transpose(1, 2).reshape(rows, length, -1)
        return self.o_proj(out)


class Experts(nn.Module):
    """Router and experts. Gate and up are interleaved as in the checkpoint: even rows gate, odd rows up."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.router = nn.Linear(s.hidden, s.experts)
        self.gate_up = nn.Parameter(torch.randn(s.experts, 2 * s.intermediate, s.hidden) * s.hidden**-0.5)
        self.gate_up_bias = nn.Parameter(torch.zeros(s.experts, 2 * s.intermediate))
        self.down = nn.Parameter(torch.randn(s.experts, s.hidden, s.intermediate) * 0.3 * s.intermediate**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(s.experts, s.hidden))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] -> (output [T, D], load imbalance of the experts, 1 when even)."""
        s = self.shape
        logits = self.router(x)  # [T, E]
        top, chosen = logits.topk(s.active, -1)
        weights = top.softmax(-1)  # [T, A]
        share = torch.zeros_like(logits).scatter(-1, chosen, weights)  # [T, E]
        # Of few experts, computing all in two large products is faster than a product per expert.
        out = self.sparse(x, chosen, weights) if s.experts > 2 * s.active else self.dense(x, share)
        used = (share > 0).float().mean(0) / s.active
        return out, s.experts * (used * logits.softmax(-1).mean(0)).sum()

    def dense(self, x: Tensor, share: Tensor) -> Tensor:
        """All experts on x [T, D], summed with the weights share [T, E], zero where a token did not choose one."""
        s = self.shape
        both = F.linear(x, self.gate_up.view(-1, s.hidden), self.gate_up_bias.view(-1))
        act = swiglu(both.view(-1, s.experts, 2 * s.intermediate)) * share.unsqueeze(-1)  # [T, E, I]
        return act.flatten(1) @ self.down.transpose(1, 2).reshape(-1, s.hidden) + share @ self.down_bias

    def sparse(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The experts chosen [T, A] on x [T, D], summed with weights [T, A]: a product for each expert's tokens."""
        order = chosen.flatten().argsort()
        counts = chosen.flatten().bincount(minlength=self.shape.experts).tolist()
        tokens = order // self.shape.active
        both = linear_each(x[tokens], counts, self.gate_up, self.gate_up_bias)
        out = linear_each(swiglu(both), counts, self.down, self.down_bias)
        return torch.zeros_like(x).index_add(0, tokens, (out * weights.flatten()[order, None]).to(x.dtype))


def linear_each(x: Tensor, counts: list[int], weight: Tensor, bias: Tensor) -> Tensor:
    """x [N, in], rows sorted by expert -> [N, out], where expert e of weight [E, out, in] takes the next counts[e]."""
    parts = zip(x.split(counts), weight.unbind(), bias.unbind(), strict=True)
    return torch.cat([F.linear(part, w, b) for part, w, b in parts])


def swiglu(both: Tensor) -> Tensor:
    """gpt-oss's clamped SwiGLU of [..., 2I], gate and up interleaved."""
    gate, up = both.unflatten(-1, (-1, 2)).unbind(-1)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


class Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(s.hidden), Norm(s.hidden)
        self.self_attn, self.mlp = Attention(s), Experts(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        out, imbalance = self.mlp(self.post_attention_layernorm(x).flatten(0, 1))
        return x + out.view_as(x), imbalance


class Nano(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.embed_tokens = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = Norm(s.hidden)
        self.lm_head = nn.Linear(s.hidden, s.vocab, bias=False)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        for layer in self.layers:
            nn.init.normal_(layer.self_attn.o_proj.weight, std=0.3 * (s.heads * s.head_dim) ** -0.5)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B, L] -> (normalized hidden states [B, L, D], the layers' mean load imbalance)."""
        length = ids.shape[1]
        cos, sin = yarn(self.shape.head_dim, length)
        distance = torch.arange(length).view(-1, 1) - torch.arange(length)
        full = torch.zeros(length, length).masked_fill(distance < 0, -1e30)
        sliding = full.masked_fill(distance >= self.shape.window, -1e30)
        x, total = self.embed_tokens(ids), torch.zeros(())
        for i, layer in enumerate(self.layers):
            x, imbalance = layer(x, cos, sin, full if i % 2 else sliding)
            total = total + imbalance
        return self.norm(x), total / len(self.layers)
