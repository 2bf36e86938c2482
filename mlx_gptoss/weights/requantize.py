"""Quantizing while loading: a checkpoint whose matrices are quantized as they are read. Nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..config import ModelConfig
from ..errors import InvalidRequest
from . import codecs, quantization
from .checkpoint import CheckpointLike
from .formats import WRITERS
from .params import Param, Role
from .tensor import AFFINE4, AFFINE8, Dense, Spec, Weight

REST_SPECS: Final = {"rest-8bit": AFFINE8, "rest-4bit": AFFINE4}
REST_ROLES: Final[tuple[Role, ...]] = ("attention", "embed", "lm_head")
QUANTIZE_NAMES: Final = (*sorted(name for name in WRITERS if name.startswith("mlx-")), *REST_SPECS)


class Requantized:
    """A checkpoint with its matrices quantized as the format `name` stores them, for a backend to load.

    name: an MLX format; or "rest-8bit" or "rest-4bit", which quantize all matrices but those of the experts and the
        router to affine codes in groups of 64.
    A matrix that is stored that way already stays as it is, bit for bit. Raises InvalidRequest for an unknown name.
    """

    def __init__(self, checkpoint: CheckpointLike, name: str) -> None:
        if name not in QUANTIZE_NAMES:
            raise InvalidRequest(f"quantize must be one of {', '.join(QUANTIZE_NAMES)}, not {name!r}")
        self.config: ModelConfig = checkpoint.config
        self._checkpoint = checkpoint
        self._name = name
        self._params = {param.name: param for param in checkpoint.params}

    @property
    def size_bytes(self) -> int:
        """Size of all weights as `read` returns them."""
        params = self._checkpoint.params
        if self._name not in REST_SPECS:
            units = WRITERS[self._name].units(self._name, params, {param.name: "BF16" for param in params})
            return sum(info.nbytes for unit in units for info in unit.tensors)
        size = self._checkpoint.size_bytes
        for role in REST_ROLES:
            size -= self._checkpoint.matrix_bytes(role)
            for param in params:
                if param.role == role and param.is_matrix:
                    spec = self._spec(param)
                    bits = 16 if spec is None else spec.bits + 2 * 16 / spec.group
                    size += int(param.size * bits) // 8
        return size

    def added_bytes(self, run_as: Callable[[Spec], Spec]) -> int:
        """Bytes that a backend adds which computes in wider codes. run_as: from a storage to the one it computes in."""
        params = [param for param in self._checkpoint.params if param.is_matrix]
        specs = [(param.size, self._spec(param)) for param in params]
        return sum(size * (run_as(spec).bits - spec.bits) // 8 for size, spec in specs if spec is not None)

    @property
    def params(self) -> tuple[Param, ...]:
        """As Checkpoint.params."""
        return self._checkpoint.params

    def stored_as(self, name: str) -> tuple[Spec | None, str | None]:
        """As Checkpoint.stored_as, of the weight that `read` returns."""
        param = self._params[name]
        if not param.is_matrix or (self._name in REST_SPECS and param.role not in REST_ROLES):
            return self._checkpoint.stored_as(name)
        spec = self._spec(param)
        return spec, "BF16" if spec is not None and spec.scale == "float" else None

    def read(self, name: str) -> Weight:
        """The weight of a parameter by its canonical name, quantized block by block."""
        param, weight = self._params[name], self._checkpoint.read(name)
        if not param.is_matrix:
            return weight
        if self._name in REST_SPECS and param.role not in REST_ROLES:
            return weight
        spec = self._spec(param)
        return Dense(codecs.to_bfloat16(weight)) if spec is None else quantization.to_spec(weight, spec)

    def release(self) -> None:
        """As Checkpoint.release, of all weights."""
        self._checkpoint.release()

    def _spec(self, param: Param) -> Spec | None:
        """The Spec of a matrix; None if it stays bfloat16: the format says so, or groups do not divide its rows."""
        if self._name in REST_SPECS:
            spec: Spec | None = REST_SPECS[self._name]
        else:
            _, spec = WRITERS[self._name].recipes[self._name][param.role]
        return None if spec is None or param.shape[-1] % spec.group else spec
