"""The mixture of experts: gate, up and down projections of each token's experts, and their weighted sum.

One token takes two kernels. Each program of both finds the token's experts by itself from the router's logits; the down
projection adds up its four experts, weighted, and the residual in registers. Several tokens take three: pairs of token
and expert are grouped by expert (routing.py), so that each expert's weights are read once for all of its tokens, and
the last kernel adds up each token's results, always in the same order.

Legend: T tokens, E experts, A active experts of a token, P = T * A pairs, D hidden, I intermediate; BN, BK and BT as in
tiles.py, BE as in routing.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..adapters import ExpertAdapter
from ..layers import Experts
from . import lora, tiles
from .dequant import load_rows, outer_factor, weight_args
from .launch import launch, wait_for_inputs
from .linear import multiply, multiply_one
from .routing import Groups, find_block, top_experts
from .swiglu import gate_up_rows, swiglu


@triton.jit
def _gate_up_one_token_kernel(
    x,
    norm,
    logits,
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
    SPLIT: tl.constexpr,
):
    """out = swiglu(RMSNorm(x) @ w[expert]^T + bias[expert]): BN / 2 columns of one of the token's experts for each
    program. program_id(0): which of the A experts; program_id(1): which columns.

    x: [1, K]. norm: [K]. logits: float32 [1, E]. bias: [E, 2 I]. out: [A, I]
    w, ..., OUTER: the matrix [E, 2 I, K], see `weight_args`
    """
    wait_for_inputs()
    a = tl.program_id(0)
    experts, _ = top_experts(logits, 0, E, A, BE)
    expert = tl.sum(tl.where(tl.arange(0, A) == a, experts, 0), 0)
    rows, row_mask = gate_up_rows(expert, I, BN)
    acc = multiply(
        x, None, None, norm, eps, w, w_scale, w_bias, rows, row_mask, K, ELEMENT, SCALE, GROUP, BN, BK, 1, SPLIT
    )
    acc *= outer_factor(w_outer, rows, row_mask, OUTER, BN)[:, None]
    acc += load_rows(bias, rows, row_mask).to(tl.float32)[:, None]
    hidden = swiglu(acc, limit, alpha, BN, 1)
    column = (tl.program_id(1) * (BN // 2) + tl.arange(0, BN // 2))[:, None]
    tl.store(out + a.to(tl.int64) * I + column, hidden.to(out.dtype.element_ty), mask=column < I)


@triton.jit
def _down_one_token_kernel(
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
    SPLIT: tl.constexpr,
):
    """x += the sum over the token's experts of weight * (w[expert] @ hidden[a] + bias[expert]): BN columns for each
    program.

    hidden: [A, K]. logits: float32 [1, E]. bias: [E, N]. x: [1, N]. w, ..., OUTER: the matrix [E, N, K]

    BN rows of each of the A experts are one tile of A * BN rows, multiplied with all A hidden vectors.
    """
    wait_for_inputs()
    experts, weights = top_experts(logits, 0, E, A, BE)
    i = tl.arange(0, A * BN)
    a = tl.arange(0, A)
    own = (i // BN)[:, None] == a[None, :]  # [A * BN, A]: whether row i is of the a-th expert
    column = tl.program_id(0) * BN + i % BN
    row_mask = column < N
    rows = tl.sum(tl.where(own, experts[None, :], 0), 1).to(tl.int64) * N + column
    result = multiply_one(
        hidden, None, 0.0, w, w_scale, w_bias, rows, row_mask, K, ELEMENT, SCALE, GROUP, BN, BK, A, SPLIT
    )
    result *= outer_factor(w_outer, rows, row_mask, OUTER, A * BN)
    result += load_rows(bias, rows, row_mask).to(tl.float32)
    result *= tl.sum(tl.where(own, weights[None, :], 0), 1)
    total = tl.sum(result.reshape(A, BN), 0)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    total += tl.load(x + column, mask=column < N, other=0).to(tl.float32)
    tl.store(x + column, total.to(x.dtype.element_ty), mask=column < N)


def forward_one_token(x: Tensor, logits: Tensor, experts: Experts, hidden: Tensor, norm: Tensor, eps: float) -> None:
    """x [1, D] += the weighted sum of the experts that logits, float32 [1, E], choose, applied to RMSNorm(x).

    norm: [D]. hidden: scratch [A, I].
    """
    (A, I), (E, D) = hidden.shape, experts.down.bias.shape
    (gate_up,), (down,) = experts.gate_up.matrices, experts.down.matrices
    choice = {"E": E, "A": A, "BE": triton.next_power_of_2(E)}
    tile = tiles.gate_up_one_token_tile(gate_up, x.dtype)
    launch(
        _gate_up_one_token_kernel,
        (A, triton.cdiv(2 * I, tile.BN)),
        *(x, norm, logits, experts.gate_up.bias, hidden),
        eps=eps,
        limit=experts.limit,
        alpha=experts.alpha,
        I=I,
        K=D,
        **choice,
        **tile.options(),
        **weight_args(gate_up),
    )
    tile = tiles.down_one_token_tile(down, x.dtype)
    launch(
        _down_one_token_kernel,
        (triton.cdiv(D, tile.BN),),
        *(hidden, logits, experts.down.bias, x),
        N=D,
        K=I,
        **choice,
        **tile.options(),
        **weight_args(down),
    )


@triton.jit
def _gate_up_grouped_kernel(
    x,
    order,
    starts,
    bias,
    delta,
    out,
    w,
    w_scale,
    w_bias,
    w_outer,
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
    SPLIT: tl.constexpr,
):
    """out = swiglu(x @ w[expert]^T + bias[expert]): BN / 2 columns of up to BT pairs of one expert for each program.
    program_id(0): which block of pairs; program_id(1): which columns.

    x: [T, K]. order, starts: see Groups. bias: [E, 2 I]. delta: [P, 2 I], added to the product, or None. out: [P, I]
    w, ..., OUTER: the matrix [E, 2 I, K], see `weight_args`
    """
    wait_for_inputs()
    expert, start, end = find_block(starts, tl.program_id(0), E, BE, BT)
    if start >= end:
        return
    index = start + tl.arange(0, BT)
    pair_mask = index < end
    pairs = tl.load(order + index, mask=pair_mask, other=0).to(tl.int64)
    rows, row_mask = gate_up_rows(expert, I, BN)
    acc = multiply(
        x,
        pairs // A,
        pair_mask,
        None,
        0.0,
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
    )
    acc *= outer_factor(w_outer, rows, row_mask, OUTER, BN)[:, None]
    acc += load_rows(bias, rows, row_mask).to(tl.float32)[:, None]
    if delta is not None:
        offsets = pairs[None, :] * (2 * I) + (rows - expert.to(tl.int64) * (2 * I))[:, None]
        acc += tl.load(delta + offsets, mask=row_mask[:, None] & pair_mask[None, :], other=0).to(tl.float32)
    hidden = swiglu(acc, limit, alpha, BN, BT)
    column = (tl.program_id(1) * (BN // 2) + tl.arange(0, BN // 2))[:, None]
    mask = (column < I) & pair_mask[None, :]
    tl.store(out + pairs[None, :] * I + column, hidden.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _down_grouped_kernel(
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
    SPLIT: tl.constexpr,
):
    """out = hidden @ w[expert]^T + bias[expert]: BN columns of up to BT pairs of one expert for each program.
    program_id(0): which block of pairs; program_id(1): which columns.

    hidden: [P, K]. order, starts: see Groups. bias: [E, N]. out: [P, N], not yet weighted
    w, ..., OUTER: the matrix [E, N, K], see `weight_args`
    """
    wait_for_inputs()
    expert, start, end = find_block(starts, tl.program_id(0), E, BE, BT)
    if start >= end:
        return
    index = start + tl.arange(0, BT)
    pair_mask = index < end
    pairs = tl.load(order + index, mask=pair_mask, other=0).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    row_mask = column < N
    rows = expert.to(tl.int64) * N + column
    acc = multiply(
        hidden,
        pairs,
        pair_mask,
        None,
        0.0,
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
    )
    acc *= outer_factor(w_outer, rows, row_mask, OUTER, BN)[:, None]
    acc += load_rows(bias, rows, row_mask).to(tl.float32)[:, None]
    mask = row_mask[:, None] & pair_mask[None, :]
    tl.store(out + pairs[None, :] * N + column[:, None], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sum_experts_kernel(x, parts, weights, positions, out, D: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    """out = x + the sum of each token's A weighted parts: BLOCK columns of one token for each program.

    x: [T, D] or None, which is 0. parts: [T * A, D]. weights: float32 [T * A]. out: [T, D]
    positions: int32 [T] or None; a row at -1 is idle and left as it is
    """
    wait_for_inputs()
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


def forward_grouped(
    x: Tensor | None,
    normed: Tensor,
    groups: Groups,
    experts: Experts,
    hidden: Tensor,
    parts: Tensor,
    out: Tensor,
    positions: Tensor | None = None,
    adapters: Sequence[ExpertAdapter] = (),
) -> None:
    """out [T, D] = x (or 0) + the weighted sum of each token's experts applied to normed [T, D].

    hidden [P, I] and parts [P, D] are scratch; the parts of pairs that are not in `groups` are added as they are.
    positions: int32 [T]; rows at -1 are idle and left as they are. `out` may be x. adapters: what is added to the
    products.
    """
    (T, D), (P, I) = out.shape, hidden.shape
    A, E = P // T, len(experts.down.bias)
    (gate_up,), (down,) = experts.gate_up.matrices, experts.down.matrices
    BT = tiles.grouped_token_block(P, E, gate_up, out.dtype)
    blocks = min(E, P) + P // BT if BT < T else min(E, P)  # the most that find_block can count
    shared = {"E": E, "BE": triton.next_power_of_2(E), "BT": BT}
    delta = _gate_up_delta(normed, groups, adapters, A, parts.new_zeros((P, 2 * I))) if adapters else None
    tile = tiles.grouped_tile(BT, gate_up, out.dtype)
    launch(
        _gate_up_grouped_kernel,
        (blocks, triton.cdiv(2 * I, tile.BN)),
        *(normed, groups.order, groups.starts, experts.gate_up.bias, delta, hidden),
        limit=experts.limit,
        alpha=experts.alpha,
        I=I,
        A=A,
        K=D,
        **shared,
        **tile.options(),
        **weight_args(gate_up),
    )
    tile = tiles.grouped_tile(BT, down, out.dtype)
    launch(
        _down_grouped_kernel,
        (blocks, triton.cdiv(D, tile.BN)),
        *(hidden, groups.order, groups.starts, experts.down.bias, parts),
        N=D,
        K=I,
        **shared,
        **tile.options(),
        **weight_args(down),
    )
    for each in adapters:
        if each.down is not None:
            lora.add_low_rank(hidden, each.down, groups, each.tokens, A, parts, per_row=1)
    BLOCK = min(1024, triton.next_power_of_2(D))
    grid = (T, triton.cdiv(D, BLOCK))
    launch(_sum_experts_kernel, grid, x, parts, groups.weights, positions, out, D=D, A=A, BLOCK=BLOCK, num_warps=4)


def _gate_up_delta(
    normed: Tensor, groups: Groups, adapters: Sequence[ExpertAdapter], active: int, delta: Tensor
) -> Tensor:
    """delta [P, 2 I], zeros, with what the adapters add to gate and up."""
    for each in adapters:
        if each.gate_up is not None:
            lora.add_low_rank(normed, each.gate_up, groups, each.tokens, active, delta, per_row=active)
    return delta
