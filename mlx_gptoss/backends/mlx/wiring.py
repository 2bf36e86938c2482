"""Wired memory of this process on a Mac: what macOS may neither compress nor swap.

MLX wires nothing by default, and large models have then run 43 to 150 times slower. Wiring everything has frozen small
Macs, and changing the limit while the GPU computes has panicked macOS. So the limit is set once, after the first model
is loaded, to what is in use then, its weights; and set back when the last model is closed.
"""

from __future__ import annotations

import threading
from typing import Any

import mlx.core as mx


class Wiring:
    """The models that share the process's wired limit. memory: mlx.core, or what stands in for it in a test."""

    def __init__(self, memory: Any = mx) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._models = 0
        self._before = 0  # bytes

    def add(self, recommended: int) -> int | None:
        """Call it when a model is loaded, on its thread, before its first step. recommended: bytes of the device's
        recommended working set. Returns the new limit in bytes; None where another model is loaded, which may be
        computing: the new one's memory then stays unwired."""
        with self._lock:
            limit = None
            if self._models == 0:
                self._memory.synchronize()
                self._memory.clear_cache()
                limit = min(int(self._memory.get_active_memory()), recommended)
                self._before = int(self._memory.set_wired_limit(limit))
            self._models += 1
            return limit

    def remove(self) -> None:
        """Call it when a model of add() is closed, after its arrays are gone."""
        with self._lock:
            self._models -= 1
            if self._models == 0:
                self._memory.synchronize()
                self._memory.set_wired_limit(self._before)


PROCESS = Wiring()
