"""`nvfp4`: NVIDIA ModelOpt's unified export. Experts stay fused as in `bf16`, input-major and interleaved, with
underscores: `gate_up_proj` U8 [E, H/2, 2I], `gate_up_proj_weight_scale` F8_E4M3 [E, H/16, 2I] and the scalars
`gate_up_proj_weight_scale_2` and `_input_scale`. Attention is output-major and dotted: `q_proj.weight` U8 [N, K/2],
`.weight_scale` [N, K/16]. w = e2m1 * (e4m3 * weight_scale_2). Any module may be BF16 instead.

Input scales serve kernels with 4-bit activations: nothing here computes with them, but a conversion carries them.

A ModelOpt model saved without its export ("fake-quantized") is BF16 with `*_quantizer._amax` scalars, or a pickle,
beside it: it reads as `bf16`, with a note, and converting it to `nvfp4` gives what ModelOpt's export would have given.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CheckpointError
from .. import codecs, quantization
from ..params import Param
from ..safetensors import TensorInfo
from ..tensor import MXFP4, NVFP4, Quantized, Weight
from . import bf16
from .base import (
    FLOATS,
    HF_DENSE,
    CheckpointHeaders,
    Encoder,
    ExpectedTensor,
    Format,
    GetTensor,
    Recipe,
    Source,
    TensorSlice,
    Unit,
    experts_prefix,
    fused_rows,
    fused_shape,
    fused_units,
    hf_name,
    matrix_recipe,
)

NOTE = "a fake-quantized NVFP4 checkpoint: bfloat16 weights; convert --to nvfp4 makes it real, and a third as large"
STATE_FILE = "modelopt_state.pth"  # a pickle, never opened

_log = logging.getLogger(__name__)
_MAX_VALUE = np.float32(6 * 448)  # the largest e2m1 times the largest e4m3
_DEFAULT_INPUT_SCALE = np.float32(1)  # an input scale under which blocks of activations up to 2688 do not saturate
_POWERS_OF_TWO = np.array([1, 2, 4, *range(8, 128, 8)], np.uint8)  # e4m3 codes of 2^-9 .. 2^8
_WRONG_AXIS = (
    "ModelOpt 0.35 wrote the scales of experts along the wrong axis, and the weights cannot be recovered from them; "
    "export the model again with ModelOpt 0.37 or later, or choose another checkpoint"
)


@dataclass(frozen=True)
class _TensorNames:
    """The tensors of one stored matrix."""

    weight: str
    prefix: str  # of its scales and quantizers

    @classmethod
    def of(cls, param: Param) -> _TensorNames:
        if param.role == "experts":
            base = experts_prefix(param) + ("down_proj" if param.kind == "experts.down.weight" else "gate_up_proj")
            return cls(base, f"{base}_")
        weight = hf_name(param)
        return cls(weight, weight.removesuffix("weight"))

    @property
    def scale(self) -> str:
        return f"{self.prefix}weight_scale"

    @property
    def scale_2(self) -> str:
        return f"{self.prefix}weight_scale_2"

    @property
    def input_scale(self) -> str:
        return f"{self.prefix}input_scale"

    @property
    def cache_scales(self) -> tuple[str, str]:
        """What an 8-bit KV cache would be scaled by; not used."""
        return f"{self.prefix}k_scale", f"{self.prefix}v_scale"

    def amax(self, quantizer: str) -> str:
        return f"{self.prefix}{quantizer}_quantizer._amax"


class ModelOpt(Format):
    family = "nvfp4"
    writes = True
    recipes: Mapping[str, Recipe] = {
        "nvfp4": matrix_recipe(HF_DENSE, None, attention=("nvfp4", NVFP4), experts=("nvfp4", NVFP4))
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
        found = []
        for unit in fused_units(params, dtypes, _expert_unit):
            first = unit.params[0]
            part = first.kind.split(".")[1] if first.role == "attention" and first.is_matrix else ""
            if part == "q":
                together = [by_name[first.name.replace(".q.", f".{x}.")] for x in "qkv"]
                found.append(_attention_unit(tuple(together)))
            elif part == "o":
                found.append(_attention_unit((first,)))
            elif not part:  # k and v go with q
                found.append(unit)
        return found

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        """As in ModelOpt 0.37's config.json. Loaders tell the layout by `producer`, so it stays there."""
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


_PRODUCER = {"name": "modelopt", "version": "0.37.0"}


