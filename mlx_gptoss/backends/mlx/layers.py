"""The layers of model.py: matrices as they are stored, linear layers and experts over them.

A matrix is never re-quantized or upcast as a whole: MLX multiplies by the codes, and a dense matrix that is
narrower than the activations (bfloat16 weights, float32 activations on a CPU) is upcast block by block. On a CPU an
MLX operation uses one core, so large matrices are split by rows there, one part for the stream of each core.

Legend: D in, N out, E experts, T tokens, A experts active per token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ...weights.tensor import AFFINE, MXFP4, MXFP8, NVFP4, Spec, Weight
from .elementwise import finish

# Elements of a dense matrix upcast at once. 8 MB in float32 come from memory that is still mapped and cached, which
# on a CPU makes the product 2.5 times as fast as with the whole matrix upcast first, and as fast as a float32 one.
UPCAST_ELEMENTS = 1 << 21
MODES: dict[Spec, str] = {  # what MLX calls them
    MXFP4: "mxfp4",
    NVFP4: "nvfp4",
    MXFP8: "mxfp8",
    **dict.fromkeys(AFFINE.values(), "affine"),
}
# MLX fuses attention on Metal for up to 32 queries of a KV head in one kernel, and for more than 8 tokens in another.
VECTOR_QUERIES, MATRIX_TOKENS = 32, 9
MLX_NVFP4_SCALE = 448.0 * 6.0  # MLX divides a global scale by the largest scale times the largest code

Mask = mx.array | str | None
Attend = Callable[[mx.array, mx.array, mx.array, float, Mask, mx.array], mx.array]


def fused(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask, sinks: mx.array) -> mx.array:
    """MLX's attention with sinks: q [B, H, L, 64], keys and values [B, K, S, 64], sinks [H] -> [B, H, L, 64].

    mask: bool [B, 1 or H, L, S], true for visible keys, or "causal" for queries at the last L of S positions."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)


