"""The common draw on the device: greedy, or at a temperature over the whole vocabulary, with its log-probability.

The same numbers as sample.py's `choose` (SplitMix64, Gumbel noise); whatever else a request asks for (top_p, penalties,
alternatives ...) goes through `choose` itself, over the same logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sample import GOLDEN, MIX_1, MIX_2, UNIFORM_BITS
from .launch import launch

BLOCK = 4096
_GOLDEN, _MIX_1, _MIX_2 = (tl.constexpr(z - 2**64 if z >= 2**63 else z) for z in (GOLDEN, MIX_1, MIX_2))
_DROPPED, _KEPT, _STEP = (tl.constexpr(v) for v in (64 - UNIFORM_BITS, (1 << UNIFORM_BITS) - 1, 2.0**-UNIFORM_BITS))


@triton.jit
def _mix(z):
    """SplitMix64's finalizer on int64, which wraps."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _MIX_1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def gumbel(key, tokens):
    """Standard Gumbel noise for int64 token ids: -log(-log(1 - u)), small u, the large noise, without cancellation."""
    bits = _mix(key + tokens * _GOLDEN)
    u = (((bits >> _DROPPED) & _KEPT).to(tl.float32) + 0.5) * _STEP
    exact = tl.where(u < 0.01, u * (1 + u * (0.5 + u * (1.0 / 3 + u * 0.25))), -tl.log(1 - u))
    return -tl.log(exact)


@triton.jit
def _tiles(logits, temperatures, keys, tops, totals, bests, ids, V, TILES, BLOCK: tl.constexpr):
    """Of one row's BLOCK logits: the largest, the sum of exponentials below it, and the best candidate."""
    tile, row = tl.program_id(0), tl.program_id(1)
    tokens = tile * BLOCK + tl.arange(0, BLOCK)
    here = tokens < V
    values = tl.load(logits + row.to(tl.int64) * V + tokens, mask=here, other=-float("inf"))
    top = tl.max(values, 0)
    at = row * TILES + tile
    tl.store(tops + at, top)
    tl.store(totals + at, tl.sum(tl.exp(values - top), 0))
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        values = values / temperature + gumbel(tl.load(keys + row), tokens.to(tl.int64))
        values = tl.where(here, values, -float("inf"))
    best = tl.argmax(values, 0)
    tl.store(bests + at, tl.max(values, 0))
    tl.store(ids + at, (tile * BLOCK + best).to(tl.int32))


@triton.jit
def _choose(logits, tops, totals, bests, ids, slots, positions, tokens, logprobs, last, V, TILES, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    here = at < TILES
    at += row * TILES
    top = tl.load(tops + at, mask=here, other=-float("inf"))
    highest = tl.max(top, 0)
    total = tl.sum(tl.load(totals + at, mask=here, other=0) * tl.exp(top - highest), 0)
    best = tl.argmax(tl.load(bests + at, mask=here, other=-float("inf")), 0)
    token = tl.load(ids + row * TILES + best).to(tl.int64)
    tl.store(tokens + row, token)
    chosen = tl.load(logits + row.to(tl.int64) * V + token)
    tl.store(logprobs + row, chosen - highest - tl.log(total))
    if tl.load(positions + row) >= 0:
        tl.store(last + tl.load(slots + row), token)


def scratch(rows: int, vocabulary: int, device: torch.device) -> tuple[Tensor, ...]:
    """What `draw` needs for up to `rows` rows."""
    shape = (rows, triton.cdiv(vocabulary, BLOCK))
    floats = tuple(torch.empty(shape, dtype=torch.float32, device=device) for _ in range(3))
    return *floats, torch.empty(shape, dtype=torch.int32, device=device)


def draw(
    logits: Tensor,
    temperatures: Tensor,
    keys: Tensor,
    slots: Tensor,
    positions: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    last: Tensor,
    parts: tuple[Tensor, ...],
) -> None:
    """logits, temperatures (0 is greedy) and keys float32 [B, V], float32 [B], int64 [B] -> tokens int64 [B], their
    logprobs float32 [B] under the raw logits, and last[slots[b]] int64 for rows that are not idle (position -1)."""
    B, V = logits.shape
    tiles = triton.cdiv(V, BLOCK)
    launch(_tiles, (tiles, B), logits, temperatures, keys, *parts, V, tiles, BLOCK=BLOCK, num_warps=8)
    launch(
        _choose,
        (B,),
        *(logits, *parts, slots, positions, tokens, logprobs, last, V, tiles),
        BLOCK=triton.next_power_of_2(tiles),
        num_warps=1,
    )
