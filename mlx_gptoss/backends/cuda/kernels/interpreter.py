"""Arithmetic that Triton's interpreter gets wrong, with a version for the interpreter beside the one for a GPU.

With TRITON_INTERPRET=1 Triton runs a kernel in numpy on CPU tensors, and the tests use that where there is no GPU.
numpy has no bfloat16, so the interpreter keeps bfloat16 values as their 16 bits. That breaks four things:

- tl.dot multiplies the bits as integers            -> `dot`
- so do a * b and tl.fma                             -> `times`, `times_plus`
- bfloat16 to float32 is wrong for subnormals       -> `to_float32`
- float32 to bfloat16 is, too, and does not round to nearest even -> `to_bfloat16`

Compiled for a GPU, each function but `to_bfloat16` is the single Triton expression in its `else` branch, but that
products of bfloat16 are one instruction for two values: left to the compiler, it swaps the halves of many pairs before
and after. A conversion with `.to` is good enough in a kernel where subnormals and the last bit do not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """acc + a @ b: a [M, K] and b [K, N] of one dtype, acc and the result float32 [M, N]. No TF32 for float32."""
    if INTERPRETED:
        acc = tl.dot(to_float32(a), to_float32(b), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def times(a, b):
    """a * b in their dtype, float32 or bfloat16."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        y = to_bfloat16(to_float32(a) * to_float32(b))
    elif a.dtype == tl.bfloat16:
        y = tl.inline_asm_elementwise(
            "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }",
            "=r,r,r",
            [a, b],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        y = a * b
    return y


@triton.jit
def times_plus(a, b, c):
    """a * b + c in their dtype, float32 or bfloat16; rounded once on a GPU."""
    if INTERPRETED:
        y = to_float32(a) * to_float32(b) + to_float32(c)
        if a.dtype == tl.bfloat16:
            y = to_bfloat16(y)
    elif a.dtype == tl.bfloat16:
        y = tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        y = tl.fma(a, b, c)
    return y


@triton.jit
def to_float32(x):
    """x as float32. A bfloat16 is the upper half of a float32, so the interpreter shifts its bits."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def to_bfloat16(x):
    """float32 to bfloat16, rounded to nearest even on the bits. For the interpreter only."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
