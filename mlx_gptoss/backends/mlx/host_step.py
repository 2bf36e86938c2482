"""A layer of a decoding step in numpy, for a CPU: one token of each of several sequences.

Between products and attention a step has some forty small operations. MLX computes each graph on another thread, which
has to be woken and, on a busy machine, waits for a core. Here the caller computes them itself. model.py has the same
network.

Legend: B rows, D hidden, E experts, A active per token, I intermediate, P = B * A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .cache import FullCache, LayerCache, Span
from .cpu.attention import TokenAttention, Tokens
from .cpu.products import Products
from .host import HostMatrix, to_numpy
from .layers import Linear, Matrix
from .model import Block

Floats = NDArray[np.float32]


class Rotations:
    """Cosines and sines of positions. frequencies: radians per position, float64 [32]."""

    def __init__(self, frequencies: NDArray[np.float64]) -> None:
        self._frequencies = frequencies
        self._starts: tuple[int, ...] = ()
        self._turns = np.empty((2, 0))

    def of(self, starts: Sequence[int]) -> NDArray[Any]:
        """float32 [2, B, 1, 32], computed once a step."""
        if self._starts != tuple(starts):
            angles = np.multiply.outer(np.asarray(starts, np.float64), self._frequencies)[:, None]
            self._starts, self._turns = tuple(starts), np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
        return self._turns


def all_on_host(*matrices: Matrix) -> bool:
    return all(isinstance(matrix, HostMatrix) for matrix in matrices)


@dataclass(frozen=True)
class HostBlock(Block):
    """A Block whose matrices are all HostMatrix, of one process, without adapters. Several tokens of a row, and 8-bit
    keys and values, are computed as in Block."""

    products: Products
    rotations: Rotations

    def attend(
        self, x: mx.array, base: mx.array | None, cache: LayerCache, span: Span, last: int
    ) -> tuple[mx.array, mx.array | None]:
        """As Block."""
        if span.length > 1 or span.saves_inside or len(cache.arrays) > 1:
            return super().attend(x, base, cache, span, last)
        if isinstance(cache, FullCache):
            cache.reserve(span.end)
        kept = to_numpy(cache.arrays[0])  # of MLX, written in place: what has been computed is not computed again
        tokens, window = to_numpy(x)[:, 0], getattr(cache, "window", None)
        qkv = self._linear(self.attention.qkv, _norm(tokens, self._norms[0], self.config.rms_norm_eps))
        rows = Tokens(span.slots, span.starts, self.rotations.of(span.starts))
        heads = self._token_attention(qkv, kept, window, rows)
        return mx.array((tokens + self._linear(self.attention.out, heads))[:, None]), None

    def mix(
        self, x: mx.array, normed: mx.array | None, span: Span, next_bias: mx.array | None
    ) -> tuple[mx.array, mx.array | None]:
        """As Block; without the second result, which the next layer then computes."""
        if span.length > 1:
            return super().mix(x, normed, span, next_bias)
        residual, active = to_numpy(x)[:, 0], self.config.num_experts_per_tok
        tokens = _norm(residual, self._norms[1], self.config.rms_norm_eps)
        scores = self._linear(self.mlp.router, tokens)  # [B, E]
        chosen = np.argpartition(scores, -active, axis=-1)[:, -active:]
        weights = scores[np.arange(len(scores))[:, None], chosen]
        weights = np.exp(weights - weights.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        bias, width = self._bias, self._bias.shape[1] - residual.shape[1]
        if len(tokens) == 1:
            (experts,) = chosen
            gate_up = self._gather_token(self.mlp.gate_up.matrices, tokens, experts)
            hidden = self._swiglu(gate_up, bias[experts, :width])
            outputs = self._gather_token(self.mlp.down.matrices, hidden, experts)
            outputs += bias[experts, width:]
        else:
            order = np.argsort(chosen, axis=None, kind="stable")
            experts = chosen.ravel()[order]
            gate_up = self._gather(self.mlp.gate_up.matrices, tokens[order // active], experts)
            hidden = self._swiglu(gate_up, bias[experts, :width])
            outputs = np.empty((len(order), residual.shape[1]), np.float32)
            outputs[order] = self._gather(self.mlp.down.matrices, hidden, experts) + bias[experts, width:]
        mixed = (weights[:, None] @ outputs.reshape(*chosen.shape, -1))[:, 0]
        mixed += residual
        return mx.array(mixed[:, None]), None

    @cached_property
    def _token_attention(self) -> TokenAttention:
        sinks = to_numpy(self.attention.sinks).reshape(self.config.num_key_value_heads, -1, 1)
        return TokenAttention(self.products, sinks, self.attention.rotary.score_scale, self.config.head_dim)

    def _linear(self, linear: Linear, x: Floats) -> Floats:
        """x [B, D] -> [B, N]"""
        y = _joined([self.products.multiply(m.stored, x) for m in linear.matrices if isinstance(m, HostMatrix)])
        if linear.bias is not None:
            y += to_numpy(linear.bias)
        return y

    def _gather(self, matrices: Sequence[Matrix], x: Floats, experts: NDArray[Any]) -> Floats:
        """x [P, D] with experts in ascending order -> [P, N]"""
        return _joined([self.products.gather(m.stored, x, experts) for m in matrices if isinstance(m, HostMatrix)])

    def _gather_token(self, matrices: Sequence[Matrix], x: Floats, experts: NDArray[Any]) -> Floats:
        """x [P or 1, D] with experts of one token in any order -> [P, N]"""
        products = self.products
        return _joined([products.gather_token(m.stored, x, experts) for m in matrices if isinstance(m, HostMatrix)])

    def _swiglu(self, y: Floats, bias: Floats) -> Floats:
        """gate_up [P, 2 I] without bias [P, 2 I], changed in place -> [P, I]"""
        y += bias
        limit, width = self.config.swiglu_limit, y.shape[1] // 2
        gate, up = y[:, :width], y[:, width:]
        np.minimum(gate, limit, out=gate)
        np.minimum(up, limit, out=up)
        np.maximum(up, -limit, out=up)
        up += 1
        with np.errstate(over="ignore"):  # the sigmoid of a large negative gate is 0
            sigmoid: Floats = np.exp(gate * -self.config.swiglu_alpha)
        sigmoid += 1
        np.divide(gate, sigmoid, out=sigmoid)
        sigmoid *= up
        return sigmoid

    @cached_property
    def _norms(self) -> tuple[Floats, Floats]:
        return to_numpy(self.attention_norm), to_numpy(self.mlp_norm)

    @cached_property
    def _bias(self) -> Floats:
        return to_numpy(self.mlp.bias)


def _norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """RMSNorm of x [B, D] by weight [D]"""
    squares = np.einsum("bd,bd->b", x, x)[:, None]
    found: Floats = x * (1 / np.sqrt(squares / x.shape[1] + np.float32(eps)))
    found *= weight
    return found


def _joined(parts: list[Floats]) -> Floats:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
