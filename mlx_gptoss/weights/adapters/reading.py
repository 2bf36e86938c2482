"""Open an adapter, whichever tool has made it."""

from __future__ import annotations

from pathlib import Path

from ...config import ModelConfig
from ...errors import CheckpointError
from . import mlx_lm, peft
from .factors import Adapter
from .files import CONFIG, digest_of, open_files


def open_adapter(folder: Path | str, config: ModelConfig, name: str | None = None) -> Adapter:
    """The adapter in a folder, for the model with this config. name: for messages; None is the folder's.

    Headers and names are checked; values are read when a backend loads them, but for the digest.
    Raises CheckpointError for files that are incomplete, for another model, or have what is not LoRA.
    """
    folder = Path(folder)
    files = open_files(folder, config)
    if "peft_type" in files.config:
        entries = peft.entries_of(files)
    elif "lora_parameters" in files.config or "fine_tune_type" in files.config:
        entries = mlx_lm.entries_of(files)
    else:
        raise CheckpointError(
            f"{folder / CONFIG} has neither PEFT's peft_type nor mlx-lm's lora_parameters; save the adapter with one "
            "of them"
        )
    if not entries:
        raise CheckpointError(f"{folder} has no tensors, so it would change nothing; save the adapter again")
    outputs = {name: param.shape[-2] for name, param in files.params.items()}
    return Adapter(config, name or folder.resolve().name, entries, outputs, digest_of(files.file, entries))
