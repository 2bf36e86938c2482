"""The workspace of a conversion: a hidden folder next to the destination, which makes interrupted runs resumable.

    .NAME.partial/
        journal       JSON lines: first the identity of the conversion, then one line per complete shard
        checkpoint/   the result as it grows; renamed to the destination when it is complete
        calibration/  a folder for each part of the network whose codes are chosen (calibration/store.py)
        old/          the checkpoint that is being replaced, between the two renames

The same conversion, started again, continues after the complete shards and parts; another conversion clears the folder.
The folder stays only if it has a complete shard or part. The process that uses it holds a lock on the journal.
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
from .writer import WrittenRange

_JOURNAL, _RESULT, _CALIBRATION, _OLD = "journal", "checkpoint", "calibration", "old"


@contextlib.contextmanager
def open_workspace(target: Path, identity: Mapping[str, Any]) -> Iterator[Workspace]:
    """The workspace of a conversion to `target`. On leaving, it is removed unless an interruption left complete shards.

    identity: everything that the bytes of the result depend on, as JSON.
    A failed write becomes a GptOssError. Its message, and that of a KeyboardInterrupt, say what was kept. After a
    CheckpointError nothing is kept, because the same command would fail again.
    """
    workspace: Workspace | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        workspace = Workspace(target)
        workspace.resume(identity)
        yield workspace
        workspace.remove()
    except CheckpointError:
        if workspace:
            workspace.remove()
        raise
    except OSError as error:
        kept = workspace.suspend() if workspace else "nothing was kept"
        raise GptOssError(f"{target} could not be written ({error.strerror or error}); {kept}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(workspace.suspend() if workspace else "nothing was kept") from None
    except BaseException:
        if workspace:
            workspace.suspend()
        raise


class Workspace:
    """The locked folder of one conversion.

    folder: where the result grows. calibration: where a calibration keeps what it has finished: a folder for each part,
    whose name ends in ".unfinished" until then. complete_shards: file name -> the ranges it was written in
    (writer.Journal).
    """

    def __init__(self, target: Path) -> None:
        """Create the folder if necessary and lock it.

        Raises GptOssError if another process holds the lock, or if something else has the folder's name.
        """
        self._target = target
        self._root = _root_of(target)
        self.folder: Path = self._root / _RESULT
        self.calibration: Path = self._root / _CALIBRATION
        self._file = _lock(self._root, target)
        self._append_lock = Lock()
        self.complete_shards: dict[str, Sequence[WrittenRange]] = {}

    def resume(self, identity: Mapping[str, Any]) -> None:
        """Take over the complete shards of a run with the same identity; remove everything else."""
        with os.fdopen(os.dup(self._file), "rb") as file:
            lines = file.read().splitlines(keepends=True)
        if lines and _parse_line(lines[0]) == identity:
            self._read_entries(lines)
        else:
            os.truncate(self._file, 0)
            if self.calibration.exists():
                shutil.rmtree(self.calibration)
            self._append(identity)
        self._remove_incomplete()
        self.folder.mkdir(exist_ok=True)

    def record_shard(self, name: str, ranges: Sequence[WrittenRange]) -> None:
        """Record that a shard is complete and on the disk. From any thread."""
        with self._append_lock:
            sync_folder(self.folder)
            self._append({"shard": name, "ranges": ranges})
            self.complete_shards[name] = ranges

    def install(self) -> None:
        """Rename the finished result to the destination.

        A checkpoint that was there is moved away first, and comes back if the rename fails.
        """
        sync_folder(self.folder)
        old = self._root / _OLD
        is_replacing = self._target.exists()
        if is_replacing:
            self._target.rename(old)
        try:
            self.folder.rename(self._target)
        except BaseException:
            if is_replacing:
                old.rename(self._target)
            raise
        sync_folder(self._target.parent)

    def suspend(self) -> str:
        """After a failure: remove incomplete files, or the whole folder if no shard or calibrated part is complete.

        Returns what to tell the user.
        """
        self._remove_incomplete()
        count, what = len(self.complete_shards), "complete shard"
        if not count:
            count, what = self._calibrated_parts(), "calibrated part"
        if not count:
            self.remove()
            return "nothing was kept"
        self._unlock()
        return f"the same command continues after the {count} {what}{'s' * (count > 1)} kept in {self._root}"

    def _calibrated_parts(self) -> int:
        folders = self.calibration.iterdir() if self.calibration.is_dir() else ()
        return sum(path.is_dir() and path.suffix != ".unfinished" for path in folders)

    def remove(self) -> None:
        """Remove the folder with everything in it."""
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

    def _read_entries(self, lines: Sequence[bytes]) -> None:
        """Take over the shards recorded up to the first malformed line, and truncate the journal there."""
        end = len(lines[0])
        for line in lines[1:]:
            entry = _parse_line(line)
            if not isinstance(entry, dict) or not _is_shard_entry(entry):
                break
            ranges = [(offset, length, checksum) for offset, length, checksum in entry["ranges"]]
            self.complete_shards[entry["shard"]] = ranges
            end += len(line)
        os.truncate(self._file, end)

    def _remove_incomplete(self) -> None:
        """Remove all files except complete shards, and forget shards whose files are gone."""
        found = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        for name in found - set(self.complete_shards):
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.complete_shards = {name: ranges for name, ranges in self.complete_shards.items() if name in found}
        recover(self._target)
        if (self._root / _OLD).exists():
            shutil.rmtree(self._root / _OLD)


def recover(target: Path) -> None:
    """Put the old checkpoint back if a process was killed between moving it away and installing the new one."""
    old = _root_of(target) / _OLD
    if old.is_dir() and not target.exists():
        old.rename(target)


def _root_of(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


def _lock(root: Path, target: Path) -> int:
    """Create the folder and its journal if necessary, and lock the journal; returns its descriptor.

    Raises GptOssError if the folder was not made by this module, or if another process holds the lock.
    """
    if root.is_symlink() or (root.exists() and not _is_workspace(root)):
        raise GptOssError(f"{root} is in the way and was not made by a conversion; remove or rename it")
    root.mkdir(exist_ok=True)
    file = os.open(root / _JOURNAL, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A process that has just finished may have removed the journal between the two calls.
        if os.path.samestat(os.fstat(file), os.stat(root / _JOURNAL)):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    raise GptOssError(f"another process is writing {target}; wait for it, or choose another destination")


def _is_workspace(root: Path) -> bool:
    return root.is_dir() and ((root / _JOURNAL).is_file() or not any(root.iterdir()))


def _is_shard_entry(entry: Mapping[str, Any]) -> bool:
    ranges = entry.get("ranges")
    return (
        isinstance(entry.get("shard"), str)
        and isinstance(ranges, list)
        and all(isinstance(item, list) and len(item) == 3 and all(type(x) is int for x in item) for item in ranges)
    )


def _parse_line(line: bytes) -> Any:
    """The JSON value of a line; None if it is incomplete or malformed."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
