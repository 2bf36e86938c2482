"""Attention with sinks: one new token a row over the cache, and one sequence's many new tokens.

Query heads that share a KV head are rows of one product, so that a key is read once for all of them. Softmax is online,
in float32 and base 2. A head's sink is where its running maximum starts, which is therefore always finite.

Legend: B rows, L tokens, H query heads, K kv heads, S slots, C places for keys; every head is 64 wide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .linear import dot

PROGRAMS = 264  # of decoding at once: two for each of an H100's processors
LONGEST = 8192  # places of one split, so that a long row's programs do not outlast all others
PARTIAL = tl.constexpr(68)  # floats that a split leaves: 64 sums, then their maximum and total; whole 16 bytes
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(rows, at, end, stride, N: tl.constexpr, WHOLE: tl.constexpr):
    """[N, 64]: the places from `at` on of keys or values; zeros for those from `end` on, unless all are WHOLE."""
    j = tl.arange(0, N)
    rows += tl.cast(at, tl.int64) * stride + (j[:, None] * stride + tl.arange(0, 64)[None, :])
    if WHOLE:
        return tl.load(rows)
    return tl.load(rows, mask=(j < end - at)[:, None], other=0)


@triton.jit
def _scores(queries, k):
    """[M, 64], [N, 64] -> [M, N]"""
    return dot(queries, tl.trans(k), tl.zeros((queries.shape[0], k.shape[0]), tl.float32))


@triton.jit
def _weigh(scores, scale, top):
    """One more block: its weights [M, N], what the sums so far are worth beside them [M], and the new maximum [M]."""
    new = tl.maximum(top, tl.max(scores, 1) * scale)
    return tl.exp2(scores * scale - new[:, None]), tl.exp2(top - new), new


@triton.jit
def _share(length, BUSY: tl.constexpr, LONGEST: tl.constexpr, N: tl.constexpr):
    """Places of a split: an equal part of the row's blocks for each of BUSY programs, and at most LONGEST."""
    return tl.minimum(tl.cdiv(tl.cdiv(length, N), BUSY) * N, LONGEST)


