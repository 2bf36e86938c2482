"""Draw tokens on the device: greedily, or at a temperature from the whole vocabulary, with their log-probabilities.

The drawn tokens are those of `sample_tokens` in the backend's sample.py, which makes the same Gumbel noise from the
same random numbers (SplitMix64). Requests with other options (top_p, penalties, logprobs ...) go through
`sample_tokens` itself, with the same logits.

Two kernels: the first reduces each block of a row's logits to four numbers, the second reduces the blocks of a row.

Legend: B rows, V vocabulary, S slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sample import GOLDEN, MIX_1, MIX_2, UNIFORM_BITS
from .launch import launch, wait_for_inputs

BLOCK = 4096  # logits of a program
# As int64, which is what the kernels compute in: its bits are those of uint64, and it wraps alike.
_GOLDEN, _MIX_1, _MIX_2 = (tl.constexpr(z - 2**64 if z >= 2**63 else z) for z in (GOLDEN, MIX_1, MIX_2))
_UNIFORM_SHIFT = tl.constexpr(64 - UNIFORM_BITS)
_UNIFORM_MASK = tl.constexpr((1 << UNIFORM_BITS) - 1)
_UNIFORM_STEP = tl.constexpr(2.0**-UNIFORM_BITS)


@triton.jit
def _mix(z):
    """SplitMix64's finalizer of int64. The masks make its shifts those of unsigned numbers."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _MIX_1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def gumbel(key, tokens):
    """Standard Gumbel noise, float32, for int64 token ids under a row's int64 key: -log(-log(1 - u)).

    Large noise comes from a small u, where a series for -log(1 - u) avoids cancellation.
    """
    bits = _mix(key + tokens * _GOLDEN)
    u = (((bits >> _UNIFORM_SHIFT) & _UNIFORM_MASK).to(tl.float32) + 0.5) * _UNIFORM_STEP
    exponential = tl.where(u < 0.01, u * (1 + u * (0.5 + u * (1.0 / 3 + u * 0.25))), -tl.log(1 - u))
    return -tl.log(exponential)


@triton.jit
def _draw_blocks_kernel(logits, temperatures, keys, maxima, totals, bests, ids, V, BLOCKS, BLOCK: tl.constexpr):
    """Reduce BLOCK logits of one row: the largest, the sum of exponentials relative to it, and the best candidate with
    its value, which is the logit or, at a temperature, logit / temperature + noise.

    logits: float32 [B, V]. temperatures: float32 [B]. keys: int64 [B]
    maxima, totals, bests: float32 [B, BLOCKS], and ids: int32 [B, BLOCKS], written
    """
    wait_for_inputs()
    block, row = tl.program_id(0), tl.program_id(1)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    mask = tokens < V
    values = tl.load(logits + row.to(tl.int64) * V + tokens, mask=mask, other=-float("inf"))
    maximum = tl.max(values, 0)
    at = row * BLOCKS + block
    tl.store(maxima + at, maximum)
    tl.store(totals + at, tl.sum(tl.exp(values - maximum), 0))
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        values = values / temperature + gumbel(tl.load(keys + row), tokens.to(tl.int64))
        values = tl.where(mask, values, -float("inf"))
    best = tl.argmax(values, 0)
    tl.store(bests + at, tl.max(values, 0))
    tl.store(ids + at, tl.minimum(block * BLOCK + best, V - 1).to(tl.int32))  # NaNs have no largest one


@triton.jit
def _draw_rows_kernel(
    logits, maxima, totals, bests, ids, slots, positions, tokens, logprobs, last, V, BLOCKS, BLOCK: tl.constexpr
):
    """Choose one row's token from its BLOCKS candidates. BLOCK: BLOCKS or the next power of two.

    logits to ids: see `_draw_blocks_kernel`. slots, positions: int32 [B]
    tokens: int64 [B], logprobs: float32 [B] and last: int64 [S], written; `last` not by a row at position -1
    """
    wait_for_inputs()
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    mask = at < BLOCKS
    at += row * BLOCKS
    maximum = tl.load(maxima + at, mask=mask, other=-float("inf"))
    row_max = tl.max(maximum, 0)
    total = tl.sum(tl.load(totals + at, mask=mask, other=0) * tl.exp(maximum - row_max), 0)
    best = tl.argmax(tl.load(bests + at, mask=mask, other=-float("inf")), 0)
    token = tl.load(ids + row * BLOCKS + best).to(tl.int64)
    tl.store(tokens + row, token)
    logit = tl.load(logits + row.to(tl.int64) * V + token)
    tl.store(logprobs + row, logit - row_max - tl.log(total))
    if tl.load(positions + row) >= 0:
        tl.store(last + tl.load(slots + row), token)


def scratch(rows: int, vocabulary: int, device: torch.device) -> tuple[Tensor, ...]:
    """Uninitialized scratch of `draw` for up to `rows` rows."""
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
    """Draw one token for each row of logits, float32 [B, V].

    temperatures: float32 [B], 0 for greedy. keys: int64 [B], of the noise. parts: from `scratch`
    tokens: int64 [B], written. logprobs: float32 [B], written: of the tokens, under the logits as they are
    last: int64 [S]; last[slots[b]] becomes the token, unless positions[b] is -1. slots, positions: int32 [B]
    """
    B, V = logits.shape
    blocks = triton.cdiv(V, BLOCK)
    launch(
        _draw_blocks_kernel,
        (blocks, B),
        *(logits, temperatures, keys, *parts, V, blocks),
        BLOCK=BLOCK,
        num_warps=8,
    )
    launch(
        _draw_rows_kernel,
        (B,),
        *(logits, *parts, slots, positions, tokens, logprobs, last, V, blocks),
        BLOCK=triton.next_power_of_2(blocks),
        num_warps=1,
    )
