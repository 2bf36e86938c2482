"""Attention with sinks, for a decoding step (one new token a row, over the cache) and a prefill (many new tokens).

The query heads that share a KV head are rows of one matrix, so a key is read once for all of them. Softmax is online,
in float32 and base 2: a program keeps each row's maximum, the sum of its weights and the weighted sum of values. A
head's sink is one more score without a value. It is the initial maximum, which is therefore always finite.

Decoding splits long rows over several programs, as Flash-Decoding does; a second kernel merges their partial results.

Legend: B rows, L tokens, H query heads, KV key heads, S slots, C cache entries of a slot; every head has 64 dimensions.
M query rows by N keys are a tile (tiles.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantized_kv import KeysOrValues
from . import tiles
from .interpreter import dot, to_float32
from .launch import launch, wait_for_inputs
from .quantized_kv import centered, load_scales, with_scales

PROGRAMS = 264  # that decoding aims to run at once: two for each multiprocessor of an H100
MAX_SPLIT = 8192  # keys of one split, so that a long row's programs do not run much longer than all others
PARTIAL = tl.constexpr(68)  # floats of a partial result: 64 sums, maximum, total, and padding to a multiple of 16 bytes
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_block(pointer, start, end, stride, N: tl.constexpr, FULL: tl.constexpr):
    """[N, 64]: keys or values from entry `start` on, entries being `stride` elements apart. Those from `end` on are 0;
    FULL says that there are none."""
    j = tl.arange(0, N)
    pointers = pointer + (tl.cast(start, tl.int64) * stride + (j[:, None] * stride + tl.arange(0, 64)[None, :]))
    if FULL:
        return tl.load(pointers)
    return tl.load(pointers, mask=(j < end - start)[:, None], other=0)


@triton.jit
def _load_entries(pointer, first, start, end, C, N: tl.constexpr, WINDOW: tl.constexpr):
    """As `_load_block`; with WINDOW, of a ring of C entries, counted from entry `first` on."""
    if WINDOW is None:
        return _load_block(pointer, start, end, 64, N, False)
    j = tl.arange(0, N)
    entry = first + start + j
    entry = tl.where(entry < C, entry, entry - C)
    return tl.load(
        pointer + (entry[:, None] * 64 + tl.arange(0, 64)[None, :]), mask=(j < end - start)[:, None], other=0
    )


@triton.jit
def _scores(queries, k):
    """queries [M, 64] @ k [N, 64]^T -> float32 [M, N]"""
    return dot(queries, tl.trans(k), tl.zeros((queries.shape[0], k.shape[0]), tl.float32))


@triton.jit
def _softmax_step(scores, scale, row_max):
    """Online softmax over one more block of scores [M, N]: (weights [M, N], rescale [M], the new row_max [M]).

    Sums so far must be multiplied by `rescale`. scale: the attention scale times log2(e).
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
    return tl.exp2(scores * scale - new_max[:, None]), tl.exp2(row_max - new_max), new_max


@triton.jit
def _split_length(length, SPLITS: tl.constexpr, MAX_SPLIT: tl.constexpr, N: tl.constexpr):
    """Keys of one split: the row's blocks of N keys in SPLITS equal parts, but at most MAX_SPLIT keys."""
    return tl.minimum(tl.cdiv(tl.cdiv(length, N), SPLITS) * N, MAX_SPLIT)


