"""Open an adapter, whichever tool has made it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...config import ModelConfig
from ...errors import CheckpointError
from . import mlx_lm, peft
from .factors import Adapter
from .files import CONFIG, AdapterFiles, digest_of, open_files


def open_adapter(folder: Path | str, config: ModelConfig, name: str | None = None) -> Adapter:
    """The adapter in a folder, for the model with this config. name: for messages; None is the folder's.

    Headers and names are checked; values are read when a backend loads them, but for the digest.
    Raises CheckpointError for files that are incomplete, for another model, or have what is not LoRA.
    """
    files = open_files(Path(folder)).of(config)
    adapter = adapter_of(files, name)
    return replace(adapter, digest=digest_of(files.file, adapter.entries))


def check_adapter(folder: Path, config: ModelConfig) -> None:
    """Raise what open_adapter() would raise, by the headers alone."""
    adapter_of(open_files(folder).of(config))


def adapter_of(files: AdapterFiles, name: str | None = None) -> Adapter:
    """open_adapter() of opened files, without the digest, for which the whole file would be read."""
    entries = peft.entries_of(files) if is_peft(files) else mlx_lm.entries_of(files)
    if not entries:
        raise CheckpointError(f"{files.folder} has no tensors, so it would change nothing; save the adapter again")
    outputs = {param: shape.shape[-2] for param, shape in files.params.items()}
    return Adapter(files.model, name or files.folder.resolve().name, entries, outputs, "")


def is_peft(files: AdapterFiles) -> bool:
    """Whether PEFT has written the config, and not mlx-lm. Raises CheckpointError if neither has."""
    if "peft_type" in files.config:
        return True
    if "lora_parameters" in files.config or "fine_tune_type" in files.config:
        return False
    raise CheckpointError(
        f"{files.folder / CONFIG} has neither PEFT's peft_type nor mlx-lm's lora_parameters; save the adapter with one "
        "of them"
    )
