"""Checkpoints that keep one module per linear layer: `mlp.experts.7.gate_proj.weight` instead of one tensor of all
experts. Shared by compressed-tensors and AutoRound; a parameter of the experts is put together from many tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..params import Param
from ..safetensors import TensorInfo
from ..tensor import Array
from .base import Get, Want, experts_prefix, plain_name

Turn = Callable[[Array], Array]  # from a stored tensor to rows [N, ...]


@dataclass(frozen=True)
class Modules:
    """The stored modules that hold one parameter.

    names: for each expert the modules whose rows, one behind the other, hold its rows; for attention one alone.
    rows: which of those rows are the parameter's.
    stacked: True for experts, whose parameters have an axis of experts before the rows.
    """

    names: tuple[tuple[str, ...], ...]
    rows: slice = slice(None)
    stacked: bool = True

    @property
    def first(self) -> str:
        return self.names[0][0]

    def wants(self, part: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> list[Want]:
        """The tensors `part` of all modules."""
        return [Want(f"{name}.{part}", dtypes, shape) for names in self.names for name in names]

    def read(self, get: Get, part: str, turn: Turn = lambda stored: stored) -> Array:
        """[E, N, ...], copied, or [N, ...] of attention, as `turn` makes it."""
        if not self.stacked:
            return turn(get(f"{self.first}.{part}"))
        found = None
        for expert, names in enumerate(self.names):
            parts = [turn(get(f"{name}.{part}")) for name in names]
            rows = parts[0] if len(parts) == 1 else np.concatenate(parts)[self.rows]
            if found is None:
                found = np.empty((len(self.names), *rows.shape), rows.dtype)
            as_words(found)[expert] = as_words(rows)
        assert found is not None
        return found


def as_words(values: Array) -> Array:
    """The same bits as unsigned integers: numpy copies bfloat16 one value at a time, integers in runs."""
    return values.view(f"u{values.itemsize}")


def module_of(param: Param) -> str:
    """The module of an attention parameter: `model.layers.3.self_attn.q_proj`."""
    return plain_name(param).rpartition(".")[0]


def expert_modules(param: Param, infix: str = "") -> tuple[str, ...]:
    """The modules of an expert parameter: `model.layers.3.mlp.experts.0.gate_proj`, ..."""
    part = param.kind.split(".")[1]
    return tuple(f"{experts_prefix(param)}{infix}{expert}.{part}_proj" for expert in range(param.shape[0]))


def tensors(modules: Sequence[str], part: str, dtype: str, shape: tuple[int, ...]) -> list[TensorInfo]:
    """One tensor for each module, all alike."""
    return [TensorInfo(f"{module}.{part}", dtype, shape) for module in modules]
