"""What an adapter is, told by its config and the header of its tensors; no value is read."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ...config import ModelConfig
from ...errors import CheckpointError
from . import mlx_lm
from .factors import Adapter, Entry
from .files import CONFIG, AdapterFiles, open_files
from .peft_config import TRAINING, TRAINING_DEFAULTS
from .reading import adapter_of, is_peft

MODULES = {kind: ".".join(module) for module, kind in mlx_lm.MODULES.items()}  # attention.q -> self_attn.q_proj
TENSOR = re.compile(r".*layers\.(\d{1,4})\.([\w.]{1,120}?)\.lora_[abAB](\.[\w.]*)?", re.ASCII)
EXPERT = re.compile(r"\.\d+\b")
DATA_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".json", ".jinja", ".model")
MAX_FILES, MAX_FIELDS, MAX_TEXT = 1000, 50, 200


@dataclass(frozen=True)
class AdapterSummary:
    """What an adapter is, and which models it fits.

    kind: whose files they are, "PEFT", "Unsloth" (PEFT's files) or "mlx-lm". base_model: the model that it names; "" if
    it names none. ranks, scales: all that occur, ascending; the scale multiplies b @ a. alpha: lora_alpha; None for
    mlx-lm, which has none. rslora: whether the scale is alpha / sqrt(rank). targets: the layers by the changed module,
    such as self_attn.q_proj. parameters: values of all factors. size_bytes: of them in the file.
    unused_fields, unused_files: of the config and of the folder, those without effect here: settings of the training,
    other weights, a tokenizer.
    misfits: by the name of each model that was asked about, why the adapter cannot be used with it; None if it can.
    device_values: values of the factors on a device, as they are stacked there; None if it fits none of the models.
    Without one, ranks are what the config says and scales are unknown.
    """

    kind: str
    base_model: str
    ranks: tuple[int, ...]
    alpha: float | None
    scales: tuple[float, ...]
    rslora: bool
    targets: Mapping[str, tuple[int, ...]]
    parameters: int
    size_bytes: int
    unused_fields: tuple[str, ...]
    unused_files: tuple[str, ...]
    misfits: Mapping[str, str | None]
    device_values: int | None

    @property
    def fits(self) -> bool:
        """Whether it can be used with all models that were asked about."""
        return not any(self.misfits.values())


def summarize(folder: Path | str, models: Mapping[str, ModelConfig]) -> AdapterSummary:
    """The summary of the adapter in a folder. models: those to compare it with, by name.

    Raises CheckpointError for a folder that is no adapter, or whose files are damaged.
    """
    files = open_files(Path(folder))
    misfits: dict[str, str | None] = {}
    fitting: Adapter | None = None
    for name, model in models.items():
        try:
            found = adapter_of(files.of(model))
        except CheckpointError as error:
            misfits[name] = str(error)
        else:
            misfits[name], fitting = None, fitting or found
    config, tensors = files.config, files.file.header.tensors
    entries = () if fitting is None else tuple(fitting.entries.values())
    peft = is_peft(files)
    return AdapterSummary(
        kind="mlx-lm" if not peft else "Unsloth" if _by_unsloth(files) else "PEFT",
        base_model=_text(config.get("base_model_name_or_path", config.get("model"))),
        ranks=_ranks(files, entries, peft),
        alpha=_number(config.get("lora_alpha", 8)) if peft else None,
        scales=tuple(sorted({scale for entry in entries for scale in entry.scales or (entry.scale,)})),
        rslora=peft and config.get("use_rslora") is True,
        targets=_targets(tensors if fitting is None else fitting.entries),
        parameters=sum(info.count for info in tensors.values()),
        size_bytes=sum(info.nbytes for info in tensors.values()),
        unused_fields=_unused_fields(files, peft),
        unused_files=_unused_files(files),
        misfits=misfits,
        device_values=None if fitting is None else fitting.nbytes(1),
    )


def _by_unsloth(files: AdapterFiles) -> bool:
    """Unsloth marks the config of what it saves, and alone has fused modules per expert."""
    mapping = files.config.get("auto_mapping")
    marked = isinstance(mapping, Mapping) and mapping.get("unsloth_fixed")
    return bool(marked or files.config.get("unsloth_fixed")) or any(
        ".gate_up_projs." in name or ".down_projs." in name for name in files.file.header.tensors
    )


def _ranks(files: AdapterFiles, entries: Iterable[Entry], peft: bool) -> tuple[int, ...]:
    found = {entry.rank for entry in entries}
    if not found:
        given = files.config if peft else files.config.get("lora_parameters")
        rank = given.get("r" if peft else "rank") if isinstance(given, Mapping) else None
        found = {rank} if type(rank) is int else set()
    return tuple(sorted(found))


def _targets(names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The layers by module. names: of parameters, or of tensors, in which numbers of experts are left out."""
    layers: dict[str, set[int]] = defaultdict(set)
    for name in names:
        if match := TENSOR.fullmatch(name):
            layers[EXPERT.sub("", match[2])].add(int(match[1]))
        elif name.startswith("layers."):
            _, layer, kind = name.split(".", 2)
            layers[MODULES[kind]].add(int(layer))
    order = {module: place for place, module in enumerate(MODULES.values())}
    return {module: tuple(sorted(layers[module])) for module in sorted(layers, key=lambda m: (order.get(m, 99), m))}


def _unused_fields(files: AdapterFiles, peft: bool) -> tuple[str, ...]:
    config = files.config
    if peft:
        given = {name: config.get(name) for name in sorted(TRAINING)}
        names = [name for name, value in given.items() if value and value != TRAINING_DEFAULTS.get(name)]
    else:
        parameters = config.get("lora_parameters")
        dropout = isinstance(parameters, Mapping) and parameters.get("dropout")
        names = ["dropout"] * bool(dropout) + sorted(set(map(str, config)) - mlx_lm.SHOWN)
    return tuple(_text(name) for name in names[:MAX_FIELDS])


def _unused_files(files: AdapterFiles) -> tuple[str, ...]:
    """Other files with data; of a folder with very many files, only some are looked at."""
    with os.scandir(files.folder) as found:
        names = {entry.name for entry in islice(found, MAX_FILES) if entry.name.endswith(DATA_SUFFIXES)}
    return tuple(_text(name) for name in sorted(names - {CONFIG, files.file.path.name})[:MAX_FIELDS])


def _number(value: Any) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e6
    return value if usable else None


def _text(value: Any) -> str:
    """A text of a file as it can be shown: cut off, and without control characters."""
    if not isinstance(value, str):
        return ""
    value = value[:MAX_TEXT]
    return value if value.isprintable() else repr(value)[1:-1]
