"""The backends by name. Each is imported when it is first used, so that the other one need not be installed."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import cast

from ..errors import BackendUnavailable, InvalidRequest
from .base import Backend

BACKENDS = ("mlx", "cuda")
DRIVER_LIBRARIES = ("libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1", "nvcuda.dll")
INSTALL = {"mlx": "pip install mlx-gptoss", "cuda": "pip install 'mlx-gptoss[cuda]'"}


def find_backend(name: str) -> tuple[Backend, str]:
    """Import a backend. Returns its module and its name. "auto" is the best backend for this machine."""
    if name not in ("auto", *BACKENDS):
        raise InvalidRequest(f"backend must be auto, {' or '.join(BACKENDS)}, not {name!r}")
    chosen = best_backend() if name == "auto" else name
    return cast(Backend, _backend_module(chosen)), chosen


def best_backend() -> str:
    """cuda if the installed torch can use an NVIDIA GPU; otherwise mlx, on Metal or on the CPU.

    Imports torch only on a machine with the NVIDIA driver.
    """
    has_torch = sys.platform != "darwin" and find_spec("torch") is not None
    return "cuda" if has_torch and has_nvidia_driver() and _backend_module("cuda").has_gpu() else "mlx"


def has_nvidia_driver() -> bool:
    """Whether the NVIDIA driver's library can be loaded, which is fast; importing torch takes seconds. The driver's
    files under /proc may be missing in a container that has a GPU."""
    for name in DRIVER_LIBRARIES:
        with suppress(OSError):
            ctypes.CDLL(name)
            return True
    return False


def _backend_module(name: str) -> ModuleType:
    try:
        return import_module(f".{name}", __package__)
    except ImportError as error:
        raise BackendUnavailable(f"the {name} backend cannot be imported ({error}): {INSTALL[name]}") from error
