"""`mlx-*`: what mlx-lm writes and loads. Modules keep Hugging Face's names, gate and up apart and output-major; a
quantized module is `.weight` U32 (codes, lowest bits first), `.scales` and, when affine, `.biases`. Every module has
a mode of its own, told by dtypes and shapes; config.json's `quantization` must agree where it speaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import CheckpointError
from .. import codecs, quantization, search
from ..params import Param
from ..safetensors import DTYPES, TensorInfo
from ..tensor import AFFINE4, AFFINE8, MXFP4, MXFP8, NVFP4, Quantized, Spec, Weight
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
    dense_source,
    dense_unit,
    hf_name,
    matrix_recipe,
)

_MODES: Mapping[str, tuple[Spec, ...]] = {
    "affine": tuple(Spec("uint", bits, group, "float") for bits in (4, 8) for group in (32, 64, 128)),
    "mxfp4": (MXFP4,),
    "nvfp4": (NVFP4,),
    "mxfp8": (MXFP8,),
}
_NVFP4_MAX = 448 * 6  # MLX's global_scale is the amax that scale 448 and code 6.0 stand for


Quantizer = Callable[[Weight, Spec, np.dtype[Any]], Quantized]


class Mlx(Format):
    """quantize: what makes a weight that is stored otherwise into a quantized one, bit for bit as it is if it is so
    already."""

    family = "mlx"
    writes = True
    recipes: Mapping[str, Recipe] = {
        "mlx-4bit": matrix_recipe("mlx", AFFINE4, router=("mlx", AFFINE8)),
        "mlx-8bit": matrix_recipe("mlx", AFFINE8),
        "mlx-mxfp8": matrix_recipe("mlx", MXFP8, router=("mlx", AFFINE8)),
        "mlx-nvfp4": matrix_recipe("mlx", NVFP4, router=("mlx", AFFINE8)),
        "mlx-mxfp4": matrix_recipe(HF_DENSE, None, experts=("mlx", MXFP4)),
        "mlx-mxfp4-q8": matrix_recipe("mlx", AFFINE8, experts=("mlx", MXFP4)),
        "mlx-mxfp4-q4": matrix_recipe("mlx", AFFINE4, experts=("mlx", MXFP4), router=("mlx", AFFINE8)),
    }

    def __init__(self, quantize: Quantizer = quantization.convert) -> None:
        self._quantize = quantize

    def find(self, param: Param, headers: CheckpointHeaders) -> Source | None:
        name = hf_name(param)
        module = name.rpartition(".")[0]
        if param.is_matrix and headers.has(f"{module}.scales", f"{module}.biases"):
            return _quantized_source(module, param, headers)
        if param.role == "experts" and headers.has(name):
            return dense_source("mlx", name, param.shape)
        return None

    def units(self, target: str, params: Sequence[Param], dtypes: Mapping[str, str]) -> list[Unit]:
        specs = _specs(self.recipes[target], params)

        def unit(param: Param) -> Unit:
            spec = specs.get(param.name)
            scales = dtypes.get(param.name, "BF16")
            if spec is None:
                return dense_unit(param, dtypes, hf_name(param))
            return _quantized_unit(param, spec, scales, self._quantize)

        return [unit(param) for param in params]

    def config_entries(self, target: str, params: Sequence[Param]) -> dict[str, Any]:
        """The default and, as older loaders need them, an entry for every quantized module."""
        recipe = self.recipes[target]
        default = recipe["experts"][1]
        assert default is not None
        block: dict[str, Any] = _config_entry(default)
        for param in params:
            spec = _specs(recipe, [param]).get(param.name)
            if spec is not None:
                block[hf_name(param).rpartition(".")[0]] = _config_entry(spec)
        return {"quantization": block, "quantization_config": block}


def _specs(recipe: Recipe, params: Sequence[Param]) -> dict[str, Spec]:
    """The spec of each parameter to quantize. As in mlx-lm, rows that cannot be cut into groups stay dense."""
    found = {}
    for param in params:
        spec = recipe[param.role][1] if param.is_matrix else None
        if spec is not None and param.shape[-1] % spec.group == 0:
            found[param.name] = spec
    return found


def _mode(spec: Spec) -> str:
    return next(mode for mode, specs in _MODES.items() if spec in specs)


def _config_entry(spec: Spec) -> dict[str, Any]:
    return {"group_size": spec.group, "bits": spec.bits, "mode": _mode(spec)}


def _quantized_source(module: str, param: Param, headers: CheckpointHeaders) -> Source:
    spec = _infer_spec(module, param, headers)
    _check_config(module, spec, headers.raw)
    lead, width = param.shape[:-1], param.shape[-1]
    names = {part: f"{module}.{part}" for part in ("weight", "scales", "biases", "global_scale")}
    grouped = (*lead, width // spec.group)
    expected = [ExpectedTensor(names["weight"], ("U32",), (*lead, width * spec.bits // 32))]
    affine = spec.scale == "float"
    expected.append(ExpectedTensor(names["scales"], FLOATS if affine else ("U8",), grouped))
    if affine:
        same = headers.dtype(names["scales"])
        expected.append(ExpectedTensor(names["biases"], (same,) if same in FLOATS else FLOATS, grouped))
    with_global = spec == NVFP4 and headers.has(names["global_scale"])
    if with_global:
        expected.append(ExpectedTensor(names["global_scale"], ("F32",), lead[:1] if param.role == "experts" else ()))

    def load(get: GetTensor) -> Weight:
        codes = get(names["weight"]).view(np.uint8)
        outer = None
        if with_global:
            outer = (get(names["global_scale"]) / np.float32(_NVFP4_MAX)).reshape(*lead[:-1], 1, 1)
        return Quantized(spec, codes, get(names["scales"]), get(names["biases"]) if affine else None, outer)

    return Source("mlx", spec, tuple(expected), load, scale_tensor=names["scales"] if affine else None)


def _infer_spec(module: str, param: Param, headers: CheckpointHeaders) -> Spec:
    """Bits and group from the shapes, the mode from the dtype of the scales."""
    words, groups = headers.shape(f"{module}.weight")[-1:], headers.shape(f"{module}.scales")[-1:]
    affine = headers.dtype(f"{module}.scales") != "U8"
    width = param.shape[-1]
    if not words or not groups or not groups[0] or 32 * words[0] % width or width % groups[0]:
        return AFFINE4 if affine else MXFP4  # shapes that fit nothing: the check of shapes will list them
    bits, group = 32 * words[0] // width, width // groups[0]
    for mode, specs in _MODES.items():
        for spec in specs:
            if (mode == "affine") == affine and (spec.bits, spec.group) == (bits, group):
                return spec
    kind = "affine" if affine else "floating-point"
    raise CheckpointError(
        f"{module} is quantized to {bits} bits in {kind} groups of {group}, which cannot be read; affine 4 and 8 bits "
        "in groups of 32, 64 or 128, mxfp4, mxfp8 and nvfp4 can: convert the original checkpoint to one of them"
    )


def _check_config(module: str, spec: Spec, raw: Mapping[str, Any]) -> None:
    """Raise if config.json's quantization block says something else of this module. A block may be missing."""
    block = raw.get("quantization", raw.get("quantization_config"))
    if not isinstance(block, Mapping) or "group_size" not in block:
        return
    entry = block.get(module, True)
    if entry is True:
        entry = {"mode": "affine", **{key: block[key] for key in ("group_size", "bits", "mode") if key in block}}
    stated = dict(entry) if isinstance(entry, Mapping) else {}
    found = _config_entry(spec)
    wrong = [key for key in found if stated.get(key, "affine" if key == "mode" else found[key]) != found[key]]
    if wrong:
        raise CheckpointError(
            f"config.json's quantization says {entry!r} of {module}, but its tensors are {found}; "
            "the files belong to different checkpoints, or config.json was edited"
        )


