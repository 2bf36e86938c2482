"""Chains of elementwise operations between the products, each one launch where MLX compiles them.

MLX compiles for a GPU at run time. On a CPU it would need a C++ compiler on the user's machine and a second per chain,
and a launch costs next to nothing, so the same functions run uncompiled there.

Legend: T tokens, A experts active per token, D hidden, I intermediate, B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx


def swiglu(
    gate: mx.array, up: mx.array, bias_gate: mx.array, bias_up: mx.array, limit: float, alpha: float
) -> mx.array:
    """gate * sigmoid(alpha * gate) * (up + 1), each with its bias, gate clamped from above and up on both sides."""
    gate = mx.minimum(gate + bias_gate, limit)
    up = mx.clip(up + bias_up, -limit, limit)
    return gate * mx.sigmoid(alpha * gate) * (up + 1)


def finish(y: mx.array, outer: mx.array | None, base: mx.array | None, dtype: str) -> mx.array:
    """y * outer + base in `dtype`, by its name in mlx.core: what is left of a product with a quantized matrix.

    y [..., N], outer [], [N] or [..., N], base [N] or [..., N]; None is 1 and 0."""
    y = y if outer is None else y * outer
    return (y if base is None else y + base).astype(getattr(mx, dtype))


def combine(
    residual: mx.array, outputs: Sequence[mx.array], biases: Sequence[mx.array], weights: Sequence[mx.array]
) -> mx.array:
    """residual [T, 1, 1, D] + sum of weight * (output + bias) over the A experts: A arrays each, [T, 1, 1, D] or 1.

    Summed in float32, pair by pair (MLX would split a deeper chain in two), and rounded once.
    """
    terms = [(o + b).astype(mx.float32) * w for o, b, w in zip(outputs, biases, weights, strict=True)]
    return (residual.astype(mx.float32) + _pairwise(mx.add, terms)).astype(residual.dtype)


def combine_chosen(
    residual: mx.array, outputs: mx.array, biases: mx.array, logits: mx.array, next_bias: mx.array | None
) -> tuple[mx.array, mx.array | None]:
    """The residual stream after the experts, and the same with the next layer's bias.

    residual [T, 1, 1, D], outputs and biases [T, A, 1, D], logits [T, A] of the chosen experts, whose softmax weights
    the outputs, next_bias [D]. Returns [T, 1, 1, D] each, None without next_bias.
    """
    weights = mx.softmax(logits, axis=-1, precise=True)
    x = combine(residual, *by_expert(outputs, biases, weights[..., None, None]))
    return x, None if next_bias is None else x + next_bias


def combine_chosen_fused(
    residual: mx.array, outputs: mx.array, biases: mx.array, logits: mx.array, next_bias: mx.array | None
) -> tuple[mx.array, mx.array | None]:
    """As combine_chosen, deep enough for one launch: MLX fuses 11 operations one after another, broadcasts included.

    With next_bias, the stream is what is left without it, so that the sum that the next layer adds to is rounded once.
    """
    o, b, logits_of = by_expert(outputs, biases, mx.broadcast_to(logits[..., None, None], outputs.shape))
    chosen = [z.astype(mx.float32) for z in logits_of]
    normalizer = _pairwise(mx.logaddexp, chosen)
    terms = [(y + c).astype(mx.float32) * mx.exp(z - normalizer) for y, c, z in zip(o, b, chosen, strict=True)]
    stream = residual.astype(mx.float32)
    if next_bias is None:
        return (stream + _pairwise(mx.add, terms)).astype(residual.dtype), None
    base = ((stream + next_bias) + _pairwise(mx.add, terms)).astype(residual.dtype)
    return base - next_bias, base


def weights(ranked: mx.array, top: mx.array, temperature: mx.array, ranks: mx.array, top_k: mx.array) -> mx.array:
    """Probabilities up to a factor, [B, n]: of logits ranked [B, n], largest first, over temperature [B, 1]. 0 from
    rank top_k [B, 1] on. top [B, 1]: the largest; ranks [n]: 0, 1, ..."""
    return mx.where(ranks < top_k, mx.exp((ranked - top) / temperature), 0.0)


def nucleus(
    ranked: mx.array, weights: mx.array, sums: mx.array, ranks: mx.array, top_k: mx.array, top_p: mx.array
) -> mx.array:
    """ranked [B, n], with -inf from rank top_k [B, 1] on, and where the weights before add up to top_p [B, 1] of all.
    sums: cumulative weights [B, n]."""
    kept = (sums - weights < top_p * sums[:, -1:]) | (top_p >= 1.0)
    return mx.where(kept & (ranks < top_k), ranked, -mx.inf)


def by_expert(*arrays: mx.array) -> list[list[mx.array]]:
    """Arrays [T, A, ...] as A views [T, 1, ...] each."""
    return [list(mx.split(array, array.shape[1], axis=1)) for array in arrays]


def logsumexp(logits: mx.array) -> mx.array:
    """The logarithm of the sum of all exponentials of each row of logits [B, V], [B]."""
    return mx.logsumexp(logits, axis=-1)


def add_gumbel_noise(logits: mx.array, temperature: mx.array, keys: mx.array) -> mx.array:
    """Logits [B, V] over temperature [B, 1], plus Gumbel noise of keys [B, 2]: their argmax is a draw from the
    softmax. Rows of temperature 0 are unchanged. Each row's noise depends only on its own key."""
    noise = mx.vmap(lambda key: mx.random.gumbel(logits.shape[-1:], key=key))(keys)
    drawn = logits / mx.where(temperature > 0, temperature, 1.0) + noise
    return mx.where(temperature > 0, drawn, logits)


def _pairwise(combine_two: Callable[[mx.array, mx.array], mx.array], terms: Sequence[mx.array]) -> mx.array:
    """All terms combined, neighbours first."""
    terms = list(terms)
    while len(terms) > 1:
        pairs = [terms[i : i + 2] for i in range(0, len(terms), 2)]
        terms = [combine_two(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return terms[0]


@dataclass(frozen=True)
class Elementwise:
    """The functions above, as the device runs them."""

    swiglu: Callable[..., mx.array] = swiglu
    finish: Callable[..., mx.array] = finish
    combine: Callable[..., mx.array] = combine
    combine_chosen: Callable[..., tuple[mx.array, mx.array | None]] = combine_chosen
    weights: Callable[..., mx.array] = weights
    nucleus: Callable[..., mx.array] = nucleus
    logsumexp: Callable[[mx.array], mx.array] = logsumexp
    add_gumbel_noise: Callable[..., mx.array] = add_gumbel_noise


UNCOMPILED = Elementwise()


def compiled() -> Elementwise:
    """Every chain as one launch. The chains that a prompt runs are compiled without shapes, so that a new length needs
    no new compilation."""
    return Elementwise(
        swiglu=mx.compile(swiglu, shapeless=True),
        finish=mx.compile(finish, shapeless=True),
        combine=mx.compile(combine, shapeless=True),
        combine_chosen=mx.compile(combine_chosen_fused),
        weights=mx.compile(weights),
        nucleus=mx.compile(nucleus),
        add_gumbel_noise=mx.compile(add_gumbel_noise),
    )
