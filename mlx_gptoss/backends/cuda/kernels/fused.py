"""Operations in Triton: what a GPU computes a prefill with. Decoding has a path of its own, decode.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ....config import ModelConfig
from ....errors import CheckpointError
from ..layers import Experts, Matrix, Turn
from ..plain import Plain
from . import attention, linear, moe, routing

FEW_QUERIES, MANY_KEYS = 64, 4096


class Fused(Plain):
    """`single`, which only one-token prompts need, is plain torch."""

    def __init__(self) -> None:
        super().__init__(threads=1)

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raise CheckpointError for a model that the kernels are not written for; every gpt-oss fits them."""
        A = config.num_experts_per_tok
        if config.head_dim != 64 or A & (A - 1) or config.num_attention_heads % config.num_key_value_heads:
            raise CheckpointError(
                f"the CUDA kernels are for heads of 64 and a power of two of experts a token, not {config.head_dim} "
                f"and {A}; use --device cpu"
            )

    def product(self, x: Tensor, matrix: Matrix) -> Tensor:
        """x [T, D] times a matrix [N, D], transposed -> [T, N]"""
        return linear.product(x, matrix)

    def turn(self, x: Tensor, turn: Turn) -> Tensor:
        """x [1, L, heads * 64] -> rotated [1, heads, L, 64], a view of [L, heads, 64]"""
        return linear.turn(x[0], turn.cos[0, 0], turn.sin[0, 0]).transpose(0, 1)[None]

    def causal(self, q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, scale: float) -> Tensor:
        """[1, H, L, 64] over [1, K, C, 64] -> [1, L, H * 64]. A short message after a long context has too few queries
        to fill a GPU; there each is a row of a decoding step, whose keys are split among programs."""
        L, C = q.shape[2], keys.shape[2]
        if L <= FEW_QUERIES and C > MANY_KEYS:
            return _split(q, keys, values, sinks, scale)
        return _flash(q, keys, values, sinks, scale, window=None, first=0)

    def banded(self, q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, scale: float, past: int) -> Tensor:
        """[1, H, L, 64] over [1, K, W + L, 64] -> [1, L, H * 64]"""
        W = keys.shape[2] - q.shape[2]
        return _flash(q, keys, values, sinks, scale, window=W, first=W - past)

    def mixture(self, x: Tensor, scores: Tensor, experts: Experts) -> Tensor:
        """Pairs of token and expert sorted by expert, each expert's on tensor cores."""
        (T, D), A = x.shape, experts.active
        inner = experts.down.matrices[0].shape[-1]
        hidden, parts, out = (torch.empty(shape, dtype=x.dtype, device=x.device) for shape in _shapes(T, A, inner, D))
        groups = routing.sort_many(scores, A)
        if len(experts.held) < scores.shape[1]:
            parts.zero_()  # of experts that other ranks hold
            groups = groups.held(experts.held)
        moe.mixture(None, x, groups, experts, hidden, parts, out)
        return out


def _shapes(T: int, A: int, inner: int, D: int) -> tuple[tuple[int, int], ...]:
    return (T * A, inner), (T * A, D), (T, D)


def _split(q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, scale: float) -> Tensor:
    (_, H, L, dim), (_, K, C, _) = q.shape, keys.shape
    positions = torch.arange(C - L, C, dtype=torch.int32, device=q.device)
    out = torch.empty((L, H * dim), dtype=q.dtype, device=q.device)
    scratch = attention.decode_scratch(L, H, K, C, q.dtype, q.device)
    rows = q[0].transpose(0, 1).contiguous()
    slots = torch.zeros_like(positions)  # `keys` is one slot's
    attention.decode_attention(rows, keys, values, slots, positions, sinks, scale, out, scratch, ring=False)
    return out[None]


def _flash(
    q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, scale: float, *, window: int | None, first: int
) -> Tensor:
    _, H, L, dim = q.shape
    out = torch.empty((L, H, dim), dtype=q.dtype, device=q.device)
    attention.prefill_attention(q[0].transpose(0, 1), keys[0], values[0], sinks, scale, out, window=window, first=first)
    return out.view(1, L, H * dim)
