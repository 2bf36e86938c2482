"""A weight as every format and every backend understands it. numpy only; arrays may be views into a mapped file.

One formula covers every format: `w = (value(code) * scale + bias) * outer`, evaluated in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from ..config import ModelConfig

Array = NDArray[Any]
Element = Literal["e2m1", "e4m3", "uint"]
ScaleKind = Literal["e8m0", "e4m3", "float", "none"]


@dataclass(frozen=True)
class Spec:
    """How the numbers of a quantized weight are stored.

    element: what a code means: e2m1 (FP4), e4m3 (FP8), or an unsigned integer.
    bits: of one code, 4 or 8.
    group: elements along K that share a scale; 0 when there is none (`scale` is "none").
    scale: e8m0 (a power of two in a byte), e4m3 (a byte), "float" (bf16, f16 or f32 as stored), or "none".
    """

    element: Element
    bits: int
    group: int
    scale: ScaleKind


MXFP4 = Spec("e2m1", 4, 32, "e8m0")
NVFP4 = Spec("e2m1", 4, 16, "e4m3")
MXFP8 = Spec("e4m3", 8, 32, "e8m0")
FP8_ROW = Spec("e4m3", 8, 0, "none")
AFFINE4 = Spec("uint", 4, 64, "float")
AFFINE8 = Spec("uint", 8, 64, "float")
AFFINE8_G32 = Spec("uint", 8, 32, "float")


@dataclass(frozen=True)
class Dense:
    """Values as stored: bfloat16 (ml_dtypes), float16 or float32. Matrices are [..., N, K]: output-major.

    input_scale: what kernels with 4-bit activations divide this matrix's input by, if a checkpoint says so; carried
        from one checkpoint into the next, used by nothing else.
    """

    values: Array
    input_scale: float | None = None


@dataclass(frozen=True)
class Quantized:
    """codes: uint8 [..., N, K * bits / 8], K-major, low nibble first.
    scale: [..., N, K / group], uint8 for e8m0 and e4m3 (their bit patterns), a float dtype otherwise; None for none.
    bias: like scale, float dtype; None is 0.
    outer: float32 or as stored, broadcastable to [..., N, 1]: per tensor [], per expert [E, 1, 1], per row [..., N, 1];
        None is 1.
    input_scale: as in Dense.
    """

    spec: Spec
    codes: Array
    scale: Array | None = None
    bias: Array | None = None
    outer: Array | None = None
    input_scale: float | None = None


Weight = Dense | Quantized


class Weights(Protocol):
    """Where a backend's loader gets a model from: a checkpoint, or one that is quantized as it is read."""

    config: ModelConfig

    def read(self, name: str) -> Weight:
        """The weight of a parameter by its canonical name (params.py)."""
        ...

    def release(self) -> None:
        """Drop what has been read from memory; it can be read again."""
        ...
