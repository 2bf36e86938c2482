"""Chains of elementwise operations between the products, each one launch where MLX compiles them.

MLX compiles for a GPU at run time. On a CPU it would need a C++ compiler on the user's machine and a second per chain,
and a launch costs next to nothing, so the same functions run uncompiled there.

Legend: T tokens, A experts active per token, D hidden, I intermediate, B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx


def add(product: mx.array, bias: mx.array, residual: mx.array) -> mx.array:
    """product + bias + residual"""
    return product + bias + residual


def swiglu(
    gate: mx.array, up: mx.array, bias_gate: mx.array, bias_up: mx.array, limit: float, alpha: float
) -> mx.array:
    """gate * sigmoid(alpha * gate) * (up + 1), each with its bias, gate clamped from above and up on both sides."""
    gate = mx.minimum(gate + bias_gate, limit)
    up = mx.clip(up + bias_up, -limit, limit)
    return gate * mx.sigmoid(alpha * gate) * (up + 1)


def combine(
    residual: mx.array, outputs: Sequence[mx.array], biases: Sequence[mx.array], weights: Sequence[mx.array]
) -> mx.array:
    """residual + sum of weight * (output + bias) over the A experts: A arrays each, [T, D], [T, D] and [T, 1].

    Summed in float32, pair by pair (MLX would split a deeper chain in two), and rounded once.
    """
    terms = [(o + b).astype(mx.float32) * w for o, b, w in zip(outputs, biases, weights, strict=True)]
    while len(terms) > 1:
        terms = [sum(terms[i : i + 2][1:], start=terms[i]) for i in range(0, len(terms), 2)]
    return (residual.astype(mx.float32) + terms[0]).astype(residual.dtype)


def add_gumbel_noise(logits: mx.array, temperature: mx.array, keys: mx.array) -> mx.array:
    """Logits [B, V] over temperature [B, 1], plus Gumbel noise of keys [B, 2]: their argmax is a draw from the
    softmax. Rows of temperature 0 are unchanged. Each row's noise depends only on its own key."""
    noise = mx.vmap(lambda key: mx.random.gumbel(logits.shape[-1:], key=key))(keys)
    drawn = logits / mx.where(temperature > 0, temperature, 1.0) + noise
    return mx.where(temperature > 0, drawn, logits)


@dataclass(frozen=True)
class Elementwise:
    """The functions above, as the device runs them."""

    add: Callable[..., mx.array] = add
    swiglu: Callable[..., mx.array] = swiglu
    combine: Callable[..., mx.array] = combine
    add_gumbel_noise: Callable[..., mx.array] = add_gumbel_noise


UNCOMPILED = Elementwise()


def compiled() -> Elementwise:
    """Every chain as one launch. The three chains of a layer are compiled without shapes, so that a new prompt length
    needs no new compilation."""
    return Elementwise(
        **{
            name: mx.compile(function, shapeless=name != "add_gumbel_noise")
            for name, function in vars(UNCOMPILED).items()
        }
    )