@triton.jit(do_not_specialize=["C"])
def _decode(
    q,
    keys,
    values,
    slots,
    positions,
    sinks,
    out,
    scale,
    C,
    stride,
    H: tl.constexpr,
    K: tl.constexpr,
    BUSY: tl.constexpr,
    LONGEST: tl.constexpr,
    DIRECT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """One split of a row and KV head. DIRECT: the only split, it writes the row; else out is `_combine`'s scratch."""
    row, kv, split = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1)
    length = tl.minimum(tl.load(positions + row) + 1, C)  # 0 for an idle row
    start, end = 0, length
    if not DIRECT:
        share = _share(length, BUSY, LONGEST, N)
        start = split * share
        end = tl.minimum(start + share, length)
        if start >= end:
            return
    g, d = tl.arange(0, M), tl.arange(0, 64)
    mine = g < H // K
    heads = row * H + kv * (H // K) + g
    queries = tl.load(q + heads[:, None] * 64 + d[None, :], mask=mine[:, None], other=0)
    sink = tl.load(sinks + kv * (H // K) + g, mask=mine, other=0) * LOG2_E
    scale *= LOG2_E
    base = (tl.load(slots + row).to(tl.int64) * K + kv) * stride
    top = sink
    total = tl.zeros((M, N), tl.float32)  # summed up at the end: a block less to wait for other warps
    acc = tl.zeros((M, 64), tl.float32)
    for at in range(start, end, N):
        k = _tile(keys + base, at, end, 64, N, False)
        v = _tile(values + base, at, end, 64, N, False)
        scores = tl.where((tl.arange(0, N) < end - at)[None, :], _scores(queries, k), -float("inf"))
        weights, fade, top = _weigh(scores, scale, top)
        total = total * fade[:, None] + weights
        acc = dot(weights.to(v.dtype), v, acc * fade[:, None])
    if DIRECT:
        acc /= (tl.sum(total, 1) + tl.exp2(sink - top))[:, None]
        tl.store(out + heads[:, None] * 64 + d[None, :], acc.to(out.dtype.element_ty), mask=mine[:, None])
    else:
        partial = out + (heads * tl.num_programs(1) + split) * PARTIAL
        tl.store(partial[:, None] + d[None, :], acc, mask=mine[:, None])
        tl.store(partial + 64, top, mask=mine)
        tl.store(partial + 65, tl.sum(total, 1), mask=mine)


@triton.jit(do_not_specialize=["C"])
def _combine(
    scratch,
    positions,
    sinks,
    out,
    C,
    H: tl.constexpr,
    BUSY: tl.constexpr,
    LONGEST: tl.constexpr,
    SPLITS: tl.constexpr,
    N: tl.constexpr,
):
    """One row's query head: the splits that had keys, each worth 2 ** its maximum, and the sink."""
    head, row = tl.program_id(0), tl.program_id(1)
    length = tl.minimum(tl.load(positions + row) + 1, C)
    s, d = tl.arange(0, SPLITS), tl.arange(0, 64)
    there = s * _share(length, BUSY, LONGEST, N) < length
    partial = scratch + ((row * H + head) * SPLITS + s) * PARTIAL
    sink = tl.load(sinks + head) * LOG2_E
    tops = tl.load(partial + 64, mask=there, other=-float("inf"))
    totals = tl.load(partial + 65, mask=there, other=0)
    sums = tl.load(partial[:, None] + d[None, :], mask=there[:, None], other=0)
    top = tl.maximum(sink, tl.max(tops, 0))
    worth = tl.exp2(tops - top)
    total = tl.sum(totals * worth, 0) + tl.exp2(sink - top)
    y = tl.sum(sums * worth[:, None], 0) / total
    tl.store(out + (row * H + head) * 64 + d, y.to(out.dtype.element_ty))


def _block(dtype: torch.dtype) -> int:
    """N: 8 KB of keys."""
    return 128 // dtype.itemsize


def _splits(B: int, K: int, capacity: int, block: int) -> tuple[int, int]:
    """Powers of two: how many splits of each row keep the device busy, and how many the longest row may need."""
    busy = min(max(1, PROGRAMS // (B * K)), triton.cdiv(capacity, block))
    busy = 1 << (busy.bit_length() - 1)
    return busy, max(busy, triton.next_power_of_2(triton.cdiv(capacity, LONGEST)))


def decode_scratch(B: int, H: int, K: int, capacity: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """float32 [B, H, splits, PARTIAL], uninitialized: for `decode_attention` over `capacity` places of `dtype`."""
    splits = _splits(B, K, capacity, _block(dtype))[1]
    return torch.empty((B, H, splits, PARTIAL.value), dtype=torch.float32, device=device)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    sinks: Tensor,
    scale: float,
    out: Tensor,
    scratch: Tensor | None,
    *,
    ring: bool,
) -> None:
    """One new token a row over the cache, which holds its own key already.

    q [B, H, 64]; keys, values [S, K, C, 64], or the first C places of caches so shaped; slots, positions int32 [B], -1
    for an idle row, which reads nothing and becomes zeros; sinks float32 [H]; scale > 0; out [B, H * 64] of q's dtype.
    A row sees the places up to its position; with `ring`, position p stands at place p % C and all that were written
    are seen. scratch: what `decode_scratch` makes for this B and C; rings need none. Launches depend on shapes alone,
    so that a graph can capture them.
    """
    (B, H, _), (_, K, C, _), N = q.shape, keys.shape, _block(keys.dtype)
    busy, splits = (1, 1) if ring else _splits(B, K, C, N)
    if splits > 1 and (scratch is None or scratch.numel() < B * H * splits * PARTIAL.value):
        raise ValueError(f"{B} rows of {C} places need the scratch that decode_scratch makes for them")
    shares = {"BUSY": busy, "LONGEST": C if ring else LONGEST, "N": N}
    launch(
        _decode,
        (B * K, splits),
        *(q, keys, values, slots, positions, sinks, out if splits == 1 else scratch),
        scale=scale,
        C=C,
        stride=keys.stride(1),
        H=H,
        K=K,
        DIRECT=splits == 1,
        M=max(16, triton.next_power_of_2(H // K)),
        num_warps=4,
        num_stages=4,
        **shares,
    )
    if splits > 1:
        launch(_combine, (H, B), scratch, positions, sinks, out, C=C, H=H, SPLITS=splits, num_warps=4, **shares)


@triton.jit(do_not_specialize=["L", "C", "first"])
def _prefill(
    q,
    keys,
    values,
    sinks,
    out,
    scale,
    L,
    C,
    first,
    q_row,
    q_head,
    k_head,
    k_place,
    v_head,
    v_place,
    out_row,
    out_head,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """M / GROUP queries times the G heads of one KV head, the last queries first: they have the most keys to see."""
    kv, block = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    r, d = tl.arange(0, M), tl.arange(0, 64)
    start = block * (M // GROUP)
    i, g = start + r // GROUP, r % GROUP
    mine = (i < L) & (g < G)
    head = kv * G + g
    queries = tl.load(q + (i.to(tl.int64) * q_row + head * q_head)[:, None] + d[None, :], mask=mine[:, None], other=0)
    top = tl.load(sinks + head, mask=g < G, other=0) * LOG2_E
    total = tl.full((M,), 1, tl.float32)  # the sink's own weight
    acc = tl.zeros((M, 64), tl.float32)
    scale *= LOG2_E
    keys += tl.cast(kv, tl.int64) * k_head
    values += tl.cast(kv, tl.int64) * v_head
    place = C - L + i
    begin, end = first, tl.minimum(C - L + start + M // GROUP, C)
    if WINDOW is not None:
        begin = tl.maximum(begin, C - L + start - WINDOW + 1)
        middle = begin
    else:  # all of these queries see the keys before `middle`
        middle = begin + tl.maximum(C - L + start + 1 - begin, 0) // N * N
        for at in range(begin, middle, N):
            k = _tile(keys, at, end, k_place, N, True)
            v = _tile(values, at, end, v_place, N, True)
            weights, fade, top = _weigh(_scores(queries, k), scale, top)
            total = total * fade + tl.sum(weights, 1)
            acc = dot(weights.to(v.dtype), v, acc * fade[:, None])
    for at in range(middle, end, N):
        k = _tile(keys, at, end, k_place, N, False)
        v = _tile(values, at, end, v_place, N, False)
        j = at + tl.arange(0, N)
        seen = j[None, :] <= place[:, None]
        if WINDOW is not None:
            seen &= j[None, :] > place[:, None] - WINDOW
        weights, fade, top = _weigh(tl.where(seen, _scores(queries, k), -float("inf")), scale, top)
        total = total * fade + tl.sum(weights, 1)
        acc = dot(weights.to(v.dtype), v, acc * fade[:, None])
    at_out = out + (i.to(tl.int64) * out_row + head * out_head)[:, None] + d[None, :]
    tl.store(at_out, (acc / total[:, None]).to(out.dtype.element_ty), mask=mine[:, None])


def prefill_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    sinks: Tensor,
    scale: float,
    out: Tensor,
    *,
    window: int | None,
    first: int,
) -> None:
    """One sequence's L new queries over its C >= L keys, the last L of which are their own.

    q, out [L, H, 64]; keys, values [K, C, 64]: views, the last dimension of which is contiguous; sinks float32 [H];
    scale > 0. Query i stands at place C - L + i and sees the places from `first` up to its own; with `window`, only
    the last `window` of them, and work a token does not grow with L or C.
    """
    (L, H, _), (K, C, _) = q.shape, keys.shape
    G = H // K
    GROUP = triton.next_power_of_2(G)
    wide = keys.dtype == torch.float32
    M = max(32 if wide else 128, GROUP)
    launch(
        _prefill,
        (K, triton.cdiv(L, M // GROUP)),
        *(q, keys, values, sinks, out),
        scale=scale,
        L=L,
        C=C,
        first=first,
        q_row=q.stride(0),
        q_head=q.stride(1),
        k_head=keys.stride(0),
        k_place=keys.stride(1),
        v_head=values.stride(0),
        v_place=values.stride(1),
        out_row=out.stride(0),
        out_head=out.stride(1),
        G=G,
        GROUP=GROUP,
        WINDOW=window,
        M=M,
        N=32 if wide else 64,
        num_warps=4 if wide else 8,
        num_stages=3,
    )
