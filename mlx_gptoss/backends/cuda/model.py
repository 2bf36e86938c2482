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
from .adapters import LowRank, add_linear, expert_adapters
from .cache import Cache, FullCache, LayerCache, Span
from .layers import Experts, Linear, Operations, Rotation
from .matrices import Matrix
from .plain import heads_of
from .ranks import Ranks


@dataclass(frozen=True)
class Rotary:
    """frequencies: float64 [32], radians per position.
    score_scale: 1/sqrt(64) times the squared YaRN concentration, which applies to both q and k."""

    frequencies: Tensor
    score_scale: float

    def rotation(self, positions: Tensor) -> Rotation:
        """The rotation at positions [B, L], computed once per pass for all layers."""
        angles = positions[:, None, :, None] * self.frequencies
        return Rotation(angles.cos().float(), angles.sin().float())


@dataclass(frozen=True)
class Attention:
    """qkv: D -> (H + 2 K) * 64; out: H * 64 -> D; sinks float32 [H]. H and K are this rank's; only the first
    rank has out's bias. qkv_adapters, out_adapters: what each adapter adds to them."""

    config: ModelConfig
    ops: Operations
    ranks: Ranks
    qkv: Linear
    out: Linear
    sinks: Tensor
    scale: float
    qkv_adapters: tuple[LowRank | None, ...] = ()
    out_adapters: tuple[LowRank | None, ...] = ()

    def __call__(self, x: Tensor, cache: LayerCache, span: Span, rotation: Rotation) -> Tensor:
        c = self.config
        qkv = add_linear(self.qkv(x), x, self.qkv_adapters, span.adapters)
        qk, v = torch.split(qkv, [c.q_size + c.kv_size, c.kv_size], dim=-1)
        rotated = self.ops.rotate(qk, rotation)  # [B, H + K, L, 64]
        q, k = rotated[:, : c.num_attention_heads], rotated[:, c.num_attention_heads :]
        v = heads_of(v, c.head_dim)  # [B, K, L, 64]
        if span.length == 1:
            see = cache.append(k, v, span)
            y = self.ops.attend_one(q, see.keys, see.values, see.mask, self.sinks, self.scale)
        elif isinstance(cache, FullCache):
            y = self.ops.attend_causal(q, *cache.extend(k, v, span), self.sinks, self.scale)
        else:
            past = min(span.starts[0], cache.window)
            y = self.ops.attend_sliding(q, *cache.extend(k, v, span), self.sinks, self.scale, past)
        return self.ranks.sum(add_linear(self.out(y), y, self.out_adapters, span.adapters))


@dataclass(frozen=True)
class MixtureOfExperts:
    """router: D -> E, in float32. experts: those that this rank holds. The adapters: what each one adds to them."""

    ops: Operations
    ranks: Ranks
    router: Linear
    experts: Experts
    router_adapters: tuple[LowRank | None, ...] = ()
    gate_up_adapters: tuple[LowRank | None, ...] = ()
    down_adapters: tuple[LowRank | None, ...] = ()

    def __call__(self, x: Tensor, span: Span) -> Tensor:
        """x [B, L, D] -> [B, L, D]"""
        tokens = x.view(-1, x.shape[-1])  # [T, D]; several rows have one token each
        scores = add_linear(self.router(tokens), tokens, self.router_adapters, span.adapters)
        adapters = tuple(expert_adapters(self.gate_up_adapters, self.down_adapters, span.adapters))
        return self.ranks.sum(self.ops.mixture(tokens, scores, self.experts, adapters)).view(x.shape)


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

    def attend(self, x: Tensor, cache: LayerCache, span: Span, rotation: Rotation) -> Tensor:
        """x [B, L, D] -> the same shape"""
        return x + self.attention(self.attention_norm(x), cache, span, rotation)

    def mix(self, x: Tensor, span: Span) -> Tensor:
        """x [B, L, D] -> the same shape, through the experts"""
        return x + self.mlp(self.mlp_norm(x), span)


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
    ranks: Ranks

    def __call__(self, ids: Tensor, cache: Cache, span: Span) -> Tensor:
        """ids [B, L] -> hidden states before the final norm, [B, L, D]"""
        return self.run(range(2 * len(self.blocks)), self.embedded(ids), cache, span)

    def embedded(self, ids: Tensor) -> Tensor:
        """ids [B, L] -> [B, L, D], the input of the first stage"""
        return self.embed.at(ids).decode(self.dtype)

    def run(self, stages: range, x: Tensor, cache: Cache, span: Span) -> Tensor:
        """x [B, L, D] through consecutive stages: stage 2 n is the attention of layer n, stage 2 n + 1 its experts."""
        rotation = self.rotary.rotation(span.positions)
        for stage in stages:
            block, layer_cache = self.blocks[stage // 2], cache.layers[stage // 2]
            x = block.mix(x, span) if stage % 2 else block.attend(x, layer_cache, span, rotation)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states [..., D] -> float32 logits [..., V]"""
        return self.ranks.gather(self.lm_head(self.norm(x)), self.config.vocab_size)
