"""Matrices as stored times a few tokens: `multiply`, which every such kernel is built on, and the dense layers.

A program computes BN output rows for BT tokens over all of K: the weights are decoded in registers as the left operand
of the tensor cores, the tokens are the right one. With one token (BT = 1) that is a matrix-vector product, which reads
each weight once and leaves the arithmetic to hardware that would be idle.

Legend: T tokens, K columns, N rows; H query heads, KV key heads of 64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layers import DenseMatrix, Matrix
from .dequant import outer_factor, weight_args, weight_tile, widen
from .launch import INTERPRETED, launch

EMBED_BLOCK = 512
WIDE = 16384  # rows that make more programs than a GPU holds at once


@dataclass(frozen=True)
class Tile:
    """BN rows and BK columns a program and step, by `warps` warps, with loads `stages` steps ahead."""

    BN: int
    BK: int
    warps: int
    stages: int


def tile_for(tokens: int, matrix: Matrix, dtype: torch.dtype) -> Tile:
    """Chosen by counting: programs for every processor, bytes in flight, and instructions a weight, of which 3.7 keep
    up with an H200's memory. Where N is small, narrow tiles; not too narrow, as each program reads all tokens."""
    dense = isinstance(matrix, DenseMatrix)
    if dtype == torch.float32:  # no tensor cores
        return Tile(16, 64, 4, 2)
    if tokens == 1:
        return Tile(16, 256, 1, 4 if dense else 3)
    if dense and matrix.shape[-2] < WIDE:
        return Tile(16, 128, 1, 4) if tokens <= 16 else Tile(32, 128, 2, 4)
    return Tile(32, 128, 2, 4 if dense else 3) if tokens <= 16 else Tile(64, 64, 4, 4 if dense else 3)


