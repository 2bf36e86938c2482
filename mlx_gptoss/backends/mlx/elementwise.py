"""The arithmetic between the products: chains of elementwise operations, each one launch where MLX compiles them.

MLX compiles for a GPU while the program runs. On a CPU it would need a C++ compiler on the user's machine and a
second for each chain, where a launch costs next to nothing: there the same functions run as they stand.

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

    Summed in float32, pair by pair (a chain that is too deep would be cut in two), and rounded once.
    """
    terms = [(o + b).astype(mx.float32) * w for o, b, w in zip(outputs, biases, weights, strict=True)]
    while len(terms) > 1:
        terms = [sum(terms[i : i + 2][1:], start=terms[i]) for i in range(0, len(terms), 2)]
    return (residual.astype(mx.float32) + terms[0]).astype(residual.dtype)


def add_gumbel_noise(logits: mx.array, temperature: mx.array, keys: mx.array) -> mx.array:
    """Logits [B, V] over temperature [B, 1], plus Gumbel noise of keys [B, 2]: their argmax is a draw from the
    softmax. Rows of temperature 0 stay as they are. Each row's noise hangs on its own key alone."""
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
    """Every chain as one launch. The three of each layer do not look at shapes, so that a new prompt length costs
    no new compilation."""
    return Elementwise(
        **{
            name: mx.compile(function, shapeless=name != "add_gumbel_noise")
            for name, function in vars(UNCOMPILED).items()
        }
    )
