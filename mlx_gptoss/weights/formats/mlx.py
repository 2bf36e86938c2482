"""`mlx-*`: the layouts that mlx-lm writes and loads. Modules keep Hugging Face's names; gate and up are separate and
output-major. A quantized module is `.weight` U32 (codes, lowest bits first), `.scales` and, if affine, `.biases`.

Every module has its own mode, inferred from dtypes and shapes. config.json's `quantization` block may be missing, but
it must not contradict the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import CheckpointError
from .. import quantization, search
from ..params import Param
from ..safetensors import DTYPES, TensorInfo
from ..tensor import AFFINE, AFFINE4, AFFINE8, MXFP4, MXFP8, NVFP4, Quantized, Spec, Weight
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
    dense_source,
    matrix_recipe,
)
from .hf_layout import HF_DENSE, dense_unit, hf_name

FAMILY = "mlx"
_MODES: Mapping[str, tuple[Spec, ...]] = {
    "affine": tuple(AFFINE.values()),
    "mxfp4": (MXFP4,),
    "nvfp4": (NVFP4,),
    "mxfp8": (MXFP8,),
}
_NVFP4_MAX = 448 * 6  # MLX's global_scale is the amax, which the scale 448 with the code 6.0 represents

Quantizer = Callable[[Weight, Spec, np.dtype[Any]], Quantized]  # weight, spec, dtype of affine scales


class Mlx(Format):
    """The MLX family.

    quantize: converts a weight to a spec. A weight that is already stored in that spec must come back bit for bit.
    widths: specs of single matrices by name, in place of the recipe's: what is written is then of mixed widths.
    """

    family = FAMILY
    writes = True
    recipes: Mapping[str, Recipe] = {
        "mlx-3bit": matrix_recipe(FAMILY, AFFINE[3, 64], router=(FAMILY, AFFINE8)),
        "mlx-4bit": matrix_recipe(FAMILY, AFFINE4, router=(FAMILY, AFFINE8)),
        "mlx-6bit": matrix_recipe(FAMILY, AFFINE[6, 64], router=(FAMILY, AFFINE8)),
        "mlx-8bit": matrix_recipe(FAMILY, AFFINE8),
        "mlx-mxfp8": matrix_recipe(FAMILY, MXFP8, router=(FAMILY, AFFINE8)),
        "mlx-nvfp4": matrix_recipe(FAMILY, NVFP4, router=(FAMILY, AFFINE8)),
        "mlx-mxfp4": matrix_recipe(HF_DENSE, None, experts=(FAMILY, MXFP4)),
        "mlx-mxfp4-q8": matrix_recipe(FAMILY, AFFINE8, experts=(FAMILY, MXFP4)),
        "mlx-mxfp4-q4": matrix_recipe(FAMILY, AFFINE4, experts=(FAMILY, MXFP4), router=(FAMILY, AFFINE8)),
    }

    def __init__(self, quantize: Quantizer = quantization.to_spec, widths: Mapping[str, Spec] | None = None) -> None:
        self._quantize = quantize
        self._widths = widths or {}

    def find(self, param: Param, headers: CheckpointHeaders) -> Source | None:
        name = hf_name(param)
        module = name.rpartition(".")[0]
        if param.is_matrix and headers.has(f"{module}.scales", f"{module}.biases"):
            return _quantized_source(module, param, headers)
        if param.role == "experts" and headers.has(name):
            return dense_source(FAMILY, name, param.shape)
        return None

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        specs = {**_specs(self.recipes[target], params), **self._widths}

        def unit(param: Param) -> Unit:
            spec = specs.get(param.name)
            if spec is None:
                return dense_unit(param, dtypes, hf_name(param))
            return _quantized_unit(param, spec, dtypes.get(param.name, "BF16"), self._quantize)

        return [unit(param) for param in params]

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        """`quantization`: the default mode, and an entry for every quantized module, which older loaders need."""
        recipe = self.recipes[target]
        default = recipe["experts"][1]
        assert default is not None
        block: dict[str, Any] = _config_entry(default)
        specs = {**_specs(recipe, params), **self._widths}
        for param in params:
            if param.name in specs:
                block[hf_name(param).rpartition(".")[0]] = _config_entry(specs[param.name])
        return {"quantization": block, "quantization_config": block}


def _specs(recipe: Recipe, params: Sequence[Param]) -> dict[str, Spec]:
    """The spec of each parameter to quantize, by name. Rows that do not split into groups stay dense, as in mlx-lm."""
    specs = {}
    for param in params:
        spec = recipe[param.role][1] if param.is_matrix else None
        if spec is not None and param.shape[-1] % spec.group == 0:
            specs[param.name] = spec
    return specs


def _config_entry(spec: Spec) -> dict[str, Any]:
    """What config.json says about a module that is stored in this spec."""
    mode = next(mode for mode, specs in _MODES.items() if spec in specs)
    return {"group_size": spec.group, "bits": spec.bits, "mode": mode}


def _quantized_source(module: str, param: Param, headers: CheckpointHeaders) -> Source:
    """`.weight` U32 [..., N, K * bits / 32] with `.scales` (and `.biases` if affine) [..., N, K / group].

    NVFP4 may have a `.global_scale` F32, [E] for experts and [] otherwise.
    """
    spec = _infer_spec(module, param, headers)
    _check_config(module, spec, headers.raw)
    lead, width = param.shape[:-1], param.shape[-1]
    names = {part: f"{module}.{part}" for part in ("weight", "scales", "biases", "global_scale")}
    grouped = (*lead, width // spec.group)
    expected = [ExpectedTensor(names["weight"], ("U32",), (*lead, width * spec.bits // 32))]
    affine = spec.scale == "float"
    expected.append(ExpectedTensor(names["scales"], FLOATS if affine else ("U8",), grouped))
    if affine:
        dtype = headers.dtype(names["scales"])
        expected.append(ExpectedTensor(names["biases"], (dtype,) if dtype in FLOATS else FLOATS, grouped))
    with_global = spec == NVFP4 and headers.has(names["global_scale"])
    if with_global:
        shape = lead[:1] if param.role == "experts" else ()
        expected.append(ExpectedTensor(names["global_scale"], ("F32",), shape))

    def load(get: GetTensor) -> Weight:
        codes = get(names["weight"]).view(np.uint8)
        outer = None
        if with_global:
            outer = (get(names["global_scale"]) / np.float32(_NVFP4_MAX)).reshape(*lead[:-1], 1, 1)
        return Quantized(spec, codes, get(names["scales"]), get(names["biases"]) if affine else None, outer)

    return Source(FAMILY, spec, tuple(expected), load, scale_dtype=headers.dtype(names["scales"]) if affine else None)


def _infer_spec(module: str, param: Param, headers: CheckpointHeaders) -> Spec:
    """The spec of a module: bits and group from the shapes, the mode from the dtype of the scales.

    Raises CheckpointError for a combination that is not supported. Shapes that match nothing get an arbitrary spec;
    the general check of shapes then reports them.
    """
    words, groups = headers.shape(f"{module}.weight")[-1:], headers.shape(f"{module}.scales")[-1:]
    affine = headers.dtype(f"{module}.scales") != "U8"
    width = param.shape[-1]
    if not words or not groups or not groups[0] or 32 * words[0] % width or width % groups[0]:
        return AFFINE4 if affine else MXFP4
    bits, group = 32 * words[0] // width, width // groups[0]
    for mode, specs in _MODES.items():
        for spec in specs:
            if (mode == "affine") == affine and (spec.bits, spec.group) == (bits, group):
                return spec
    kind = "affine" if affine else "floating-point"
    raise CheckpointError(
        f"{module} is quantized to {bits} bits in {kind} groups of {group}, which is not supported. Supported are "
        "affine 2, 3, 4, 5, 6 and 8 bits in groups of 32, 64 or 128, mxfp4, mxfp8 and nvfp4; convert the original "
        "checkpoint to one of these"
    )


def _check_config(module: str, spec: Spec, raw: Mapping[str, Any]) -> None:
    """Raise CheckpointError if config.json's quantization block contradicts the tensors. The block may be missing."""
    block = raw.get("quantization", raw.get("quantization_config"))
    if not isinstance(block, Mapping) or "group_size" not in block:
        return
    entry = block.get(module, True)
    if entry is True:
        entry = {"mode": "affine", **{key: block[key] for key in ("group_size", "bits", "mode") if key in block}}
    # null is the mode's default, and says nothing that the tensors do not say.
    stated = {k: v for k, v in entry.items() if v is not None} if isinstance(entry, Mapping) else {}
    actual = _config_entry(spec)
    # An entry without a mode is affine, whatever the default mode is.
    if any(stated.get(key, "affine" if key == "mode" else actual[key]) != actual[key] for key in actual):
        raise CheckpointError(
            f"config.json's quantization says {entry!r} about {module}, but its tensors are {actual}; "
            "the files belong to different checkpoints, or config.json was edited"
        )


