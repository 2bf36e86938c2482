"""The models on this machine: the bundled one, those in the hub's cache and in the folders of MLX_GPTOSS_HOME."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..weights import checkpoint as checkpoints
from . import hub
from .plan import NANO, NANO_ALIAS

HOME_VARIABLE = "MLX_GPTOSS_HOME"
NANO_NAME = "mlx-gptoss-nano"

__all__ = ["NANO", "NANO_ALIAS", "NANO_NAME", "InstalledModel", "installed_models"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InstalledModel:
    """A model on this machine.

    name: a hub id, the name of a folder or file, or NANO_NAME. path: its folder or .gguf file.
    """

    name: str
    path: Path


def installed_models() -> list[InstalledModel]:
    """The models on this machine that can be opened, the bundled one first, each name once.

    Reads the headers of what may be a model and leaves out all else, such as models of other architectures.
    """
    found: dict[str, InstalledModel] = {}
    cached = (InstalledModel(repo, path) for repo, path in hub.cached_repositories())
    for model in (InstalledModel(NANO_NAME, NANO), *_in_folders(), *cached):
        if model.name not in found and _opens(model.path):
            found[model.name] = model
    return list(found.values())


def _in_folders() -> Iterator[InstalledModel]:
    """What may be a model in the folders of MLX_GPTOSS_HOME, which os.pathsep divides: folders and .gguf files."""
    for name in filter(None, os.environ.get(HOME_VARIABLE, "").split(os.pathsep)):
        try:
            entries = sorted(Path(name).expanduser().iterdir())
        except OSError as error:
            _log.warning("%s of %s cannot be read: %s", name, HOME_VARIABLE, error.strerror)
            continue
        for entry in entries:
            if (entry / "config.json").is_file() or entry.suffix == ".gguf":
                yield InstalledModel(entry.name, entry)


def _opens(path: Path) -> bool:
    try:
        checkpoints.open(path)
    except CheckpointError:
        return False
    return True
