"""The kernels as functions of this process: compiled once on this machine, and from the disk after that."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from ....machine import cache_folder
from ....weights.codecs import E2M1
from . import attention_kernel, emit, kernels, reader, storages
from .attention_kernel import attention_module
from .emit import NAME, Target, compiled, linked
from .kernels import kernel_module
from .objects import ObjectFiles
from .storages import Heads, Storage

Kernel = Callable[[int, int], None]


@dataclass(frozen=True)
class Compiled:
    """The kernel of a storage. lanes: float32 in one vector, by which paired inputs are ordered."""

    run: Kernel
    lanes: int
    engine: object  # which owns the machine code


@lru_cache
def kernel(kind: Storage | Heads, target: Target) -> Compiled:
    """The kernel for a storage or for attention's heads, once in a process."""
    files, key = ObjectFiles(cache_folder() / "kernels"), _key(kind, target)
    code = files.find(key)
    if code is None:
        module = kernel_module(kind, target) if isinstance(kind, Storage) else attention_module(kind, target)
        code = compiled(module, target)
        files.put(key, code)
    engine = linked(code, target)
    run = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(engine.get_function_address(NAME))
    return Compiled(run, target.lanes, engine)


def _key(kind: Storage | Heads, target: Target) -> str:
    """All that machine code depends on: compiler, processor, what it is for, tables, and the programs that write it."""
    modules = (attention_kernel, emit, kernels, reader, storages)
    texts = b"".join(Path(str(module.__file__)).read_bytes() for module in modules)
    digest = sha256(texts + E2M1.tobytes()).hexdigest()
    return f"{emit.compiler()}, {target}, {kind}, {digest}"
