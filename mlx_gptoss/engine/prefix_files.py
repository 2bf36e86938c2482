"""The folder of the prefix cache's files, so that snapshots outlast the process.

One folder per fingerprint (a model and how it is computed), one file per chunk of a prompt (span_file.py). Several
processes may use a folder at the same time. Each one looks regularly for what the others have written and removed, so
together they keep to the size limit and share what is in it.

A file that is truncated, changed, foreign or cannot be read is a cache miss. No error of the disk reaches the engine,
and the engine never waits for a write, and READ_TIMEOUT_S at most for a read: a background thread writes and removes,
another one reads. Errors are logged, one a minute.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from time import monotonic, time

from ..errors import GptOssError
from . import span_file
from .span_file import MAX_HEADER_BYTES, SUFFIX, TEMP_SUFFIX, Damaged, StoredSpan

MAX_BYTES = 16 << 30  # all files of one fingerprint
MAX_PENDING_WRITES = 16  # snapshots that may wait for the disk; they are held in memory
RESCAN_SHARE = 16  # look for the files of other processes after writing 1/16 of the maximum
RESCAN_S = 30.0  # and at a write after this time
STALE_S = 3600.0  # an older temporary file, or one whose previous chunk is missing, has been abandoned
PAUSE_S = 60.0  # how long nothing is written after the disk was full or failed
WARN_INTERVAL_S = 60.0
READ_TIMEOUT_S = 2.0  # a disk may have to spin up, and a network's may be gone; computing the prompt is faster then
CLOSE_TIMEOUT_S = 30.0  # how long close() waits for a disk that does not answer

# Errors of the machine's state rather than of the folder that the user chose.
_TEMPORARY = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENOMEM}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Changes:
    """What others have done to the folder. added: files of other processes. missing: own files that are gone, or could
    not be written."""

    added: list[StoredSpan]
    missing: list[StoredSpan]


class PrefixFiles:
    """The files of one fingerprint.

    folder: parent of the fingerprint's own folder. Raises GptOssError if it is not writable.
    max_bytes: total size; beyond it the prefix cache removes the least recently used files.
    nbytes: total size now, of the files in `known`.
    known: the files that the prefix cache has nodes for, by name.

    Everything but the background thread's own methods is called on the engine thread. If the disk is full or fails,
    nothing is written for PAUSE_S.
    """

    def __init__(self, folder: Path, fingerprint: str, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.nbytes: int = 0
        self.known: dict[str, StoredSpan] = {}
        self._folder = folder / hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
        self._fingerprint = fingerprint
        self._warnings = _Warnings()
        self._paused_until = 0.0  # by monotonic()
        self._require_writable(folder)
        self._jobs: SimpleQueue[tuple[StoredSpan, bytes | None] | None] = SimpleQueue()  # None as bytes: remove it
        self._unwritten: dict[str, bytes] = {}  # name -> packed snapshot that is not on disk yet
        self._removing: Counter[str] = Counter()  # names whose removal is queued
        self._changes: SimpleQueue[Changes] = SimpleQueue()
        self._written_bytes = 0  # since the last rescan
        self._scanned_at = monotonic()
        self._writer: Thread | None = None
        self._reader = _Reader()

    def _require_writable(self, folder: Path) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
        except OSError as error:
            if error.errno in _TEMPORARY:
                self._pause(error)
                return
            raise GptOssError(
                f"cannot write the prompt cache to {folder}: {error.strerror}; choose another folder"
            ) from error

    def scan(self) -> list[StoredSpan]:
        """The files that earlier processes wrote; they are `known` from now on. Damaged files are removed."""
        found = [stored for name in self._names() if (stored := self._read_header(name)) is not None]
        for stored in found:
            self.add(stored)
        return found

    def add(self, stored: StoredSpan) -> None:
        """Count a file that another process wrote."""
        self.known[stored.name] = stored
        self.nbytes += stored.nbytes

    def forget(self, stored: StoredSpan) -> None:
        """Count a file no longer, without removing it."""
        if self.known.pop(stored.name, None) is not None:
            self.nbytes -= stored.nbytes

    @property
    def accepts_writes(self) -> bool:
        """Whether write() would queue a snapshot: not while many wait for the disk, or it has just failed."""
        return len(self._unwritten) < MAX_PENDING_WRITES and monotonic() >= self._paused_until

    def has_room(self, nbytes: int) -> bool:
        """Whether a file of about this size can be added without removing others."""
        return self.nbytes + nbytes + MAX_HEADER_BYTES <= self.max_bytes

    def write(self, parent: str | None, span: tuple[int, ...], end: int, data: bytes) -> StoredSpan | None:
        """Queue a packed snapshot for writing. Returns its file, or None if it is not accepted.

        parent: the name of the previous chunk's file; of the first chunk, the adapter's digest or None.
        """
        if not self.accepts_writes or not self._start_writer():
            return None
        stored = span_file.describe(self._fingerprint, parent, span, end, len(data))
        self.add(stored)
        self._unwritten[stored.name] = data
        self._jobs.put((stored, data))
        return stored

    def read(self, stored: StoredSpan) -> bytes | None:
        """The packed snapshot; None if its file cannot be read now. Raises Damaged if it never will: the file is
        missing or has changed."""
        if (data := self._unwritten.get(stored.name)) is not None:
            return data
        try:
            return self._reader.read(self._folder, stored)
        except FileNotFoundError:
            raise Damaged("has been removed") from None
        except (OSError, MemoryError, RuntimeError) as error:
            self._warn(f"a file of the prompt cache cannot be read, so its prompt is computed again: {_reason(error)}")
            return None

    def report_damage(self, reason: object) -> None:
        """Log that a file was dropped. reason: continues a sentence that begins with the file."""
        self._warn(f"a file of the prompt cache {reason}; its prompt is computed again")

    def remove(self, stored: StoredSpan) -> None:
        """Queue a file for removal."""
        self.forget(stored)
        if self._start_writer():
            self._removing[stored.name] += 1
            self._jobs.put((stored, None))

    def take_changes(self) -> Iterator[Changes]:
        """What the background thread has found since the last call."""
        while not self._changes.empty():
            yield self._changes.get()

    def is_pending(self, name: str) -> bool:
        """Whether a write or removal of this file is queued."""
        return name in self._unwritten or name in self._removing

    def close(self) -> None:
        """Wait until everything queued has been written, CLOSE_TIMEOUT_S at most."""
        self._reader.close()
        if self._writer is not None:
            self._jobs.put(None)
            self._writer.join(CLOSE_TIMEOUT_S)
            if self._writer.is_alive():
                self._warn(f"the disk of the prompt cache has not answered for {CLOSE_TIMEOUT_S:.0f} seconds")

    def _start_writer(self) -> bool:
        """Whether the background thread runs. It is started with the first job."""
        if self._writer is None:
            writer = Thread(target=self._run_writer, name="mlx-gptoss prompt cache", daemon=True)
            try:
                writer.start()
            except RuntimeError as error:  # no more threads
                self._pause(error)
                return False
            self._writer = writer
        return True

    # On the background thread.

    def _run_writer(self) -> None:
        while (job := self._jobs.get()) is not None:
            stored, data = job
            try:
                if data is None:
                    self._remove_file(stored)
                else:
                    self._write_file(stored, data)
            except Exception as error:
                self._pause(error)
            try:
                if monotonic() - self._scanned_at > RESCAN_S or self._written_bytes > self.max_bytes // RESCAN_SHARE:
                    self._rescan()
            except Exception as error:
                self._warn(f"the folder of the prompt cache cannot be read: {_reason(error)}")

    def _write_file(self, stored: StoredSpan, data: bytes) -> None:
        written = False
        try:
            if monotonic() >= self._paused_until:
                span_file.write(self._folder, stored, data)
                written = True
                self._written_bytes += stored.nbytes
        except (IsADirectoryError, FileNotFoundError) as error:  # of this one name, or another process removed it
            self._warn(f"a file of the prompt cache could not be written: {_reason(error)}")
        finally:
            if self._unwritten.get(stored.name) is data:
                del self._unwritten[stored.name]
            if not written:
                self._changes.put(Changes([], [stored]))

    def _remove_file(self, stored: StoredSpan) -> None:
        try:
            self._unlink(stored.filename)
        finally:
            self._removing[stored.name] -= 1
            if not self._removing[stored.name]:
                del self._removing[stored.name]

    def _rescan(self) -> None:
        """Compare the folder with the files that are known."""
        self._scanned_at, self._written_bytes = monotonic(), 0
        known = dict(self.known)
        queued = set(self._unwritten)  # read after `known`: a file in neither is on the disk, or was removed
        names = set(self._names())
        fresh = [
            name for name in names if (stem := name.removesuffix(SUFFIX)) not in known and not self.is_pending(stem)
        ]
        added = [stored for name in fresh if (stored := self._read_header(name)) is not None]
        gone = [stored for name, stored in known.items() if stored.filename not in names and name not in queued]
        if added or gone:
            self._changes.put(Changes(added, gone))

    # On either thread.

    def _names(self) -> list[str]:
        """Names of the cache's files. Abandoned temporary files are removed."""
        try:
            listed = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            self._warn(f"the folder of the prompt cache cannot be read: {_reason(error)}")
            return []
        for name in listed:
            if name.endswith(TEMP_SUFFIX):
                self._remove_abandoned(name)
        return [name for name in listed if name.endswith(SUFFIX)]

    def _remove_abandoned(self, name: str) -> None:
        try:
            if time() - os.lstat(self._folder / name).st_mtime > STALE_S:
                self._unlink(name)
        except FileNotFoundError:
            return  # its writer has renamed it
        except OSError as error:
            self._warn(f"a temporary file of the prompt cache cannot be removed: {_reason(error)}")

    def _read_header(self, name: str) -> StoredSpan | None:
        """The chunk that a file describes; None if it cannot be read. A damaged file is removed."""
        try:
            try:
                return span_file.read_header(self._folder / name, self._fingerprint)
            except Damaged as error:
                self.report_damage(error)
                self._unlink(name)
        except FileNotFoundError:
            return None  # another process has removed it
        except (OSError, MemoryError) as error:
            self._warn(f"a file of the prompt cache cannot be read: {_reason(error)}")
        return None

    def _unlink(self, name: str) -> None:
        """Remove a file, or leave a folder of that name. Raises OSError."""
        path = self._folder / name
        try:
            os.unlink(path)
        except FileNotFoundError:
            return
        except OSError:
            if not path.is_dir():
                raise
            self._warn(f"{name} in the prompt cache is a folder; remove it")

    def _pause(self, error: BaseException) -> None:
        self._paused_until = monotonic() + PAUSE_S
        self._warn(f"the prompt cache is not written to disk for {PAUSE_S:.0f} seconds: {_reason(error)}")

    def _warn(self, text: str) -> None:
        self._warnings.log(text)


