"""Snapshots of the prefix cache in files, so that they outlast the process.

A folder for each model and way of computing (its fingerprint), a file for each span. A file is one line of JSON, which
says what the span is and what follows, and the snapshot's bytes. It is written under another name and renamed, and
checked when it is read: one that is cut short, changed or of something else is removed, and computed anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread
from time import time

from ..errors import GptOssError

MAX_BYTES = 16 << 30  # of all files of one fingerprint
MAX_HEADER_BYTES = 1 << 16  # bytes; a span of 256 ids takes 2 kB
MAX_UNWRITTEN = 16  # snapshots that may wait for the disk before the engine does
SUFFIX, TEMP_SUFFIX = ".kv", ".part"
STALE_S = 3600.0  # after which nobody finishes an unfinished file

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredSpan:
    """One file. name: a digest of the fingerprint and all tokens up to `end`; parent: that of the span before, None for
    the first. last_used: when it was last read or written, seconds since the epoch."""

    name: str
    parent: str | None
    span: tuple[int, ...]
    end: int
    nbytes: int
    last_used: float = 0.0


class PrefixFiles:
    """The files of one fingerprint. Raises GptOssError for a folder that cannot be used.

    Written on a thread of its own; a disk that is full or gone ends the writing, with a warning, and nothing else.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._folder = folder / hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
        self._fingerprint = fingerprint
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
        except OSError as error:
            raise GptOssError(
                f"the prompt cache cannot be kept in {folder}: {error.strerror}; name another folder"
            ) from error
        self._queue: Queue[Callable[[], None] | None] = Queue(MAX_UNWRITTEN)
        self._unwritten: dict[str, bytes] = {}  # by name, what is not written yet
        self._write_failed = False
        self._writer: Thread | None = None

    def scan(self) -> list[StoredSpan]:
        """What earlier processes left. Files that are not whole are removed."""
        found = []
        for path in self._folder.glob(f"*{SUFFIX}"):
            stored = self._read_header(path)
            if stored is None:
                path.unlink(missing_ok=True)
                continue
            found.append(stored)
            self.nbytes += stored.nbytes
        for path in self._folder.glob(f"*{TEMP_SUFFIX}"):
            if time() - path.lstat().st_mtime > STALE_S:
                path.unlink(missing_ok=True)
        return found

    def write(self, parent: StoredSpan | None, span: tuple[int, ...], end: int, data: bytes) -> StoredSpan | None:
        """Write a snapshot soon. None if the disk has failed before."""
        if self._write_failed:
            return None
        before = None if parent is None else parent.name
        name = self._span_name(before, span)
        line = {"parent": before, "span": span, "end": end, "bytes": len(data), "sha256": _digest(data)}
        header = json.dumps(line).encode() + b"\n"
        stored = StoredSpan(name, before, span, end, len(header) + len(data))
        self.nbytes += stored.nbytes
        self._unwritten[name] = data
        self._enqueue(lambda: self._write(name, header, data))
        return stored

    def read(self, stored: StoredSpan) -> bytes | None:
        """The snapshot's bytes; None if its file is gone or not what it was."""
        if (data := self._unwritten.get(stored.name)) is not None:
            return data
        try:
            with self._path(stored.name).open("rb") as file:
                line = json.loads(file.readline(MAX_HEADER_BYTES))
                data = file.read()
            if _digest(data) != line["sha256"]:
                raise ValueError("its bytes have changed")
            os.utime(file.name)
            return data
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            _log.warning("a file of the prompt cache was dropped: %s", error)
            return None

    def remove(self, stored: StoredSpan) -> None:
        self.nbytes -= stored.nbytes
        self._enqueue(lambda: self._path(stored.name).unlink(missing_ok=True))

    def close(self) -> None:
        """Wait until everything is written."""
        if self._writer is not None:
            self._queue.put(None)
            self._writer.join()

    def _enqueue(self, job: Callable[[], None]) -> None:
        if self._writer is None:
            self._writer = Thread(target=self._run_writer, name="mlx-gptoss prompt cache", daemon=True)
            self._writer.start()
        self._queue.put(job)

    def _run_writer(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                job()
            except OSError as error:
                if not self._write_failed:
                    _log.warning("the prompt cache is no longer written to disk: %s", error.strerror)
                self._write_failed = True

    def _write(self, name: str, header: bytes, data: bytes) -> None:
        try:
            if not self._write_failed:
                self._write_atomically(name, header, data)
        finally:
            self._unwritten.pop(name, None)

    def _write_atomically(self, name: str, header: bytes, data: bytes) -> None:
        handle, written = tempfile.mkstemp(TEMP_SUFFIX, dir=self._folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(header)
                file.write(data)
            Path(written).replace(self._path(name))
        except BaseException:
            Path(written).unlink(missing_ok=True)
            raise

    def _read_header(self, path: Path) -> StoredSpan | None:
        """What a file says it is, if its name and size agree."""
        try:
            state = path.lstat()
            with path.open("rb") as file:
                text = file.readline(MAX_HEADER_BYTES)
            line = json.loads(text)
            span, parent = tuple(int(i) for i in line["span"]), line["parent"]
            stored = StoredSpan(path.stem, parent, span, int(line["end"]), state.st_size, state.st_mtime)
            whole = state.st_size == len(text) + int(line["bytes"]) and stored.end >= len(span) > 0
            return stored if whole and path.stem == self._span_name(parent, span) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{SUFFIX}"

    def _span_name(self, parent: str | None, span: tuple[int, ...]) -> str:
        return _digest(repr((self._fingerprint, parent, span)).encode())[:40]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
