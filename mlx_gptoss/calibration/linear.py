"""One linear layer in both models: as the source has it, and as the result will store it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import MatMul
from ..weights import codecs, quantization
from ..weights.checkpoint import CheckpointLike
from ..weights.formats.base import Recipe
from ..weights.params import Param
from ..weights.tensor import Array, Dense, Quantized, Spec, Weight
from .moments import Moments
from .network import Floats
from .rounding import is_rounded
from .store import PartWriter


@dataclass(frozen=True)
class Linear:
    """Weights [N, K] and bias [N], or 0 for a layer without one. float32."""

    weight: Floats
    bias: Floats | np.float32
    matmul: MatMul

    def __call__(self, x: Floats) -> Floats:
        """x [T, K] -> [T, N]"""
        y: Floats = self.matmul(x, self.weight.T)
        y += self.bias
        return y


@dataclass(frozen=True)
class Pair:
    """The layer in the original model, and in the one that is being made."""

    original: Linear
    actual: Linear


@dataclass(frozen=True)
class Target:
    """How the result stores matrices.

    specs: by name, of the matrices that are calibrated. stored: by name, of the other ones; None is bfloat16.
    dtype: of float scales. symmetric: as in Rounder.quantize. matmul: computes all large products.
    """

    specs: Mapping[str, Spec]
    stored: Mapping[str, Spec | None]
    dtype: np.dtype[Any]
    symmetric: bool
    matmul: MatMul = np.matmul

    @staticmethod
    def of(
        source: CheckpointLike,
        recipe: Recipe,
        *,
        symmetric: bool,
        widths: Mapping[str, Spec] | None = None,
        matmul: MatMul = np.matmul,
    ) -> Target:
        """The target of a recipe. What the source stores as the recipe does is kept, as in every conversion.

        widths: specs of single matrices by name, in place of the recipe's.
        """
        specs: dict[str, Spec] = {}
        stored: dict[str, Spec | None] = {}
        for param in source.params:
            if not param.is_matrix:
                continue
            spec = (widths or {}).get(param.name, recipe[param.role][1])
            if spec is not None and spec.group and param.shape[-1] % spec.group:
                spec = None
            if spec is not None and is_rounded(spec) and source.stored_as(param.name)[0] != spec:
                specs[param.name] = spec
            else:
                stored[param.name] = spec
        return Target(specs, stored, np.dtype(np.float16) if symmetric else codecs.BFLOAT16, symmetric, matmul)


class Matrix:
    """A matrix parameter with its bias, [N, K] or [E, N, K], on its way into the result."""

    def __init__(self, source: CheckpointLike, target: Target, writer: PartWriter, param: Param, bias: Param | None):
        self._target = target
        self._weight = source.read(param.name)
        self._bias = None if bias is None else source.read(bias.name)
        self._spec = target.specs.get(param.name)
        self._kept = target.stored.get(param.name)
        self._quantized: Quantized | None = None
        self._new_bias: Array | None = None
        if self._spec is not None:
            self._quantized = writer.quantized(param, self._spec)
            if bias is not None:
                self._new_bias = writer.values(bias)
                self._new_bias[...] = codecs.dequantize(source.read(bias.name))

    @property
    def is_calibrated(self) -> bool:
        """Whether its codes are to be chosen; otherwise it is stored as any conversion stores it."""
        return self._spec is not None

    def original(self, expert: int | None = None) -> Linear:
        """The layer of an expert, or of a matrix without experts, as the source has it."""
        index = slice(None) if expert is None else expert
        bias = np.float32(0) if self._bias is None else codecs.dequantize(self._part(self._bias, index))
        return self._linear(codecs.dequantize(self._part(self._weight, index)), bias)

    def finish(self, original: Linear, moments: Moments | None, expert: int | None = None) -> Linear:
        """The layer as the result has it: quantized for inputs of these moments, unless it is not calibrated."""
        if self._spec is None or self._quantized is None:
            return self._uncalibrated(original, expert)
        assert moments is not None
        target = self._target
        part = moments.quantize(original.weight, self._spec, target.dtype, symmetric=target.symmetric)
        index = slice(None) if expert is None else expert
        self._fill(index, part)
        weight = codecs.dequantize(part)
        if self._new_bias is None:
            return self._linear(weight, original.bias)
        bias = moments.bias(np.asarray(original.bias), original.weight, weight)
        self._new_bias[index] = _as_precise(bias, np.asarray(original.bias))
        return self._linear(weight, np.array(self._new_bias[index]))

    def finish_rows(self, moments: Moments, rows: slice) -> None:
        """As finish, for some rows of a matrix without a bias that is too large for one pass."""
        assert self._spec is not None
        weight = codecs.dequantize(self._weight[rows])
        self._fill(rows, moments.quantize(weight, self._spec, self._target.dtype, symmetric=self._target.symmetric))

    def _fill(self, index: int | slice, part: Quantized) -> None:
        stored = self._quantized
        assert stored is not None and stored.scale is not None and stored.bias is not None
        stored.codes[index], stored.scale[index], stored.bias[index] = part.codes, part.scale, part.bias

    def _uncalibrated(self, original: Linear, expert: int | None) -> Linear:
        part = self._part(self._weight, slice(None) if expert is None else expert)
        if self._kept is None:
            return self._linear(codecs.dequantize(Dense(codecs.to_bfloat16(part))), original.bias)
        return self._linear(codecs.dequantize(quantization.to_spec(part, self._kept)), original.bias)

    def _linear(self, weight: Floats, bias: Floats | np.float32) -> Linear:
        return Linear(weight, bias, self._target.matmul)

    @staticmethod
    def _part(weight: Weight, index: int | slice) -> Weight:
        return weight[index]


def _as_precise(bias: Floats, original: Floats) -> NDArray[Any]:
    """The bias rounded to bfloat16 if the original one is exact in it, as the result then stores it so."""
    rounded = original.astype(codecs.BFLOAT16).astype(np.float32)
    return bias.astype(codecs.BFLOAT16).astype(np.float32) if np.array_equal(rounded, original) else bias