def _quantized_unit(param: Param, spec: Spec, dtype: str, quantize: Quantizer) -> Unit:
    """`.weight`, `.scales` and, if affine, `.biases`; `dtype` is the dtype of affine scales and biases."""
    module = hf_name(param).rpartition(".")[0]
    lead, width = param.shape[:-1], param.shape[-1]
    grouped = (*lead, width // spec.group)
    affine = spec.scale == "float"
    codes = TensorInfo(f"{module}.weight", "U32", (*lead, width * spec.bits // 32))
    scales = TensorInfo(f"{module}.scales", dtype if affine else "U8", grouped)
    biases = TensorInfo(f"{module}.biases", dtype, grouped)

    def encode(weights: Sequence[Weight]) -> Encoder:
        def encode_rows(start: int, stop: int) -> list[TensorSlice]:
            part = quantize(weights[0][start:stop], spec, DTYPES[dtype])
            slices: list[TensorSlice] = [(codes.name, start, part.codes)]
            for info, array in ((scales, part.scale), (biases, part.bias)):
                if array is not None:
                    slices.append((info.name, start, array))
            return slices

        return encode_rows

    return Unit((param,), (codes, scales, biases) if affine else (codes, scales), encode)


FORMAT = Mlx()
SEARCH_FORMAT = Mlx(search.to_spec)  # writes the same layouts with `--search mse`
SEARCHABLE = tuple(name for name, recipe in Mlx.recipes.items() if AFFINE4 in [spec for _, spec in recipe.values()])
