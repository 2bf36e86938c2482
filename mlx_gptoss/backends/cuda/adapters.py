"""What LoRA adapters add to the products of model.py: two thin products each, for the rows that use an adapter.

Legend: B rows, T tokens, D in, N out, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """a: [R, D], b: [N, R]; or [E, R, D] and [E, N, R] of experts. In the activations' dtype, b with the scale."""

    a: Tensor
    b: Tensor

    def delta(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """x [B, .., D] -> [B, .., N]. rows: bool [B], those that use the adapter; the others get zeros, whatever their
        values."""
        return of_rows(x @ self.a.mT, rows) @ self.b.mT


Uses = Sequence[tuple[int, Tensor | None]]  # of a pass: an adapter's index, and bool [B], the rows that use it, or None


@dataclass(frozen=True)
class ExpertAdapter:
    """What one adapter adds to the experts of a layer, and the tokens that use it: bool [T], or None for all."""

    gate_up: LowRank | None
    down: LowRank | None
    tokens: Tensor | None


def add_linear(y: Tensor, x: Tensor, adapters: Sequence[LowRank | None], uses: Uses) -> Tensor:
    """y [B, .., N], the product with x [B, .., D], plus what the adapters add."""
    for index, rows in uses:
        if (low_rank := adapters[index]) is not None:
            y = y + low_rank.delta(x, rows)
    return y


def expert_adapters(
    gate_up: Sequence[LowRank | None], down: Sequence[LowRank | None], uses: Uses
) -> Iterator[ExpertAdapter]:
    """The adapters of a pass that change the experts of a layer."""
    for index, rows in uses:
        if gate_up[index] is not None or down[index] is not None:
            yield ExpertAdapter(gate_up[index], down[index], rows)


def of_rows(u: Tensor, rows: Tensor | None) -> Tensor:
    """u [B, ..] with zeros in the rows that do not use the adapter."""
    return u if rows is None else torch.where(rows.view(-1, *[1] * (u.ndim - 1)), u, 0)
