"""What a format is: a pure mapping between the network's parameters and the tensors that a checkpoint stores.

Reading: `Format.find(param, headers)` says where a parameter lies (a `Source`: the tensors wanted, and how to make a
Weight of them), from names, dtypes and shapes alone. Writing: `Format.units(target, config, ...)` says which tensors
there will be (names, dtypes and shapes, before any data) and how a run of rows of each is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...config import ModelConfig
from .. import codecs
from ..params import Param, Role
from ..safetensors import TensorInfo
from ..tensor import Array, Dense, Spec, Weight

GetTensor = Callable[[str], Array]  # a stored tensor by its name, mapped, not read
TensorSlice = tuple[str, int, Array]  # tensor, first row, rows [n, ...]: what a writer puts into a file at once
Encoder = Callable[[int, int], Iterable[TensorSlice]]  # rows [start, stop) of a unit -> pieces
FLOATS = ("BF16", "F16", "F32")
HF_DENSE = "hf-dense"  # the family of a dense tensor under its Hugging Face name, which most formats share


@dataclass(frozen=True)
class CheckpointHeaders:
    """What a checkpoint says about itself before any data is read."""

    tensors: Mapping[str, TensorInfo]
    config: ModelConfig
    raw: Mapping[str, Any]  # config.json as parsed

    def has(self, *names: str) -> bool:
        """True if any of these tensors is stored."""
        return any(name in self.tensors for name in names)

    def dtype(self, name: str) -> str | None:
        info = self.tensors.get(name)
        return info.dtype if info else None

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape; () for a tensor that is missing."""
        info = self.tensors.get(name)
        return info.shape if info else ()


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that a parameter is made of, with the dtypes and the one shape it may have."""

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Where one parameter lies in a checkpoint.

    family: the family of the format that stores it so; HF_DENSE for a dense tensor under its Hugging Face name,
        which every family but `original` shares.
    spec: how its numbers are stored; None when dense.
    load: makes the Weight; lazy views wherever the layout allows, and never a change of a value.
    load_experts: makes that of a range of experts alone; None where a view of the whole does as well.
    scale_tensor: the first tensor of its scales if they are floats, whose dtype then matters to whoever copies them.
    note: what a user should know of weights stored so, in one line.
    """

    family: str
    spec: Spec | None
    expected: tuple[ExpectedTensor, ...]
    load: Callable[[GetTensor], Weight]
    scale_tensor: str | None = None
    note: str = ""
    load_experts: Callable[[GetTensor, range], Weight] | None = None


@dataclass(frozen=True)
class Unit:
    """Parameters that are written together because they share stored tensors.

    rows: length of the axis along which the work is cut (experts, or output rows): axis 0 of every weight of the unit.
    encode: takes the unit's weights (whole, lazy) and returns an Encoder; what must be known of all rows first
        (an amax) is worked out before it returns.
    """

    params: tuple[Param, ...]
    tensors: tuple[TensorInfo, ...]
    encode: Callable[[Sequence[Weight]], Encoder]

    @property
    def rows(self) -> int:
        return self.params[0].shape[0]

    @property
    def values(self) -> int:
        """Number of weights in the unit."""
        return sum(param.size for param in self.params)


Recipe = Mapping[Role, tuple[str, Spec | None]]  # of the matrices of each role: the family and the spec they have


class Format(Protocol):
    """One family of layouts, both ways."""

    family: str
    recipes: Mapping[str, Recipe]  # the format names that this family has, and how each stores its matrices
    writes: bool

    def find(self, param: Param, headers: CheckpointHeaders) -> Source | None:
        """Where the parameter lies if this family stores it here, else None. Shapes are checked by the caller."""

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        """How the target format is written; `dtypes` gives the dtype of each vector (norms, sinks, biases), and that
        of the float scales of each matrix which the source stores in the target's spec."""

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        """What the target adds to config.json: its quantization block."""

    def extra_files(self, target: str, params: Sequence[Param]) -> Mapping[str, Any]:
        """JSON files that the target's tools want beside config.json: name -> content."""
        return {}


