"""A checkpoint with an adapter added to its weights, for conversion to bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...config import ModelConfig
from .. import codecs
from ..checkpoint import Checkpoint
from ..params import Param, Role
from ..tensor import Dense, Spec, Weight
from .factors import Adapter


class Merged:
    """As the checkpoint, with scale * b @ a added in float32 to each matrix that the adapter changes."""

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter) -> None:
        self.config: ModelConfig = checkpoint.config
        self.format: str = checkpoint.format
        self.params: tuple[Param, ...] = checkpoint.params
        self.size_bytes: int = checkpoint.size_bytes
        self.stop_ids: tuple[int, ...] = checkpoint.stop_ids
        self._checkpoint, self._adapter = checkpoint, adapter

    def read(self, name: str, rows: range | None = None) -> Weight:
        """As Checkpoint.read; float32 where the adapter changes the weight."""
        weight, module = self._checkpoint.read(name, rows), name.removesuffix(".weight")
        entry = self._adapter.entries.get(module) if name.endswith(".weight") else None
        if entry is None:
            return weight
        part = slice(None) if rows is None else slice(rows.start, rows.stop)
        a, b = entry.a(), entry.b()
        delta = b[part] @ (a if entry.experts is None else a[part])
        return Dense(np.add(codecs.dequantize(weight), delta, dtype=np.float32))

    def release(self, weight: Weight | None = None) -> None:
        """As Checkpoint.release."""
        self._checkpoint.release(weight)

    def stored_as(self, name: str) -> tuple[Spec | None, str | None]:
        """As Checkpoint.stored_as; dense where the adapter changes the weight."""
        changed = name.removesuffix(".weight") in self._adapter.entries
        return (None, None) if changed else self._checkpoint.stored_as(name)

    def scale_dtype(self, name: str) -> str | None:
        """As Checkpoint.scale_dtype; none where the adapter changes the weight."""
        return self._checkpoint.scale_dtype(name) if self.stored_as(name)[0] is not None else None

    def matrix_bytes(self, role: Role) -> int:
        """As Checkpoint.matrix_bytes, of the weights without the adapter."""
        return self._checkpoint.matrix_bytes(role)

    def unpacked_bytes(self, name: str) -> int:
        """As Checkpoint.unpacked_bytes."""
        return self._checkpoint.unpacked_bytes(name)

    def fingerprint(self) -> list[list[Any]]:
        """That of the checkpoint, with the adapter's content."""
        return [*self._checkpoint.fingerprint(), ["adapter", self._adapter.digest]]