def query_blocks(q: mx.array, keys: mx.array, max_scores: int | None) -> list[tuple[int, int]]:
    """(first, end) of the tokens that attend at once, of q [B, H, L, 64] with keys [B, K, S, 64]: as many as max_scores
    allows (None is all), and a number that MLX fuses."""
    (_, H, L, _), (_, K, S, _) = q.shape, keys.shape
    if max_scores is None:
        return [(0, L)]
    most, vector = max(1, max_scores // (H * S)), max(1, VECTOR_QUERIES // (H // K))
    blocks, first = [], 0
    while first < L:
        rows = min(most, L - first)
        blocks.append((first, first + (rows if rows >= MATRIX_TOKENS else min(rows, vector))))
        first = blocks[-1][1]
    return blocks


@dataclass(frozen=True)
class DenseMatrix:
    """weight: [N, D] or [E, N, D] in the dtype it is stored in."""

    weight: mx.array

    def matmul(self, x: mx.array, bias: mx.array | None = None) -> mx.array:
        """x [..., D], bias [N] or [..., N] -> [..., N]"""
        if self.weight.dtype == x.dtype:
            return x @ self._transposed if bias is None else mx.addmm(bias, x, self._transposed)
        rows = max(1, UPCAST_ELEMENTS // self.weight.shape[-1])
        blocks = [self.weight[i : i + rows] for i in range(0, self.weight.shape[0], rows)]
        y = mx.concatenate([x @ block.astype(x.dtype).T for block in blocks], axis=-1)
        return y if bias is None else y + bias

    def gather(self, x: mx.array, experts: mx.array, tokens: mx.array | None) -> mx.array:
        """As ExpertLinear."""
        if self.weight.dtype == x.dtype:
            return mx.gather_mm(x, self.weight.swapaxes(-1, -2), tokens, experts, sorted_indices=tokens is None)
        return self.matmul_each_expert(x, experts)

    def matmul_each_expert(self, x: mx.array, experts: mx.array) -> mx.array:
        """One product per expert in use, each expert upcast separately, for a CPU with float32 activations and bfloat16
        experts. It waits for the router's choice, which costs nothing on a CPU."""
        chosen: list[int] = np.array(experts).ravel().tolist()
        order = sorted(range(len(chosen)), key=chosen.__getitem__)
        pairs = mx.broadcast_to(x, (*experts.shape, *x.shape[-2:])).reshape(len(chosen), x.shape[-1])
        products = [
            replace(self, weight=self.weight[expert]).matmul(pairs[mx.array(list(mine))])
            for expert, mine in groupby(order, key=chosen.__getitem__)
        ]
        y = mx.concatenate(products)[mx.argsort(mx.array(order))]
        return y.reshape(*experts.shape, 1, -1)

    def rows(self, ids: mx.array, dtype: mx.Dtype) -> mx.array:
        """ids [...] -> [..., D]"""
        return self.weight[ids].astype(dtype)

    @cached_property
    def _transposed(self) -> mx.array:
        """A view, made once and not at every step."""
        return self.weight.T


@dataclass(frozen=True)
class QuantizedMatrix:
    """codes uint32 [..., N, D * bits / 32], scales [..., N, D / group], biases like scales for mode "affine" only.

    outer: a factor on the output: [] for the whole matrix, [N] per row, [E, 1] or [E, N] for experts; None is 1.
    spec: of codes and scales, one of MODES; FP8_ROW is MXFP8 here, with scales of 1.
    global_scale: float32 [E], `outer` of experts as MLX's kernel takes it (takes_global_scale); None leaves it to us.
    finish: elementwise.finish, as the device runs it.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array | None
    outer: mx.array | None
    spec: Spec
    global_scale: mx.array | None = None
    finish: Callable[..., mx.array] = finish

    def matmul(self, x: mx.array, bias: mx.array | None = None) -> mx.array:
        """x [..., D], bias [N] or [..., N] -> [..., N]"""
        y = mx.quantized_matmul(x, self.codes, self.scales, self.biases, transpose=True, **self._format)
        if self.outer is None and y.dtype == x.dtype:
            return y if bias is None else y + bias
        return self.finish(y, self.outer, bias, _name(x.dtype))

    def gather(self, x: mx.array, experts: mx.array, tokens: mx.array | None) -> mx.array:
        """As ExpertLinear; float32 if the scales are, whatever x is."""
        scale: dict[str, Any] = {} if self.global_scale is None else {"global_scale": self.global_scale}
        y = mx.gather_qmm(
            x,
            self.codes,
            self.scales,
            self.biases,
            lhs_indices=tokens,
            rhs_indices=experts,
            transpose=True,
            sorted_indices=tokens is None,
            **self._format,
            **scale,
        )
        if self.outer is None or scale:
            return y
        outer = self.outer if self.outer.ndim == 0 else self.outer[experts][..., None, :]
        return self.finish(y, outer, None, _name(y.dtype))

    def rows(self, ids: mx.array, dtype: mx.Dtype) -> mx.array:
        """ids [...] -> [..., D], decoded in float32"""
        scales = self.scales[ids]
        biases = None if self.biases is None else self.biases[ids].astype(mx.float32)
        scales = scales.astype(mx.float32) if self.spec.scale == "float" else scales
        w = mx.dequantize(self.codes[ids], scales, biases, **self._format).astype(mx.float32)
        if self.outer is not None:
            w = w * (self.outer if self.outer.ndim == 0 else self.outer[ids][..., None])
        return w.astype(dtype)

    @cached_property
    def _format(self) -> dict[str, Any]:
        return {"group_size": self.spec.group, "bits": self.spec.bits, "mode": MODES[self.spec]}


def takes_global_scale() -> bool:
    """Whether this MLX multiplies NVFP4 experts by a factor of each in one kernel, on the default device. Tried on a
    small matrix, because it depends on MLX's version and on the device."""
    weight = mx.random.normal((2, 32, 64), key=mx.random.key(0))
    codes, scales, *_ = mx.quantize(weight, group_size=NVFP4.group, bits=NVFP4.bits, mode="nvfp4")
    matrix = QuantizedMatrix(codes, scales, None, mx.array([[0.5], [3.0]]), NVFP4)
    x, experts = mx.ones((1, 1, 1, 64)), mx.array([[1, 0]], dtype=mx.uint32)
    tokens = mx.zeros((1, 1), dtype=mx.uint32)
    try:
        found = replace(matrix, global_scale=global_scale(matrix)).gather(x, experts, tokens)
        return bool(mx.allclose(found, matrix.gather(x, experts, tokens), rtol=1e-4, atol=1e-4))
    except (TypeError, ValueError, RuntimeError):
        return False


def global_scale(matrix: QuantizedMatrix) -> mx.array | None:
    """`outer` of NVFP4 experts as QuantizedMatrix.global_scale; None if it is not one factor for each expert."""
    experts, outer = matrix.codes.shape[0], matrix.outer
    if matrix.spec != NVFP4 or matrix.codes.ndim != 3 or outer is None or outer.shape not in ((), (experts, 1)):
        return None
    return mx.broadcast_to(outer.reshape(-1), (experts,)) * MLX_NVFP4_SCALE


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


class Matrix(Protocol):
    """DenseMatrix, QuantizedMatrix, or a CPU's HostMatrix."""

    def matmul(self, x: mx.array, bias: mx.array | None = None) -> mx.array: ...
    def gather(self, x: mx.array, experts: mx.array, tokens: mx.array | None) -> mx.array: ...
    def rows(self, ids: mx.array, dtype: mx.Dtype) -> mx.array: ...


@dataclass(frozen=True)
class MappedRows:
    """An embedding matrix that stays in the mapped file. A look-up waits for the ids and copies only their rows.

    to_device: copies a weight to the device (load.py's fuse), so that a row is decoded as if it were resident.
    """

    weight: Weight
    to_device: Callable[[Weight], Matrix]

    def rows(self, ids: mx.array, dtype: mx.Dtype) -> mx.array:
        """ids [...] -> [..., D]"""
        numbers = np.array(ids).ravel()
        rows = self.to_device(self.weight[numbers]).rows(mx.arange(numbers.size), dtype)
        return rows.reshape(*ids.shape, -1)


@dataclass(frozen=True)
class Linear:
    """Matrices that share their input, fused into one where their storage allows it.

    matrices: one after load's fusion; more if the parts are stored differently (a 6-bit v with a 4-bit q), or if each
    has its own stream. bias: [N] of all together. streams: one per matrix, or none.
    """

    matrices: tuple[Matrix, ...]
    bias: mx.array | None = None
    streams: tuple[mx.Stream, ...] = ()

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., D] -> [..., N]"""
        return self.plus(self.bias, x)

    def plus(self, base: mx.array | None, x: mx.array) -> mx.array:
        """base + the product with x, without the bias. base [N] or [..., N], x [..., D] -> [..., N]"""
        if len(self.matrices) == 1:
            return self.matrices[0].matmul(x, base)
        y = _side_by_side(self.matrices, self.streams, lambda matrix: matrix.matmul(x))
        return y if base is None else y + base


@dataclass(frozen=True)
class ExpertLinear:
    """Linear layers of all experts, without biases: each row is multiplied by the matrices of its own experts."""

    matrices: tuple[Matrix, ...]
    streams: tuple[mx.Stream, ...] = ()

    def __call__(self, x: mx.array, experts: mx.array, tokens: mx.array | None) -> mx.array:
        """x [P, 1, D] with experts [P] in ascending order, and tokens None -> [P, 1, N];
        x [T, 1 or A, 1, D] with experts [T, A] and the numbers of x's rows, tokens [T, 1 or A], which MLX would
        otherwise make on the device -> [T, A, 1, N]."""
        if len(self.matrices) == 1:
            return self.matrices[0].gather(x, experts, tokens)
        return _side_by_side(self.matrices, self.streams, lambda matrix: matrix.gather(x, experts, tokens))


def _side_by_side(
    matrices: tuple[Matrix, ...], streams: tuple[mx.Stream, ...], product: Callable[[Matrix], mx.array]
) -> mx.array:
    """The product with each of several matrices, on its own stream if there are any, joined along the last axis."""
    parts = []
    for i, matrix in enumerate(matrices):
        with mx.stream(streams[i]) if streams else nullcontext():
            parts.append(product(matrix))
    return mx.concatenate(parts, axis=-1)
