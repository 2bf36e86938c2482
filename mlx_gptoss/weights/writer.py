"""A streaming writer of safetensors files: all tensors are known beforehand, rows come in any order, from any thread.

A shard is closed as soon as it is whole: it is brought to the disk and, if there is a journal and more than one shard,
noted there. A writer that is given the same journal again takes up after the shards noted in it.
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

from .safetensors import DTYPES, TensorInfo
from .tensor import Array

SHARD_BYTES = 2 * 10**9  # what an interruption can cost: a minute or two of work
_READ = 2**20

Run = tuple[int, int, int]  # of bytes in a file: offset, length, checksum


class Notes(Protocol):
    """Where whole shards are noted."""

    @property
    def whole(self) -> Mapping[str, Sequence[Run]]:
        """The shards noted so far, and of what runs each was written."""
        ...

    def note(self, shard: str, runs: Sequence[Run]) -> None:
        """Called, from any thread, once a shard is on the disk."""
        ...


@dataclass
class _Shard:
    """One file; `file` is its descriptor while it is being written."""

    path: Path
    header: bytes
    size: int  # of the file
    missing: int  # bytes still to be written
    runs: list[Run] = field(default_factory=list)
    file: int | None = None


class Writer:
    """Writes a single `model.safetensors`, or, beyond `limit` bytes, shards cut at tensor borders and an index.

    Tensors of wide dtypes come first in each file, so that every tensor is aligned. `kept` is the size of the tensors
    in shards that the journal says are whole already: writing to these does nothing.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[TensorInfo],
        metadata: Mapping[str, str],
        limit: int = SHARD_BYTES,
        journal: Notes | None = None,
    ) -> None:
        self._folder = folder
        self._journal = journal
        self._lock = Lock()
        self._places: dict[str, tuple[TensorInfo, _Shard, int]] = {}  # name -> tensor, shard, offset
        self._shards: list[_Shard] = []
        self.total = sum(info.nbytes for info in tensors)
        self.kept = 0
        shards = split_shards(tensors, limit)
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            self._plan(folder / name, sorted(shard, key=lambda t: (-DTYPES[t.dtype].itemsize, t.name)), metadata)

    def _plan(self, path: Path, tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> None:
        header = encode_header(tensors, metadata)
        content = sum(info.nbytes for info in tensors)
        shard = _Shard(path, header, len(header) + content, content)
        runs = self._journal.whole.get(path.name) if self._journal else None
        if runs is not None and _is_whole(shard, runs):
            shard.missing, shard.runs = 0, list(runs)
            self.kept += content
        at = len(header)
        for info in tensors:
            self._places[info.name] = (info, shard, at)
            at += info.nbytes
        self._shards.append(shard)

    @property
    def shards(self) -> int:
        return len(self._shards)

    def is_written(self, names: Sequence[str]) -> bool:
        """Whether these tensors all lie in whole shards."""
        return all(not self._places[name][1].missing for name in names)

    def write(self, name: str, row: int, array: Array) -> int:
        """Put rows [n, ...] of a tensor at `row` of its first axis; returns the bytes written: none if its shard was
        whole before."""
        info, shard, start = self._places[name]
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        offset = start + row * (info.nbytes // (info.shape[0] if info.shape else 1))
        if row < 0 or offset + len(data) > start + info.nbytes:
            raise ValueError(f"rows from {row} of {name} lie outside its shape {info.shape}")
        with self._lock:
            if not shard.missing:
                return 0
            if shard.file is None:
                shard.file = _create(shard)
            file = shard.file
        _write_all(file, data, offset)
        run = (offset, len(data), _checksum(data))
        with self._lock:
            shard.runs.append(run)
            shard.missing -= len(data)
            whole = not shard.missing
        if whole:
            self._close(shard, file)
        return len(data)

    def _close(self, shard: _Shard, file: int) -> None:
        os.fsync(file)
        if self._journal is not None and len(self._shards) > 1:
            self._journal.note(shard.path.name, shard.runs)
        shard.file = None
        os.close(file)

    def finish(self) -> None:
        """Write the index. Raises ValueError if rows are missing."""
        missing = sum(shard.missing for shard in self._shards)
        if missing:
            raise ValueError(f"{self.total - missing} of {self.total} bytes were written")
        for shard in self._shards:
            if shard.file is None and not shard.path.exists():  # of tensors without a value
                self._close(shard, _create(shard))
        if len(self._shards) > 1:
            index = {name: shard.path.name for name, (_, shard, _) in sorted(self._places.items())}
            data = {"metadata": {"total_size": self.total}, "weight_map": index}
            write_text(self._folder / "model.safetensors.index.json", json.dumps(data, indent=2) + "\n")

    def checks(self) -> Iterator[Callable[[], int]]:
        """For each run of rows, of shards kept from an earlier time too, a function that reads it back and returns its
        length. It raises OSError if the bytes differ from those written, and removes the shard."""
        for shard in self._shards:
            for run in shard.runs:
                yield partial(_read_back, shard.path, *run)

    def close(self) -> None:
        """Let go of shards that are not whole; the files stay."""
        for shard in self._shards:
            if shard.file is not None:
                os.close(shard.file)
                shard.file = None


def split_shards(tensors: Sequence[TensorInfo], limit: int) -> list[list[TensorInfo]]:
    """Cut a list of tensors, in order, into runs of at most `limit` bytes (or one tensor that is larger)."""
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in tensors:
        if shards[-1] and size + info.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return shards


def encode_header(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data: the length and the header, padded with spaces so that the data is 8-aligned."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for info in tensors:
        entries[info.name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": (at, at + info.nbytes)}
        at += info.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_text(path: Path, text: str) -> None:
    """Write a small file and bring it to the disk."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _is_whole(shard: _Shard, runs: Sequence[Run]) -> bool:
    """Whether the file is there with this header and size, and the runs that were noted make it up."""
    if not shard.path.is_file() or shard.path.stat().st_size != shard.size:
        return False
    if sum(length for _, length, _ in runs) != shard.missing:
        return False
    with shard.path.open("rb") as file:
        return file.read(len(shard.header)) == shard.header


def _create(shard: _Shard) -> int:
    file = os.open(shard.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _write_all(file, memoryview(shard.header), 0)
        os.ftruncate(file, shard.size)
    except BaseException:
        os.close(file)
        raise
    return file


def _checksum(data: bytes | memoryview) -> int:
    """The sum of the 64-bit words modulo 2^64: parts of multiples of 8 bytes add up, and no flipped, lost or zeroed
    bytes go unnoticed. As fast as memory, where a CRC would take longer than the writing."""
    even = len(data) // 8 * 8
    words = np.frombuffer(data, np.uint64, even // 8)
    return (int(words.sum(dtype=np.uint64)) + int.from_bytes(data[even:], "little")) % 2**64


def _write_all(file: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)


def _read_back(path: Path, offset: int, length: int, checksum: int) -> int:
    altered = OSError(errno.EIO, "the disk returned other bytes than were written")
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # removed below for another run of it
        raise altered from None
    try:
        found = 0
        for start in range(0, length, _READ):
            found += _checksum(os.pread(file, min(_READ, length - start), offset + start))
    finally:
        os.close(file)
    if found % 2**64 != checksum:
        path.unlink(missing_ok=True)
        raise altered
    return length
