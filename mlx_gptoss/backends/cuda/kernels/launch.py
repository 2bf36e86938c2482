"""The one function that starts kernels, so that tests can record or replace every launch."""

from __future__ import annotations

from typing import Any


def launch(kernel: Any, grid: tuple[int, ...], *args: object, **options: object) -> None:
    """Run kernel[grid](*args, **options). options: the kernel's other arguments by name, num_warps and num_stages."""
    kernel[grid](*args, enable_fp_fusion=True, **options)
