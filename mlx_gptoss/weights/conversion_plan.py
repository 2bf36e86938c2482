"""The plan of a conversion: names, dtypes and shapes of the result's tensors, and its JSON files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from . import codecs
from .checkpoint import CheckpointLike
from .config_json import published
from .formats import gguf, gguf_metadata, mlx, recipe_of
from .formats.base import Recipe, Unit
from .safetensors import TensorInfo
from .tensor import Dense, Spec


@dataclass(frozen=True)
class ConversionPlan:
    """Everything about the result of a conversion except its values.

    units: the tensors, in groups that are written together.
    config: the content of config.json.
    extra_files: name -> content of the other JSON files.
    metadata: that of each safetensors file; of a GGUF file "file_type" alone.
    is_gguf: the result is one GGUF file, which has the config and the tokenizer inside.
    """

    units: tuple[Unit, ...]
    config: Mapping[str, Any]
    extra_files: Mapping[str, Any]
    metadata: Mapping[str, str]
    is_gguf: bool = False

    @property
    def tensors(self) -> list[TensorInfo]:
        return [info for unit in self.units for info in unit.tensors]

    @property
    def size_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors)

    @property
    def digest(self) -> str:
        """SHA-256 of the whole plan."""
        tensors = [(info.name, info.dtype, info.shape) for info in self.tensors]
        text = json.dumps([tensors, self.config, self.extra_files, self.metadata], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def plan_conversion(
    checkpoint: CheckpointLike, to: str, search: str | None = None, widths: Mapping[str, Spec] | None = None
) -> ConversionPlan:
    """The plan for writing `checkpoint` in the format `to`. search: as in convert. Reads headers and vectors only.

    widths: specs of single matrices by name, in place of those of an MLX format.

    Raises CheckpointError if the format cannot be written, or not from this model's shapes.
    """
    target_format, recipe = recipe_of(to, search)
    if widths:
        target_format = mlx.Mlx(widths=widths)
    config = checkpoint.config
    if not config.eos_token_id:  # `original/config.json` has none
        config = replace(config, eos_token_id=checkpoint.stop_ids)
    content = published(config) | target_format.config_entries(to, checkpoint.params)
    if not config.eos_token_id:
        del content["eos_token_id"]
    dtypes = _vector_dtypes(checkpoint) | _scale_dtypes(checkpoint, recipe, widths or {})
    units = target_format.units(to, checkpoint.params, dtypes)
    extra_files = target_format.extra_files(to, checkpoint.params)
    if to in gguf.GGUF_NAMES:
        gguf_metadata.check_config(content, config)
        return ConversionPlan(tuple(units), content, {}, {"file_type": str(gguf.file_type(to))}, True)
    metadata = {"format": "mlx" if target_format.family == "mlx" else "pt"}
    return ConversionPlan(tuple(units), content, extra_files, metadata)


def _vector_dtypes(checkpoint: CheckpointLike) -> dict[str, str]:
    """The dtype of each norm, sink and bias by its name: BF16 if bfloat16 holds its values exactly, else F32."""
    found = {}
    for param in checkpoint.params:
        if not param.is_matrix:
            weight = checkpoint.read(param.name)
            is_exact = codecs.dequantize(Dense(codecs.to_bfloat16(weight))) == codecs.dequantize(weight)
            found[param.name] = "BF16" if is_exact.all() else "F32"
    return found


def _scale_dtypes(checkpoint: CheckpointLike, recipe: Recipe, widths: Mapping[str, Spec]) -> dict[str, str]:
    """The dtype of the float scales of each matrix that is stored as the target stores it, which keeps them."""
    found = {}
    for param in checkpoint.params:
        spec, dtype = checkpoint.stored_as(param.name)
        if param.is_matrix and dtype is not None and spec == widths.get(param.name, recipe[param.role][1]):
            found[param.name] = dtype
    return found
