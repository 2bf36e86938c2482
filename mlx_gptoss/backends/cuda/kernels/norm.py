"""RMSNorm, of a residual stream to which the parts of a product with split K are added first.

Legend: T tokens, D hidden, P parts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, wait_for_inputs


@triton.jit(do_not_specialize=["T"])
def _rms_norm_kernel(x, norm, partial, bias, out, T, eps, D: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, D] = RMSNorm(x [T, D]) with weights norm [D], one token for each program. out: of any float dtype.

    partial: float32 [PARTS, T, D], or None. Their sum, in order, and bias [D] or None are added to x, which is stored
    """
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    values = tl.load(x + row * D + k, mask=k < D, other=0).to(tl.float32)
    if partial is not None:
        total = tl.load(partial + row * D + k, mask=k < D, other=0)
        for part in tl.static_range(1, PARTS):
            total += tl.load(partial + (part * T + row) * D + k, mask=k < D, other=0)
        if bias is not None:
            total += tl.load(bias + k, mask=k < D, other=0).to(tl.float32)
        stored = (values + total).to(x.dtype.element_ty)
        tl.store(x + row * D + k, stored, mask=k < D)
        values = stored.to(tl.float32)
    gain = tl.load(norm + k, mask=k < D, other=0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 0) / D + eps)
    tl.store(out + row * D + k, (values * gain).to(out.dtype.element_ty), mask=k < D)


def rms_norm(
    x: Tensor, norm: Tensor, eps: float, out: Tensor, *, partial: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """out [T, D] = RMSNorm(x [T, D]) with weights norm [D], computed in float32.

    partial: float32 [P, T, D], as `linear.split_linear` writes it. x first becomes x + their sum + bias [D].
    """
    T, D = x.shape
    launch(
        _rms_norm_kernel,
        (T,),
        *(x, norm, partial, bias, out, T, eps),
        D=D,
        PARTS=0 if partial is None else len(partial),
        BLOCK=triton.next_power_of_2(D),
        num_warps=4,
    )
