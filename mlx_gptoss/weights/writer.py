"""A streaming writer of safetensors files: tensors are declared first, rows then written in any order, from any thread.

A shard is closed as soon as it is complete: it is synced to the disk and, if there is a journal and more than one
shard, recorded there. A writer that is given the same journal again skips the shards recorded in it.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np

from .safetensors import DTYPES, INDEX, TensorInfo
from .tensor import Array

SHARD_BYTES = 2 * 10**9  # what an interruption can cost: one or two minutes of work
_READ_BYTES = 2**20

Layout = Callable[[Sequence[TensorInfo]], tuple[bytes, Mapping[str, int], int]]  # header, offsets, size of the file
WrittenRange = tuple[int, int, int]  # bytes of a file that were written at once: offset, length, checksum


class Journal(Protocol):
    """A record of complete shards that outlives the process (journal.py has the one on the disk)."""

    @property
    def complete_shards(self) -> Mapping[str, Sequence[WrittenRange]]:
        """The shards recorded so far, by file name, with the ranges that each was written in."""
        ...

    def record_shard(self, name: str, ranges: Sequence[WrittenRange]) -> None:
        """Record a shard that is on the disk. Called from any thread."""
        ...


@dataclass
class _Shard:
    """One file.

    size: the file's size in bytes.
    missing_bytes: bytes that are not written yet.
    file: the descriptor while the file is being written.
    """

    path: Path
    header: bytes
    size: int
    missing_bytes: int
    ranges: list[WrittenRange] = field(default_factory=list)
    file: int | None = None


class Writer:
    """Writes one `model.safetensors`; or, if the tensors have more than `shard_bytes`, several shards and an index.

    Tensors of wide dtypes come first in each file, so that every tensor is aligned. resumed_bytes: size of the tensors
    in shards that the journal has as complete. Writing to those does nothing.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[TensorInfo],
        metadata: Mapping[str, str],
        shard_bytes: int = SHARD_BYTES,
        journal: Journal | None = None,
        gguf: Layout | None = None,
    ) -> None:
        """gguf: lays the tensors out in one GGUF file instead."""
        self._folder = folder
        self._journal = journal
        self._lock = Lock()
        self._locations: dict[str, tuple[TensorInfo, _Shard, int]] = {}  # name -> tensor, shard, offset
        self._shards: list[_Shard] = []
        self.total_bytes: int = sum(info.nbytes for info in tensors)
        self.resumed_bytes: int = 0
        if gguf is not None:
            self._add_shard(folder / "model.gguf", tensors, *gguf(tensors))
            return
        shards = split_shards(tensors, shard_bytes)
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            ordered = sorted(shard, key=lambda t: (-DTYPES[t.dtype].itemsize, t.name))
            self._add_shard(folder / name, ordered, *_layout(ordered, metadata))

    def _add_shard(
        self, path: Path, tensors: Sequence[TensorInfo], header: bytes, offsets: Mapping[str, int], size: int
    ) -> None:
        content_bytes = sum(info.nbytes for info in tensors)
        shard = _Shard(path, header, size, content_bytes)
        ranges = self._journal.complete_shards.get(path.name) if self._journal else None
        if ranges is not None and _is_complete(shard, ranges):
            shard.missing_bytes, shard.ranges = 0, list(ranges)
            self.resumed_bytes += content_bytes
        for info in tensors:
            self._locations[info.name] = (info, shard, offsets[info.name])
        self._shards.append(shard)

    def is_written(self, names: Sequence[str]) -> bool:
        """True if all these tensors are in complete shards."""
        return all(not self._locations[name][1].missing_bytes for name in names)

    def write(self, name: str, row: int, array: Array) -> int:
        """Write rows [n, ...] of a tensor, the first at index `row` of its first axis. From any thread.

        Returns the number of bytes written, which is 0 if the shard was complete before. Raises ValueError for rows
        outside the tensor, OSError if the disk fails.
        """
        info, shard, start = self._locations[name]
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        offset = start + row * (info.nbytes // (info.shape[0] if info.shape else 1))
        if row < 0 or offset + len(data) > start + info.nbytes:
            raise ValueError(f"rows from {row} of {name} are outside its shape {info.shape}")
        with self._lock:
            if not shard.missing_bytes:
                return 0
            if shard.file is None:
                shard.file = _create(shard)
            file = shard.file
        _write_all(file, data, offset)
        written = (offset, len(data), _checksum(data))
        with self._lock:
            shard.ranges.append(written)
            shard.missing_bytes -= len(data)
            is_complete = not shard.missing_bytes
        if is_complete:
            self._close(shard, file)
        return len(data)

    def _close(self, shard: _Shard, file: int) -> None:
        os.fsync(file)
        if self._journal is not None and len(self._shards) > 1:
            self._journal.record_shard(shard.path.name, shard.ranges)
        shard.file = None
        os.close(file)

    def finish(self) -> None:
        """Write the index. Raises ValueError if rows are missing."""
        missing_bytes = sum(shard.missing_bytes for shard in self._shards)
        if missing_bytes:
            raise ValueError(f"{self.total_bytes - missing_bytes} of {self.total_bytes} bytes were written")
        for shard in self._shards:
            if shard.file is None and not shard.path.exists():  # its tensors have no values
                self._close(shard, _create(shard))
        if len(self._shards) > 1:
            index = {name: shard.path.name for name, (_, shard, _) in sorted(self._locations.items())}
            data = {"metadata": {"total_size": self.total_bytes}, "weight_map": index}
            write_text(self._folder / INDEX, json.dumps(data, indent=2) + "\n")

    def verification_jobs(self) -> Iterator[Callable[[], int]]:
        """One function per written range, resumed shards included, that reads it back and returns its length.

        The function raises OSError and removes the shard if the bytes differ from those written.
        """
        for shard in self._shards:
            for written in shard.ranges:
                yield partial(_read_back, shard.path, *written)

    def close(self) -> None:
        """Close incomplete shards. Their files stay."""
        for shard in self._shards:
            if shard.file is not None:
                os.close(shard.file)
                shard.file = None


def split_shards(tensors: Sequence[TensorInfo], shard_bytes: int) -> list[list[TensorInfo]]:
    """Split a list of tensors, in order, into shards of at most `shard_bytes`. A larger tensor gets its own shard."""
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in tensors:
        if shards[-1] and size + info.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return shards


def _layout(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The bytes before the data, each tensor's offset in the file, and the file's size."""
    header = encode_header(tensors, metadata)
    offsets, at = {}, len(header)
    for info in tensors:
        offsets[info.name] = at
        at += info.nbytes
    return header, offsets, at


def encode_header(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data: the header's length and the header, padded with spaces to 8-align the data."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for info in tensors:
        entries[info.name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": (at, at + info.nbytes)}
        at += info.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_text(path: Path, text: str | bytes) -> None:
    """Write a small file that does not exist yet, and sync it to the disk."""
    with path.open("xb") as file:
        file.write(text.encode() if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())


def _is_complete(shard: _Shard, ranges: Sequence[WrittenRange]) -> bool:
    """True if the file has the shard's header and size, and the recorded ranges cover its content."""
    if not shard.path.is_file() or shard.path.stat().st_size != shard.size:
        return False
    if sum(length for _, length, _ in ranges) != shard.missing_bytes:
        return False
    with shard.path.open("rb") as file:
        return file.read(len(shard.header)) == shard.header


def _create(shard: _Shard) -> int:
    """Create the shard's file with its header and its final size; returns the descriptor."""
    file = os.open(shard.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _write_all(file, memoryview(shard.header), 0)
        os.ftruncate(file, shard.size)
    except BaseException:
        os.close(file)
        raise
    return file


def _checksum(data: bytes | memoryview) -> int:
    """The sum of the 64-bit words modulo 2^64.

    The checksums of parts add up if their lengths are multiples of 8, and a flipped bit or a zeroed block changes the
    sum. It runs at memory speed, where a CRC would take longer than the writing.
    """
    even = len(data) // 8 * 8
    words = np.frombuffer(data, np.uint64, even // 8)
    return (int(words.sum(dtype=np.uint64)) + int.from_bytes(data[even:], "little")) % 2**64


def _write_all(file: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)


def _read_back(path: Path, offset: int, length: int, checksum: int) -> int:
    """Compare a written range with its checksum; returns its length.

    Raises OSError and removes the file if the bytes differ.
    """
    altered = OSError(errno.EIO, "the disk returned other bytes than were written")
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # removed below because of another range
        raise altered from None
    try:
        found = 0
        for start in range(0, length, _READ_BYTES):
            found += _checksum(os.pread(file, min(_READ_BYTES, length - start), offset + start))
    finally:
        os.close(file)
    if found % 2**64 != checksum:
        path.unlink(missing_ok=True)
        raise altered
    return length