def block_of(tokens: int, dtype: torch.dtype, most: int = 64) -> int:
    """BT: tokens of one program; a power of two, 1 or at least 16."""
    most = 16 if dtype == torch.float32 else most
    return 1 if tokens == 1 else min(most, max(16, triton.next_power_of_2(tokens)))


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32."""
    if INTERPRETED:
        acc = tl.dot(widen(a), widen(b), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def multiply(
    x,
    x_rows,
    x_fits,
    norm,
    eps,
    w,
    w_scale,
    w_bias,
    rows,
    fits,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
):
    """float32 [BN, BT]: rows `rows` of w, int64 [BN], times rows `x_rows` of x, int64 [BT], before `outer`.

    norm: [K] multiplies RMSNorm(x), whose factor 1 / rms(x) is applied to the sums, or None.
    """
    acc = tl.zeros((BN, BT), tl.float32)
    squares = tl.zeros((BK, BT), tl.float32)
    for k0 in range(0, K, BK):
        weights = weight_tile(w, w_scale, w_bias, rows, fits, k0, K, ELEMENT, SCALE, GROUP, BN, BK, x.dtype.element_ty)
        k = k0 + tl.arange(0, BK)
        tokens = tl.load(x + x_rows[None, :] * K + k[:, None], mask=x_fits[None, :] & (k < K)[:, None], other=0)
        if norm is not None:
            wide = tokens.to(tl.float32)
            squares += wide * wide
            gain = tl.load(norm + k, mask=k < K, other=0).to(tl.float32)
            tokens = (wide * gain[:, None]).to(tokens.dtype)
        acc = dot(weights, tokens, acc)
    if norm is not None:
        acc *= tl.rsqrt(tl.sum(squares, 0) / K + eps)[None, :]
    return acc


@triton.jit
def _linear(
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
):
    rows = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    tokens = (tl.program_id(1) * BT + tl.arange(0, BT)).to(tl.int64)
    fits = rows < N
    here = tokens < T
    acc = multiply(x, tokens, here, norm, eps, w, w_scale, w_bias, rows, fits, K, ELEMENT, SCALE, GROUP, BN, BK, BT)
    acc *= outer_factor(w_outer, rows, fits, OUTER, BN)[:, None]
    if bias is not None:
        acc += tl.load(bias + rows, mask=fits, other=0).to(tl.float32)[:, None]
    at = tokens[None, :] * STRIDE + rows[:, None]
    mask = fits[:, None] & here[None, :]
    if residual is not None:
        acc += tl.load(residual + at, mask=mask, other=0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


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
    """out [T, N] = RMSNorm(x [T, K]) @ matrix [N, K]^T + bias [N] + residual [T, N]; the last three are optional, and
    `out` may be the residual. `out` may be columns of something wider."""
    count, (N, K), BT = x.shape[0], matrix.shape, block_of(x.shape[0], x.dtype)
    tile = tile_for(count, matrix, x.dtype)
    grid = (triton.cdiv(N, tile.BN), triton.cdiv(count, BT))
    launch(
        _linear,
        grid,
        *(x, norm, residual, bias, out),
        T=count,
        eps=eps,
        N=N,
        STRIDE=out.stride(0),
        K=K,
        BN=tile.BN,
        BK=tile.BK,
        BT=BT,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **weight_args(matrix),
    )


@triton.jit
def _qkv(
    x,
    norm,
    bias,
    cos,
    sin,
    slots,
    positions,
    q,
    keys,
    values,
    w,
    w_scale,
    w_bias,
    w_outer,
    T,
    eps,
    head0,
    H: tl.constexpr,
    KV: tl.constexpr,
    C: tl.constexpr,
    RING: tl.constexpr,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    OUTER: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
):
    """A program takes BN / 2 pairs (i, i + 32) of one head, so that it can rotate them."""
    HALF: tl.constexpr = BN // 2
    head = tl.program_id(0) * HALF // 32
    pair = tl.program_id(0) * HALF % 32
    i = tl.arange(0, BN)
    rows = (head * 64 + pair + i // HALF * 32 + i % HALF).to(tl.int64)
    fits = rows >= 0
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    tokens = t.to(tl.int64)
    here = t < T
    acc = multiply(x, tokens, here, norm, eps, w, w_scale, w_bias, rows, fits, K, ELEMENT, SCALE, GROUP, BN, BK, BT)
    acc *= outer_factor(w_outer, rows, fits, OUTER, BN)[:, None]
    acc += tl.load(bias + head0 * 64 + rows).to(tl.float32)[:, None]
    head += head0
    position = tl.load(positions + t, mask=here, other=-1)
    here = position >= 0
    a, b = tl.split(acc.reshape(2, HALF, BT).permute(1, 2, 0))  # [HALF, BT] each
    pairs = pair + tl.arange(0, HALF)
    if head < H + KV:
        angle = position.to(tl.int64)[None, :] * 32 + pairs[:, None]
        c = tl.load(cos + angle, mask=here[None, :], other=0)
        s = tl.load(sin + angle, mask=here[None, :], other=0)
        a, b = a * c - b * s, b * c + a * s
    if head < H:
        place = (tokens * H + head)[None, :] * 64 + pairs[:, None]
        tl.store(q + place, a.to(q.dtype.element_ty), mask=here[None, :])
        tl.store(q + place + 32, b.to(q.dtype.element_ty), mask=here[None, :])
    else:
        slot = tl.load(slots + t, mask=here, other=0).to(tl.int64)
        row = (slot * KV + (head - H) % KV) * C + (position % C if RING else position)
        place = row[None, :] * 64 + pairs[:, None]
        if head < H + KV:
            tl.store(keys + place, a.to(keys.dtype.element_ty), mask=here[None, :])
            tl.store(keys + place + 32, b.to(keys.dtype.element_ty), mask=here[None, :])
        else:
            tl.store(values + place, a.to(values.dtype.element_ty), mask=here[None, :])
            tl.store(values + place + 32, b.to(values.dtype.element_ty), mask=here[None, :])


def project_qkv(
    x: Tensor,
    matrices: tuple[Matrix, ...],
    bias: Tensor | None,
    table: tuple[Tensor, Tensor],
    slots: Tensor,
    positions: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    ring: bool,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """One token a row into queries, and into the cache: projection, bias, rotation and the write, in one kernel for
    each matrix (one, where q, k and v are stored alike).

    x [B, D]; matrices of (H + 2 KV) * 64 rows together; table: cos and sin, float32 [positions, 32]; slots, positions
    int32 [B], -1 for an idle row, which writes nothing; q [B, H, 64]; keys, values [S, KV, C, 64]; ring: position p
    stands at p % C. norm: as in `linear`.
    """
    (count, H, _), (_, KV, C, _) = q.shape, keys.shape
    BT, head0 = block_of(count, x.dtype), 0
    for matrix in matrices:
        (N, K), tile = matrix.shape, tile_for(count, matrix, x.dtype)
        launch(
            _qkv,
            (N // tile.BN, triton.cdiv(count, BT)),
            *(x, norm, bias, *table, slots, positions, q, keys, values),
            T=count,
            eps=eps,
            head0=head0,
            H=H,
            KV=KV,
            C=C,
            RING=ring,
            K=K,
            BN=tile.BN,
            BK=tile.BK,
            BT=BT,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **weight_args(matrix),
        )
        head0 += N // 64


@triton.jit
def _turn(x, cos, sin, out, STRIDE: tl.constexpr, HEADS: tl.constexpr, BH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BH)
    pair = tl.arange(0, 32)
    mask = (head < HEADS)[:, None] & (pair >= 0)[None, :]
    at = x + row * STRIDE + head[:, None] * 64 + pair[None, :]
    a = tl.load(at, mask=mask, other=0).to(tl.float32)
    b = tl.load(at + 32, mask=mask, other=0).to(tl.float32)
    c = tl.load(cos + row * 32 + pair)[None, :]
    s = tl.load(sin + row * 32 + pair)[None, :]
    at = out + (row * HEADS + head)[:, None] * 64 + pair[None, :]
    tl.store(at, (a * c - b * s).to(out.dtype.element_ty), mask=mask)
    tl.store(at + 32, (b * c + a * s).to(out.dtype.element_ty), mask=mask)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [L, heads * 64], columns of something wider or not, rotated by cos and sin, float32 [L, 32] ->
    [L, heads, 64]"""
    L, width = x.shape
    heads = width // 64
    out = torch.empty((L, heads, 64), dtype=x.dtype, device=x.device)
    BH = triton.next_power_of_2(heads)
    launch(_turn, (L,), x, cos, sin, out, STRIDE=x.stride(0), HEADS=heads, BH=BH, num_warps=4)
    return out


