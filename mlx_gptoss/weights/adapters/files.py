"""The files of an adapter: a folder with adapter_config.json and one safetensors file. Nothing in them is trusted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...config import ModelConfig
from ...errors import CheckpointError
from ...untrusted.json_file import parse_json, read_file
from ..params import Param, parameters
from ..safetensors import MappedFile
from ..tensor import Array
from .factors import MAX_RANK, Entry

CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 4 << 20
MAX_CONFIG_ITEMS = 100_000
FLOATS = ("F32", "F16", "BF16")
PEFT_WEIGHTS, MLX_LM_WEIGHTS = "adapter_model.safetensors", "adapters.safetensors"


@dataclass(frozen=True)
class AdapterFiles:
    """folder, config: adapter_config.json as parsed. file: the tensors. Of the model that they are for, from of():
    params: its matrices by their names without `.weight`. model: its config."""

    folder: Path
    config: Mapping[str, Any]
    file: MappedFile
    params: Mapping[str, Param] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)

    def of(self, model: ModelConfig) -> AdapterFiles:
        """The same files for the model with this config."""
        params = {param.name.removesuffix(".weight"): param for param in parameters(model) if param.is_matrix}
        return replace(self, params=params, model=model)

    @property
    def base(self) -> str:
        """Which model the adapter says it was trained on, for messages; "" if it does not say."""
        named = self.config.get("base_model_name_or_path", self.config.get("model"))
        return f" (it names {named!r:.200} as its model)" if isinstance(named, str) and named else ""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor. Raises CheckpointError if it is missing or its values are no floats."""
        info = self.file.header.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.folder} lacks the tensor {name!r:.200}; save the adapter again")
        if info.dtype not in FLOATS:
            raise CheckpointError(f"{name!r:.200} in {self.folder} is {info.dtype}, not F32, F16 or BF16")
        return info.shape

    def get(self, name: str) -> Array:
        return self.file.get(name)

    def param(self, name: str, tensor: str) -> Param:
        """The model's parameter for a tensor. Raises CheckpointError for one that it does not have."""
        param = self.params.get(name)
        if param is None:
            raise CheckpointError(
                f"{self.folder} is for another model{self.base}: {tensor!r:.200} belongs to {name!r:.100}, "
                "which this one does not have"
            )
        return param

    def misfit(self, tensor: str, shape: tuple[int, ...], param: Param) -> CheckpointError:
        """The error for factors whose shape does not fit their parameter."""
        return CheckpointError(
            f"{self.folder} is for another model{self.base}: {tensor!r:.200} has shape {list(shape)}, which does not "
            f"fit {param.name} {list(param.shape)}"
        )

    def linear(self, name: str, pair: tuple[str, str], scale: float, *, transposed: bool = False) -> Entry:
        """The entry of a matrix: a [R, K] and b [N, R], or [K, R] and [R, N] if transposed. pair: their names."""
        shapes = [self.shape(tensor) for tensor in pair]
        param = self.param(name, pair[0])
        a_shape, b_shape = (shape[::-1] if transposed else shape for shape in shapes)
        if len(param.shape) != 2 or len(a_shape) != 2 or a_shape[1] != param.shape[1]:
            raise self.misfit(pair[0], shapes[0], param)
        rank = checked_rank(a_shape[0], pair[0])
        if b_shape != (param.shape[0], rank):
            raise self.misfit(pair[1], shapes[1], param)
        a, b = (lambda: self.get(pair[0])), (lambda: self.get(pair[1]))
        if transposed:
            a, b = (lambda: self.get(pair[0]).T), (lambda: self.get(pair[1]).T)
        return Entry(pair[0], rank, param.shape[1], param.shape[0], None, scale, a, b)


def open_files(folder: Path) -> AdapterFiles:
    """Read the config and the header. Raises CheckpointError for a folder that has none, or only a pickle."""
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"{folder} has no {CONFIG}: give the folder that PEFT or mlx-lm saved the adapter to")
    config = parse_json(read_file(folder / CONFIG, MAX_CONFIG_BYTES), CONFIG, MAX_CONFIG_ITEMS)
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG} is not a JSON object; save the adapter again")
    found = [folder / name for name in (PEFT_WEIGHTS, MLX_LM_WEIGHTS) if (folder / name).is_file()]
    if not found:
        if list(folder.glob("*.bin")):
            raise CheckpointError(
                f"{folder} has its weights as a pickle (.bin), which may run code when it is opened; save the adapter "
                "again with save_pretrained(..., safe_serialization=True)"
            )
        raise CheckpointError(f"{folder} has neither {PEFT_WEIGHTS} nor {MLX_LM_WEIGHTS}; save the adapter again")
    if len(found) > 1:
        raise CheckpointError(f"{folder} has both {PEFT_WEIGHTS} and {MLX_LM_WEIGHTS}; keep one of them")
    return AdapterFiles(folder, config, MappedFile(found[0]))


def checked_rank(rank: int, tensor: str) -> int:
    """Raises CheckpointError for a rank that no adapter has."""
    if not 1 <= rank <= MAX_RANK:
        raise CheckpointError(f"{tensor!r:.200} has rank {rank}; it must be from 1 to {MAX_RANK}")
    return rank


def digest_of(file: MappedFile, entries: Mapping[str, Entry]) -> str:
    """SHA-256 of the file and of what the config makes of it."""
    digest = hashlib.sha256()
    with file.path.open("rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
    facts = [(name, each.source, each.rank, each.scale, each.experts) for name, each in sorted(entries.items())]
    digest.update(repr(facts).encode())
    return digest.hexdigest()
