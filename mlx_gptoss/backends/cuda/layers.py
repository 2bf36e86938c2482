"""The layers of model.py: matrices as they are stored, linear layers and experts over them.

A matrix stays in device memory as the checkpoint stores it. An Operations computes with it: plain.py in PyTorch,
kernels/ in Triton.

Legend: D in, N out, E experts, A active experts, T tokens, B rows, L tokens a row, H query heads, K kv heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from ...weights.codecs import E2M1, E4M3, E8M0
from ...weights.tensor import Element, ScaleKind, Spec
from .adapters import ExpertAdapter
from .quantized_kv import KeysOrValues, Packed

Index = int | slice | Tensor


@dataclass(frozen=True)
class DenseMatrix:
    """weight: [N, D] or [E, N, D] in the dtype it is stored in."""

    weight: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def at(self, index: Index) -> DenseMatrix:
        """A part along the first axis: one expert, a block of rows, or rows by their ids."""
        return DenseMatrix(self.weight[index])

    def decode(self, dtype: torch.dtype) -> Tensor:
        """All values, [..., N, D]"""
        return self.weight.to(dtype)


@dataclass(frozen=True)
class QuantizedMatrix:
    """codes uint8 [..., N, D * bits / 8]; scale and bias [..., N, D / group] as stored, or None;
    outer float32, [] for the whole matrix or [..., N, 1], or None."""

    spec: Spec
    codes: Tensor
    scale: Tensor | None
    bias: Tensor | None
    outer: Tensor | None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.spec.bits))

    def at(self, index: Index) -> QuantizedMatrix:
        """Its part along the first axis: one expert, a block of rows, or rows by their ids."""
        return replace(
            self,
            codes=self.codes[index],
            scale=None if self.scale is None else self.scale[index],
            bias=None if self.bias is None else self.bias[index],
            outer=self.outer if self.outer is None or self.outer.ndim == 0 else self.outer[index],
        )

    def decode(self, dtype: torch.dtype) -> Tensor:
        """All its values, [..., N, D]: (value(code) * scale + bias) * outer in float32, then rounded to `dtype`"""
        w = _values(self.codes, self.spec)
        if self.scale is not None:
            grouped = w.view(*self.scale.shape, self.spec.group)
            grouped.mul_(_scales(self.scale, self.spec.scale)[..., None])
            if self.bias is not None:
                grouped.add_(self.bias.float()[..., None])
        if self.outer is not None:
            w.mul_(self.outer)
        return w.to(dtype)


Matrix = DenseMatrix | QuantizedMatrix


@dataclass(frozen=True)
class Rotation:
    """The rotation of each position: float32 [B, 1, L, 32]."""

    cos: Tensor
    sin: Tensor


class Operations(Protocol):
    """The operations of a forward pass, chosen when a model is loaded."""

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


def _values(codes: Tensor, spec: Spec) -> Tensor:
    """The codes' values, float32 [..., D]"""
    if spec.element == "uint" and spec.bits == 8:
        return codes.float()
    if spec.bits == 8:
        return _decode_bytes("e4m3", codes)
    # Four codes per look-up, because decoding on a CPU spends its time on look-ups.
    words = codes.view(torch.uint16).flatten().int()
    found = _four_code_table(spec.element, codes.device).index_select(0, words)
    return found.view(torch.float16).view(*codes.shape[:-1], -1).float()


def _scales(scale: Tensor, kind: ScaleKind) -> Tensor:
    """float32, as `scale` is shaped"""
    return scale.float() if kind == "float" else _decode_bytes(kind, scale)


def _decode_bytes(kind: str, codes: Tensor) -> Tensor:
    """e8m0 or e4m3 codes to float32"""
    return _byte_table(kind, codes.device).index_select(0, codes.flatten().int()).view(codes.shape)


@cache
def _four_code_table(element: Element, device: torch.device) -> Tensor:
    """From 16 bits to the values of their four codes, lowest first: [65536] int64, each of which is four float16. They
    hold every e2m1 value and every integer to 15 exactly."""
    nibbles = torch.from_numpy(E2M1) if element == "e2m1" else torch.arange(16, dtype=torch.float32)
    words = torch.arange(1 << 16)
    quads = torch.stack([nibbles[words >> shift & 15] for shift in (0, 4, 8, 12)], dim=-1)
    return quads.half().view(torch.int64)[:, 0].contiguous().to(device)


@cache
def _byte_table(kind: str, device: torch.device) -> Tensor:
    """float32 [256]"""
    return torch.from_numpy(E8M0 if kind == "e8m0" else E4M3).to(device)
