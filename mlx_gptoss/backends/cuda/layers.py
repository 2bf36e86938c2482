"""The pieces model.py is made of: matrices as they are stored, linear layers and experts over them.

A matrix stays in device memory as the checkpoint stores it. A product decodes it block by block, in float32 and by
the one formula of weights/tensor.py, into operands of the activations' dtype.

Legend: D in, N out, E experts, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ...weights.codecs import E2M1, E4M3, E8M0
from ...weights.tensor import Element, ScaleKind, Spec

# Elements decoded at once. On a CPU the block stays in the cache until the product has read it.
CPU_BLOCK = 1 << 20
GPU_BLOCK = 1 << 26

Index = int | slice | Tensor


@dataclass(frozen=True)
class DenseMatrix:
    """weight: [N, D] or [E, N, D] in the dtype it is stored in."""

    weight: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def at(self, index: Index) -> DenseMatrix:
        """Its part along the first axis: one expert, a block of rows, or rows by their ids."""
        return DenseMatrix(self.weight[index])

    def decode(self, dtype: torch.dtype) -> Tensor:
        """All its values, [..., N, D]"""
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


def product(x: Tensor, matrix: Matrix) -> Tensor:
    """x [T, D] times a matrix [N, D], transposed -> [T, N]"""
    if isinstance(matrix, DenseMatrix) and matrix.weight.dtype == x.dtype:
        return x @ matrix.weight.mT
    count, width = matrix.shape
    step = max(1, (CPU_BLOCK if x.device.type == "cpu" else GPU_BLOCK) // width)
    y = x.new_empty((x.shape[0], count))
    for start in range(0, count, step):
        rows = slice(start, start + step)
        torch.mm(x, matrix.at(rows).decode(x.dtype).mT, out=y[:, rows])
    return y


@dataclass(frozen=True)
class Linear:
    """Matrices side by side that share their input, fused into one where their storage allows it.

    matrices: one after load's fusion, more when the parts are stored differently (a 6-bit v beside a 4-bit q).
    bias: [N] over all of them together.
    """

    matrices: tuple[Matrix, ...]
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., N]"""
        flat = x.reshape(-1, x.shape[-1])
        parts = [product(flat, matrix) for matrix in self.matrices]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class ExpertLinear:
    """The same for a bank of experts: matrices [E, N, D], bias [E, N]."""

    matrices: tuple[Matrix, ...]
    bias: Tensor

    def expert(self, index: int) -> Linear:
        """One expert's layer, as views."""
        return Linear(tuple(matrix.at(index) for matrix in self.matrices), self.bias[index])


def _values(codes: Tensor, spec: Spec) -> Tensor:
    """What the codes mean, float32 [..., D]"""
    if spec.element == "uint" and spec.bits == 8:
        return codes.float()
    table = _value_table(spec.element, spec.bits, codes.device)
    found = table.index_select(0, codes.flatten().int())
    return found.view(torch.float32).view(*codes.shape[:-1], -1)


def _scales(scale: Tensor, kind: ScaleKind) -> Tensor:
    """float32, as `scale` is shaped"""
    if kind == "float":
        return scale.float()
    return _scale_table(kind, scale.device).index_select(0, scale.flatten().int()).view(scale.shape)


@cache
def _value_table(element: Element, bits: int, device: torch.device) -> Tensor:
    """From a byte to its value, float32 [256], or to its two, low nibble first, as complex64 [256]."""
    if bits == 8:
        return torch.from_numpy(E4M3).to(device)
    nibbles = torch.from_numpy(E2M1) if element == "e2m1" else torch.arange(16, dtype=torch.float32)
    byte = torch.arange(256)
    return torch.complex(nibbles[byte & 15], nibbles[byte >> 4]).to(device)


@cache
def _scale_table(kind: ScaleKind, device: torch.device) -> Tensor:
    """From a byte to the scale it stands for, float32 [256]."""
    return torch.from_numpy(E8M0 if kind == "e8m0" else E4M3).to(device)
