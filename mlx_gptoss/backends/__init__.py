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

# Bytes of weights below which importing torch costs more time than computing with it saves on a CPU.
SMALL = 256 << 20


def find_backend(name: str, weights_bytes: int = 0) -> tuple[Backend, str]:
    """The backend's module, imported now, and its name. "auto" takes the best for this machine and a model of so many
    bytes; 0 stands for a small one."""
    if name not in ("auto", *BACKENDS):
        raise InvalidRequest(f"backend must be auto, {' or '.join(BACKENDS)}, not {name!r}")
    chosen = best_backend(weights_bytes) if name == "auto" else name
    return cast(Backend, _backend_module(chosen)), chosen


def best_backend(weights_bytes: int) -> str:
    """Metal -> mlx; a GPU that the installed torch can use -> cuda. On a CPU, where torch is several times as fast:
    cuda if torch is installed and the model not small, so that a small one starts at once; otherwise mlx.

    torch is imported here only on a machine that has the NVIDIA driver.
    """
    if sys.platform == "darwin" or find_spec("torch") is None:
        return "mlx"
    if any(path.exists() for path in NVIDIA_DRIVER) and _backend_module("cuda").has_gpu():
        return "cuda"
    return "mlx" if weights_bytes < SMALL else "cuda"


def _backend_module(name: str) -> ModuleType:
    try:
        return import_module(f".{name}", __package__)
    except ImportError as error:
        raise BackendUnavailable(f"the {name} backend cannot be imported ({error}): {INSTALL[name]}") from error
