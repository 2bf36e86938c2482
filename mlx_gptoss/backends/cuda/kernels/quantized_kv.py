"""Keys and values in 8 bits (../quantized_kv.py): quantizing them, and decoding them for a prompt. A decoding step
computes with the codes (attention.py).

Legend: B rows of a decoding step, L tokens of a prompt, KV key heads, S slots, C cache entries of a slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantized_kv import LEAST_SCALE, TOP, KeysOrValues, Packed
from .interpreter import to_float32
from .launch import launch, wait_for_inputs

ENTRIES = 64  # that a program of `_dequantize_kernel` decodes
_TOP, _LEAST_SCALE = tl.constexpr(float(TOP)), tl.constexpr(LEAST_SCALE)
_INTEGERS = tl.constexpr(8388608.0)  # 2^23, from which on every float32 is an integer


@triton.jit
def centered(codes, dtype: tl.constexpr):
    """8-bit codes minus 128, exact in every dtype. Their sums with weights are then as small as those of the values,
    which the weights' rounding would be multiplied by. In float32, 2^23 or-ed with a code is 2^23 plus the code."""
    return ((codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - (_INTEGERS + 128)).to(dtype)


@triton.jit
def _round(x):
    """float32 to the nearest integer, halves to even."""
    size = tl.abs(x)
    size = tl.where(size < _INTEGERS, (size + _INTEGERS) - _INTEGERS, size)
    return tl.where(x < 0, -size, size)


@triton.jit(do_not_specialize=["C"])
def _quantize_kernel(
    x,
    codes,
    scale_bias,
    slots,
    positions,
    C,
    x_stride_part,
    x_stride_row,
    x_stride_head,
    SLOTS: tl.constexpr,
    KV: tl.constexpr,
    BH: tl.constexpr,
):
    """One row's keys or values, as pack() in ../quantized_kv.py, with the same operations. program_id(1): which of the
    parts of x: keys and values, or a sequence.

    x: [parts, B, KV, 64], by strides. codes: uint8 [parts, S, KV, C, 64]. scale_bias: float32 [parts, S, KV, C, 2]
    slots, positions: int32 [B], where the rows go; a row at -1 is idle and writes nothing. None: row n is entry n of
        the only slot. BH: KV or the next power of two
    """
    wait_for_inputs()
    row, part = tl.program_id(0), tl.program_id(1)
    slot, position = 0, row
    if positions is not None:
        position = tl.load(positions + row)
        if position < 0:
            return
        slot = tl.load(slots + row)
    head, d = tl.arange(0, BH), tl.arange(0, 64)
    mask = head < KV
    vectors = x + part * x_stride_part + row.to(tl.int64) * x_stride_row
    vectors += head[:, None] * x_stride_head + d[None, :]
    values = to_float32(tl.load(vectors, mask=mask[:, None], other=0))
    low, high = tl.min(values, 1), tl.max(values, 1)
    low_is_larger = tl.abs(low) > tl.abs(high)
    scale = tl.maximum(tl.div_rn(high - low, _TOP), _LEAST_SCALE)
    scale = tl.where(low_is_larger, scale, -scale)
    edge = tl.where(low_is_larger, low, high)
    steps = _round(tl.div_rn(edge, scale))
    some = steps != 0
    scale = tl.where(some, tl.div_rn(edge, tl.where(some, steps, 1.0)), scale)
    bias = tl.where(some, edge, 0.0)
    rounded = _round(tl.div_rn(values - bias[:, None], scale[:, None]))
    rounded = tl.minimum(tl.maximum(rounded, 0.0), _TOP)
    entry = ((part * SLOTS + slot).to(tl.int64) * KV + head) * C + position
    tl.store(codes + entry[:, None] * 64 + d[None, :], rounded.to(tl.uint8), mask=mask[:, None])
    tl.store(scale_bias + entry * 2, scale, mask=mask)
    tl.store(scale_bias + entry * 2 + 1, bias, mask=mask)


def pack(x: Tensor) -> Packed:
    """Keys or values [B, KV, L, 64], of any strides but the last, in 8 bits."""
    B, KV, L, dim = x.shape
    packed = Packed(
        torch.empty((B, KV, L, dim), dtype=torch.uint8, device=x.device),
        torch.empty((B, KV, L, 2), dtype=torch.float32, device=x.device),
    )
    strides = {"x_stride_part": x.stride(0), "x_stride_row": x.stride(2), "x_stride_head": x.stride(1)}
    _quantize(x, [packed.codes, packed.scale_bias], None, None, (L, B), C=L, SLOTS=1, KV=KV, **strides)
    return packed


def write_rows(fresh: Tensor, arrays: Sequence[Tensor], slots: Tensor, positions: Tensor) -> None:
    """Write the keys and values of one token a row to a cache in 8 bits.

    fresh: [2, B, KV, 1, 64]. arrays: of the cache, codes uint8 [2, S, KV, C, 64], scales and biases float32
        [2, S, KV, C, 2]. slots, positions: int32 [B]; a row at position -1 is idle and writes nothing
    """
    parts, B, KV, _, dim = fresh.shape
    _, S, _, C, _ = arrays[0].shape
    strides = {"x_stride_part": B * KV * dim, "x_stride_row": KV * dim, "x_stride_head": dim}
    _quantize(fresh, arrays, slots, positions, (B, parts), C=C, SLOTS=S, KV=KV, **strides)


def _quantize(
    x: Tensor,
    arrays: Sequence[Tensor],
    slots: Tensor | None,
    positions: Tensor | None,
    grid: tuple[int, int],
    *,
    KV: int,
    **sizes: int,
) -> None:
    BH = triton.next_power_of_2(KV)
    launch(_quantize_kernel, grid, x, *arrays, slots, positions, KV=KV, BH=BH, **sizes, num_warps=1)


@triton.jit(do_not_specialize=["C"])
def _dequantize_kernel(codes, scale_bias, out, C, stride, N: tl.constexpr):
    """N entries of one head. codes: uint8 [KV, C, 64], heads `stride` elements apart. scale_bias: int64 [KV, C], see
    `scale_pairs`. out: [KV, C, 64]. program_id(1): the head."""
    wait_for_inputs()
    head = tl.program_id(1).to(tl.int64)
    j, d = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, 64)
    mask, offsets = j < C, j[:, None] * 64 + d[None, :]
    numbers = centered(tl.load(codes + head * stride + offsets, mask=mask[:, None], other=0), tl.float32)
    scale, middle = load_scales(scale_bias + head * (stride // 64) + j, mask)
    values = numbers * scale[:, None] + middle[:, None]
    tl.store(out + head * C * 64 + offsets, values.to(out.dtype.element_ty), mask=mask[:, None])


@triton.jit
def load_scales(pointers, mask):
    """(scales, middles), float32 as the pointers to `scale_pairs` are shaped: a value is `centered` code * scale +
    middle. 0 where the mask is false."""
    pair = tl.load(pointers, mask=mask, other=0)
    scale = (pair & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)
    bias = (pair >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    return scale, scale * 128 + bias


def scale_pairs(packed: Packed) -> Tensor:
    """Scale and bias of each vector as one number of 64 bits, int64 [..., KV, C]: a pipelined loop then loads both,
    and would not load ahead what no product needs."""
    return packed.scale_bias.view(torch.int64)[..., 0]


def with_scales(kv: KeysOrValues) -> tuple[Tensor, Tensor | None]:
    """Keys or values as a kernel takes them: codes and `scale_pairs`, or as they are and None."""
    return (kv.codes, scale_pairs(kv)) if isinstance(kv, Packed) else (kv, None)


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Keys or values of one slot, the first C entries of a cache, [1, KV, C, 64]"""
    _, KV, C, dim = packed.shape
    out = torch.empty((1, KV, C, dim), dtype=dtype, device=packed.codes.device)
    launch(
        _dequantize_kernel,
        (triton.cdiv(C, ENTRIES), KV),
        *(packed.codes, scale_pairs(packed), out),
        C=C,
        stride=packed.codes.stride(1),
        N=ENTRIES,
        num_warps=4,
    )
    return out
