"""Checkpoints with one module per linear layer: `mlp.experts.7.gate_proj.weight`, not one tensor for all experts.

compressed-tensors and AutoRound write such checkpoints. An expert parameter is then assembled from many tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ...errors import CheckpointError
from .. import codecs
from ..params import Param
from ..safetensors import DTYPES, TensorInfo
from ..tensor import Array, Dense, Spec, Weight
from .base import FLOATS, CheckpointHeaders, Encoder, ExpectedTensor, GetTensor, Source, TensorSlice, Unit
from .hf_layout import HF_DENSE, experts_prefix, fused_rows, hf_name

Transform = Callable[[Array], Array]  # from a stored tensor to rows [N, ...]


@dataclass(frozen=True)
class Modules:
    """The stored modules that hold one parameter.

    names: for each expert, the modules whose concatenated rows contain the expert's rows; one module for attention.
    rows: which of the concatenated rows belong to the parameter.
    stacked: True for experts, whose parameters have an expert axis before the rows.
    """

    names: tuple[tuple[str, ...], ...]
    rows: slice = field(default_factory=lambda: slice(None))
    stacked: bool = True

    @property
    def first(self) -> str:
        """The name of the first module, which the layout is recognized by."""
        return self.names[0][0]

    def expected(self, part: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> list[ExpectedTensor]:
        """The tensor `part` of every module, to read."""
        return [ExpectedTensor(f"{name}.{part}", dtypes, shape) for names in self.names for name in names]

    def read(self, get: GetTensor, part: str, transform: Transform = lambda array: array) -> Array:
        """The tensor `part` of all modules, each passed through `transform`. The rest is as for `gather`."""
        return self.gather(lambda name: transform(get(f"{name}.{part}")))

    def gather(self, rows_of: Callable[[str], Array]) -> Array:
        """The rows [N, ...] that `rows_of` returns for the name of each module.

        Experts are copied into one array [E, N, ...]; an attention tensor [N, ...] is returned as it is.
        """
        if not self.stacked:
            return rows_of(self.first)
        stack: Array | None = None
        for expert, names in enumerate(self.names):
            parts = [rows_of(name) for name in names]
            rows = (parts[0] if len(parts) == 1 else np.concatenate(parts))[self.rows]
            if stack is None:
                stack = np.empty((len(self.names), *rows.shape), rows.dtype)
            _as_uints(stack)[expert] = _as_uints(rows)
        assert stack is not None
        return stack

    def stored_rows(self, param: Param) -> int:
        """The rows of each module, which are twice the parameter's where a module has both gate and up."""
        rows = param.shape[0] if not self.stacked else param.shape[1]
        return 2 * rows if self.rows != slice(None) and len(self.names[0]) == 1 else rows

    def select(self, experts: range) -> Modules:
        """The modules of some experts."""
        return replace(self, names=self.names[experts.start : experts.stop])

    def tensor_infos(self, part: str, dtype: str, shape: tuple[int, ...]) -> list[TensorInfo]:
        """The tensor `part` of every module, to write. Each expert has one module."""
        return [TensorInfo(f"{names[0]}.{part}", dtype, shape) for names in self.names]

    def slices(self, part: str, start: int, rows: Array) -> list[TensorSlice]:
        """What to write for experts [start, start + n), given as [n, N, ...], or for such rows of attention."""
        if not self.stacked:
            return [(f"{self.first}.{part}", start, rows)]
        return [(f"{names[0]}.{part}", 0, row) for names, row in zip(self.names[start:], rows, strict=False)]


def modules_of(param: Param, infix: str = "") -> Modules:
    """`model.layers.3.self_attn.q_proj`, or `model.layers.3.mlp.experts.{infix}{expert}.gate_proj` for each expert."""
    if param.role != "experts":
        return Modules(((hf_name(param).rpartition(".")[0],),), stacked=False)
    part = param.kind.split(".")[1]
    prefix = experts_prefix(param) + infix
    return Modules(tuple((f"{prefix}{expert}.{part}_proj",) for expert in range(param.shape[0])))


def half_split_modules(param: Param) -> Modules:
    """The modules of a parameter where `gate_proj` and `up_proj` are the two halves of the interleaved rows."""
    part = param.kind.split(".")[1]
    first, second = (
        modules_of(Param(param.name.replace(f".{part}.", f".{other}."), param.layer, param.role, param.shape))
        for other in ("gate", "up")
    )
    both = zip(first.names, second.names, strict=True)
    return Modules(tuple((*gate, *up) for gate, up in both), fused_rows(part))


def is_per_expert(param: Param, headers: CheckpointHeaders, infix: str = "") -> bool:
    """Whether the first expert has its own module for this expert parameter.

    Raises CheckpointError if there are fewer tensors than experts. This is checked before anything lists the experts,
    because the number of experts in config.json is not trusted.
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
    """The float dtype of a tensor, which its siblings in the other experts must share; FLOATS if it has none."""
    dtype = headers.dtype(name)
    return (dtype,) if dtype in FLOATS else FLOATS


def modules_source(
    modules: Modules,
    family: str,
    spec: Spec | None,
    expected: Sequence[ExpectedTensor],
    load: Callable[[GetTensor, Modules], Weight],
    scale_dtype: str | None = None,
) -> Source:
    """The Source of a parameter that `load` assembles from its modules, or from those of some experts alone."""

    def load_experts(get: GetTensor, experts: range) -> Weight:
        return load(get, modules.select(experts))

    some = load_experts if modules.stacked else None
    return Source(family, spec, tuple(expected), lambda get: load(get, modules), scale_dtype, load_experts=some)


def dense_experts_source(modules: Modules, part: str, param: Param, headers: CheckpointHeaders) -> Source:
    """Expert biases [E, N], or expert weights [E, N, K] that were left unquantized."""
    dtypes = same_float_dtype(headers, f"{modules.first}.{part}")
    expected = modules.expected(part, dtypes, (modules.stored_rows(param), *param.shape[2:]))
    return modules_source(modules, HF_DENSE, None, expected, lambda get, modules: Dense(modules.read(get, part)))


def dense_experts_unit(param: Param, dtype: str) -> Unit:
    """The biases of an expert parameter, one tensor per expert, written as `dtype`."""
    modules = modules_of(param)

    def encode(weights: Sequence[Weight]) -> Encoder:
        return lambda start, stop: modules.slices("bias", start, _to_dtype(weights[0][start:stop], dtype))

    return Unit((param,), tuple(modules.tensor_infos("bias", dtype, param.shape[1:])), encode)


def quantization_config(headers: CheckpointHeaders) -> Mapping[str, object]:
    """config.json's quantization_config; empty without one."""
    block = headers.raw.get("quantization_config")
    return block if isinstance(block, Mapping) else {}


def _to_dtype(weight: Weight, dtype: str) -> Array:
    """The values rounded to a float dtype. Raises CheckpointError for a value outside its range."""
    if dtype == "BF16":
        return codecs.to_bfloat16(weight)
    with np.errstate(over="ignore"):
        values: Array = codecs.dequantize(weight).astype(DTYPES[dtype])
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"a bias is not a finite {values.dtype.name}, which int4-autoround stores; choose another format"
        )
    return values


def _as_uints(values: Array) -> Array:
    """The same bits as unsigned integers. numpy copies bfloat16 one value at a time, but integers in bulk."""
    return values.view(f"u{values.itemsize}")
