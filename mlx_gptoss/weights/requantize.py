"""A checkpoint seen through another format's recipe: weights are quantized as they are read, and nothing is written."""

from __future__ import annotations

from ..config import ModelConfig
from ..errors import InvalidRequest
from . import codecs
from .checkpoint import Readable
from .formats import WRITERS
from .tensor import Dense, Weight


class Requantized:
    """What a backend's loader needs of a Checkpoint, with matrices stored as `name` would store them.

    Weights that are stored so already stay as they are, bit for bit. Raises InvalidRequest for a name that is not one
    of MLX's formats.
    """

    def __init__(self, checkpoint: Readable, name: str) -> None:
        recipes = WRITERS[name].recipes if name in WRITERS else {}
        if not name.startswith("mlx-") or name not in recipes:
            names = ", ".join(sorted(n for n in WRITERS if n.startswith("mlx-")))
            raise InvalidRequest(f"quantize must be one of {names}, not {name!r}")
        self.config: ModelConfig = checkpoint.config
        self._checkpoint = checkpoint
        self._recipe = recipes[name]
        self._params = {param.name: param for param in checkpoint.params}

    def read(self, name: str) -> Weight:
        """The weight of a parameter by its canonical name, quantized block by block."""
        param, weight = self._params[name], self._checkpoint.read(name)
        if not param.is_matrix:
            return weight
        spec = self._recipe[param.role][1]
        if spec is None:
            return Dense(codecs.to_bfloat16(weight))
        return weight if param.shape[-1] % spec.group else codecs.convert(weight, spec)

    def release(self) -> None:
        self._checkpoint.release()
