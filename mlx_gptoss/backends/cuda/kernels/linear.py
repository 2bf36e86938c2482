"""Products with stored matrices, and the embedding.

A program of a product computes BN output rows for BT tokens over all of K, or over one of P parts of it (split K). The
weights are decoded in registers and are the left operand of the tensor cores; the tokens are the right one. With one
token (BT = 1) this is a matrix-vector product, limited by memory: it reads each weight once, and tensor cores that
would be idle do the arithmetic.

Legend: T tokens, N output rows, K columns, B rows of a decoding step, S slots; BN, BK, BT and P as in tiles.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..matrices import DenseMatrix, Matrix
from . import tiles
from .dequant import load_rows, outer_factor, weight_args, weight_tile
from .interpreter import dot
from .launch import launch, wait_for_inputs

EMBED_BLOCK = 512  # columns


@triton.jit
def multiply(
    x,
    tokens,
    token_mask,
    norm,
    eps,
    w,
    w_scale,
    w_bias,
    rows,
    row_mask,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    SPLIT: tl.constexpr,
    first=0,
    PARTS: tl.constexpr = 1,
):
    """float32 [BN, BT]: w[rows] @ RMSNorm(x[tokens])^T before `outer`, the product that every kernel is built on.

    x: [any, K]. tokens: int64 [BT], rows of x; token_mask: bool [BT], or None if every token exists. With BT = 1 it is
        the first row of x, without a mask
    norm: [K], the norm's weights, or None for no norm. Its factor 1 / rms(x) is computed on the way and applied to the
        sums.
    w, w_scale, w_bias, rows, row_mask: see `weight_tile`
    first, PARTS: only K / PARTS columns from `first` on, whole steps, without a norm and with several tokens
    """
    tl.static_assert(PARTS == 1 or (norm is None and BT > 1 and K % (PARTS * SPLIT * BK) == 0))
    if BT == 1:
        acc = multiply_one(
            x, norm, eps, w, w_scale, w_bias, rows, row_mask, K, ELEMENT, SCALE, GROUP, BN, BK, 1, SPLIT
        )[:, None]
    elif SPLIT == 1:
        acc = tl.zeros((BN, BT), tl.float32)
        squares = tl.zeros((BK, BT), tl.float32)
        for i in range(0, K // PARTS, BK):
            k0 = first + i
            weights = weight_tile(
                w, w_scale, w_bias, rows, row_mask, k0, K, ELEMENT, SCALE, GROUP, BN, BK, x.dtype.element_ty
            )
            k = k0 + tl.arange(0, BK)
            pointers = x + tokens[None, :] * K + k[:, None]  # [BK, BT]
            mask = (k < K)[:, None] if token_mask is None else token_mask[None, :] & (k < K)[:, None]
            values = tl.load(pointers, mask=mask, other=0)
            if norm is not None:
                wide = values.to(tl.float32)
                squares += wide * wide
                gain = tl.load(norm + k, mask=k < K, other=0).to(tl.float32)
                values = (wide * gain[:, None]).to(values.dtype)
            acc = dot(weights, values, acc)
        if norm is not None:
            acc *= tl.rsqrt(tl.sum(squares, 0) / K + eps)[None, :]
    else:
        M: tl.constexpr = SPLIT * BN
        parts = tl.arange(0, M) // BN * BK
        tile_rows = _repeat(rows, BN, 1, SPLIT)
        tile_mask = row_mask if row_mask is None else _repeat(row_mask, BN, 1, SPLIT)
        sums = tl.zeros((SPLIT, BN, BT), tl.float32)
        for i in range(0, K // PARTS, SPLIT * BK):
            k0 = first + i
            weights = weight_tile(
                w,
                w_scale,
                w_bias,
                tile_rows,
                tile_mask,
                k0 + parts[:, None],
                K,
                ELEMENT,
                SCALE,
                GROUP,
                M,
                BK,
                x.dtype.element_ty,
            )
            k = k0 + (tl.arange(0, SPLIT) * BK)[:, None, None] + tl.arange(0, BK)[None, :, None]
            values = tl.load(x + tokens[None, None, :] * K + k, mask=token_mask[None, None, :] & (k < K), other=0)
            sums = dot(weights.reshape(SPLIT, BN, BK), values, sums)
        acc = tl.sum(sums, 0)
    return acc


@triton.jit
def multiply_one(
    x,
    norm,
    eps,
    w,
    w_scale,
    w_bias,
    rows,
    row_mask,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    VECTORS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """float32 [VECTORS * BN]: w[rows] @ RMSNorm(x)^T before `outer`, BN rows for each of VECTORS vectors.

    x: [VECTORS, K]. rows, row_mask: [VECTORS * BN], those of the first vector first. norm: only with one vector

    Tensor cores multiply with at least 8 columns. The columns here are the vectors, each in SPLIT parts: a step takes
    SPLIT * BK columns of w, and the SPLIT parts of a row are as many rows of the tile, each of which keeps the sum of
    its own column. So a program has more rows for its warps, and each value of x is decoded, scaled and loaded once.
    """
    PARTS: tl.constexpr = VECTORS * SPLIT
    M: tl.constexpr = PARTS * BN
    part = tl.arange(0, PARTS)
    row_part = tl.arange(0, M) // BN
    own = row_part[:, None] == part[None, :]  # [M, PARTS]
    rows = _repeat(rows, BN, VECTORS, SPLIT)
    if row_mask is not None:
        row_mask = _repeat(row_mask, BN, VECTORS, SPLIT)
    acc = tl.zeros((M, PARTS), tl.float32)
    squares = tl.zeros((BK, PARTS), tl.float32)
    for k0 in range(0, K, SPLIT * BK):
        first = k0 if SPLIT == 1 else k0 + (row_part % SPLIT * BK)[:, None]
        weights = weight_tile(
            w, w_scale, w_bias, rows, row_mask, first, K, ELEMENT, SCALE, GROUP, M, BK, x.dtype.element_ty
        )
        k = k0 + (part % SPLIT * BK)[None, :] + tl.arange(0, BK)[:, None]  # [BK, PARTS]
        values = tl.load(x + (part // SPLIT * K)[None, :] + k, mask=k < K, other=0)
        if norm is not None:
            wide = values.to(tl.float32)
            squares += wide * wide
            values = (wide * tl.load(norm + k, mask=k < K, other=0).to(tl.float32)).to(values.dtype)
        acc = dot(weights, values, acc)
    sums = tl.sum(tl.where(own, acc, 0), 1)
    if SPLIT > 1:
        sums = tl.sum(sums.reshape(VECTORS, SPLIT, BN), 1).reshape(VECTORS * BN)
    if norm is not None:
        sums *= tl.rsqrt(tl.sum(tl.sum(squares, 0), 0) / K + eps)
    return sums


@triton.jit
def _repeat(values, BN: tl.constexpr, VECTORS: tl.constexpr, SPLIT: tl.constexpr):
    """values [VECTORS * BN] to [VECTORS * SPLIT * BN], each BN of them SPLIT times."""
    if SPLIT > 1:
        values = values.reshape(VECTORS, 1, BN).broadcast_to(VECTORS, SPLIT, BN).reshape(VECTORS * SPLIT * BN)
    return values


@triton.jit(do_not_specialize=["T"])
def _linear_kernel(
    x,
    norm,
    residual,
    bias,
    out,
    w,
    w_scale,
    w_bias,
    w_outer,
    T,
    eps,
    N: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    OUTER: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
):
    """out = RMSNorm(x) @ w^T + bias + residual, one [BN, BT] tile of its transpose for each program.

    x: [T, K]. norm: [K], bias: [N], residual: as `out`; each may be None
    out: [T, N], float32 or x's dtype, rows STRIDE apart. With several PARTS, [PARTS, T, N]: out[p] is the product of
        the p-th K / PARTS columns, which program_id(2) = p computes
    w, ..., OUTER: the matrix [N, K], see `weight_args`
    """
    wait_for_inputs()
    rows = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    tokens = (tl.program_id(1) * BT + tl.arange(0, BT)).to(tl.int64)
    row_mask = rows < N
    token_mask = tokens < T
    part = tl.program_id(2)
    acc = multiply(
        x,
        tokens,
        token_mask,
        norm,
        eps,
        w,
        w_scale,
        w_bias,
        rows,
        row_mask,
        K,
        ELEMENT,
        SCALE,
        GROUP,
        BN,
        BK,
        BT,
        SPLIT,
        part * (K // PARTS) if PARTS > 1 else 0,
        PARTS,
    )
    acc *= outer_factor(w_outer, rows, row_mask, OUTER, BN)[:, None]
    if bias is not None:
        acc += load_rows(bias, rows, row_mask).to(tl.float32)[:, None]
    offsets = (tokens + part * T if PARTS > 1 else tokens)[None, :] * STRIDE + rows[:, None]
    mask = row_mask[:, None] & token_mask[None, :]
    if residual is not None:
        acc += tl.load(residual + offsets, mask=mask, other=0).to(tl.float32)
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=mask)


def linear(
    x: Tensor,
    matrix: Matrix,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """out [T, N] = RMSNorm(x [T, K]) @ matrix [N, K]^T + bias [N] + residual [T, N].

    Norm, bias and residual are optional. `out` may be the residual, and may be columns of a wider tensor; a residual
    has the strides of `out`.
    """
    _launch(x, matrix, out, tiles.linear_tile(len(x), matrix, x.dtype), 1, bias, residual, norm, eps)


def split_linear(x: Tensor, matrix: Matrix, partial: Tensor) -> None:
    """partial float32 [P, T, N], whose sum over P is x [T, K] @ matrix [N, K]^T. P as `tiles.split_k` says.
    `norm.rms_norm` adds them up, always in the same order."""
    tile, _ = tiles.split_k(len(x), matrix, x.dtype)
    _launch(x, matrix, partial[0], tile, len(partial))


def _launch(
    x: Tensor,
    matrix: Matrix,
    out: Tensor,
    tile: tiles.Tile,
    parts: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    T, (N, K) = x.shape[0], matrix.shape
    BT = tiles.token_block(T, matrix, x.dtype)
    launch(
        _linear_kernel,
        (triton.cdiv(N, tile.BN), triton.cdiv(T, BT), parts),
        *(x, norm, residual, bias, out),
        T=T,
        eps=eps,
        N=N,
        STRIDE=out.stride(0),
        K=K,
        BT=BT,
        PARTS=parts,
        **tile.options(),
        **weight_args(matrix),
    )


def product(x: Tensor, matrix: Matrix, *, wide: bool = False) -> Tensor:
    """x [T, K] @ matrix [N, K]^T -> [T, N] of x's dtype, with cuBLAS if the matrix is stored in that dtype; float32 if
    `wide`."""
    dtype = torch.float32 if wide else x.dtype
    if isinstance(matrix, DenseMatrix) and matrix.weight.dtype == dtype == x.dtype:
        return x @ matrix.weight.mT
    out = x.new_empty((x.shape[0], matrix.shape[0]), dtype=dtype)
    linear(x, matrix, out)
    return out


@triton.jit
def _embed_kernel(
    given,
    last,
    slots,
    positions,
    out,
    w,
    w_scale,
    w_bias,
    w_outer,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    OUTER: tl.constexpr,
    BK: tl.constexpr,
):
    """BK columns of one row's embedding for each program; zeros for an idle row.

    given: int64 [B], a token or -1. last: int64 [S]. slots, positions: int32 [B]. out: [B, K]
    w, ..., OUTER: the matrix [V, K], see `weight_args`
    """
    wait_for_inputs()
    row = tl.program_id(0)
    token = tl.load(given + row)
    if token < 0:
        token = tl.load(last + tl.load(slots + row))
    rows = token + tl.zeros((1,), tl.int64)
    row_mask = tl.load(positions + row) + tl.zeros((1,), tl.int32) >= 0
    k0 = tl.program_id(1) * BK
    values = weight_tile(w, w_scale, w_bias, rows, row_mask, k0, K, ELEMENT, SCALE, GROUP, 1, BK, tl.float32)
    values *= outer_factor(w_outer, rows, row_mask, OUTER, 1)[:, None]
    k = k0 + tl.arange(0, BK)
    tl.store(out + row.to(tl.int64) * K + k[None, :], values.to(out.dtype.element_ty), mask=(k < K)[None, :])


def embed(given: Tensor, last: Tensor, slots: Tensor, positions: Tensor, matrix: Matrix, out: Tensor) -> None:
    """out [B, D] = rows of matrix [V, D]: a row's token is given[b], or last[slots[b]] where that is -1.

    given: int64 [B]. last: int64 [S], the token that each slot sampled last. slots, positions: int32 [B]; a row at
    position -1 is idle and becomes zeros.
    """
    B, D = out.shape
    BK = min(EMBED_BLOCK, triton.next_power_of_2(D))
    launch(
        _embed_kernel,
        (B, triton.cdiv(D, BK)),
        *(given, last, slots, positions, out),
        K=D,
        BK=BK,
        num_warps=2,
        **weight_args(matrix),
    )
