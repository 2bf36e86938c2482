"""gpt-oss, top-down. Every function gets what it needs as arguments; the cache is the only thing that changes.

Legend: B rows, L tokens, D hidden, H query heads, K kv heads, E experts, A active experts, I intermediate,
T = B * L tokens, W window, V vocabulary.
Reference: openai/gpt-oss, gpt_oss/torch/model.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ...config import ModelConfig
from .cache import Cache, FullCache, LayerCache, RingCache, Span
from .layers import ExpertLinear, Linear, Matrix

SORT_FROM = 64  # token-expert pairs from which sorting them by expert pays: each expert is then read once


@dataclass(frozen=True)
class Rotary:
    """frequencies: float32 [32], positions per radian (what mx.fast.rope calls freqs).
    score_scale: 1/sqrt(64) times the squared YaRN concentration, which belongs on both q and k."""

    frequencies: mx.array
    score_scale: float

    def __call__(self, x: mx.array, offsets: mx.array) -> mx.array:
        """x [B, heads, L, 64], offsets [B]"""
        dims = x.shape[-1]
        return mx.fast.rope(x, dims, traditional=False, base=None, scale=1.0, offset=offsets, freqs=self.frequencies)


@dataclass(frozen=True)
class Attention:
    """qkv: D -> (H + 2 K) * 64; out: H * 64 -> D; sinks [H] in the activation dtype."""

    config: ModelConfig
    qkv: Linear
    out: Linear
    sinks: mx.array
    rotary: Rotary

    def __call__(self, x: mx.array, cache: LayerCache, span: Span) -> mx.array:
        c = self.config
        B, L, _ = x.shape
        q, k, v = mx.split(self.qkv(x), [c.q_size, c.q_size + c.kv_size], axis=-1)
        q = self._heads(q, c.num_attention_heads)  # [B, H, L, 64]
        k = self._heads(k, c.num_key_value_heads)  # [B, K, L, 64]
        v = self._heads(v, c.num_key_value_heads)
        q, k = self.rotary(q, span.offsets), self.rotary(k, span.offsets)
        if isinstance(cache, RingCache) and L > 1:
            y = self._banded(q, *cache.extend(k, v, span), past=min(span.starts[0], cache.window))
        else:
            see = cache.update(k, v, span) if isinstance(cache, FullCache) else cache.append(k, v, span)
            y = self._attend(q, see.keys, see.values, see.mask)
        return self.out(y.swapaxes(1, 2).reshape(B, L, c.q_size))

    def _banded(self, q: mx.array, keys: mx.array, values: mx.array, past: int) -> mx.array:
        """Sliding attention of one slot's L new queries over W past and L new keys, S = min(L, W) queries at a time.

        Work per token does not grow with L: block n of S queries sees only the keys [n S, n S + W + S).
        """
        L = q.shape[2]
        W = keys.shape[2] - L
        S = min(L, W)
        n = -(-L // S)
        if n > 1:
            pad = [(0, 0), (0, 0), (0, n * S - L), (0, 0)]
            q = _blocks(mx.pad(q, pad), S)  # [n, H, S, 64]
            k, v = (_blocks(mx.pad(a, pad), S) for a in (keys, values))  # [n + 1, K, S, 64], as S = W
            keys, values = (mx.concatenate([a[:-1], a[1:]], axis=2) for a in (k, v))  # [n, K, W + S, 64]
        # Query i stands at place W + i of its block's keys and sees the W places up to itself.
        i, j = mx.arange(S)[:, None], mx.arange(W + S)[None, :]
        mask = mx.broadcast_to((j > i) & (j <= i + W), (n, 1, S, W + S))
        if past < W:  # the first block's oldest places lie before position 0
            exists = (mx.arange(n)[:, None] > 0) | (j >= W - past)
            mask = mask & exists[:, None, None, :]
        y = self._attend(q, keys, values, mask)  # [n, H, S, 64]
        return y.swapaxes(0, 1).reshape(1, y.shape[1], n * S, y.shape[3])[:, :, :L]

    def _attend(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None) -> mx.array:
        scale = self.rotary.score_scale
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=self.sinks)

    def _heads(self, x: mx.array, heads: int) -> mx.array:
        """[B, L, heads * 64] -> [B, heads, L, 64]"""
        B, L, _ = x.shape
        return x.reshape(B, L, heads, self.config.head_dim).swapaxes(1, 2)


@dataclass(frozen=True)
class MixtureOfExperts:
    """router: D -> E; gate_up: D -> 2 I per expert, gate rows first; down: I -> D per expert."""

    config: ModelConfig
    router: Linear
    gate_up: ExpertLinear
    down: ExpertLinear

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, L, D] -> [B, L, D]"""
        B, L, D = x.shape
        x = x.reshape(B * L, D)
        experts, weights = self._route(x)  # [T, A] each
        if experts.size >= SORT_FROM:
            y = self._sorted(x, experts)
        else:
            y = self._expert(x[:, None, None, :], experts, sorted_experts=False)  # [T, A, 1, D]
        return (y.squeeze(-2) * weights[..., None]).sum(axis=1).reshape(B, L, D)

    def _route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Softmax over the A largest router logits, in float32."""
        active = self.config.num_experts_per_tok
        logits = self.router(x)  # [T, E]
        experts = mx.argpartition(logits, kth=-active, axis=-1)[..., -active:]
        weights = mx.softmax(mx.take_along_axis(logits, experts, axis=-1), axis=-1, precise=True)
        return experts, weights

    def _sorted(self, x: mx.array, experts: mx.array) -> mx.array:
        """The same with the T * A pairs ordered by expert, so that each expert's rows are adjacent."""
        T, A = experts.shape
        order = mx.argsort(experts.flatten())
        y = self._expert(x[order // A][:, None, :], experts.flatten()[order], sorted_experts=True)  # [T * A, 1, D]
        return y[mx.argsort(order)].reshape(T, A, 1, -1)

    def _expert(self, x: mx.array, experts: mx.array, *, sorted_experts: bool) -> mx.array:
        gate, up = mx.split(self.gate_up(x, experts, sorted_experts=sorted_experts), 2, axis=-1)
        hidden = clamped_swiglu(gate, up, self.config.swiglu_limit, self.config.swiglu_alpha)
        return self.down(hidden, experts, sorted_experts=sorted_experts)


def clamped_swiglu(gate: mx.array, up: mx.array, limit: float, alpha: float) -> mx.array:
    """gate * sigmoid(alpha * gate) * (up + 1), gate clamped from above and up on both sides."""
    gate = mx.minimum(gate, limit)
    up = mx.clip(up, -limit, limit)
    return gate * mx.sigmoid(alpha * gate) * (up + 1)


@dataclass(frozen=True)
class Block:
    config: ModelConfig
    attention_norm: mx.array
    attention: Attention
    mlp_norm: mx.array
    mlp: MixtureOfExperts

    def __call__(self, x: mx.array, cache: LayerCache, span: Span) -> mx.array:
        eps = self.config.rms_norm_eps
        x = x + self.attention(mx.fast.rms_norm(x, self.attention_norm, eps), cache, span)
        return x + self.mlp(mx.fast.rms_norm(x, self.mlp_norm, eps))


@dataclass(frozen=True)
class GptOss:
    """One loaded model. dtype is that of activations and of the KV cache."""

    config: ModelConfig
    dtype: mx.Dtype
    embed: Matrix
    blocks: tuple[Block, ...]
    norm: mx.array
    lm_head: Linear

    def __call__(self, ids: mx.array, cache: Cache, span: Span) -> mx.array:
        """ids [B, L] -> hidden states before the final norm, [B, L, D]"""
        x = self.embed.rows(ids, self.dtype)
        for block, layer_cache in zip(self.blocks, cache.layers, strict=True):
            x = block(x, layer_cache, span)
        return x

    def logits(self, x: mx.array) -> mx.array:
        """Hidden states [..., D] -> float32 logits [..., V]"""
        return self.lm_head(mx.fast.rms_norm(x, self.norm, self.config.rms_norm_eps)).astype(mx.float32)


def _blocks(x: mx.array, size: int) -> mx.array:
    """[1, heads, n * size, 64] -> [n, heads, size, 64]"""
    _, heads, length, dim = x.shape
    return x.reshape(heads, length // size, size, dim).swapaxes(0, 1)
