"""`bnb-4bit`: matrices as bitsandbytes' 4-bit codes (NF4 or FP4), as transformers and Unsloth save them. Read only.

`.weight` U8 [n / 2, 1] holds the codes of all values in row-major order, the first of two in the high nibble. A code
stands for an entry of `.weight.quant_map`, times the scale of its block of 64 values: `.weight.absmax` in float32, or,
quantized once more, an entry of `.weight.nested_quant_map` times `.weight.nested_absmax` (one per 256 scales) plus an
offset. `.weight.quant_state.bitsandbytes__nf4` is JSON in bytes. No kernel reads such values: they are decoded to
float32.

transformers quantizes attention alone, and the experts stay fused as in `bf16`. Unsloth has a module for each expert:
`mlp.experts.gate_up_projs.7`, whose rows interleave gate and up, and `mlp.experts.down_projs.7`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import CheckpointError
from ..params import Param
from ..tensor import Array, Dense, Weight
from .base import FLOATS, CheckpointHeaders, ExpectedTensor, Format, GetTensor, Recipe, Source, Unit
from .hf_layout import experts_prefix, fused_rows, hf_name

FAMILY = "bnb-4bit"
_KINDS = ("nf4", "fp4")
_MAX_STATE = 4096  # bytes of JSON
_BITS = 4 + 8 / 64 + 32 / 64 / 256  # stored, per weight
_READ_ONLY = "bnb-4bit is read but not written; convert to mlx-4bit, or to another format"


class BitsAndBytes(Format):
    family = FAMILY
    writes = False
    recipes: Mapping[str, Recipe] = {}

    def find(self, param: Param, headers: CheckpointHeaders) -> Source | None:
        modules = _modules(param, headers)
        if modules is None:
            return None
        if not param.is_matrix:
            return _bias_source(modules, param)
        if any(_state_name(module, headers) is not None for module in modules):
            return _matrix_source(modules, param, headers)
        if headers.dtype(f"{modules[0]}.weight") in ("I8", "U8") and headers.has(f"{modules[0]}.SCB"):
            raise CheckpointError(
                f"{modules[0]} is in bitsandbytes' int8, which is not supported; use the bfloat16 or 4-bit one"
            )
        return None

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        raise CheckpointError(_READ_ONLY)

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        raise CheckpointError(_READ_ONLY)


def _modules(param: Param, headers: CheckpointHeaders) -> list[str] | None:
    """The modules of a parameter, one for each expert; None if this checkpoint has none of this kind."""
    if param.role != "experts":
        module = hf_name(param).rpartition(".")[0]
        return [module] if param.is_matrix else None
    name = "down_projs" if ".down." in param.name else "gate_up_projs"
    prefix = f"{experts_prefix(param)}{name}."
    if not headers.has(f"{prefix}0.weight"):
        return None
    if param.shape[0] > len(headers.tensors):
        raise CheckpointError(
            f"config.json says {param.shape[0]} experts but there are too few tensors; one is missing"
        )
    return [f"{prefix}{expert}" for expert in range(param.shape[0])]


def _state_name(module: str, headers: CheckpointHeaders) -> str | None:
    names = (f"{module}.weight.quant_state.bitsandbytes__{kind}" for kind in _KINDS)
    return next((name for name in names if headers.has(name)), None)


def _stored_rows(param: Param) -> tuple[int, slice]:
    """The rows of a module's matrix, and those that belong to the parameter."""
    if param.role != "experts":
        return param.shape[0], slice(None)
    part = param.kind.split(".")[1]
    return param.shape[1] * (1 if part == "down" else 2), fused_rows(part)


def _bias_source(modules: Sequence[str], param: Param) -> Source:
    """Biases of experts, [E, N] from [N] or, of gate and up together, [2 N] each."""
    count, rows = _stored_rows(param)
    expected = tuple(ExpectedTensor(f"{module}.bias", FLOATS, (count,)) for module in modules)

    def load(get: GetTensor, experts: range | None = None) -> Weight:
        chosen = modules if experts is None else modules[experts.start : experts.stop]
        return Dense(np.stack([get(f"{module}.bias")[rows].astype(np.float32) for module in chosen]))

    return Source(FAMILY, None, expected, load, load_experts=load)


