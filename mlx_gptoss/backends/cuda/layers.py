"""The layers of model.py: linear layers and experts over the matrices of matrices.py.

An Operations computes with a matrix: plain.py in PyTorch, kernels/ in Triton.

Legend: D in, N out, E experts, A active experts, T tokens, B rows, L tokens a row, H query heads, K kv heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .adapters import ExpertAdapter
from .matrices import Matrix
from .quantized_kv import KeysOrValues, Packed


@dataclass(frozen=True)
class Rotation:
    """The rotation of each position: float32 [B, 1, L, 32]."""

    cos: Tensor
    sin: Tensor


class Operations(Protocol):
    """The operations of a forward pass, chosen when a model is loaded."""

    def stored(self, matrix: Matrix) -> Matrix:
        """A matrix that was just read, in the form that its products read. It may take the given one's memory."""
        ...

    def product(self, x: Tensor, matrix: Matrix, *, wide: bool = False) -> Tensor:
        """x [T, D] times a matrix [N, D], transposed -> [T, N] of x's dtype, or float32 if `wide`"""
        ...

    def rotate(self, x: Tensor, rotation: Rotation) -> Tensor:
        """x [B, L, heads * 64], whose pairs are (i, i + 32) of a head -> rotated [B, heads, L, 64]"""
        ...

    def pack(self, x: Tensor) -> Packed:
        """Keys or values [B, K, L, 64] in 8 bits"""
        ...

    def attend_one(
        self, q: Tensor, keys: KeysOrValues, values: KeysOrValues, mask: Tensor | None, sinks: Tensor, scale: float
    ) -> Tensor:
        """One query a row, [B, H, 1, 64], over keys [B, K, C, 64] where mask, bool [B, 1, 1, C], is true or None ->
        [B, 1, H * 64]. Softmax with one more column per head, the sink, float32 [H], which is dropped afterwards."""
        ...

    def attend_causal(self, q: Tensor, keys: KeysOrValues, values: KeysOrValues, sinks: Tensor, scale: float) -> Tensor:
        """One slot's L new queries [1, H, L, 64] over all C keys [1, K, C, 64], the last L of which are their own ->
        [1, L, H * 64]"""
        ...

    def attend_sliding(self, q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, scale: float, past: int) -> Tensor:
        """attend_causal for sliding layers: the keys are W past ones and the L new ones, [1, K, W + L, 64], and each
        query sees W of them up to its own. The first W - past keys do not exist."""
        ...

    def mixture(self, x: Tensor, scores: Tensor, experts: Experts, adapters: Sequence[ExpertAdapter] = ()) -> Tensor:
        """x [T, D] through each token's A likeliest experts by scores, float32 [T, E], weighted by the softmax over
        those -> [T, D]. Experts of other ranks are left out. adapters: what is added to the experts' products."""
        ...

    def close(self) -> None:
        """End its threads, after the last operation."""
        ...


@dataclass(frozen=True)
class Linear:
    """Matrices that share their input, fused into one where their storage allows it.

    matrices: one after load's fusion; more if the parts are stored differently (a 6-bit v with a 4-bit q).
    bias: [N] of all together. wide: float32 results whatever the activations are, for scores that are compared: close
    ones would become equal in bfloat16.
    """

    matrices: tuple[Matrix, ...]
    bias: Tensor | None
    ops: Operations
    wide: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., N]"""
        flat = x.reshape(-1, x.shape[-1])
        parts = [self.ops.product(flat, matrix, wide=self.wide) for matrix in self.matrices]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class ExpertLinear:
    """Linear layers of all experts: matrices [E, N, D], bias [E, N]."""

    matrices: tuple[Matrix, ...]
    bias: Tensor

    def expert(self, index: int, ops: Operations) -> Linear:
        """One expert's layer, as views."""
        return Linear(tuple(matrix.at(index) for matrix in self.matrices), self.bias[index], ops)


@dataclass(frozen=True)
class Experts:
    """gate_up: D -> 2 I per expert, gate rows first. down: I -> D. active: A. limit, alpha: of the SwiGLU.
    local_experts: the router's numbers of these experts; other ranks compute the others."""

    gate_up: ExpertLinear
    down: ExpertLinear
    active: int
    limit: float
    alpha: float
    local_experts: range
