"""A layer's experts for few tokens, each token-expert pair by itself.

Legend: T tokens, D hidden, I intermediate, E experts, A active experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ....weights.tensor import MXFP4
from ..elementwise import UNCOMPILED, by_expert
from ..layers import ExpertLinear, QuantizedMatrix
from .metal import SIMDGROUP, MetalKernel

ROWS = 4  # outputs of a simdgroup
SIMDGROUPS = 2  # of a threadgroup of swiglu.metal
STEP = 16  # weights that a lane takes at once, as in codes.metal


@dataclass(frozen=True)
class ExpertLayer:
    """gate_up [E, 2 I, D], gate rows first, down [E, D, I], bias [E, 2 I + D] of both; limit, alpha: of SwiGLU."""

    gate_up: QuantizedMatrix
    down: QuantizedMatrix
    bias: mx.array
    limit: float
    alpha: float

    @staticmethod
    def of(gate_up: ExpertLinear, down: ExpertLinear, bias: mx.array, limit: float, alpha: float) -> ExpertLayer | None:
        """The layer, if the kernels take it: MXFP4 or affine codes, each projection in one matrix."""
        matrices = [*gate_up.matrices, *down.matrices]
        found = [matrix for matrix in matrices if isinstance(matrix, QuantizedMatrix) and _is_readable(matrix)]
        if len(gate_up.matrices) != 1 or len(down.matrices) != 1 or len(found) < len(matrices):
            return None
        return ExpertLayer(found[0], found[1], bias, limit, alpha)


def mixture(
    x: mx.array,
    residual: mx.array,
    experts: mx.array,
    weights: mx.array,
    layer: ExpertLayer,
    next_bias: mx.array | None,
) -> tuple[mx.array, mx.array | None]:
    """x, residual [T, D], experts uint32 [T, A], weights [T, A], next_bias [D] -> the residual plus the weighted sum of
    the experts' outputs, and the same plus next_bias if there is one, [T, D] each."""
    (T, A), D = experts.shape, x.shape[-1]
    rows = mx.arange(T * A, dtype=mx.uint32)
    bias = layer.bias[experts]
    y = layer.gate_up.gather(x[:, None, None], experts, rows[:T, None])
    gate, up = mx.split(y, 2, axis=-1)
    hidden = UNCOMPILED.swiglu(gate, up, *mx.split(bias[..., None, :-D], 2, axis=-1), layer.limit, layer.alpha)
    y = layer.down.gather(hidden, experts, rows.reshape(T, A)).squeeze(-2)
    out = UNCOMPILED.combine(residual[:, None], *by_expert(y, bias[..., -D:], weights[..., None])).squeeze(1)
    return out, None if next_bias is None else out + next_bias


class Experts:
    """`mixture` as two launches. SwiGLU's limit and alpha are those of the model."""

    def __init__(self, limit: float, alpha: float) -> None:
        stored = ["codes", "scales", "biases", "bias"]
        self._swiglu = MetalKernel("swiglu", ["x", "experts", *stored, "limits"], ["hidden"], header="codes")
        inputs = ["hidden", "experts", "weights", *stored, "residual", "next_bias"]
        self._down = MetalKernel("down", inputs, ["out", "base"], header="codes")
        self._limits = mx.array([limit, alpha], dtype=mx.float32)
        mx.eval(self._limits)

    def __call__(
        self,
        x: mx.array,
        residual: mx.array,
        experts: mx.array,
        weights: mx.array,
        layer: ExpertLayer,
        next_bias: mx.array | None,
    ) -> tuple[mx.array, mx.array | None]:
        """As `mixture`, with x, residual, weights and next_bias of one dtype. Products, SwiGLU and sums are computed in
        float32; what SwiGLU returns and the results are rounded to the dtype."""
        (T, A), D, I = experts.shape, x.shape[-1], layer.down.codes.shape[-1] * 32 // layer.down.spec.bits
        (hidden,) = self._swiglu(
            [x, experts, *_arrays(layer.gate_up), layer.bias, self._limits],
            template=[
                *(("T", x.dtype), ("D", D), ("I", I), ("OUT", D)),
                *(*_format(layer.gate_up), ("ROWS", ROWS), ("ACTIVE", A)),
            ],
            groups=(-(-I // (ROWS * SIMDGROUPS)), T * A, 1),
            threads=SIMDGROUPS * SIMDGROUP,
            shapes=[(T, A, I)],
            dtypes=[x.dtype],
        )
        bias = x[0] if next_bias is None else next_bias  # the kernel adds something in any case
        out, base = self._down(
            [
                hidden,
                experts,
                weights,
                *_arrays(layer.down),
                layer.bias,
                residual,
                bias,
            ],
            template=[
                *(("T", x.dtype), ("D", I), ("N", D), ("BEFORE", 2 * I)),
                *(*_format(layer.down), ("ROWS", ROWS), ("ACTIVE", A)),
            ],
            groups=(-(-D // ROWS), T, 1),
            threads=A * SIMDGROUP,
            shapes=[(T, D)] * 2,
            dtypes=[x.dtype] * 2,
        )
        return out, None if next_bias is None else base


def can_mix(active: int) -> bool:
    """Whether the kernels take so many experts a token."""
    return active <= SIMDGROUP


def _is_readable(matrix: QuantizedMatrix) -> bool:
    spec = matrix.spec
    width = matrix.codes.shape[-1] * 32 // spec.bits
    return (
        (spec == MXFP4 or (spec.element == "uint" and matrix.biases is not None))
        and matrix.outer is None
        and spec.group % STEP == 0
        and width % spec.group == 0
    )


def _arrays(matrix: QuantizedMatrix) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scales and biases; MXFP4 has no biases, and the kernel does not read them."""
    return matrix.codes, matrix.scales, matrix.scales if matrix.biases is None else matrix.biases


def _format(matrix: QuantizedMatrix) -> tuple[tuple[str, int | bool], ...]:
    spec = matrix.spec
    return ("GROUP", spec.group), ("BITS", spec.bits), ("E2M1", spec.element == "e2m1")
