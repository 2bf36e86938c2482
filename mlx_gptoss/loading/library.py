"""The models on this machine: the bundled one, those in the hub's cache and in the folders of MLX_GPTOSS_HOME."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    found: dict[str, InstalledModel] = {}
    for model in _candidates():
        if model.name not in found and _opened(model) is not None:
            found[model.name] = model
    return list(found.values())


def model_facts(backend: str = "auto") -> list[ModelFacts]:
    """The installed models with their sizes, and whether each fits into the memory of the backend's device."""
    module, name = find_backend(backend)
    found: list[ModelFacts] = []
    for model in _candidates():
        with _unread(_read_when_used(model.path)) as used_at:
            checkpoint = _opened(model)
            if checkpoint is None or model.name in {facts.name for facts in found}:
                continue
            found.append(
                ModelFacts(
                    name=NANO_ALIAS if model.place == "bundled" else model.name,
                    path=model.path,
                    place=model.place,
                    format=checkpoint.format,
                    parameters=sum(param.size for param in checkpoint.params),
                    size_bytes=_size(model.path) if model.size_bytes is None else model.size_bytes,
                    used_at=used_at,
                    memory=memory_plan(checkpoint, module, as_stored=name == "mlx"),
                )
            )
    return found


def _read_when_used(path: Path) -> Path:
    """A file that loading a model reads: its tokenizer, or else its only file."""
    tokenizer = path / "tokenizer.json"
    return tokenizer if tokenizer.exists() else path


@contextmanager
def _unread(file: Path) -> Iterator[float]:
    """Gives the time when the file was last read, and keeps it whatever is read of it now: listing is no use."""
    before = file.stat()
    try:
        yield before.st_atime
    finally:
        with suppress(OSError):  # it belongs to another user
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def model_names() -> list[str]:
    """The names that a --model option takes, of all models on this machine. Opens no checkpoint."""
    names = (model.name for model in _candidates() if model.place != "bundled")
    return list(dict.fromkeys([NANO_ALIAS, *names]))


def _opened(model: InstalledModel) -> Checkpoint | None:
    """The checkpoint; None if it cannot be opened."""
    try:
        return checkpoints.open(model.path)
    except CheckpointError:
        return None


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
