"""`nvfp4`: NVIDIA ModelOpt's unified Hugging Face export.

Experts stay fused as in `bf16`, input-major and interleaved, with names joined by underscores: `gate_up_proj`
U8 [E, H/2, 2I], `gate_up_proj_weight_scale` F8_E4M3 [E, H/16, 2I] and the scalars `gate_up_proj_weight_scale_2` and
`gate_up_proj_input_scale`. Attention is output-major with dotted names: `q_proj.weight` U8 [N, K/2],
`q_proj.weight_scale` [N, K/16]. w = e2m1 * (e4m3 * weight_scale_2). Any module may be BF16 instead.

Input scales serve kernels with 4-bit activations. Nothing here computes with them, but a conversion keeps them.

A ModelOpt model that was saved without export ("fake-quantized") is BF16, with `*_quantizer._amax` scalars in the
checkpoint or a pickle beside it. It is read as `bf16`, with a note. Converting it to `nvfp4` gives what ModelOpt's
export would have given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CheckpointError
from .. import codecs
from ..params import Param
from ..safetensors import TensorInfo
from ..tensor import NVFP4, Quantized, Weight
from . import bf16
from .base import (
    FLOATS,
    CheckpointHeaders,
    Encoder,
    ExpectedTensor,
    Format,
    GetTensor,
    Recipe,
    Source,
    TensorSlice,
    Unit,
    matrix_recipe,
)
from .hf_layout import HF_DENSE, experts_prefix, fused_rows, fused_shape, fused_units, hf_name
from .nvfp4_encoding import MAX_VALUE, choose_encoding

FAMILY = "nvfp4"
NOTE = "a fake-quantized NVFP4 checkpoint with bfloat16 weights; convert --to nvfp4 stores it in a third of the size"
STATE_FILE = "modelopt_state.pth"  # a pickle, never opened

_PRODUCER = {"name": "modelopt", "version": "0.37.0"}
_DEFAULT_INPUT_SCALE = np.float32(1)  # without calibration: blocks of activations up to 2688 do not saturate
_WRONG_AXIS = (
    "ModelOpt 0.35 wrote the scales of experts along the wrong axis, and the weights cannot be recovered from them; "
    "export the model again with ModelOpt 0.37 or later, or use another checkpoint"
)


class ModelOpt(Format):
    family = FAMILY
    writes = True
    recipes: Mapping[str, Recipe] = {
        "nvfp4": matrix_recipe(HF_DENSE, None, attention=(FAMILY, NVFP4), experts=(FAMILY, NVFP4))
    }

    def find(self, param: Param, headers: CheckpointHeaders) -> Source | None:
        if not param.is_matrix:
            return None
        names = _TensorNames.of(param)
        if headers.dtype(names.weight) == "U8" and headers.has(names.scale, names.scale_2):
            return _quantized_source(param, names, headers)
        return _fake_quantized_source(param, names, headers)

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        by_name = {param.name: param for param in params}
        units = []
        for unit in fused_units(params, dtypes, _expert_unit):
            first = unit.params[0]
            part = first.kind.split(".")[1] if first.role == "attention" and first.is_matrix else ""
            if part == "q":
                units.append(_attention_unit(tuple(by_name[first.name.replace(".q.", f".{x}.")] for x in "qkv")))
            elif part == "o":
                units.append(_attention_unit((first,)))
            elif not part:  # k and v are written with q
                units.append(unit)
        return units

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        """`quantization_config` as in ModelOpt 0.37. Loaders recognize the layout by `producer`, so it must stay."""
        group = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4.group}
        block = {
            "config_groups": {"group_0": {"input_activations": group, "weights": group, "targets": ["Linear"]}},
            "ignore": ["lm_head"],
            "quant_algo": "NVFP4",
            "producer": _PRODUCER,
            "quant_method": "modelopt",
        }
        return {"quantization_config": block}

    def extra_files(self, target: str, params: Sequence[Param]) -> Mapping[str, Any]:
        block = {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": NVFP4.group,
            "exclude_modules": ["lm_head"],
        }
        return {"hf_quant_config.json": {"producer": _PRODUCER, "quantization": block}}


@dataclass(frozen=True)
class _TensorNames:
    """The names of the tensors of one stored matrix. prefix: of its scales and quantizers."""

    weight: str
    prefix: str

    @classmethod
    def of(cls, param: Param) -> _TensorNames:
        """The names for a matrix of the network; gate and up share theirs."""
        if param.role == "experts":
            base = experts_prefix(param) + ("down_proj" if param.kind == "experts.down.weight" else "gate_up_proj")
            return cls(base, f"{base}_")
        weight = hf_name(param)
        return cls(weight, weight.removesuffix("weight"))

    @property
    def scale(self) -> str:
        """The e4m3 scales of the groups."""
        return f"{self.prefix}weight_scale"

    @property
    def scale_2(self) -> str:
        """The second scale, float32."""
        return f"{self.prefix}weight_scale_2"

    @property
    def input_scale(self) -> str:
        return f"{self.prefix}input_scale"

    @property
    def cache_scales(self) -> tuple[str, str]:
        """The scales of an 8-bit KV cache, which are not used."""
        return f"{self.prefix}k_scale", f"{self.prefix}v_scale"

    def amax(self, quantizer: str) -> str:
        return f"{self.prefix}{quantizer}_quantizer._amax"


def _quantized_source(param: Param, names: _TensorNames, headers: CheckpointHeaders) -> Source:
    """An exported matrix: views of codes and scales, [E, N, ...] for experts and [N, ...] for attention."""
    experts = param.role == "experts"
    part = param.kind.split(".")[1]
    *lead, height, width = fused_shape(param.shape, 1) if experts and part != "down" else param.shape
    if experts and headers.shape(names.scale) == (*lead, width, height // NVFP4.group):
        raise CheckpointError(f"{names.scale} is {list(headers.shape(names.scale))}: {_WRONG_AXIS}")

    def stored_shape(length: int) -> tuple[int, ...]:
        return (*lead, length, height) if experts else (height, length)

    expected = [
        ExpectedTensor(names.weight, ("U8",), stored_shape(width // 2)),
        ExpectedTensor(names.scale, ("F8_E4M3",), stored_shape(width // NVFP4.group)),
        _expected_scalar(names.scale_2, headers, lead),
    ]
    optional = [names.input_scale, *names.cache_scales]
    expected += [_expected_scalar(name, headers, lead) for name in optional if headers.has(name)]
    rows = fused_rows(part) if experts else slice(None)
    calibrated = headers.has(names.input_scale)

    def load(get: GetTensor) -> Weight:
        codes, scale = get(names.weight), get(names.scale)
        outer = get(names.scale_2).astype(np.float32).reshape(-1)
        outer = outer[0] if outer.size == 1 else outer[:, None, None]
        input_scale = float(get(names.input_scale).max()) if calibrated else None
        if experts:
            codes, scale = codes.swapaxes(1, 2)[:, rows], scale.swapaxes(1, 2)[:, rows]
        return Quantized(NVFP4, codes, scale, outer=np.asarray(outer), input_scale=input_scale)

    return Source(FAMILY, NVFP4, tuple(expected), load)


def _expected_scalar(name: str, headers: CheckpointHeaders, lead: Sequence[int]) -> ExpectedTensor:
    """One number for the whole tensor, [] or [1], or one for each expert, [E]."""
    shape = headers.shape(name)
    return ExpectedTensor(name, FLOATS, shape if shape in ((), (1,), tuple(lead)) else ())


def _fake_quantized_source(param: Param, names: _TensorNames, headers: CheckpointHeaders) -> Source | None:
    """A dense matrix with the amax of its quantizers in the checkpoint; None if there is no such amax."""
    amaxes = [name for name in map(names.amax, ("weight", "input", "output")) if headers.has(name)]
    dense = bf16.FORMAT.find(param, headers) if amaxes else None
    if dense is None:
        return None

    def load(get: GetTensor) -> Weight:
        weight = dense.load(get)
        if names.amax("input") not in amaxes:
            return weight
        return replace(weight, input_scale=float(get(names.amax("input")).astype(np.float32) / MAX_VALUE))

    expected = (*dense.expected, *(ExpectedTensor(name, FLOATS, ()) for name in amaxes))
    return replace(dense, expected=expected, load=load, note=NOTE)


def fake_quantized_note(name: str, folder: Path) -> str:
    """NOTE for a checkpoint of the format `name` with ModelOpt's state file beside it; "" otherwise."""
    return NOTE if name == "bf16" and (folder / STATE_FILE).exists() else ""


