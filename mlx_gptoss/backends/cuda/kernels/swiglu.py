"""The rows of an expert's gate and up projections that one program takes, and what it does with their products.

Legend: I intermediate; BN and BT as in tiles.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gate_up_rows(expert, I: tl.constexpr, BN: tl.constexpr):
    """The BN rows of a program: (rows int64 [BN] of the bank, row_mask [BN]), BN / 2 gate rows and their up rows.

    An expert has 2 * I rows, gate rows first. program_id(1) counts blocks of BN / 2.
    """
    HALF: tl.constexpr = BN // 2
    i = tl.arange(0, BN)
    column = tl.program_id(1) * HALF + i % HALF
    return expert.to(tl.int64) * (2 * I) + i // HALF * I + column, column < I


@triton.jit
def swiglu(acc, limit, alpha, BN: tl.constexpr, BT: tl.constexpr):
    """acc [BN, BT], gate rows over up rows, to hidden [BN / 2, BT] = gate * sigmoid(alpha * gate) * (up + 1).

    gate is clamped to at most `limit`, up to [-limit, limit].
    """
    gate, up = tl.split(acc.reshape(2, BN // 2, BT).permute(1, 2, 0))
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    return gate / (1 + tl.exp(-alpha * gate)) * (up + 1)