@triton.jit(do_not_specialize=["C"])
def _decode_kernel(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    slots,
    positions,
    sinks,
    out,
    scale,
    C,
    stride,
    H: tl.constexpr,
    KV: tl.constexpr,
    SPLITS: tl.constexpr,
    MAX_SPLIT: tl.constexpr,
    DIRECT: tl.constexpr,
    WINDOW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """One split of one row's query heads that share a KV head. program_id(0): row and KV head; program_id(1): split.

    q: [B, H, 64]. keys, values: [S, KV, C, 64], heads `stride` elements apart: in q's dtype, or codes in 8 bits, which
    have key_scales and value_scales, int64 [S, KV, C] (`scale_pairs`)
    slots, positions: int32 [B]; a row at -1 is idle and sees no keys. sinks: float32 [H]
    out: with DIRECT there is one split, and out is [B, H * 64]; else it is float32 scratch [B, H, splits, PARTIAL]
    WINDOW: keys that a row sees of a ring that has more of them, or None for all entries written
    """
    wait_for_inputs()
    row, kv, split = tl.program_id(0) // KV, tl.program_id(0) % KV, tl.program_id(1)
    length = tl.minimum(tl.load(positions + row) + 1, C if WINDOW is None else WINDOW)  # 0 for an idle row
    first = 0 if WINDOW is None else (tl.load(positions + row) + 1 - length) % C
    start, end = 0, length
    if not DIRECT:
        split_length = _split_length(length, SPLITS, MAX_SPLIT, N)
        start = split * split_length
        end = tl.minimum(start + split_length, length)
        if start >= end:
            return
    g, d = tl.arange(0, M), tl.arange(0, 64)
    head_mask = g < H // KV
    heads = row * H + kv * (H // KV) + g
    queries = tl.load(q + heads[:, None] * 64 + d[None, :], mask=head_mask[:, None], other=0)
    sink = tl.load(sinks + kv * (H // KV) + g, mask=head_mask, other=0) * LOG2_E
    scale *= LOG2_E
    base = (tl.load(slots + row).to(tl.int64) * KV + kv) * stride
    row_max = sink
    sums = tl.zeros((M, N), tl.float32)  # of weights; reduced after the loop, as warps wait for each other to reduce
    acc = tl.zeros((M, 64), tl.float32)
    if key_scales is not None:
        query_sums = tl.sum(to_float32(queries), 1)
        middles = tl.zeros((M, N), tl.float32)  # the weights times the middles of values, reduced after the loop
    for at in range(start, end, N):
        j = tl.arange(0, N)
        k = _load_entries(keys + base, first, at, end, C, N, WINDOW)
        v = _load_entries(values + base, first, at, end, C, N, WINDOW)
        if key_scales is None:
            scores = _scores(queries, k)
        else:
            k_scale, k_middle = load_scales(key_scales + base // 64 + at + j, j < end - at)
            scores = _scores(queries, centered(k, queries.dtype)) * k_scale[None, :]
            scores += query_sums[:, None] * k_middle[None, :]
        scores = tl.where((j < end - at)[None, :], scores, -float("inf"))
        weights, rescale, row_max = _softmax_step(scores, scale, row_max)
        sums = sums * rescale[:, None] + weights
        if value_scales is None:
            acc = dot(weights.to(v.dtype), v, acc * rescale[:, None])
        else:
            v_scale, v_middle = load_scales(value_scales + base // 64 + at + j, j < end - at)
            middles = middles * rescale[:, None] + weights * v_middle[None, :]
            weights *= v_scale[None, :]
            acc = dot(weights.to(queries.dtype), centered(v, queries.dtype), acc * rescale[:, None])
    if value_scales is not None:
        acc += tl.sum(middles, 1)[:, None]
    if DIRECT:
        acc /= (tl.sum(sums, 1) + tl.exp2(sink - row_max))[:, None]
        tl.store(out + heads[:, None] * 64 + d[None, :], acc.to(out.dtype.element_ty), mask=head_mask[:, None])
    else:
        partial = out + (heads * tl.num_programs(1) + split) * PARTIAL
        tl.store(partial[:, None] + d[None, :], acc, mask=head_mask[:, None])
        tl.store(partial + 64, row_max, mask=head_mask)
        tl.store(partial + 65, tl.sum(sums, 1), mask=head_mask)


@triton.jit(do_not_specialize=["C"])
def _merge_splits_kernel(
    scratch,
    positions,
    sinks,
    out,
    C,
    H: tl.constexpr,
    SPLITS: tl.constexpr,
    MAX_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    N: tl.constexpr,
):
    """Merge the splits of one row's query head with its sink. Each split counts 2 ** its maximum.

    scratch: float32 [B, H, MAX_SPLITS, PARTIAL]. positions: int32 [B]. sinks: float32 [H]. out: [B, H * 64]
    """
    wait_for_inputs()
    head, row = tl.program_id(0), tl.program_id(1)
    length = tl.minimum(tl.load(positions + row) + 1, C)
    s, d = tl.arange(0, MAX_SPLITS), tl.arange(0, 64)
    written = s * _split_length(length, SPLITS, MAX_SPLIT, N) < length
    partial = scratch + ((row * H + head) * MAX_SPLITS + s) * PARTIAL
    sink = tl.load(sinks + head) * LOG2_E
    maxima = tl.load(partial + 64, mask=written, other=-float("inf"))
    totals = tl.load(partial + 65, mask=written, other=0)
    sums = tl.load(partial[:, None] + d[None, :], mask=written[:, None], other=0)
    row_max = tl.maximum(sink, tl.max(maxima, 0))
    rescale = tl.exp2(maxima - row_max)
    total = tl.sum(totals * rescale, 0) + tl.exp2(sink - row_max)
    y = tl.sum(sums * rescale[:, None], 0) / total
    tl.store(out + (row * H + head) * 64 + d, y.to(out.dtype.element_ty))


def _splits(B: int, KV: int, C: int, N: int) -> tuple[int, int]:
    """(into how many splits a row is divided to keep a GPU busy, how many the longest row may need); powers of two.

    The second is the bigger one where rows may be longer than MAX_SPLIT keys for each of the first.
    """
    splits = min(max(1, PROGRAMS // (B * KV)), triton.cdiv(C, N))
    splits = 1 << (splits.bit_length() - 1)
    return splits, max(splits, triton.next_power_of_2(triton.cdiv(C, MAX_SPLIT)))


def entries(keys: KeysOrValues) -> int:
    """How many entries a slot of the cache has that keys [..., KV, C, 64] are the first C of. Splits follow from it and
    not from C, so that kernels are compiled for one cache and not for each length of a context."""
    return with_scales(keys)[0].stride(-3) // 64


def decode_scratch(B: int, H: int, KV: int, capacity: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized float32 [B, H, splits, PARTIAL] for `decode_attention` over `capacity` entries of `dtype`."""
    max_splits = _splits(B, KV, capacity, tiles.decode_attention_tile(H // KV, dtype).N)[1]
    return torch.empty((B, H, max_splits, PARTIAL.value), dtype=torch.float32, device=device)


def decode_attention(
    q: Tensor,
    keys: KeysOrValues,
    values: KeysOrValues,
    slots: Tensor,
    positions: Tensor,
    sinks: Tensor,
    scale: float,
    out: Tensor,
    scratch: Tensor | None,
    *,
    window: int | None,
) -> None:
    """Attention of one new token a row over the cache, which has the token's own key already.

    q: [B, H, 64]. keys, values: [S, KV, C, 64], or the first C entries of such caches, in q's dtype or in 8 bits
    slots, positions: int32 [B]; a row at position -1 is idle, reads nothing and becomes zeros
    sinks: float32 [H]. scale: > 0. out: [B, H * 64] of q's dtype
    scratch: from `decode_scratch` for this B and the entries of a slot; None with `window`
    window: of a ring of C >= window entries, where position p is entry p % C, and a row sees the last `window` of them
        up to its own; None for entries by position, of which a row sees all up to its own

    Which kernels are launched depends on shapes alone, so that a CUDA graph can capture them.
    Raises ValueError if the scratch is too small.
    """
    (B, H, _), (_, KV, C, _) = q.shape, keys.shape
    tile = tiles.decode_attention_tile(H // KV, q.dtype)
    splits, max_splits = (1, 1) if window else _splits(B, KV, entries(keys), tile.N)
    if max_splits > 1 and (scratch is None or scratch.numel() < B * H * max_splits * PARTIAL.value):
        raise ValueError(
            f"the scratch is too small for {B} rows of {entries(keys)} entries; decode_scratch makes one that fits"
        )
    division = {"SPLITS": splits, "MAX_SPLIT": C if window else MAX_SPLIT}
    (k, k_scales), (v, v_scales) = with_scales(keys), with_scales(values)
    launch(
        _decode_kernel,
        (B * KV, max_splits),
        *(q, k, v, k_scales, v_scales, slots, positions, sinks, out if max_splits == 1 else scratch),
        scale=scale,
        C=C,
        stride=64 * entries(keys),
        H=H,
        KV=KV,
        DIRECT=max_splits == 1,
        WINDOW=None if window == C else window,
        **division,
        **tile.options(),
    )
    if max_splits > 1:
        launch(
            _merge_splits_kernel,
            (H, B),
            *(scratch, positions, sinks, out),
            C=C,
            H=H,
            MAX_SPLITS=max_splits,
            N=tile.N,
            num_warps=4,
            **division,
        )


@triton.jit(do_not_specialize=["L", "C", "first"])
def _prefill_kernel(
    q,
    keys,
    values,
    sinks,
    out,
    scale,
    L,
    C,
    first,
    q_stride_l,
    q_stride_h,
    k_stride_h,
    k_stride_c,
    v_stride_h,
    v_stride_c,
    out_stride_l,
    out_stride_h,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """M / GROUP queries times the G query heads of one KV head. The last queries, which see the most keys, start first.

    q, out: [L, H, 64]. keys, values: [KV, C, 64]. sinks: float32 [H]; H = KV * G. Strides are in elements
    GROUP: G or the next power of two. WINDOW: keys that a query sees, or None for all. first: the first key that exists

    Two loops: over the blocks of keys that every query of the program sees, without a mask, and over the rest.
    """
    wait_for_inputs()
    kv, block = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    r, d = tl.arange(0, M), tl.arange(0, 64)
    start = block * (M // GROUP)
    i, g = start + r // GROUP, r % GROUP  # query and head of row r
    row_mask = (i < L) & (g < G)
    head = kv * G + g
    q_pointers = q + (i.to(tl.int64) * q_stride_l + head * q_stride_h)[:, None] + d[None, :]
    queries = tl.load(q_pointers, mask=row_mask[:, None], other=0)
    row_max = tl.load(sinks + head, mask=g < G, other=0) * LOG2_E
    row_sum = tl.full((M,), 1, tl.float32)  # the sink's own weight
    acc = tl.zeros((M, 64), tl.float32)
    scale *= LOG2_E
    keys += tl.cast(kv, tl.int64) * k_stride_h
    values += tl.cast(kv, tl.int64) * v_stride_h
    position = C - L + i  # of the row's query among the keys
    begin, end = first, tl.minimum(C - L + start + M // GROUP, C)
    if WINDOW is not None:
        begin = tl.maximum(begin, C - L + start - WINDOW + 1)
        middle = begin
    else:
        middle = begin + tl.maximum(C - L + start + 1 - begin, 0) // N * N
        for at in range(begin, middle, N):
            k = _load_block(keys, at, end, k_stride_c, N, True)
            v = _load_block(values, at, end, v_stride_c, N, True)
            weights, rescale, row_max = _softmax_step(_scores(queries, k), scale, row_max)
            row_sum = row_sum * rescale + tl.sum(weights, 1)
            acc = dot(weights.to(v.dtype), v, acc * rescale[:, None])
    for at in range(middle, end, N):
        k = _load_block(keys, at, end, k_stride_c, N, False)
        v = _load_block(values, at, end, v_stride_c, N, False)
        j = at + tl.arange(0, N)
        seen = j[None, :] <= position[:, None]
        if WINDOW is not None:
            seen &= j[None, :] > position[:, None] - WINDOW
        weights, rescale, row_max = _softmax_step(tl.where(seen, _scores(queries, k), -float("inf")), scale, row_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = dot(weights.to(v.dtype), v, acc * rescale[:, None])
    out_pointers = out + (i.to(tl.int64) * out_stride_l + head * out_stride_h)[:, None] + d[None, :]
    tl.store(out_pointers, (acc / row_sum[:, None]).to(out.dtype.element_ty), mask=row_mask[:, None])


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
    """Attention of one sequence's L new queries over its C >= L keys, the last L of which are their own.

    q, out: [L, H, 64]. keys, values: [KV, C, 64]. All four may be views whose last dimension is contiguous
    sinks: float32 [H]. scale: > 0
    first, window: query i sees the keys from `first` to its own, C - L + i; with `window` only the last `window` of
        them, and the work per query is then independent of L and C.
    """
    (L, H, _), (KV, C, _) = q.shape, keys.shape
    G = H // KV
    GROUP = triton.next_power_of_2(G)
    tile = tiles.prefill_attention_tile(GROUP, keys.dtype)
    launch(
        _prefill_kernel,
        (KV, triton.cdiv(L, tile.M // GROUP)),
        *(q, keys, values, sinks, out),
        scale=scale,
        L=L,
        C=C,
        first=first,
        q_stride_l=q.stride(0),
        q_stride_h=q.stride(1),
        k_stride_h=keys.stride(0),
        k_stride_c=keys.stride(1),
        v_stride_h=values.stride(0),
        v_stride_c=values.stride(1),
        out_stride_l=out.stride(0),
        out_stride_h=out.stride(1),
        G=G,
        GROUP=GROUP,
        WINDOW=window,
        **tile.options(),
    )
