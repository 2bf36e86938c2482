"""The backends by name. Each is imported when it is asked for, so that the others need not be installed."""

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
# Where the NVIDIA driver shows itself on Linux and in WSL: what tells without torch, which takes seconds to import.
NVIDIA_DRIVER = (Path("/proc/driver/nvidia/version"), Path("/usr/lib/wsl/lib/libcuda.so.1"))


def find_backend(name: str) -> tuple[Backend, str]:
    """The backend's module, imported now, and its name. "auto" takes the best for this machine."""
    if name not in ("auto", *BACKENDS):
        raise InvalidRequest(f"backend must be auto, {' or '.join(BACKENDS)}, not {name!r}")
    chosen = best_backend() if name == "auto" else name
    return cast(Backend, _backend_module(chosen)), chosen


def best_backend() -> str:
    """Metal -> mlx; a GPU that the installed torch can use -> cuda; otherwise mlx, on the CPU.

    torch is imported here only on a machine that has the NVIDIA driver.
    """
    possible = sys.platform != "darwin" and find_spec("torch") is not None
    driven = possible and any(path.exists() for path in NVIDIA_DRIVER)
    return "cuda" if driven and _backend_module("cuda").has_gpu() else "mlx"


def _backend_module(name: str) -> ModuleType:
    try:
        return import_module(f".{name}", __package__)
    except ImportError as error:
        raise BackendUnavailable(f"the {name} backend cannot be imported ({error}): {INSTALL[name]}") from error
