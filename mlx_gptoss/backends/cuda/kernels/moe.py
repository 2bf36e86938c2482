"""The mixture of experts: both expert products, by the routes of routing.py.

With one token, each program finds the best experts itself from the router's logits, and the down projection sums its
four experts, weights them and adds the residual in registers. With more, each expert in use is read once for all of its
tokens, which are a tile; a last kernel adds up each token's four results, always in the same order.

Legend: T tokens, E experts, A active experts, P = T * A pairs, D hidden, I intermediate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layers import Experts, Matrix
from .dequant import outer_factor, weight_args, weight_tile
from .launch import launch
from .linear import Tile, block_of, dot, multiply, tile_for
from .routing import SORTED_AT_ONCE, Groups, best_of, group_of


@triton.jit
def swiglu(gate, up, limit, alpha):
    """gate * sigmoid(alpha * gate) * (up + 1), gate clamped from above and up on both sides."""
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    return gate / (1 + tl.exp(-alpha * gate)) * (up + 1)


@triton.jit
def _gate_up(
    x,
    norm,
    logits,
    order,
    starts,
    bias,
    out,
    w,
    w_scale,
    w_bias,
    w_outer,
    eps,
    limit,
    alpha,
    I: tl.constexpr,
    E: tl.constexpr,
    A: tl.constexpr,
    BE: tl.constexpr,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    OUTER: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
):
    """BN / 2 gate rows and the same up rows of one expert. BT = 1: program_id(0) is one of the token's experts; else
    it is a tile of pairs."""
    HALF: tl.constexpr = BN // 2
    n = tl.program_id(0)
    if BT == 1:
        experts, _ = best_of(logits, 0, E, A, BE)
        expert = tl.sum(tl.where(tl.arange(0, A) == n, experts, 0), 0)
        pairs = n + tl.zeros((1,), tl.int64)
        here = pairs >= 0
        tokens = pairs * 0
    else:
        expert, start, end = group_of(starts, n, E, BE, BT)
        if start >= end:
            return
        at = start + tl.arange(0, BT)
        here = at < end
        pairs = tl.load(order + at, mask=here, other=0).to(tl.int64)
        tokens = pairs // A
    i = tl.arange(0, BN)
    column = tl.program_id(1) * HALF + i % HALF
    fits = column < I
    rows = expert.to(tl.int64) * (2 * I) + i // HALF * I + column
    acc = multiply(x, tokens, here, norm, eps, w, w_scale, w_bias, rows, fits, K, ELEMENT, SCALE, GROUP, BN, BK, BT)
    acc *= outer_factor(w_outer, rows, fits, OUTER, BN)[:, None]
    acc += tl.load(bias + rows, mask=fits, other=0).to(tl.float32)[:, None]
    gate, up = tl.split(acc.reshape(2, HALF, BT).permute(1, 2, 0))  # [HALF, BT] each
    hidden = swiglu(gate, up, limit, alpha)
    column = tl.program_id(1) * HALF + tl.arange(0, HALF)
    mask = (column < I)[:, None] & here[None, :]
    tl.store(out + pairs[None, :] * I + column[:, None], hidden.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _down_one(
    hidden,
    logits,
    bias,
    x,
    w,
    w_scale,
    w_bias,
    w_outer,
    N: tl.constexpr,
    E: tl.constexpr,
    A: tl.constexpr,
    BE: tl.constexpr,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    OUTER: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One token's A experts side by side: BN rows of each are one tile, multiplied with all A hidden vectors (the
    tensor cores pad to more than that anyway), of which each row keeps its own."""
    experts, weights = best_of(logits, 0, E, A, BE)
    i = tl.arange(0, A * BN)
    a = tl.arange(0, A)
    own = (i // BN)[:, None] == a[None, :]  # [A * BN, A]
    column = tl.program_id(0) * BN + i % BN
    fits = column < N
    rows = tl.sum(tl.where(own, experts[None, :], 0), 1).to(tl.int64) * N + column
    acc = tl.zeros((A * BN, A), tl.float32)
    for k0 in range(0, K, BK):
        values = weight_tile(
            w, w_scale, w_bias, rows, fits, k0, K, ELEMENT, SCALE, GROUP, A * BN, BK, hidden.dtype.element_ty
        )
        k = k0 + tl.arange(0, BK)
        tokens = tl.load(hidden + a[None, :] * K + k[:, None], mask=(k < K)[:, None], other=0)
        acc = dot(values, tokens, acc)
    result = tl.sum(tl.where(own, acc, 0), 1) * outer_factor(w_outer, rows, fits, OUTER, A * BN)
    result += tl.load(bias + rows, mask=fits, other=0).to(tl.float32)
    result *= tl.sum(tl.where(own, weights[None, :], 0), 1)
    total = tl.sum(result.reshape(A, BN), 0)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    total += tl.load(x + column, mask=column < N, other=0).to(tl.float32)
    tl.store(x + column, total.to(x.dtype.element_ty), mask=column < N)


@triton.jit
def _down(
    hidden,
    order,
    starts,
    bias,
    out,
    w,
    w_scale,
    w_bias,
    w_outer,
    N: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    OUTER: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
):
    expert, start, end = group_of(starts, tl.program_id(0), E, BE, BT)
    if start >= end:
        return
    at = start + tl.arange(0, BT)
    here = at < end
    pairs = tl.load(order + at, mask=here, other=0).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    fits = column < N
    rows = expert.to(tl.int64) * N + column
    acc = multiply(hidden, pairs, here, None, 0.0, w, w_scale, w_bias, rows, fits, K, ELEMENT, SCALE, GROUP, BN, BK, BT)
    acc *= outer_factor(w_outer, rows, fits, OUTER, BN)[:, None]
    acc += tl.load(bias + rows, mask=fits, other=0).to(tl.float32)[:, None]
    mask = fits[:, None] & here[None, :]
    tl.store(out + pairs[None, :] * N + column[:, None], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _combine(x, parts, weights, positions, out, D: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if positions is not None:
        if tl.load(positions + row) < 0:
            return
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if x is not None:
        total += tl.load(x + row * D + k, mask=k < D, other=0).to(tl.float32)
    for a in tl.static_range(A):
        part = tl.load(parts + (row * A + a) * D + k, mask=k < D, other=0).to(tl.float32)
        total += tl.load(weights + row * A + a) * part
    tl.store(out + row * D + k, total.to(out.dtype.element_ty), mask=k < D)


def mixture_of_one(x: Tensor, logits: Tensor, experts: Experts, hidden: Tensor, norm: Tensor, eps: float) -> None:
    """x [1, D] += the weighted sum of the experts that logits float32 [1, E] choose, of RMSNorm(x). hidden [A, I] is
    scratch."""
    (A, I), (E, D) = hidden.shape, experts.down.bias.shape
    (gate_up,), (down,) = experts.gate_up.matrices, experts.down.matrices
    BE = triton.next_power_of_2(E)
    tile = tile_for(1, gate_up, x.dtype)
    launch(
        _gate_up,
        (A, triton.cdiv(2 * I, tile.BN)),
        *(x, norm, logits, None, None, experts.gate_up.bias, hidden),
        **_activation(experts, eps),
        I=I,
        E=E,
        A=A,
        BE=BE,
        K=D,
        BT=1,
        **_options(tile),
        **weight_args(gate_up),
    )
    tile = down_tile(x.dtype)
    launch(
        _down_one,
        (triton.cdiv(D, tile.BN),),
        *(hidden, logits, experts.down.bias, x),
        N=D,
        E=E,
        A=A,
        BE=BE,
        K=I,
        **_options(tile),
        **weight_args(down),
    )


def mixture(
    x: Tensor | None,
    normed: Tensor,
    groups: Groups,
    experts: Experts,
    hidden: Tensor,
    parts: Tensor,
    out: Tensor,
    positions: Tensor | None = None,
) -> None:
    """out [T, D] = x, or 0, + the weighted sum of each token's experts of `normed` [T, D]. hidden [P, I] and parts
    [P, D] are scratch; rows whose position is -1 are left as they are; `out` may be x."""
    (T, D), (P, I) = out.shape, hidden.shape
    A, E = P // T, len(experts.down.bias)
    (gate_up,), (down,) = experts.gate_up.matrices, experts.down.matrices
    BT = max(16, block_of(T, out.dtype, most=128))
    tiles = min(E, P) + P // BT if BT < T else min(E, P)
    shared = {"E": E, "BE": triton.next_power_of_2(E), "BT": BT}
    tile = grouped_tile(T, gate_up, out.dtype)
    launch(
        _gate_up,
        (tiles, triton.cdiv(2 * I, tile.BN)),
        *(normed, None, None, groups.order, groups.starts, experts.gate_up.bias, hidden),
        **_activation(experts, 0.0),
        I=I,
        A=A,
        K=D,
        **shared,
        **_options(tile),
        **weight_args(gate_up),
    )
    tile = grouped_tile(T, down, out.dtype)
    launch(
        _down,
        (tiles, triton.cdiv(D, tile.BN)),
        *(hidden, groups.order, groups.starts, experts.down.bias, parts),
        N=D,
        K=I,
        **shared,
        **_options(tile),
        **weight_args(down),
    )
    BLOCK = min(1024, triton.next_power_of_2(D))
    grid = (T, triton.cdiv(D, BLOCK))
    launch(_combine, grid, x, parts, groups.weights, positions, out, D=D, A=A, BLOCK=BLOCK, num_warps=4)


def down_tile(dtype: torch.dtype) -> Tile:
    """BN rows of each of A experts."""
    return Tile(16, 64, 4, 2) if dtype == torch.float32 else Tile(16, 128, 4, 3)


def grouped_tile(tokens: int, matrix: Matrix, dtype: torch.dtype) -> Tile:
    """Few tokens an expert: bytes are what it costs; many: products are."""
    many = tokens > SORTED_AT_ONCE and dtype != torch.float32
    return Tile(128, 64, 8, 3) if many else tile_for(tokens, matrix, dtype)


def _activation(experts: Experts, eps: float) -> dict[str, float]:
    return {"eps": eps, "limit": experts.limit, "alpha": experts.alpha}


def _options(tile: Tile) -> dict[str, int]:
    return {"BN": tile.BN, "BK": tile.BK, "num_warps": tile.warps, "num_stages": tile.stages}