def _quantized_unit(param: Param, spec: Spec, dtype: str, quantize: Quantizer) -> Unit:
    """`dtype` is that of affine scales and biases."""
    module = hf_name(param).rpartition(".")[0]
    lead, width = param.shape[:-1], param.shape[-1]
    grouped = (*lead, width // spec.group)
    affine = spec.scale == "float"
    codes = TensorInfo(f"{module}.weight", "U32", (*lead, width * spec.bits // 32))
    scales = TensorInfo(f"{module}.scales", dtype if affine else "U8", grouped)
    biases = TensorInfo(f"{module}.biases", dtype, grouped)

    def encode(weights: Sequence[Weight]) -> Encoder:
        def pieces(start: int, stop: int) -> list[TensorSlice]:
            part = quantize(codecs.rows(weights[0], start, stop), spec, DTYPES[dtype])
            found: list[TensorSlice] = [(codes.name, start, part.codes)]
            for info, array in ((scales, part.scale), (biases, part.bias)):
                if array is not None:
                    found.append((info.name, start, array))
            return found

        return pieces

    return Unit((param,), (codes, scales, biases) if affine else (codes, scales), encode)


FORMAT = Mlx()
SEARCH_FORMAT = Mlx(search.convert)
SEARCHABLE = tuple(name for name, recipe in Mlx.recipes.items() if AFFINE4 in [spec for _, spec in recipe.values()])
