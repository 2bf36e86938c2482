"""The router's choice: of each token's logits the largest, and the softmax over them.

Legend: T tokens, E experts, A active experts per token.
"""

from __future__ import annotations

import mlx.core as mx

from .metal import SIMDGROUP, MetalKernel


def route(logits: mx.array, active: int) -> tuple[mx.array, mx.array]:
    """logits [T, E] -> the A experts of the largest, uint32 [T, A], and the softmax over their logits, in the logits'
    dtype, computed in float32. Their order is not defined."""
    experts = mx.argpartition(logits, kth=-active, axis=-1)[..., -active:]
    weights = mx.softmax(mx.take_along_axis(logits, experts, axis=-1), axis=-1, precise=True)
    return experts, weights


class Router:
    """`route` as one launch."""

    def __init__(self) -> None:
        self._kernel = MetalKernel("router", ["logits"], ["experts", "weights"])

    def __call__(self, logits: mx.array, active: int) -> tuple[mx.array, mx.array]:
        """As `route`, with the largest logit first."""
        tokens, experts = logits.shape
        chosen, weights = self._kernel(
            [logits],
            template=[("T", logits.dtype), ("EXPERTS", experts), ("ACTIVE", active)],
            groups=(tokens, 1, 1),
            threads=SIMDGROUP,
            shapes=[(tokens, active)] * 2,
            dtypes=[mx.uint32, logits.dtype],
        )
        return chosen, weights


def can_route(experts: int, active: int) -> bool:
    """Whether the kernel takes so many experts, of which so many are active."""
    return active <= min(experts, SIMDGROUP) and experts <= 32 * SIMDGROUP