def _matrix_source(modules: Sequence[str], param: Param, headers: CheckpointHeaders) -> Source:
    count, rows = _stored_rows(param)
    size = count * param.shape[-1]
    expected: list[ExpectedTensor] = []
    for module in modules:
        expected += _expected(module, size, headers)
    states = {module: _state_name(module, headers) for module in modules}
    shape = (count, param.shape[-1])

    def load(get: GetTensor, experts: range | None = None) -> Weight:
        if param.role != "experts":
            return Dense(decode(get, modules[0], states[modules[0]], shape))
        chosen = modules if experts is None else modules[experts.start : experts.stop]
        return Dense(np.stack([decode(get, module, states[module], shape)[rows] for module in chosen]))

    return Source(
        FAMILY,
        None,
        tuple(expected),
        load,
        note="bitsandbytes' 4-bit numbers are decoded to float32 when loaded",
        load_experts=load if param.role == "experts" else None,
        memory_bits=32,
        stored_bits=_BITS,
        stored_name="bnb-4bit",
    )


def _expected(module: str, size: int, headers: CheckpointHeaders) -> list[ExpectedTensor]:
    """The tensors of one module with `size` values."""
    weight, state = f"{module}.weight", _state_name(module, headers)
    if state is None:
        raise CheckpointError(f"{module} is not quantized like its siblings, or its quant_state is missing")
    scales = -(-size // 64)
    found = [
        ExpectedTensor(weight, ("U8",), (-(-size // 2), 1)),
        ExpectedTensor(f"{weight}.quant_map", ("F32",), (16,)),
        ExpectedTensor(state, ("U8",), headers.shape(state)),
    ]
    if headers.dtype(f"{weight}.absmax") != "U8":
        return [*found, ExpectedTensor(f"{weight}.absmax", ("F32",), (scales,))]
    return [
        *found,
        ExpectedTensor(f"{weight}.absmax", ("U8",), (scales,)),
        ExpectedTensor(f"{weight}.nested_absmax", ("F32",), (-(-scales // 256),)),
        ExpectedTensor(f"{weight}.nested_quant_map", ("F32",), (256,)),
    ]


def decode(get: GetTensor, module: str, state_name: str | None, shape: tuple[int, int]) -> Array:
    """The matrix of a module, float32 [N, K]. Raises CheckpointError for a state of another shape or block size."""
    assert state_name is not None
    weight = f"{module}.weight"
    state = _state(get(state_name), module)
    if state.get("blocksize") != 64 or state.get("shape") not in (None, list(shape)):
        raise CheckpointError(
            f"{state_name} says blocks of {state.get('blocksize')!r} and the shape {state.get('shape')!r}; blocks of "
            f"64 and the shape {list(shape)} are supported"
        )
    absmax = get(f"{weight}.absmax")
    scales = absmax.astype(np.float32)
    if absmax.dtype == np.uint8:
        offset, nested = state.get("nested_offset"), state.get("nested_blocksize")
        if not isinstance(offset, float) or not np.isfinite(offset) or nested != 256:
            raise CheckpointError(f"{state_name} has no nested_offset, or nested blocks of {nested!r} instead of 256")
        outer = np.repeat(get(f"{weight}.nested_absmax"), 256)[: absmax.size]
        scales = get(f"{weight}.nested_quant_map")[absmax] * outer + np.float32(offset)
    if not np.isfinite(scales).all() or not np.isfinite(get(f"{weight}.quant_map")).all():
        raise CheckpointError(
            f"{weight} has a scale that is not a number; the checkpoint is damaged, download it again"
        )
    packed = get(weight).reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[: shape[0] * shape[1]]
    values = get(f"{weight}.quant_map")[codes].reshape(-1)
    step = 64 << 12  # values multiplied at a time
    for start in range(0, values.size, step):
        part = values[start : start + step]
        part *= np.repeat(scales[start // 64 : start // 64 + (step >> 6)], 64)[: part.size]
    return values.reshape(shape)


def _state(stored: Array, module: str) -> Mapping[str, Any]:
    try:
        state = json.loads(stored[:_MAX_STATE].tobytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the quant_state of {module} is not JSON; download the checkpoint again") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"the quant_state of {module} is not a JSON object; download the checkpoint again")
    return state


FORMAT = BitsAndBytes()
