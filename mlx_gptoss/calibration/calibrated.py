"""A checkpoint with the codes, scales and biases that a calibration has chosen, for conversion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..weights.checkpoint import CheckpointLike
from ..weights.params import Param, Role
from ..weights.tensor import Spec, Weight
from .store import Store


class Calibrated:
    """As the checkpoint, with the weights that the store has in place of its own.

    specs: of the calibrated matrices, by name.
    """

    def __init__(self, checkpoint: CheckpointLike, store: Store, specs: Mapping[str, Spec]) -> None:
        self.config: ModelConfig = checkpoint.config
        self.format: str = checkpoint.format
        self.params: tuple[Param, ...] = checkpoint.params
        self.size_bytes: int = checkpoint.size_bytes
        self.stop_ids: tuple[int, ...] = checkpoint.stop_ids
        self._checkpoint, self._store, self._specs = checkpoint, store, specs
        self._params = {param.name: param for param in checkpoint.params}

    def read(self, name: str, rows: range | None = None) -> Weight:
        """As Checkpoint.read."""
        weight = self._store.read(self._params[name], self._specs.get(name))
        if weight is None:
            return self._checkpoint.read(name, rows)
        return weight if rows is None else weight[rows.start : rows.stop]

    def release(self, weight: Weight | None = None) -> None:
        """As Checkpoint.release."""
        self._checkpoint.release(weight)

    def stored_as(self, name: str) -> tuple[Spec | None, str | None]:
        """As Checkpoint.stored_as."""
        return (self._specs[name], self.scale_dtype(name)) if name in self._specs else self._checkpoint.stored_as(name)

    def scale_dtype(self, name: str) -> str | None:
        """As Checkpoint.scale_dtype."""
        if name not in self._specs:
            return self._checkpoint.scale_dtype(name)
        return "F16" if self._store.scale_dtype.name == "float16" else "BF16"

    def matrix_bytes(self, role: Role) -> int:
        """As Checkpoint.matrix_bytes, of the source."""
        return self._checkpoint.matrix_bytes(role)

    def unpacked_bytes(self, name: str) -> int:
        """As Checkpoint.unpacked_bytes."""
        return 0 if name in self._specs else self._checkpoint.unpacked_bytes(name)

    def fingerprint(self) -> list[list[Any]]:
        """As Checkpoint.fingerprint, of the source."""
        return self._checkpoint.fingerprint()