class _Reader:
    """Reads files on a thread, which a disk that does not answer may keep."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Path, StoredSpan, Future[bytes]] | None] = SimpleQueue()
        self._last: Future[bytes] | None = None
        self._thread: Thread | None = None

    def read(self, folder: Path, stored: StoredSpan) -> bytes:
        """As span_file.read_snapshot. Raises TimeoutError after READ_TIMEOUT_S, and at once while an earlier read has
        not ended; RuntimeError if there can be no more threads."""
        if self._thread is None:
            thread = Thread(target=self._run, name="mlx-gptoss prompt cache reader", daemon=True)
            thread.start()
            self._thread = thread
        if self._last is None or self._last.done():
            self._last = Future()
            self._jobs.put((folder, stored, self._last))
            with suppress(FutureTimeoutError):
                data = self._last.result(READ_TIMEOUT_S)
                self._last = None  # it holds the data
                return data
        raise TimeoutError(f"the disk has not answered for {READ_TIMEOUT_S:.0f} seconds")

    def close(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(READ_TIMEOUT_S)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            folder, stored, result = job
            try:
                result.set_result(span_file.read_snapshot(folder, stored))
            except BaseException as error:
                result.set_exception(error)


class _Warnings:
    """Logs one warning per WARN_INTERVAL_S, with the number of those left out."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._next_at = 0.0
        self._left_out = 0

    def log(self, text: str) -> None:
        with self._lock:
            if monotonic() < self._next_at:
                self._left_out += 1
                return
            more = f" (and {self._left_out} more warnings before)" if self._left_out else ""
            self._next_at, self._left_out = monotonic() + WARN_INTERVAL_S, 0
        _log.warning("%s%s", text, more)


def _reason(error: BaseException) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
