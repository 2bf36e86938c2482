"""The thin products of LoRA adapters with experts, for pairs of token and expert grouped by expert (routing.py).

Legend: T tokens, E experts, A active experts of a token, P = T * A pairs, D in, N out, R rank; BN, BK and BT as in
tiles.py, BE as in routing.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..adapters import LowRank
from ..matrices import DenseMatrix
from . import tiles
from .dequant import weight_args
from .launch import launch, wait_for_inputs
from .linear import multiply
from .routing import Groups, find_block


@triton.jit
def _expert_factor_kernel(
    x,
    order,
    starts,
    uses,
    out,
    w,
    w_scale,
    w_bias,
    w_outer,
    N: tl.constexpr,
    E: tl.constexpr,
    A: tl.constexpr,
    BE: tl.constexpr,
    PER_ROW: tl.constexpr,
    ADD: tl.constexpr,
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
    """out = x @ w[expert]^T, or out += with ADD: BN columns of up to BT pairs of one expert for each program.
    program_id(0): which block of pairs; program_id(1): which columns.

    x: [P / PER_ROW, K], each row of PER_ROW pairs. order, starts: see Groups. out: [P, N]
    uses: bool [T], tokens whose product is not 0, or None for all. w: a dense matrix [E, N, K], see `weight_args`
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
    x_rows = pairs // PER_ROW
    acc = multiply(
        x, x_rows, pair_mask, None, 0.0, w, w_scale, w_bias, rows, row_mask, K, ELEMENT, SCALE, GROUP, BN, BK, BT, SPLIT
    )
    if uses is not None:
        used = tl.load(uses + pairs // A, mask=pair_mask, other=0) != 0
        acc = tl.where(used[None, :], acc, 0)
    offsets = pairs[None, :] * N + column[:, None]
    mask = row_mask[:, None] & pair_mask[None, :]
    if ADD:
        acc += tl.load(out + offsets, mask=mask, other=0).to(tl.float32)
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=mask)


def add_low_rank(
    x: Tensor, low_rank: LowRank, groups: Groups, uses: Tensor | None, active: int, out: Tensor, *, per_row: int
) -> None:
    """out [P, N] += (x [P / per_row, D] @ a[expert]^T) @ b[expert]^T for the pairs in `groups`.

    uses: bool [T], the tokens that use the adapter, or None for all. active: A. per_row: A if x has a row for each
    token, 1 if it has one for each pair.
    """
    u = torch.empty((len(out), low_rank.a.shape[1]), dtype=x.dtype, device=x.device)
    _product(x, low_rank.a, groups, uses, active, u, per_row, add=False)
    _product(u, low_rank.b, groups, None, active, out, 1, add=True)


def _product(
    x: Tensor, bank: Tensor, groups: Groups, uses: Tensor | None, active: int, out: Tensor, per_row: int, *, add: bool
) -> None:
    (E, N, K), P = bank.shape, len(out)
    T = P // active
    matrix = DenseMatrix(bank)
    BT = tiles.grouped_token_block(P, E, matrix, out.dtype)
    tile = tiles.grouped_tile(BT, matrix, out.dtype)
    blocks = min(E, P) + P // BT if BT < T else min(E, P)  # the most that find_block can count
    launch(
        _expert_factor_kernel,
        (blocks, triton.cdiv(N, tile.BN)),
        *(x, groups.order, groups.starts, uses, out),
        N=N,
        E=E,
        A=active,
        BE=triton.next_power_of_2(E),
        BT=BT,
        PER_ROW=per_row,
        ADD=add,
        K=K,
        **tile.options(),
        **weight_args(matrix),
    )
