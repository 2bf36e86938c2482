"""The pieces model.py is made of: matrices as they are stored, linear layers and experts over them.

A matrix stays in device memory as the checkpoint stores it. A product decodes it block by block, in float32 and by
the one formula of weights/tensor.py, into operands of the activations' dtype. On a CPU, threads share the blocks.

Legend: D in, N out, E experts, T tokens.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from threading import Barrier

import torch
from torch import Tensor

from ...weights.codecs import E2M1, E4M3, E8M0
from ...weights.tensor import Element, ScaleKind, Spec

# Elements decoded at once. On a CPU the block stays in the cache until the product has read it.
CPU_BLOCK = 1 << 20
GPU_BLOCK = 1 << 24

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


class Crew:
    """Multiplies by matrices that have to be decoded first: block by block, each block by one of `threads` threads.

    A block's decoding is a chain of small operations, some of which torch runs on one core; so whole blocks are what
    is shared, and each thread's own operations stay on its core.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = _hire(threads) if threads > 1 else None

    def product(self, x: Tensor, matrix: Matrix) -> Tensor:
        """x [T, D] times a matrix [N, D], transposed -> [T, N]"""
        if isinstance(matrix, DenseMatrix) and matrix.weight.dtype == x.dtype:
            return x @ matrix.weight.mT
        count, width = matrix.shape
        step = max(1, (CPU_BLOCK if x.device.type == "cpu" else GPU_BLOCK) // width)
        blocks = range(0, count, step)
        left = iter(blocks)  # whoever is free takes the next
        y = x.new_empty((x.shape[0], count))

        def work() -> None:
            with torch.inference_mode():
                for start in left:
                    rows = slice(start, start + step)
                    torch.mm(x, matrix.at(rows).decode(x.dtype).mT, out=y[:, rows])

        if self._pool is None or len(blocks) == 1:
            work()
        else:
            for done in [self._pool.submit(work) for _ in range(min(self._threads, len(blocks)))]:
                done.result()
        return y


def _hire(threads: int) -> ThreadPoolExecutor:
    """A pool whose threads keep their own operations on one core. torch takes that setting for the thread that makes
    it and for all that start later; for the latter it is undone."""
    pool, everyone = ThreadPoolExecutor(threads, "gptoss-product"), Barrier(threads)

    def settle() -> None:
        torch.set_num_threads(1)
        everyone.wait()

    for done in [pool.submit(settle) for _ in range(threads)]:
        done.result()
    torch.set_num_threads(threads)
    return pool


@dataclass(frozen=True)
class Linear:
    """Matrices side by side that share their input, fused into one where their storage allows it.

    matrices: one after load's fusion, more when the parts are stored differently (a 6-bit v beside a 4-bit q).
    bias: [N] over all of them together.
    """

    matrices: tuple[Matrix, ...]
    bias: Tensor | None
    crew: Crew

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., N]"""
        flat = x.reshape(-1, x.shape[-1])
        parts = [self.crew.product(flat, matrix) for matrix in self.matrices]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class ExpertLinear:
    """The same for a bank of experts: matrices [E, N, D], bias [E, N]."""

    matrices: tuple[Matrix, ...]
    bias: Tensor
    crew: Crew

    def expert(self, index: int) -> Linear:
        """One expert's layer, as views."""
        return Linear(tuple(matrix.at(index) for matrix in self.matrices), self.bias[index], self.crew)


def _values(codes: Tensor, spec: Spec) -> Tensor:
    """What the codes mean, float32 [..., D]"""
    if spec.element == "uint" and spec.bits == 8:
        return codes.float()
    if spec.bits == 8:
        return _bytes("e4m3", codes)
    # Four codes a look-up: look-ups are what decoding on a CPU spends its time on.
    words = codes.view(torch.uint16).flatten().int()
    found = _quads(spec.element, codes.device).index_select(0, words)
    return found.view(torch.float16).view(*codes.shape[:-1], -1).float()


def _scales(scale: Tensor, kind: ScaleKind) -> Tensor:
    """float32, as `scale` is shaped"""
    return scale.float() if kind == "float" else _bytes(kind, scale)


def _bytes(kind: str, codes: Tensor) -> Tensor:
    """e8m0 or e4m3 codes to float32"""
    return _byte_table(kind, codes.device).index_select(0, codes.flatten().int()).view(codes.shape)


@cache
def _quads(element: Element, device: torch.device) -> Tensor:
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
