"""A checkpoint seen through another format's recipe: weights are quantized as they are read, and nothing is written."""

from __future__ import annotations

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
    """What a backend's loader needs of a Checkpoint, with matrices stored as the format `name` would store them; or,
    for "rest-8bit" and "rest-4bit", all but experts and router quantized in groups of 64, and those as they are.

    Weights that are stored so already stay as they are, bit for bit. Raises InvalidRequest for another name.
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
        """Of all weights as they are read."""
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
        self._checkpoint.release()

    def _spec(self, param: Param) -> Spec | None:
        """None where the format keeps bfloat16, or its groups do not divide the rows."""
        spec = (
            REST_SPECS[self._name]
            if self._name in REST_SPECS
            else WRITERS[self._name].recipes[self._name][param.role][1]
        )
        return None if spec is None or param.shape[-1] % spec.group else spec