@triton.jit
def _norm(x, weight, out, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    values = tl.load(x + row * D + k, mask=k < D, other=0).to(tl.float32)
    gain = tl.load(weight + k, mask=k < D, other=0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 0) / D + eps)
    tl.store(out + row * D + k, (values * gain).to(out.dtype.element_ty), mask=k < D)


def norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """out [T, D] = RMSNorm(x [T, D]) * weight [D], in float32 inside."""
    T, D = x.shape
    launch(_norm, (T,), x, weight, out, eps, D=D, BLOCK=triton.next_power_of_2(D), num_warps=4)


@triton.jit
def _embed(
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
    row = tl.program_id(0)
    token = tl.load(given + row)
    if token < 0:
        token = tl.load(last + tl.load(slots + row))
    rows = token + tl.zeros((1,), tl.int64)
    fits = tl.load(positions + row) + tl.zeros((1,), tl.int32) >= 0
    k0 = tl.program_id(1) * BK
    values = weight_tile(w, w_scale, w_bias, rows, fits, k0, K, ELEMENT, SCALE, GROUP, 1, BK, tl.float32)
    values *= outer_factor(w_outer, rows, fits, OUTER, 1)[:, None]
    k = k0 + tl.arange(0, BK)
    tl.store(out + row.to(tl.int64) * K + k[None, :], values.to(out.dtype.element_ty), mask=(k < K)[None, :])


def embed(given: Tensor, last: Tensor, slots: Tensor, positions: Tensor, matrix: Matrix, out: Tensor) -> None:
    """out [B, D]: the embedding of `given` int64 [B], or, where that is -1, of the token that the row's slot sampled
    last, int64 [S]. An idle row (position -1) becomes zeros."""
    (B, D) = out.shape
    BK = min(EMBED_BLOCK, triton.next_power_of_2(D))
    launch(
        _embed,
        (B, triton.cdiv(D, BK)),
        *(given, last, slots, positions, out),
        K=D,
        BK=BK,
        num_warps=2,
        **weight_args(matrix),
    )


def product(x: Tensor, matrix: Matrix) -> Tensor:
    """x [T, K] @ matrix [N, K]^T -> [T, N]: cuBLAS where the matrix is stored in x's dtype."""
    if isinstance(matrix, DenseMatrix) and matrix.weight.dtype == x.dtype:
        return x @ matrix.weight.mT
    out = torch.empty((x.shape[0], matrix.shape[0]), dtype=x.dtype, device=x.device)
    linear(x, matrix, out)
    return out