def _quantized_source(param: Param, names: _TensorNames, headers: CheckpointHeaders) -> Source:
    experts = param.role == "experts"
    part = param.kind.split(".")[1]
    *lead, height, width = fused_shape(param.shape, 1) if experts and part != "down" else param.shape
    if experts and headers.shape(names.scale) == (*lead, width, height // NVFP4.group):
        raise CheckpointError(f"{names.scale} is {list(headers.shape(names.scale))}: {_WRONG_AXIS}")

    def packed(length: int) -> tuple[int, ...]:
        return (*lead, length, height) if experts else (height, length)

    expected = [
        ExpectedTensor(names.weight, ("U8",), packed(width // 2)),
        ExpectedTensor(names.scale, ("F8_E4M3",), packed(width // NVFP4.group)),
        _expected_scalar(names.scale_2, headers, lead),
    ]
    ignored = [names.input_scale, *names.cache_scales]
    expected += [_expected_scalar(name, headers, lead) for name in ignored if headers.has(name)]
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

    return Source("nvfp4", NVFP4, tuple(expected), load)


def _expected_scalar(name: str, headers: CheckpointHeaders, lead: Sequence[int]) -> ExpectedTensor:
    """One number for the whole tensor, or one for each expert."""
    shape = headers.shape(name)
    return ExpectedTensor(name, FLOATS, shape if shape in ((), (1,), tuple(lead)) else ())


def _fake_quantized_source(param: Param, names: _TensorNames, headers: CheckpointHeaders) -> Source | None:
    """A dense matrix with quantizers' amax beside it; None without such."""
    found = [name for name in map(names.amax, ("weight", "input", "output")) if headers.has(name)]
    dense = bf16.FORMAT.find(param, headers) if found else None
    if dense is None:
        return None

    def load(get: GetTensor) -> Weight:
        weight = dense.load(get)
        if names.amax("input") not in found:
            return weight
        return replace(weight, input_scale=float(get(names.amax("input")).astype(np.float32) / _MAX_VALUE))

    return replace(
        dense, expected=(*dense.expected, *(ExpectedTensor(name, FLOATS, ()) for name in found)), load=load, note=NOTE
    )


def fake_quantized_note(name: str, folder: Path) -> str:
    """What there is to know of a checkpoint of the format `name` that has ModelOpt's state beside it."""
    return NOTE if name == "bf16" and (folder / STATE_FILE).exists() else ""


@dataclass(frozen=True)
class _Encoding:
    """How weights that share a second scale are written: that scale, and what makes NVFP4 of some of their rows."""

    outer: np.float32
    rows: Callable[[Weight], Quantized]


def _encoding(weights: Sequence[Weight], name: str) -> _Encoding:
    """NVFP4 under one second scale is kept and MXFP4 keeps its codes; all else is quantized as ModelOpt does."""
    specs = {weight.spec if isinstance(weight, Quantized) else None for weight in weights}
    outers = {value for weight in weights for value in _outer_scales(weight)}
    if specs == {NVFP4} and len(outers) == 1:
        return _Encoding(outers.pop(), _as_quantized)
    if specs == {MXFP4} and outers == {1}:
        spans = [span for weight in weights if (span := _scale_range(_as_quantized(weight)))]
        bottom, top = min((low for low, _ in spans), default=0), max((high for _, high in spans), default=0)
        if top - 8 >= -126:  # a second scale that is subnormal would be zero to some kernels
            if bottom < top - 17:
                _log.warning("%s: blocks more than 17 octaves below the largest are rounded to NVFP4's range", name)
            outer = np.ldexp(np.float32(1), top - 8)
            return _Encoding(outer, lambda part: from_mxfp4(_as_quantized(part), outer))
    outer = np.float32(max(quantization.largest(weight) for weight in weights) / _MAX_VALUE) or np.float32(1)
    return _Encoding(outer, lambda part: quantization.quantize_nvfp4(part, np.asarray(outer)))


def _outer_scales(weight: Weight) -> list[np.float32]:
    """The distinct second scales of a weight; 1 without."""
    outer = weight.outer if isinstance(weight, Quantized) else None
    return [np.float32(value) for value in np.unique(1 if outer is None else outer)]


def _as_quantized(weight: Weight) -> Quantized:
    assert isinstance(weight, Quantized)
    return weight


def from_mxfp4(weight: Quantized, outer: np.float32) -> Quantized:
    """MXFP4 as NVFP4 under a power of two as second scale: the same codes, and each e8m0 scale as two of e4m3.

    Exact where a block's scale is 2^-9 to 2^8 times `outer`, or the block is zero. Blocks below that are rounded.
    """
    assert weight.scale is not None
    exponent = np.repeat(weight.scale.astype(np.int16) - 127 - _log2(outer), 2, axis=-1)
    scale = _POWERS_OF_TWO.take(np.clip(exponent, -9, 8) + 9)
    codes = weight.codes
    low = exponent < -9
    if low.any():
        rounded = quantization.quantize_nvfp4(weight, np.asarray(outer))
        assert rounded.scale is not None
        scale = np.where(low, rounded.scale, scale)
        codes = np.where(np.repeat(low, NVFP4.group // 2, axis=-1), rounded.codes, codes)
    return Quantized(NVFP4, codes, scale, outer=np.asarray(outer))


def _log2(power: np.float32) -> int:
    """log2 of a power of two."""
    return int(np.frexp(power)[1]) - 1


def _scale_range(weight: Quantized) -> tuple[int, int] | None:
    """log2 of the smallest and the largest scale of an MXFP4 block that is not zero; None if all are."""
    bottom, top = 255, -1
    for codes, scale in zip(weight.codes, np.asarray(weight.scale), strict=True):
        words = np.ascontiguousarray(codes).view("<u8").reshape(*scale.shape, 2)
        magnitudes = (words[..., 0] | words[..., 1]) & np.uint64(0x7777_7777_7777_7777)
        some = scale[magnitudes != 0]
        if some.size:
            bottom, top = min(bottom, int(some.min())), max(top, int(some.max()))
    return None if top < 0 else (bottom - 127, top - 127)


def _expert_unit(params: tuple[Param, ...]) -> Unit:
    """gate and up together, or down alone."""
    experts, _, width = params[0].shape
    height = sum(param.shape[1] for param in params)
    names = _TensorNames.of(params[0])
    weight = TensorInfo(names.weight, "U8", (experts, width // 2, height))
    scale = TensorInfo(names.scale, "F8_E4M3", (experts, width // NVFP4.group, height))

    def encode(weights: Sequence[Weight]) -> Encoder:
        encoding = _encoding(weights, names.weight)

        def pieces(start: int, stop: int) -> list[TensorSlice]:
            parts = [encoding.rows(codecs.rows(weight, start, stop)) for weight in weights]
            found = _scalars(names, encoding.outer, weights) if start == 0 else []
            for info, arrays in ((weight, [p.codes for p in parts]), (scale, [np.asarray(p.scale) for p in parts])):
                rows = np.stack(arrays, axis=2).reshape(stop - start, height, -1)  # interleaved
                found.append((info.name, start, codecs.straight(rows.swapaxes(1, 2))))
            return found

        return pieces

    return Unit(params, (weight, scale, *_scalar_infos(names)), encode)


def _attention_unit(params: tuple[Param, ...]) -> Unit:
    """q, k and v together, as kernels that join them take one second scale for all; or o alone."""
    names = [_TensorNames.of(param) for param in params]
    infos: list[TensorInfo] = []
    for param, name in zip(params, names, strict=True):
        height, width = param.shape
        infos.append(TensorInfo(name.weight, "U8", (height, width // 2)))
        infos.append(TensorInfo(name.scale, "F8_E4M3", (height, width // NVFP4.group)))
        infos += _scalar_infos(name)

    def encode(weights: Sequence[Weight]) -> Encoder:
        kept = all(isinstance(weight, Quantized) and weight.spec == NVFP4 for weight in weights)
        sharing = [[weight] for weight in weights] if kept else [weights] * len(weights)
        encodings = [_encoding(group, name.weight) for group, name in zip(sharing, names, strict=True)]

        def pieces(start: int, stop: int) -> list[TensorSlice]:
            found: list[TensorSlice] = []
            for name, weight, encoding in zip(names, weights, encodings, strict=True):
                if start == 0:
                    found += _scalars(name, encoding.outer, weights)
                if start < codecs.shape(weight)[0]:  # k and v have fewer rows than q
                    part = encoding.rows(codecs.rows(weight, start, stop))
                    found += [(name.weight, start, part.codes), (name.scale, start, np.asarray(part.scale))]
            return found

        return pieces

    return Unit(params, tuple(infos), encode)


def _scalar_infos(names: _TensorNames) -> list[TensorInfo]:
    return [TensorInfo(name, "F32", ()) for name in (names.scale_2, names.input_scale)]


def _scalars(names: _TensorNames, outer: np.float32, weights: Sequence[Weight]) -> list[TensorSlice]:
    """The second scale, and the input scale that calibration found, which ModelOpt's loaders want to be there."""
    calibrated = [weight.input_scale for weight in weights if weight.input_scale is not None]
    input_scale = np.float32(max(calibrated, default=_DEFAULT_INPUT_SCALE))
    return [(names.scale_2, 0, np.asarray(outer)), (names.input_scale, 0, np.asarray(input_scale))]


FORMAT = ModelOpt()
