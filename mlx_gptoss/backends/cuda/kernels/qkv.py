"""Queries, keys and values: their projection fused with RoPE and the write to the cache, and RoPE alone.

Legend: B rows of a decoding step, D hidden, H query heads, KV key heads, S slots, C cache entries of a slot; every head
has 64 dimensions. BN, BK and BT as in tiles.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..matrices import Matrix
from . import tiles
from .dequant import load_rows, outer_factor, weight_args
from .launch import launch, wait_for_inputs
from .linear import multiply


@triton.jit(do_not_specialize=["T", "C"])
def _qkv_kernel(
    x,
    norm,
    bias,
    delta,
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
    C,
    H: tl.constexpr,
    KV: tl.constexpr,
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
    """BN / 2 pairs of one head for BT tokens: projected, rotated, and written to q, keys or values.

    x: [T, K]. norm: [K] or None. bias: [(H + 2 KV) * 64]. delta: [T, (H + 2 KV) * 64], added to the product, or None
    cos, sin: float32 [positions, 32]
    slots, positions: int32 [T]. q: [T, H, 64]. keys, values: [S, KV, C, 64]; position p is entry p % C
    w, ..., OUTER: a matrix of whole heads [heads * 64, K], see `weight_args`; head0: its first head among all of them

    RoPE rotates dimension p of a head with p + 32, a pair. A program owns both, so its BN <= 64 rows are two runs of
    HALF = BN / 2 rows, 32 apart. Here BN = 16, and each [] is a run of 8 rows that one program takes:

        program_id(0)     0       1       2       3    |   4       5    ...
        head              0       0       0       0    |   1       1
        pair              0       8      16      24    |   0       8         the first pair of the program
        rows, first    [ 0- 7] [ 8-15] [16-23] [24-31] | [64-71] [72-79]     dimensions pair + 0 .. HALF - 1
              second   [32-39] [40-47] [48-55] [56-63] | [96-103] ...        the same + 32

    Row i of the tile is dimension pair + i % HALF, + 32 in the second run. So acc [BN, BT], reshaped to [2, HALF, BT],
    is a (first run) over b (second run), and the rotated pair is (a cos - b sin, b cos + a sin). Of all heads the first
    H are queries, the next KV keys, and the last KV values, which are not rotated.
    """
    wait_for_inputs()
    HALF: tl.constexpr = BN // 2
    head = tl.program_id(0) * HALF // 32
    pair = tl.program_id(0) * HALF % 32
    i = tl.arange(0, BN)
    rows = (head * 64 + pair + i // HALF * 32 + i % HALF).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    tokens = t.to(tl.int64)
    token_mask = t < T
    acc = multiply(
        x, tokens, token_mask, norm, eps, w, w_scale, w_bias, rows, None, K, ELEMENT, SCALE, GROUP, BN, BK, BT, SPLIT
    )
    acc *= outer_factor(w_outer, rows, None, OUTER, BN)[:, None]
    acc += load_rows(bias + head0 * 64, rows, None).to(tl.float32)[:, None]
    if delta is not None:
        offsets = tokens[None, :] * ((H + 2 * KV) * 64) + (head0 * 64 + rows)[:, None]
        acc += tl.load(delta + offsets, mask=token_mask[None, :], other=0).to(tl.float32)
    head += head0
    position = tl.load(positions + t, mask=token_mask, other=-1)
    busy = (position >= 0)[None, :]
    a, b = tl.split(acc.reshape(2, HALF, BT).permute(1, 2, 0))  # [HALF, BT] each
    pairs = (pair + tl.arange(0, HALF))[:, None]
    if head < H + KV:
        angle = position.to(tl.int64)[None, :] * 32 + pairs
        c = tl.load(cos + angle, mask=busy, other=0)
        s = tl.load(sin + angle, mask=busy, other=0)
        a, b = a * c - b * s, b * c + a * s
    if head < H:
        _store_pairs(q + (tokens * H + head)[None, :] * 64 + pairs, a, b, busy)
    else:
        slot = tl.load(slots + t, mask=position >= 0, other=0).to(tl.int64)
        entry = (slot * KV + (head - H) % KV) * C + position % C
        offsets = entry[None, :] * 64 + pairs
        if head < H + KV:
            _store_pairs(keys + offsets, a, b, busy)
        else:
            _store_pairs(values + offsets, a, b, busy)


@triton.jit
def _store_pairs(pointers, a, b, mask):
    """Store a at the pointers and b 32 elements further."""
    tl.store(pointers, a.to(pointers.dtype.element_ty), mask=mask)
    tl.store(pointers + 32, b.to(pointers.dtype.element_ty), mask=mask)


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
    norm: Tensor | None = None,
    eps: float = 0.0,
    delta: Tensor | None = None,
) -> None:
    """Compute the queries of one token a row, and write its keys and values to the cache; one kernel for each matrix.

    x: [B, D]. norm: [D], or None if x is normalized already
    matrices: (H + 2 KV) * 64 rows together, whole heads in each; one matrix if q, k and v are stored alike
    bias: [(H + 2 KV) * 64]. table: cos and sin, float32 [positions, 32]
    slots, positions: int32 [B]; a row at position -1 is idle and writes nothing
    delta: [B, (H + 2 KV) * 64], added to the projection, or None
    q: [B, H, 64], written. keys, values: [S, KV, C, 64]; position p is entry p % C
    """
    (B, H, _), (_, KV, C, _) = q.shape, keys.shape
    head0 = 0
    for matrix in matrices:
        N, K = matrix.shape
        tile, BT = tiles.linear_tile(B, matrix, x.dtype), tiles.token_block(B, matrix, x.dtype)
        launch(
            _qkv_kernel,
            (N // tile.BN, triton.cdiv(B, BT)),
            *(x, norm, bias, delta, *table, slots, positions, q, keys, values),
            T=B,
            eps=eps,
            head0=head0,
            H=H,
            KV=KV,
            C=C,
            K=K,
            BT=BT,
            **tile.options(),
            **weight_args(matrix),
        )
        head0 += N // 64


@triton.jit
def _rope_kernel(x, cos, sin, out, STRIDE: tl.constexpr, HEADS: tl.constexpr, BH: tl.constexpr):
    """Rotate one token's HEADS heads. x: [L, HEADS * 64], rows STRIDE apart. cos, sin: float32 [L, 32].
    out: [L, HEADS, 64]. BH: HEADS or the next power of two."""
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BH)[:, None]
    pair = tl.arange(0, 32)[None, :]
    mask = head < HEADS
    pointers = x + row * STRIDE + head * 64 + pair
    a = tl.load(pointers, mask=mask, other=0).to(tl.float32)
    b = tl.load(pointers + 32, mask=mask, other=0).to(tl.float32)
    c = tl.load(cos + row * 32 + pair)
    s = tl.load(sin + row * 32 + pair)
    _store_pairs(out + (row * HEADS + head) * 64 + pair, a * c - b * s, b * c + a * s, mask)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [L, heads * 64], contiguous or columns of a wider tensor, rotated by cos and sin, float32 [L, 32] ->
    [L, heads, 64]"""
    L, width = x.shape
    heads = width // 64
    out = x.new_empty((L, heads, 64))
    BH = triton.next_power_of_2(heads)
    launch(_rope_kernel, (L,), x, cos, sin, out, STRIDE=x.stride(0), HEADS=heads, BH=BH, num_warps=4)
    return out
