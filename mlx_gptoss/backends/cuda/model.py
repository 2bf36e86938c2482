"""gpt-oss, top-down. Every function gets what it needs as arguments; the cache is the only thing that changes.

Legend: B rows, L tokens, D hidden, H query heads, K kv heads, E experts, A active experts, I intermediate,
T = B * L tokens, W window, C keys, V vocabulary.
Reference: openai/gpt-oss, gpt_oss/torch/model.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import ModelConfig
from .cache import Cache, FullCache, LayerCache, Span
from .layers import ExpertLinear, Linear, Matrix

# Attention scores held at once: 64 MB of float32 on a CPU, 256 MB on a GPU.
CPU_SCORES = 1 << 24
GPU_SCORES = 1 << 26


@dataclass(frozen=True)
class Rotary:
    """frequencies: float64 [32], radians per position.
    score_scale: 1/sqrt(64) times the squared YaRN concentration, which belongs on both q and k."""

    frequencies: Tensor
    score_scale: float

    def turn(self, positions: Tensor) -> Turn:
        """positions [B, L]; once a pass, for all layers."""
        angles = positions[:, None, :, None] * self.frequencies
        return Turn(angles.cos().float(), angles.sin().float())


@dataclass(frozen=True)
class Turn:
    """The rotation of each position: float32 [B, 1, L, 32]."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, heads, L, 64], whose pairs are (i, i + 32)"""
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], dim=-1).to(x.dtype)


