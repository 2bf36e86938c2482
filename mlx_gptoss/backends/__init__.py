"""The backends by name. Each is imported when it is first used, so that the other one need not be installed."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import cast

from ..errors import BackendUnavailable, InvalidRequest
from .base import Backend

BACKENDS = ("mlx", "cuda")
INSTALL = {"mlx": "pip install mlx-gptoss", "cuda": "pip install 'mlx-gptoss[cuda]'"}
# Files of the NVIDIA driver on Linux and in WSL. Checking for them is fast; importing torch takes seconds.
NVIDIA_DRIVER = (Path("/proc/driver/nvidia/version"), Path("/usr/lib/wsl/lib/libcuda.so.1"))


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
    has_driver = has_torch and any(path.exists() for path in NVIDIA_DRIVER)
    return "cuda" if has_driver and _backend_module("cuda").has_gpu() else "mlx"


def _backend_module(name: str) -> ModuleType:
    try:
        return import_module(f".{name}", __package__)
    except ImportError as error:
        raise BackendUnavailable(f"the {name} backend cannot be imported ({error}): {INSTALL[name]}") from error
