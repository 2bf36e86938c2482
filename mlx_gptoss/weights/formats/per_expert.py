"""Checkpoints that keep one module per linear layer: `mlp.experts.7.gate_proj.weight` instead of one tensor of all
experts. Shared by compressed-tensors and AutoRound; an expert parameter is put together from many tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ...errors import CheckpointError
from .. import codecs
from ..params import Param
from ..safetensors import DTYPES, TensorInfo
from ..tensor import Array, Dense, Spec, Weight
from .base import (
    FLOATS,
    HF_DENSE,
    CheckpointHeaders,
    Encoder,
    ExpectedTensor,
    GetTensor,
    Source,
    TensorSlice,
    Unit,
    experts_prefix,
    hf_name,
)

Transform = Callable[[Array], Array]  # from a stored tensor to rows [N, ...]


@dataclass(frozen=True)
class Modules:
    """The stored modules that hold one parameter.

    names: for each expert the modules whose rows, one behind the other, hold its rows; for attention one alone.
    rows: which of those rows are the parameter's.
    stacked: True for experts, whose parameters have an axis of experts before the rows.
    """

    names: tuple[tuple[str, ...], ...]
    rows: slice = field(default_factory=lambda: slice(None))
    stacked: bool = True

    @property
    def first(self) -> str:
        return self.names[0][0]

    def expected(self, part: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> list[ExpectedTensor]:
        """The tensors `part` of all modules."""
        return [ExpectedTensor(f"{name}.{part}", dtypes, shape) for names in self.names for name in names]

    def read(self, get: GetTensor, part: str, transform: Transform = lambda headers: headers) -> Array:
        """[E, N, ...], copied, or [N, ...] of attention, as `transform` makes it."""
        if not self.stacked:
            return transform(get(f"{self.first}.{part}"))
        found: Array | None = None
        for expert, names in enumerate(self.names):
            parts = [transform(get(f"{name}.{part}")) for name in names]
            rows = parts[0] if len(parts) == 1 else np.concatenate(parts)[self.rows]
            if found is None:
                found = np.empty((len(self.names), *rows.shape), rows.dtype)
            _as_uints(found)[expert] = _as_uints(rows)
        assert found is not None
        return found

    def select(self, experts: range) -> Modules:
        """Those of some experts."""
        return replace(self, names=self.names[experts.start : experts.stop])

    def tensor_infos(self, part: str, dtype: str, shape: tuple[int, ...]) -> list[TensorInfo]:
        """The tensors `part` to write, one a module."""
        return [TensorInfo(f"{names[0]}.{part}", dtype, shape) for names in self.names]

    def slices(self, part: str, start: int, rows: Array) -> list[TensorSlice]:
        """Experts [start, start + n) of a parameter, [n, N, ...], or such rows of attention, as they are written."""
        if not self.stacked:
            return [(f"{self.first}.{part}", start, rows)]
        return [(f"{names[0]}.{part}", 0, row) for names, row in zip(self.names[start:], rows, strict=False)]


def modules_of(param: Param, infix: str = "") -> Modules:
    """`model.layers.3.self_attn.q_proj`, or `model.layers.3.mlp.experts.{infix}{expert}.gate_proj` of each expert."""
    if param.role != "experts":
        return Modules(((hf_name(param).rpartition(".")[0],),), stacked=False)
    part = param.kind.split(".")[1]
    prefix = experts_prefix(param) + infix
    return Modules(tuple((f"{prefix}{expert}.{part}_proj",) for expert in range(param.shape[0])))


def is_per_expert(param: Param, headers: CheckpointHeaders, infix: str = "") -> bool:
    """Whether the first expert has a module of its own for this parameter.

    Raises CheckpointError if there are fewer tensors than experts, before anyone lists the experts.
    """
    part = param.kind.split(".")[1]
    first = f"{experts_prefix(param)}{infix}0.{part}_proj."
    if not headers.has(*(first + suffix for suffix in ("weight", "weight_packed", "qweight", "bias"))):
        return False
    if param.shape[0] > len(headers.tensors):
        raise CheckpointError(
            f"config.json says {param.shape[0]} experts but there are only {len(headers.tensors)} tensors; "
            "a shard is missing or config.json belongs to another checkpoint"
        )
    return True


def same_float_dtype(headers: CheckpointHeaders, name: str) -> tuple[str, ...]:
    """The float dtype of a tensor, for its like of the other experts to have too; any if it has none."""
    dtype = headers.dtype(name)
    return (dtype,) if dtype in FLOATS else FLOATS


def modules_source(
    modules: Modules,
    family: str,
    spec: Spec | None,
    expected: Sequence[ExpectedTensor],
    load: Callable[[GetTensor, Modules], Weight],
    scale_tensor: str | None = None,
) -> Source:
    """A parameter that `load` puts together from its modules, or some experts of it from theirs alone."""

    def load_experts(get: GetTensor, experts: range) -> Weight:
        return load(get, modules.select(experts))

    some = load_experts if modules.stacked else None
    return Source(family, spec, tuple(expected), lambda get: load(get, modules), scale_tensor, load_experts=some)


def dense_experts_source(modules: Modules, part: str, param: Param, headers: CheckpointHeaders) -> Source:
    """Biases [E, N], or weights [E, N, K] that were left as they are."""
    expected = modules.expected(part, same_float_dtype(headers, f"{modules.first}.{part}"), param.shape[1:])
    return modules_source(modules, HF_DENSE, None, expected, lambda get, modules: Dense(modules.read(get, part)))


def dense_experts_unit(param: Param, dtype: str) -> Unit:
    """The biases of an expert parameter, each beside its module's weight."""
    modules = modules_of(param)

    def encode(weights: Sequence[Weight]) -> Encoder:
        return lambda start, stop: modules.slices("bias", start, _cast(codecs.rows(weights[0], start, stop), dtype))

    return Unit((param,), tuple(modules.tensor_infos("bias", dtype, param.shape[1:])), encode)


def quantization_config(headers: CheckpointHeaders) -> Mapping[str, object]:
    """config.json's quantization_config, empty if there is none."""
    block = headers.raw.get("quantization_config")
    return block if isinstance(block, Mapping) else {}


def _cast(weight: Weight, dtype: str) -> Array:
    if dtype == "BF16":
        return codecs.to_bfloat16(weight)
    values = codecs.dequantize(weight)
    with np.errstate(over="ignore"):
        found: Array = values.astype(DTYPES[dtype])
    if not np.isfinite(found).all():
        raise CheckpointError(f"a bias is not a finite {found.dtype.name}; choose another format than int4-autoround")
    return found


def _as_uints(values: Array) -> Array:
    """The same bits as unsigned integers: numpy copies bfloat16 one value at a time, integers in runs."""
    return values.view(f"u{values.itemsize}")
