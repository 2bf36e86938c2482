"""A weight as every format and every backend understands it: Dense or Quantized, in numpy.

One formula covers every format: `w = (value(code) * scale + bias) * outer`, evaluated in float32 (codecs.py). Arrays
may be read-only views of a mapped file; such a weight takes no memory until its values are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from ..config import ModelConfig

Array = NDArray[Any]
Index = int | slice | NDArray[Any]
Element = Literal["e2m1", "e4m3", "uint"]
ScaleKind = Literal["e8m0", "e4m3", "float", "none"]


@dataclass(frozen=True)
class Spec:
    """How the numbers of a quantized weight are stored.

    element: what a code means: e2m1 (FP4), e4m3 (FP8), or an unsigned integer.
    bits: bits per code; 2, 3, 4, 5, 6 or 8 for unsigned integers, else 4 or 8.
    group: number of consecutive elements along K that share a scale; 0 if there is no scale (`scale` is "none").
    scale: e8m0 (a power of two in one byte), e4m3 (one byte), "float" (bf16, f16 or f32 as stored), or "none".
    """

    element: Element
    bits: int
    group: int
    scale: ScaleKind


MXFP4 = Spec("e2m1", 4, 32, "e8m0")
NVFP4 = Spec("e2m1", 4, 16, "e4m3")
MXFP8 = Spec("e4m3", 8, 32, "e8m0")
FP8_ROW = Spec("e4m3", 8, 0, "none")
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE = {(bits, group): Spec("uint", bits, group, "float") for bits in AFFINE_BITS for group in (32, 64, 128)}
AFFINE4, AFFINE8, AFFINE8_G32 = AFFINE[4, 64], AFFINE[8, 64], AFFINE[8, 32]


_STORAGE_NAMES = {
    ("e2m1", "e8m0"): "mxfp4",
    ("e2m1", "e4m3"): "nvfp4",
    ("e4m3", "e8m0"): "mxfp8",
    ("e4m3", "none"): "fp8",
}


def storage_name(spec: Spec) -> str:
    """A short name of how numbers are stored: mxfp4, affine4-g64."""
    return _STORAGE_NAMES.get((spec.element, spec.scale)) or f"affine{spec.bits}-g{spec.group}"


@dataclass(frozen=True)
class Dense:
    """Values as stored: bfloat16 (ml_dtypes), float16 or float32. Matrices are [..., N, K]: output-major.

    input_scale: the divisor that kernels with 4-bit activations apply to this matrix's input, if the checkpoint has
        one. It is copied from checkpoint to checkpoint and has no other use here.
    """

    values: Array
    input_scale: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Every array of the weight."""
        return (self.values,)

    @property
    def nbytes(self) -> int:
        """Size of all arrays in bytes."""
        return _nbytes(self.arrays)

    def __getitem__(self, index: Index) -> Dense:
        """Part of the first axis, as numpy indexes it: an int or a slice gives views, an array of ints a copy."""
        return replace(self, values=self.values[index])

    def output_rows(self, start: int, stop: int) -> Dense:
        """Rows [start, stop) of a matrix [N, K], or of each expert's matrix in [E, N, K], as views."""
        return replace(self, values=self.values[..., start:stop, :])


@dataclass(frozen=True)
class Quantized:
    """Codes, scales and what else the formula needs.

    codes: uint8 [..., N, K * bits / 8], K-major, lowest bits first. Codes of 3, 5 and 6 bits cross bytes.
    scale: [..., N, K / group]: uint8 bit patterns for e8m0 and e4m3, a float dtype for "float"; None if there is none.
    bias: shape and dtype of a float scale; None means 0.
    outer: float32 or as stored, broadcastable to [..., N, 1]: [] per tensor, [E, 1, 1] per expert, [..., N, 1] per row;
        None means 1.
    input_scale: as in Dense.
    """

    spec: Spec
    codes: Array
    scale: Array | None = None
    bias: Array | None = None
    outer: Array | None = None
    input_scale: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the decoded weight, [..., N, K]."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.spec.bits)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Every array of the weight."""
        return tuple(array for array in (self.codes, self.scale, self.bias, self.outer) if array is not None)

    @property
    def nbytes(self) -> int:
        """Size of all arrays in bytes."""
        return _nbytes(self.arrays)

    def __getitem__(self, index: Index) -> Quantized:
        """Part of the first axis, as numpy indexes it: an int or a slice gives views, an array of ints a copy."""
        outer = self.outer
        if outer is not None and outer.ndim == self.codes.ndim:
            if outer.shape[0] > 1:
                outer = outer[index]
            elif isinstance(index, int):
                outer = outer[0]  # all of the axis shares this value
        scale, bias = (None if array is None else array[index] for array in (self.scale, self.bias))
        return replace(self, codes=self.codes[index], scale=scale, bias=bias, outer=outer)

    def output_rows(self, start: int, stop: int) -> Quantized:
        """Rows [start, stop) of a matrix [N, K], or of each expert's matrix in [E, N, K], as views."""
        outer = self.outer
        if outer is not None and outer.ndim > 1 and outer.shape[-2] > 1:
            outer = outer[..., start:stop, :]
        scale, bias = (None if array is None else array[..., start:stop, :] for array in (self.scale, self.bias))
        return replace(self, codes=self.codes[..., start:stop, :], scale=scale, bias=bias, outer=outer)


def _nbytes(arrays: Iterable[Array]) -> int:
    return sum(array.nbytes for array in arrays)


Weight = Dense | Quantized


def same_storage(weights: Sequence[Weight]) -> bool:
    """Whether the weights are stored the same way, so that they can be fused into one matrix."""

    def storage(weight: Weight) -> object:
        if isinstance(weight, Dense):
            return weight.values.dtype
        return weight.spec, None if weight.scale is None else weight.scale.dtype, weight.bias is None

    return len({storage(weight) for weight in weights}) == 1


class Weights(Protocol):
    """The weights of a model, by name: a checkpoint, one rank's part of it, or weights quantized as they are read."""

    config: ModelConfig

    def read(self, name: str) -> Weight:
        """The weight of a parameter by its canonical name (params.py)."""
        ...

    def release(self) -> None:
        """Drop what has been read from memory. It can be read again."""
        ...


@dataclass
class NamedWeights:
    """Weights that are in memory, by their canonical names."""

    config: ModelConfig
    weights: Mapping[str, Weight]

    def read(self, name: str) -> Weight:
        """As Weights.read. Raises KeyError for a name that is not there."""
        return self.weights[name]

    def release(self) -> None:
        """Do nothing: no file is mapped."""
