"""What LoRA adapters add to the products of model.py: two thin products each, for the rows that use an adapter.

Legend: B rows, T tokens, A active experts per token, D in, N out, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .cache import Span
from .layers import DenseMatrix, Matrix


@dataclass(frozen=True)
class LowRank:
    """a: [R, D], b: [N, R]; or [E, R, D] and [E, N, R] of experts. In the activations' dtype, b with the scale."""

    a: Matrix
    b: Matrix

    @property
    def dtype(self) -> mx.Dtype:
        return self.a.weight.dtype if isinstance(self.a, DenseMatrix) else mx.float32


def add_linear(y: mx.array, x: mx.array, adapters: Sequence[LowRank | None], span: Span) -> mx.array:
    """y [.., N], the product with x [.., D], plus what the adapters of the span's rows add."""
    for index, rows in span.adapters:
        if (low_rank := adapters[index]) is not None:
            y = y + low_rank.b.matmul(_of_rows(low_rank.a.matmul(x), rows))
    return y


def add_experts(
    y: mx.array,
    x: mx.array,
    adapters: Sequence[LowRank | None],
    span: Span,
    experts: mx.array,
    tokens: mx.array | None = None,
    pairs: mx.array | None = None,
    rows: mx.array | None = None,
) -> mx.array:
    """y, the experts' product with x, plus what the adapters of the span's rows add. Arguments as of ExpertLinear.

    tokens, pairs: numbers of the rows of x and of y. rows: of sorted pairs, each pair's token."""
    for index, uses in span.adapters:
        if (low_rank := adapters[index]) is not None:
            uses = uses if uses is None or rows is None else uses[rows]
            u = low_rank.a.gather(x.astype(low_rank.dtype), experts, tokens)
            y = y + low_rank.b.gather(_of_rows(u, uses), experts, pairs)
    return y


def _of_rows(u: mx.array, rows: mx.array | None) -> mx.array:
    """u with zeros in the rows that do not use the adapter, whatever their values."""
    return u if rows is None else mx.where(rows.reshape(-1, *[1] * (u.ndim - 1)), u, 0)
