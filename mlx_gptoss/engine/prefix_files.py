"""Snapshots of the prefix cache in files, so that they outlast the process.

One folder per fingerprint (a model and how it is computed), one file per chunk of a prompt. A file is a header, one
line of JSON, followed by the packed snapshot. It is written under a temporary name and renamed, and verified when it
is read: a truncated, changed or foreign file is removed and its chunk computed again.
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

MAX_BYTES = 16 << 30  # all files of one fingerprint
MAX_HEADER_BYTES = 1 << 16  # a chunk of 256 ids takes 2 kB
MAX_PENDING_JOBS = 16  # writes and removals that may wait for the disk before the engine has to
SUFFIX, TEMP_SUFFIX = ".kv", ".part"
STALE_S = 3600.0  # an older temporary file has been abandoned

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredSpan:
    """One file.

    name: digest of the fingerprint and all tokens up to `end`. parent: name of the previous chunk; None for the first.
    span: the chunk's tokens. end: position in the prompt where it ends. nbytes: size of the file.
    last_used: when it was last read or written, in seconds since the epoch.
    """

    name: str
    parent: str | None
    span: tuple[int, ...]
    end: int
    nbytes: int
    last_used: float = 0.0


class PrefixFiles:
    """The files of one fingerprint.

    folder: parent of the fingerprint's own folder. Raises GptOssError if it is not writable.
    max_bytes: total size; beyond it the prefix cache removes the least recently used files.
    nbytes: total size now.

    A background thread writes the files. If the disk is full or fails, writing ends with a warning in the log, and
    everything else goes on.
    """

    def __init__(self, folder: Path, fingerprint: str, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.nbytes: int = 0
        self._folder = folder / hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
        self._fingerprint = fingerprint
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
        except OSError as error:
            raise GptOssError(
                f"cannot write the prompt cache to {folder}: {error.strerror}; choose another folder"
            ) from error
        self._queue: Queue[Callable[[], None] | None] = Queue(MAX_PENDING_JOBS)
        self._unwritten: dict[str, bytes] = {}  # name -> packed snapshot that is not on disk yet
        self._write_failed = False
        self._writer: Thread | None = None

    def scan(self) -> list[StoredSpan]:
        """The files that earlier processes wrote. Incomplete files are removed."""
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
        """Queue a packed snapshot for writing. Returns its file, or None if writing has failed before.

        parent: the previous chunk's file; None for the first chunk.
        """
        if self._write_failed:
            return None
        parent_name = None if parent is None else parent.name
        name = self._span_name(parent_name, span)
        fields = {"parent": parent_name, "span": span, "end": end, "bytes": len(data), "sha256": _digest(data)}
        header = json.dumps(fields).encode() + b"\n"
        stored = StoredSpan(name, parent_name, span, end, len(header) + len(data))
        self.nbytes += stored.nbytes
        self._unwritten[name] = data
        self._enqueue(lambda: self._write(name, header, data))
        return stored

    def read(self, stored: StoredSpan) -> bytes | None:
        """The packed snapshot; None if its file is missing or has changed."""
        if (data := self._unwritten.get(stored.name)) is not None:
            return data
        try:
            with self._path(stored.name).open("rb") as file:
                header = json.loads(file.readline(MAX_HEADER_BYTES))
                data = file.read()
            if _digest(data) != header["sha256"]:
                raise ValueError("its checksum does not match")
            os.utime(file.name)
            return data
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            _log.warning("dropped a damaged file of the prompt cache: %s", error)
            return None

    def remove(self, stored: StoredSpan) -> None:
        """Queue a file for removal."""
        self.nbytes -= stored.nbytes
        self._enqueue(lambda: self._path(stored.name).unlink(missing_ok=True))

    def close(self) -> None:
        """Wait until everything queued has been written."""
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
        """The chunk that a file's header describes; None if its name or size does not match."""
        try:
            state = path.lstat()
            with path.open("rb") as file:
                text = file.readline(MAX_HEADER_BYTES)
            header = json.loads(text)
            span, parent = tuple(int(i) for i in header["span"]), header["parent"]
            stored = StoredSpan(path.stem, parent, span, int(header["end"]), state.st_size, state.st_mtime)
            whole = state.st_size == len(text) + int(header["bytes"]) and stored.end >= len(span) > 0
            return stored if whole and path.stem == self._span_name(parent, span) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{SUFFIX}"

    def _span_name(self, parent: str | None, span: tuple[int, ...]) -> str:
        return _digest(repr((self._fingerprint, parent, span)).encode())[:40]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
