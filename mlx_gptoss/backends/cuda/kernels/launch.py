"""How every kernel starts. One place, so that tests and the benchmark can see each launch."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# The interpreter keeps bfloat16 as bits and cannot compute on them; kernels widen where this is set.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def launch(kernel: Any, grid: tuple[int, ...], *args: object, **options: object) -> None:
    """kernel[grid](*args, **options); options are constexprs by name, num_warps and num_stages."""
    kernel[grid](*args, enable_fp_fusion=True, **options)
