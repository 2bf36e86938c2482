"""The models on this machine: the bundled one, those in the hub's cache and in the folders of MLX_GPTOSS_HOME."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..backends import find_backend
from ..errors import CheckpointError
from ..weights import checkpoint as checkpoints
from ..weights.checkpoint import Checkpoint
from . import hub
from .hub import HOME_VARIABLE, NANO, NANO_ALIAS, NANO_NAME
from .memory import MemoryPlan
from .plan import memory_plan

__all__ = ["HOME_VARIABLE", "NANO", "NANO_ALIAS", "NANO_NAME", "InstalledModel", "ModelFacts", "installed_models"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InstalledModel:
    """A model on this machine.

    name: a hub id, the name of a folder or file, or NANO_NAME. path: its folder or .gguf file. place: where it was
    found. size_bytes: on the disk, all revisions of a repository together; None is the size of what is at `path`.
    """

    name: str
    path: Path
    place: Literal["bundled", "folder", "cache"] = "folder"
    size_bytes: int | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What `list` shows of a model. name: what a --model option takes. used_at: when its tokenizer was last read,
    which is when the model was loaded, in seconds since 1970. File systems keep that time about to a day, some not at
    all."""

    name: str
    path: Path
    place: str
    format: str
    parameters: int
    size_bytes: int
    used_at: float
    memory: MemoryPlan


def installed_models() -> list[InstalledModel]:
    """The models on this machine that can be opened, the bundled one first, each name once.

    Reads the headers of what may be a model and leaves out all else, such as models of other architectures.
    """
    return [model for model, _ in _open_models()]


def model_facts(backend: str = "auto") -> list[ModelFacts]:
    """The installed models with their sizes, and whether each fits into the memory of the backend's device."""
    module, name = find_backend(backend)
    found = []
    for model, checkpoint in _open_models():
        read_at = model.path if model.path.is_file() else checkpoint.tokenizer_folder / "tokenizer.json"
        found.append(
            ModelFacts(
                name=NANO_ALIAS if model.place == "bundled" else model.name,
                path=model.path,
                place=model.place,
                format=checkpoint.format,
                parameters=sum(param.size for param in checkpoint.params),
                size_bytes=_size(model.path) if model.size_bytes is None else model.size_bytes,
                used_at=(read_at if read_at.exists() else model.path).stat().st_atime,
                memory=memory_plan(checkpoint, module, as_stored=name == "mlx"),
            )
        )
    return found


def model_names() -> list[str]:
    """The names that a --model option takes, of all models on this machine. Opens no checkpoint."""
    names = (model.name for model in _candidates() if model.place != "bundled")
    return list(dict.fromkeys([NANO_ALIAS, *names]))


def _open_models() -> Iterator[tuple[InstalledModel, Checkpoint]]:
    names = set()
    for model in _candidates():
        if model.name not in names:
            try:
                checkpoint = checkpoints.open(model.path)
            except CheckpointError:
                continue
            names.add(model.name)
            yield model, checkpoint


def _candidates() -> Iterator[InstalledModel]:
    yield InstalledModel(NANO_NAME, NANO, "bundled")
    yield from _in_folders()
    for repo in hub.cached_repositories():
        yield InstalledModel(repo.name, repo.path, "cache", repo.size_bytes)


def _in_folders() -> Iterator[InstalledModel]:
    """What may be a model in the folders of MLX_GPTOSS_HOME: folders and .gguf files."""
    for folder in hub.home_folders():
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            _log.warning("%s of %s cannot be read: %s", folder, HOME_VARIABLE, error.strerror)
            continue
        for entry in entries:
            if (entry / "config.json").is_file() or entry.suffix == ".gguf":
                yield InstalledModel(entry.name, entry)


def _size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
