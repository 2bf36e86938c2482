"""The one function that starts kernels, so that tests can record or replace every launch, and compiling them before."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton

_log: logging.Logger = logging.getLogger(__name__)
_SILENT_S = 2.0  # a compilation that takes longer is announced
_ahead = threading.local()  # .active: whether this thread only compiles


def launch(kernel: Any, grid: tuple[int, ...], *args: object, **options: object) -> None:
    """Run kernel[grid](*args, **options). options: the kernel's other arguments by name, num_warps and num_stages."""
    if getattr(_ahead, "active", False):
        kernel.warmup(*args, grid=grid, enable_fp_fusion=True, **options)
    else:
        kernel[grid](*args, enable_fp_fusion=True, **options)


@contextmanager
def compiling() -> Iterator[None]:
    """Compile what this thread launches inside, several kernels at a time, and run none of it. All are compiled at the
    end. One line says so if it takes more than two seconds; the next start finds them in Triton's cache."""
    said = threading.Timer(
        _SILENT_S, _log.warning, ("compiling the kernels for this GPU; the next start finds them in Triton's cache",)
    )
    said.daemon = True
    said.start()
    _ahead.active = True
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
            yield
    finally:
        _ahead.active = False
        said.cancel()
