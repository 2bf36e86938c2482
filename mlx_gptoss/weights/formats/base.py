"""The format interface: a pure mapping between the network's parameters and the tensors of a checkpoint.

Reading: `Format.find(param, headers)` returns a `Source`: which stored tensors hold the parameter and how to turn them
into a Weight. It decides from names, dtypes and shapes alone. Writing: `Format.units(target, params, dtypes)` lists the
tensors to write (names, dtypes and shapes, known before any data is read) and how to encode a range of rows of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...config import ModelConfig
from ..params import MATRIX_ROLES, Param, Role
from ..safetensors import TensorInfo
from ..tensor import Array, Dense, Spec, Weight

GetTensor = Callable[[str], Array]  # a stored tensor by name: memory-mapped, not yet read
TensorSlice = tuple[str, int, Array]  # tensor name, first row, rows [n, ...]: one write into a file
Encoder = Callable[[int, int], Iterable[TensorSlice]]  # encodes rows [start, stop) of a unit
FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class CheckpointHeaders:
    """Everything known about a checkpoint before any data is read.

    tensors: name, dtype and shape of every stored tensor, by name.
    config: the network's sizes.
    raw: config.json as parsed JSON.
    metadata: what the headers of safetensors files say beside their tensors, of all files together. Untrusted text.
    """

    tensors: Mapping[str, TensorInfo]
    config: ModelConfig
    raw: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def has(self, *names: str) -> bool:
        """True if at least one of these tensors is stored."""
        return any(name in self.tensors for name in names)

    def dtype(self, name: str) -> str | None:
        """The stored dtype as safetensors spells it, such as "BF16"; None for a missing tensor."""
        info = self.tensors.get(name)
        return info.dtype if info else None

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape; () for a missing tensor."""
        info = self.tensors.get(name)
        return info.shape if info else ()


@dataclass(frozen=True)
class ExpectedTensor:
    """A stored tensor that a parameter is read from, with the dtypes it may have and the one shape it must have."""

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Where one parameter is stored in a checkpoint.

    family: the family of the format that stores it this way, or HF_DENSE (hf_layout.py).
    spec: how its numbers are stored; None for dense weights.
    expected: every tensor it is read from; the caller checks their presence, dtypes and shapes.
    load: returns the Weight. It returns lazy views where the layout allows and never changes a value.
    scale_dtype: the safetensors dtype of the scales that `load` returns if they are floats: a conversion keeps it.
    note: one line that the user should know about weights stored this way, or "".
    load_experts: returns the Weight of a range of the first axis (experts, or rows); None where slicing the whole
        Weight is just as good.
    memory_bits: bits per weight of what `load` returns, where it makes more than what is stored; else None.
    stored_bits: bits per weight as stored, where memory_bits is given; None for GGUF, whose blocks have it.
    stored_name: how the numbers are stored, in the words of the format's tools, or "" for the spec's or dtype's name.
    """

    family: str
    spec: Spec | None
    expected: tuple[ExpectedTensor, ...]
    load: Callable[[GetTensor], Weight]
    scale_dtype: str | None = None
    note: str = ""
    load_experts: Callable[[GetTensor, range], Weight] | None = None
    memory_bits: float | None = None
    stored_bits: float | None = None
    stored_name: str = ""


@dataclass(frozen=True)
class Unit:
    """Parameters that are written together because they share stored tensors.

    params: all have the same length along axis 0.
    tensors: the tensors to write.
    encode: takes the whole, lazy weights of `params` and returns an Encoder. Statistics over all rows, such as an amax,
        are computed before it returns.
    """

    params: tuple[Param, ...]
    tensors: tuple[TensorInfo, ...]
    encode: Callable[[Sequence[Weight]], Encoder]

    @property
    def rows(self) -> int:
        """Length of axis 0 of the weights (experts, or output rows), along which the work is split into chunks."""
        return self.params[0].shape[0]

    @property
    def values(self) -> int:
        """Number of weights in the unit."""
        return sum(param.size for param in self.params)


Recipe = Mapping[Role, tuple[str, Spec | None]]  # role of a matrix -> family and spec that a format stores it with


class Format(Protocol):
    """One family of layouts, read and (if `writes`) written.

    family: the name that `Source.family` and recipes use.
    recipes: the names of the formats in this family, each with the way it stores the matrices of every role.
    """

    family: str
    recipes: Mapping[str, Recipe]
    writes: bool

    def find(self, param: Param, headers: CheckpointHeaders) -> Source | None:
        """Where this family stores the parameter in this checkpoint, or None. The caller checks shapes and dtypes."""

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        """All units to write for the format `target`.

        dtypes: by parameter name, the dtype of each vector (norms, sinks, biases), and the dtype of the float scales of
            each matrix that the source already stores in the target's spec. BF16 where a name is missing.
        """

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        """Entries that the format `target` adds to config.json, such as `quantization_config`."""

    def extra_files(self, target: str, params: Sequence[Param]) -> Mapping[str, Any]:
        """JSON files that the format's tools expect in addition to config.json: name -> content."""
        return {}


def matrix_recipe(family: str, spec: Spec | None, **overrides: tuple[str, Spec | None]) -> Recipe:
    """A recipe that stores the matrices of all roles the same way, except for the roles in `overrides`."""
    by_role: Mapping[str, tuple[str, Spec | None]] = overrides
    return {role: by_role.get(role, (family, spec)) for role in MATRIX_ROLES}


def dense_source(family: str, name: str, shape: tuple[int, ...]) -> Source:
    """The Source of a parameter that is stored as one float tensor in its own shape."""
    return Source(family, None, (ExpectedTensor(name, FLOATS, shape),), lambda get: Dense(get(name)))
