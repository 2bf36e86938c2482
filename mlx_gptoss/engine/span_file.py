"""One file of the prefix cache: a header, which is one line of JSON, then the packed snapshot of one chunk.

Only regular files are opened: a symbolic link is not followed, and a FIFO, a socket or a device is not waited for. No
more is read than the header says, short reads and writes are continued, and a file appears under its name complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 1 << 13  # a chunk of 256 ids takes 2 kB
SUFFIX, TEMP_SUFFIX = ".kv", ".part"
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_PLACEHOLDER = "0" * 64  # as long as a digest


class Damaged(ValueError):
    """The file is not one that write() wrote for this chunk. The message continues a sentence with its name."""


@dataclass(frozen=True)
class StoredSpan:
    """One file.

    name: digest of the fingerprint and all tokens up to `end`. parent: name of the previous chunk; of the first, its
    adapter's digest, or None for the model as it is.
    span: the chunk's tokens. end: position in the prompt where it ends. nbytes: size of the file.
    last_used: when it was last read or written, in seconds since the epoch.
    """

    name: str
    parent: str | None
    span: tuple[int, ...]
    end: int
    nbytes: int
    last_used: float = 0.0

    @property
    def filename(self) -> str:
        return f"{self.name}{SUFFIX}"


def describe(fingerprint: str, parent: str | None, span: tuple[int, ...], end: int, data_bytes: int) -> StoredSpan:
    """The file that will hold a snapshot of data_bytes bytes."""
    name = span_name(fingerprint, parent, span)
    return StoredSpan(name, parent, span, end, len(_header(parent, span, end, data_bytes, _PLACEHOLDER)) + data_bytes)


def span_name(fingerprint: str, parent: str | None, span: tuple[int, ...]) -> str:
    return _digest(repr((fingerprint, parent, span)).encode())[:40]


def read_header(path: Path, fingerprint: str) -> StoredSpan:
    """The chunk whose snapshot is in a file. Raises OSError, and Damaged if its name or size does not match."""
    with _open_regular(path) as (handle, state):
        header, line = _parse_header(_read(handle, MAX_HEADER_BYTES))
    parent, span, end, data_bytes = _header_fields(header)
    stored = StoredSpan(path.stem, parent, span, end, state.st_size, state.st_mtime)
    if state.st_size != len(line) + data_bytes or not 0 < len(span) <= end:
        raise Damaged("has another size than its header says")
    if path.stem != span_name(fingerprint, parent, span):
        raise Damaged("is of another prompt or model")
    return stored


def read_snapshot(folder: Path, stored: StoredSpan) -> bytes:
    """The packed snapshot. Raises OSError, and Damaged if the file has changed. Sets the time of its last use."""
    with _open_regular(folder / stored.filename) as (handle, state):
        if state.st_size != stored.nbytes:
            raise Damaged("has changed its size")
        start = _read(handle, min(MAX_HEADER_BYTES, stored.nbytes))
        header, line = _parse_header(start)
        data = start[len(line) :] + _read(handle, stored.nbytes - len(start))
        expected = _header(stored.parent, stored.span, stored.end, len(data), _digest(data))
        if expected != line:
            raise Damaged("has changed" if header.get("parent") == stored.parent else "is of another prompt")
        with suppress(OSError):  # only the order of eviction depends on it
            os.utime(handle if os.utime in os.supports_fd else folder / stored.filename)
    return data


def write(folder: Path, stored: StoredSpan, data: bytes) -> None:
    """Write a file under a temporary name and rename it. Creates the folder if it has been removed. Raises OSError."""
    handle, written = _make_temporary(folder)
    try:
        try:
            _write(handle, _header(stored.parent, stored.span, stored.end, len(data), _digest(data)))
            _write(handle, data)
        finally:
            os.close(handle)
        os.replace(written, folder / stored.filename)
    except BaseException:
        with suppress(OSError):
            os.unlink(written)
        raise


def _make_temporary(folder: Path) -> tuple[int, str]:
    try:
        return tempfile.mkstemp(TEMP_SUFFIX, dir=folder)
    except FileNotFoundError:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return tempfile.mkstemp(TEMP_SUFFIX, dir=folder)


@contextmanager
def _open_regular(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """A descriptor of a regular file and its state. Raises OSError, and Damaged if it is anything else."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise Damaged("is not a regular file")
    handle = os.open(path, _FLAGS)
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):  # replaced since lstat()
            raise Damaged("is not a regular file")
        yield handle, state
    finally:
        os.close(handle)


def _header(parent: str | None, span: tuple[int, ...], end: int, data_bytes: int, digest: str) -> bytes:
    fields = {"parent": parent, "span": span, "end": end, "bytes": data_bytes, "sha256": digest}
    return json.dumps(fields).encode() + b"\n"


def _parse_header(start: bytes) -> tuple[dict[str, Any], bytes]:
    """The header at the start of a file, parsed and as it is. Raises Damaged."""
    line = start[: start.find(b"\n") + 1]
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        raise Damaged("has a malformed header") from None
    if not isinstance(header, dict):
        raise Damaged("has a malformed header")
    return header, line


def _header_fields(header: dict[str, Any]) -> tuple[str | None, tuple[int, ...], int, int]:
    """parent, span, end and the snapshot's size. Raises Damaged if one has another type."""
    parent, span = header.get("parent"), header.get("span")
    end, data_bytes = header.get("end"), header.get("bytes")
    numbers: list[Any] = [end, data_bytes, *(span if isinstance(span, list) else [None])]
    if not (parent is None or isinstance(parent, str)) or not all(type(number) is int for number in numbers):
        raise Damaged("has a malformed header")
    return parent, tuple(numbers[2:]), numbers[0], numbers[1]


def _read(handle: int, size: int) -> bytes:
    """`size` bytes, or fewer at the end of the file."""
    pieces, left = [], size
    while left > 0 and (piece := os.read(handle, left)):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _write(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.write(handle, view)
        if not written:
            raise OSError(errno.EIO, "the file accepts no more bytes")
        view = view[written:]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
