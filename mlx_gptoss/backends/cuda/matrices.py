"""Matrices in device memory: dense, quantized as a checkpoint stores them, and packed as the kernels read them.

plain.py computes with any of them, through `decode`. kernels/ read dense and packed ones.

Legend: D in, N out, E experts, G groups of a row, whose columns share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ...weights.codecs import E2M1, E4M3, E8M0
from ...weights.tensor import Element, ScaleKind, Spec
from ..base import padded_groups

Index = int | slice | Tensor
PACK_AT_ONCE = 1 << 24  # words that are rearranged at once


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

# A word has eight codes: word t of each 32 columns has columns 4 t to 4 t + 3 and 16 + 4 t to 16 + 4 t + 3, because
# that is what one thread gives to the tensor cores. Here is where the bits of the first, third, fifth and seventh of
# them are in its lower half, lowest bit first; the upper half has the others in the same places. Then
# kernels/dequant.py has two codes where two bfloat16 need them after one shift and one mask; e2m1's last pair takes
# three of both.
WORD_BITS: dict[Element, tuple[tuple[int, ...], ...]] = {
    "e2m1": ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (13, 10, 11, 14)),
    "uint": ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)),
}


@dataclass(frozen=True)
class PackedMatrix(QuantizedMatrix):
    """The same weights in the form that the kernels read.

    codes: of 4 bits, int32 [..., N, D / 8], eight in a word, whose bits are in the order of WORD_BITS; else uint8
        [..., N, D]
    scale, bias: [..., N, G] of the types as stored, G >= D / group: rows are whole multiples of 16 bytes, so that the
        kernels copy them without waiting. What is past D / group is 0.
    small_scales: whether a constant of the decoding fits into every scale's type when both are multiplied
    """

    small_scales: bool

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * (8 if self.spec.bits == 4 else 1)))

    def decode(self, dtype: torch.dtype) -> Tensor:
        """As QuantizedMatrix.decode."""
        return self.unpack().decode(dtype)

    def unpack(self) -> QuantizedMatrix:
        """The matrix as it was stored."""
        codes = self.codes
        if self.spec.bits == 4:
            codes = _unpack_words(codes.flatten(), self.spec.element).view(codes.shape)
        groups = self.shape[-1] // self.spec.group if self.spec.group else 0
        scale, bias = (None if x is None else x[..., :groups] for x in (self.scale, self.bias))
        return QuantizedMatrix(self.spec, codes.view(torch.uint8), scale, bias, self.outer)


def pack(matrix: QuantizedMatrix) -> PackedMatrix:
    """The matrix in the form that the kernels read. Takes the memory of its codes: the one given is spent."""
    spec, codes = matrix.spec, matrix.codes
    if spec.bits == 4:
        codes = codes.view(torch.int32)
        for block in torch.split(codes.view(-1), PACK_AT_ONCE):
            block.copy_(_pack_words(block, spec.element))
    scale, bias = (None if x is None else _padded(x, spec) for x in (matrix.scale, matrix.bias))
    return PackedMatrix(spec, codes, scale, bias, matrix.outer, _has_small_scales(matrix))


def _pack_words(words: Tensor, element: Element) -> Tensor:
    """int32 [any], words of eight codes in the order of columns, to words as WORD_BITS has them."""
    return _move_bits(words.view(torch.int16).view(-1, 2, 4).mT.flatten().view(torch.int32), element, back=False)


def _unpack_words(words: Tensor, element: Element) -> Tensor:
    """The inverse of `_pack_words`."""
    return _move_bits(words, element, back=True).view(torch.int16).view(-1, 4, 2).mT.flatten().view(torch.int32)


def _move_bits(words: Tensor, element: Element, *, back: bool) -> Tensor:
    """int32 words of eight codes one after the other to the places of WORD_BITS, or back."""
    out = torch.zeros_like(words)
    for code in range(8):
        for bit, place in enumerate(WORD_BITS[element][code // 2]):
            source, target = 4 * code + bit, 16 * (code % 2) + place
            source, target = (target, source) if back else (source, target)
            out |= (words >> source & 1) << target
    return out


def _padded(values: Tensor, spec: Spec) -> Tensor:
    groups = values.shape[-1]
    return torch.nn.functional.pad(values, (0, padded_groups(groups, values.itemsize) - groups))


def _has_small_scales(matrix: QuantizedMatrix) -> bool:
    """Whether every scale is small enough that kernels/dequant.py may multiply it by a constant of the decoding: codes
    of e8m0 up to 128, which is 2, and floats below 0.5. True for torch's meta device, which has no values."""
    if matrix.scale is None or matrix.scale.is_meta:
        return matrix.scale is not None
    if matrix.spec.scale == "e8m0":
        return bool(matrix.scale.max() <= 128)
    return matrix.spec.scale == "float" and bool(matrix.scale.abs().max() < 0.5)


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