def matrix_recipe(family: str, spec: Spec | None, **overrides: tuple[str, Spec | None]) -> Recipe:
    """A recipe that stores the matrices of all roles alike, except those named."""
    roles: tuple[Role, ...] = ("embed", "attention", "router", "experts", "lm_head")
    changed: Mapping[str, tuple[str, Spec | None]] = overrides
    return {role: changed.get(role, (family, spec)) for role in roles}


def dense_source(family: str, name: str, shape: tuple[int, ...]) -> Source:
    """A parameter stored as one float tensor of its own shape."""
    return Source(family, None, (ExpectedTensor(name, FLOATS, shape),), lambda get: Dense(get(name)))


_BOTH = ("weight", "bias")
_HF_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attention.sinks": "self_attn.sinks",
    **{f"attention.{x}.{part}": f"self_attn.{x}_proj.{part}" for x in "qkvo" for part in _BOTH},
    **{f"router.{part}": f"mlp.router.{part}" for part in _BOTH},
    **{f"experts.{x}.{part}": f"mlp.experts.{x}_proj.{part}" for x in ("gate", "up", "down") for part in _BOTH},
}


def hf_name(param: Param) -> str:
    """The Hugging Face name of a parameter: `model.layers.3.self_attn.q_proj.weight`. Experts are named as MLX names
    them, `model.layers.3.mlp.experts.gate_proj.weight`; Hugging Face fuses gate and up."""
    name = _HF_NAMES[param.kind]
    return name if param.layer is None else f"model.layers.{param.layer}.{name}"


def experts_prefix(param: Param) -> str:
    """`model.layers.3.mlp.experts.`"""
    return f"model.layers.{param.layer}.mlp.experts."


def fused_rows(part: str) -> slice:
    """The rows of a fused gate_up tensor that belong to `gate` (even) or `up` (odd); all rows for `down`."""
    return {"gate": slice(0, None, 2), "up": slice(1, None, 2)}.get(part, slice(None))


def fused_shape(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape of gate and up together."""
    return (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])


def dense_unit(param: Param, dtypes: Mapping[str, str], name: str) -> Unit:
    """A parameter stored as one float tensor: matrices as bfloat16, vectors as `dtypes` says."""
    info = TensorInfo(name, dtypes.get(param.name, "BF16"), param.shape)

    def encode(weights: Sequence[Weight]) -> Encoder:
        return lambda start, stop: [(name, start, _cast(codecs.rows(weights[0], start, stop), info.dtype))]

    return Unit((param,), (info,), encode)


def fused_units(
    params: Sequence[Param], dtypes: Mapping[str, str], experts: Callable[[tuple[Param, ...]], Unit]
) -> list[Unit]:
    """The units of a Hugging Face layout: `experts` makes those of the expert matrices (gate and up together, down
    alone), their biases are fused likewise, and the rest is plain."""
    found = []
    by_name = {param.name: param for param in params}
    for param in params:
        part = param.kind.split(".")[1] if param.role == "experts" else ""
        if part == "up":
            continue  # written with gate
        fused = (param, by_name[param.name.replace(".gate.", ".up.")]) if part == "gate" else (param,)
        if not part:
            found.append(dense_unit(param, dtypes, hf_name(param)))
        elif param.is_matrix:
            found.append(experts(fused))
        else:
            found.append(_fused_bias(fused, dtypes))
    return found


def _fused_bias(params: tuple[Param, ...], dtypes: Mapping[str, str]) -> Unit:
    """`gate_up_proj_bias` [E, 2I] or `down_proj_bias` [E, H]."""
    name = experts_prefix(params[0]) + ("gate_up_proj_bias" if len(params) == 2 else "down_proj_bias")
    dtype = max((dtypes.get(param.name, "BF16") for param in params), key=("BF16", "F32").index)
    info = TensorInfo(name, dtype, (params[0].shape[0], sum(param.shape[1] for param in params)))

    def encode(weights: Sequence[Weight]) -> Encoder:
        def pieces(start: int, stop: int) -> list[TensorSlice]:
            parts = [_cast(codecs.rows(weight, start, stop), dtype) for weight in weights]
            return [(name, start, np.stack(parts, axis=-1).reshape(stop - start, -1))]

        return pieces

    return Unit(params, (info,), encode)


def _cast(weight: Weight, dtype: str) -> Array:
    return codecs.to_bfloat16(weight) if dtype == "BF16" else codecs.dequantize(weight)
