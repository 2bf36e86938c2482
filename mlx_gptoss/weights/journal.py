"""Where a conversion grows, and what an interrupted one leaves for the next: a hidden folder beside the destination.

    .NAME.partial/
        journal       JSON lines: first what is made of what, then each shard that is whole and on the disk
        checkpoint/   the result as it grows; renamed to the destination when it is complete
        old/          what is being replaced, between the two renames

The same conversion, started again, takes up after the whole shards; another one clears the folder. It is kept only if
there is a whole shard, and a process that has it holds a lock on the journal.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from ..errors import CheckpointError, GptOssError
from ..machine import sync_folder
from .writer import Run

_JOURNAL, _RESULT, _OLD = "journal", "checkpoint", "old"


class Workspace:
    """The folder while it is locked. `folder` is where the result grows; see the module for the rest."""

    def __init__(self, target: Path) -> None:
        """Raises GptOssError if something else has the folder's name, or another process the folder."""
        self._target = target
        self._root = _root_of(target)
        self.folder = self._root / _RESULT
        self._file = _lock(self._root, target)
        self._notes_lock = Lock()
        self.whole: dict[str, Sequence[Run]] = {}

    def open(self, identity: Mapping[str, Any]) -> None:
        """Take over the whole shards of the same identity, and clear away the rest. identity: all that the bytes of the
        result depend on, as JSON."""
        with os.fdopen(os.dup(self._file), "rb") as file:
            lines = file.read().splitlines(keepends=True)
        if lines and _parsed(lines[0]) == identity:
            self._read_notes(lines)
        else:
            os.truncate(self._file, 0)
            self._append(identity)
        self._remove_unfinished()
        self.folder.mkdir(exist_ok=True)

    def note(self, shard: str, runs: Sequence[Run]) -> None:
        """Write down that a shard is whole and on the disk."""
        with self._notes_lock:
            sync_folder(self.folder)
            self._append({"shard": shard, "runs": runs})
            self.whole[shard] = runs

    def install(self) -> None:
        """Rename the finished result into place; what was there before goes last, or comes back."""
        sync_folder(self.folder)
        old = self._root / _OLD
        replaced = self._target.exists()
        if replaced:
            self._target.rename(old)
        try:
            self.folder.rename(self._target)
        except BaseException:
            if replaced:
                old.rename(self._target)
            raise
        sync_folder(self._target.parent)

    def leave(self) -> str:
        """After a failure: remove what is not whole, or everything if nothing is; returns what to tell the user."""
        self._remove_unfinished()
        if not self.whole:
            self.remove()
            return "nothing of it was left behind"
        self._unlock()
        count = f"{len(self.whole)} whole shard{'s' if len(self.whole) > 1 else ''}"
        return f"the same command continues after the {count} kept in {self._root}"

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        recover(self._target)
        if self._root.exists():
            shutil.rmtree(self._root)
        self._unlock()

    def _unlock(self) -> None:
        os.close(self._file)

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = memoryview(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        os.lseek(self._file, 0, os.SEEK_END)
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)

    def _read_notes(self, lines: Sequence[bytes]) -> None:
        """Take over the shards noted, up to the first line that is not whole itself."""
        at = len(lines[0])
        for line in lines[1:]:
            note = _parsed(line)
            if not isinstance(note, dict) or not _is_note(note):
                break
            self.whole[note["shard"]] = [(offset, length, checksum) for offset, length, checksum in note["runs"]]
            at += len(line)
        os.truncate(self._file, at)

    def _remove_unfinished(self) -> None:
        """Remove all files but whole shards, and the notes of shards that are gone."""
        found = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        for name in found - set(self.whole):
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.whole = {name: runs for name, runs in self.whole.items() if name in found}
        recover(self._target)
        if (self._root / _OLD).exists():
            shutil.rmtree(self._root / _OLD)


@contextlib.contextmanager
def workspace(target: Path, identity: Mapping[str, Any]) -> Iterator[Workspace]:
    """The workspace of a conversion to `target`; gone afterwards, unless an interruption left whole shards in it.

    A failed write becomes a GptOssError, and it and KeyboardInterrupt say what was left. After a CheckpointError, which
    the same command would meet again, nothing is.
    """
    space: Workspace | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        space = Workspace(target)
        space.open(identity)
        yield space
        space.remove()
    except CheckpointError:
        if space:
            space.remove()
        raise
    except OSError as error:
        left = space.leave() if space else "nothing of it was left behind"
        raise GptOssError(f"{target} could not be written ({error.strerror or error}); {left}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(space.leave() if space else "nothing was written") from None
    except BaseException:
        if space:
            space.leave()
        raise


def recover(target: Path) -> None:
    """Put back what a process was about to replace when it was killed between two renames."""
    old = _root_of(target) / _OLD
    if old.is_dir() and not target.exists():
        old.rename(target)


def _root_of(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


def _lock(root: Path, target: Path) -> int:
    """The journal's file descriptor, locked. The folder is made, or is one that this module made."""
    if root.is_symlink() or (root.exists() and not _is_ours(root)):
        raise GptOssError(f"{root} is in the way and is not what a conversion left there; remove or rename it")
    root.mkdir(exist_ok=True)
    file = os.open(root / _JOURNAL, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file), os.stat(root / _JOURNAL)):  # not that of a process that has just finished
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    raise GptOssError(f"another process is writing {target}; wait for it, or choose another destination")


def _is_ours(root: Path) -> bool:
    return root.is_dir() and ((root / _JOURNAL).is_file() or not any(root.iterdir()))


def _is_note(note: Mapping[str, Any]) -> bool:
    runs = note.get("runs")
    return (
        isinstance(note.get("shard"), str)
        and isinstance(runs, list)
        and all(isinstance(run, list) and len(run) == 3 and all(type(x) is int for x in run) for run in runs)
    )


def _parsed(line: bytes) -> Any:
    """A line's JSON; None if it is not whole."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
