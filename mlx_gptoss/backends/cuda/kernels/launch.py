"""The one function that starts kernels, so that tests can record or replace every launch, and compiling them before.

From compute capability 9.0 on, a kernel starts while the one before it still runs, and waits for its results in its
first line (programmatic dependent launch). So the time of a launch is not added to that of a kernel, in a CUDA graph
and outside. A kernel without that line is started after the one before it has ended.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from . import tiles
from .interpreter import INTERPRETED

_log: logging.Logger = logging.getLogger(__name__)
_SILENT_S = 2.0  # a compilation that takes longer is announced
_ahead = threading.local()  # .active: whether this thread only compiles


@triton.jit
def wait_for_inputs():
    """The first line of a kernel: wait until the kernels before it have ended, and let the next one start."""
    if not INTERPRETED:
        if cuda_capability_geq(9, 0):
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()


def launch(kernel: Any, grid: tuple[int, ...], *args: object, **options: object) -> None:
    """Run kernel[grid](*args, **options). options: the kernel's other arguments by name, num_warps and num_stages."""
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    if waits_for_inputs(kernel) and tiles.capability(device) >= 90:
        options["launch_pdl"] = True
    if getattr(_ahead, "active", False):
        kernel.warmup(*args, grid=grid, enable_fp_fusion=True, **options)
    else:
        kernel[grid](*args, enable_fp_fusion=True, **options)


def waits_for_inputs(kernel: Any) -> bool:
    """Whether a kernel calls `wait_for_inputs`."""
    return wait_for_inputs.__name__ in kernel.fn.__code__.co_names


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