@dataclass(frozen=True)
class Attention:
    """qkv: D -> (H + 2 K) * 64; out: H * 64 -> D; sinks float32 [H]."""

    config: ModelConfig
    qkv: Linear
    out: Linear
    sinks: Tensor
    scale: float

    def __call__(self, x: Tensor, cache: LayerCache, span: Span, turn: Turn) -> Tensor:
        c = self.config
        B, L, _ = x.shape
        q, k, v = torch.split(self.qkv(x), [c.q_size, c.kv_size, c.kv_size], dim=-1)
        q = turn(self._heads(q, c.num_attention_heads))  # [B, H, L, 64]
        k = turn(self._heads(k, c.num_key_value_heads))  # [B, K, L, 64]
        v = self._heads(v, c.num_key_value_heads)
        if L == 1:
            see = cache.append(k, v, span)
            y = self._attend(q, see.keys, see.values, see.mask)
        elif isinstance(cache, FullCache):
            y = self._causal(q, *cache.extend(k, v, span))
        else:
            y = self._banded(q, *cache.extend(k, v, span), past=min(span.starts[0], cache.window))
        return self.out(y.to(x.dtype).transpose(1, 2).reshape(B, L, c.q_size))

    def _causal(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One slot's L new queries over all C keys, the last L of which are their own; a block of queries at a time,
        each over the keys up to its end."""
        _, H, L, _ = q.shape
        C = keys.shape[2]
        size = max(1, (CPU_SCORES if q.device.type == "cpu" else GPU_SCORES) // (H * C))
        parts = []
        for start in range(0, L, size):
            block = q[:, :, start : start + size]
            first, end = C - L + start, C - L + start + block.shape[2]
            i = torch.arange(first, end, device=q.device)[:, None]
            mask = torch.arange(end, device=q.device)[None, :] <= i
            parts.append(self._attend(block, keys[:, :, :end], values[:, :, :end], mask))
        return torch.cat(parts, dim=2)

    def _banded(self, q: Tensor, keys: Tensor, values: Tensor, past: int) -> Tensor:
        """Sliding attention of one slot's L new queries over W past and L new keys, S = min(L, W) queries at a time.

        Work per token does not grow with L: block n of S queries sees only the keys [n S, n S + W + S).
        """
        L = q.shape[2]
        W = keys.shape[2] - L
        S = min(L, W)
        n = -(-L // S)
        if n > 1:
            pad = (0, 0, 0, n * S - L)
            q = _blocks(F.pad(q, pad), S)  # [n, H, S, 64]
            k, v = (_blocks(F.pad(a, pad), S) for a in (keys, values))  # [n + 1, K, S, 64], as S = W
            keys, values = (torch.cat([a[:-1], a[1:]], dim=2) for a in (k, v))  # [n, K, W + S, 64]
        # Query i stands at place W + i of its block's keys and sees the W places up to itself.
        i, j = torch.arange(S, device=q.device)[:, None], torch.arange(W + S, device=q.device)[None, :]
        mask = ((j > i) & (j <= i + W)).expand(n, 1, S, W + S)
        if past < W:  # the first block's oldest places lie before position 0
            exists = (torch.arange(n, device=q.device)[:, None] > 0) | (j >= W - past)
            mask = mask & exists[:, None, None, :]
        y = self._attend(q, keys, values, mask)  # [n, H, S, 64]
        return y.transpose(0, 1).reshape(1, y.shape[1], n * S, y.shape[3])[:, :, :L]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax attention with one more column a head, its sink, which is dropped afterwards. Float32 throughout.

        q [B, H, L, 64], k and v [B, K, C, 64], mask bool [..., L, C] -> float32 [B, H, L, 64]
        """
        B, H, L, dim = q.shape
        K, C = k.shape[1:3]
        packed = (q.float() * self.scale).reshape(B, K, H // K * L, dim)  # the heads that share keys, as one matrix
        scores = (packed @ k.float().mT).view(B, H, L, C)
        if mask is not None:
            scores.masked_fill_(~mask, -torch.inf)
        sinks = self.sinks[:, None, None]
        top = torch.maximum(scores.amax(dim=-1, keepdim=True), sinks)  # [B, H, L, 1]
        weights = scores.sub_(top).exp_()
        total = weights.sum(dim=-1, keepdim=True) + (sinks - top).exp()
        y = weights.view(B, K, H // K * L, C) @ v.float()
        return y.view(B, H, L, dim) / total

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        """[B, L, heads * 64] -> [B, heads, L, 64]"""
        B, L, _ = x.shape
        return x.view(B, L, heads, self.config.head_dim).transpose(1, 2)


@dataclass(frozen=True)
class MixtureOfExperts:
    """router: D -> E; gate_up: D -> 2 I per expert, gate rows first; down: I -> D per expert."""

    config: ModelConfig
    router: Linear
    gate_up: ExpertLinear
    down: ExpertLinear

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]. Each expert in use is decoded once, for all tokens that chose it."""
        tokens = x.view(-1, x.shape[-1])  # [T, D]
        experts, weights = self._route(tokens)  # [T, A] each
        A = experts.shape[1]
        order = experts.flatten().argsort(stable=True)  # pairs of token and expert, by expert
        counts = experts.flatten().bincount(minlength=self.config.num_local_experts)
        y = torch.zeros_like(tokens, dtype=torch.float32)
        start = 0
        for expert, count in enumerate(counts.tolist()):  # a GPU is waited for here
            if count:
                pairs = order[start : start + count]
                mine = pairs // A
                out = self._expert(tokens[mine], expert).float()  # [count, D]
                y.index_add_(0, mine, out * weights.flatten()[pairs, None])
                start += count
        return y.to(x.dtype).view(x.shape)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The A largest router logits' experts, and their softmax, in float32."""
        logits, experts = self.router(x).float().topk(self.config.num_experts_per_tok, dim=-1)
        return experts, logits.softmax(dim=-1)

    def _expert(self, x: Tensor, expert: int) -> Tensor:
        gate, up = self.gate_up.expert(expert)(x).chunk(2, dim=-1)
        hidden = clamped_swiglu(gate, up, self.config.swiglu_limit, self.config.swiglu_alpha)
        return self.down.expert(expert)(hidden)


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    """gate * sigmoid(alpha * gate) * (up + 1), gate clamped from above and up on both sides."""
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


@dataclass(frozen=True)
class Norm:
    """RMSNorm, in float32. weight: [D]."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


@dataclass(frozen=True)
class Block:
    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: MixtureOfExperts

    def __call__(self, x: Tensor, cache: LayerCache, span: Span, turn: Turn) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cache, span, turn)
        return x + self.mlp(self.mlp_norm(x))


@dataclass(frozen=True)
class GptOss:
    """One loaded model. dtype is that of activations and of the KV cache."""

    config: ModelConfig
    dtype: torch.dtype
    embed: Matrix
    rotary: Rotary
    blocks: tuple[Block, ...]
    norm: Norm
    lm_head: Linear

    def __call__(self, ids: Tensor, cache: Cache, span: Span) -> Tensor:
        """ids [B, L] -> hidden states before the final norm, [B, L, D]"""
        x = self.embed.at(ids).decode(self.dtype)
        turn = self.rotary.turn(span.positions)
        for block, layer_cache in zip(self.blocks, cache.layers, strict=True):
            x = block(x, layer_cache, span, turn)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states [..., D] -> float32 logits [..., V]"""
        return self.lm_head(self.norm(x)).float()


def _blocks(x: Tensor, size: int) -> Tensor:
    """[1, heads, n * size, 64] -> [n, heads, size, 64]"""
    _, heads, length, dim = x.shape
    return x.reshape(heads, length // size, size, dim).transpose(0, 1)