def _expert_unit(params: tuple[Param, ...]) -> Unit:
    """`gate_up_proj` of (gate, up), or `down_proj` of (down,), with its scales."""
    experts, _, width = params[0].shape
    height = sum(param.shape[1] for param in params)
    names = _TensorNames.of(params[0])
    weight = TensorInfo(names.weight, "U8", (experts, width // 2, height))
    scale = TensorInfo(names.scale, "F8_E4M3", (experts, width // NVFP4.group, height))

    def encode(weights: Sequence[Weight]) -> Encoder:
        encoding = choose_encoding(weights, names.weight)

        def encode_rows(start: int, stop: int) -> list[TensorSlice]:
            parts = [encoding.encode(weight[start:stop]) for weight in weights]
            slices = _scalar_slices(names, encoding.outer, weights) if start == 0 else []
            for info, arrays in ((weight, [p.codes for p in parts]), (scale, [np.asarray(p.scale) for p in parts])):
                rows = np.stack(arrays, axis=2).reshape(stop - start, height, -1)  # interleaved
                slices.append((info.name, start, codecs.contiguous_rows(rows.swapaxes(1, 2))))
            return slices

        return encode_rows

    return Unit(params, (weight, scale, *_scalar_infos(names)), encode)


def _attention_unit(params: tuple[Param, ...]) -> Unit:
    """q, k and v together, because kernels that fuse them use one second scale for all three; or o alone."""
    names = [_TensorNames.of(param) for param in params]
    infos: list[TensorInfo] = []
    for param, name in zip(params, names, strict=True):
        height, width = param.shape
        infos.append(TensorInfo(name.weight, "U8", (height, width // 2)))
        infos.append(TensorInfo(name.scale, "F8_E4M3", (height, width // NVFP4.group)))
        infos += _scalar_infos(name)

    def encode(weights: Sequence[Weight]) -> Encoder:
        all_nvfp4 = all(isinstance(weight, Quantized) and weight.spec == NVFP4 for weight in weights)
        shared = [[weight] for weight in weights] if all_nvfp4 else [weights] * len(weights)
        encodings = [choose_encoding(group, name.weight) for group, name in zip(shared, names, strict=True)]

        def encode_rows(start: int, stop: int) -> list[TensorSlice]:
            slices: list[TensorSlice] = []
            for name, weight, encoding in zip(names, weights, encodings, strict=True):
                if start == 0:
                    slices += _scalar_slices(name, encoding.outer, weights)
                if start < weight.shape[0]:  # k and v have fewer rows than q
                    part = encoding.encode(weight[start:stop])
                    slices += [(name.weight, start, part.codes), (name.scale, start, np.asarray(part.scale))]
            return slices

        return encode_rows

    return Unit(params, tuple(infos), encode)


def _scalar_infos(names: _TensorNames) -> list[TensorInfo]:
    return [TensorInfo(name, "F32", ()) for name in (names.scale_2, names.input_scale)]


def _scalar_slices(names: _TensorNames, outer: np.float32, weights: Sequence[Weight]) -> list[TensorSlice]:
    """The second scale and the input scale from calibration. ModelOpt's loaders require both."""
    calibrated = [weight.input_scale for weight in weights if weight.input_scale is not None]
    input_scale = np.float32(max(calibrated, default=_DEFAULT_INPUT_SCALE))
    return [(names.scale_2, 0, np.asarray(outer)), (names.input_scale, 0, np.asarray(input_scale))]


FORMAT = ModelOpt()
