"""The safetensors container: a header reader for untrusted files, and memory-mapped tensors.

A file is eight bytes (the header's length, little-endian), the header (JSON: name -> dtype, shape, data_offsets) and
the tensors' bytes without gaps. Only headers are read until the values of a tensor are used.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from ..untrusted.json_file import parse_json
from .tensor import Array

INDEX = "model.safetensors.index.json"  # of a checkpoint in several files: the file of each tensor
MAX_HEADER_BYTES = 16 * 2**20  # the largest real header, of 120b with tensors for each expert, has 8 MB
MAX_ITEMS = 600_000  # commas and brackets in a JSON file; that header has 450,000. Parsing then takes at most 150 MB

# numpy has no float8, so those tensors are uint8 bit patterns.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in a header. dtype: safetensors' name, a key of DTYPES. blocks: GGUF's name of the blocks that
    the last axis of a U8 tensor is one of."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: str = ""

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.count * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Header:
    """The header of one file. offsets: of each tensor's first byte, from the start of the file."""

    tensors: Mapping[str, TensorInfo]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read the header of one safetensors file and check it against the file's length.

    Raises CheckpointError for a truncated file, a header that is too long or not JSON, a duplicate name, an unknown
    dtype, a shape that does not fit its bytes, and offsets that are negative, overlap or leave gaps.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or 8 + length > size:
                raise _damaged(path, "is truncated: it ends inside its header")
            if length > MAX_HEADER_BYTES:
                raise _damaged(path, f"has a header of {length} bytes; no gpt-oss checkpoint needs {MAX_HEADER_BYTES}")
            entries = parse_json(file.read(length), str(path.name), MAX_ITEMS)
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "has a header that is not a JSON object")
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null where there is none
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "has __metadata__ that is not a map of strings")
    spans = [_parse_entry(path, name, entry) for name, entry in entries.items()]
    _check_spans(path, spans, size - 8 - length)
    return Header(
        tensors={info.name: info for info, _, _ in spans},
        offsets={info.name: 8 + length + begin for info, begin, _ in spans},
        metadata=metadata,
    )


class MappedFile:
    """A memory-mapped file of tensors. Tensors are read-only views of the mapping and may be unaligned."""

    def __init__(self, path: Path, header: Header | None = None) -> None:
        """header: that of a file in another format, such as GGUF; None reads the header of a safetensors file.

        Raises CheckpointError if the file cannot be mapped or its header is wrong.
        """
        self.path = path
        self.header: Header = header or read_header(path)
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be mapped ({error.strerror})") from error
        self._start = np.frombuffer(self._map, np.uint8).ctypes.data

    def get(self, name: str) -> Array:
        """A tensor as a view. Its pages are read from the disk when its values are used."""
        info = self.header.tensors[name]
        view: Array = np.ndarray(info.shape, DTYPES[info.dtype], self._map, self.header.offsets[name])
        return view

    def release(self, start: int, stop: int) -> None:
        """Drop the resident pages that are entirely within the addresses [start, stop). They can be read again."""
        page = mmap.PAGESIZE
        first = -(-max(start - self._start, 0) // page) * page
        last = min(stop - self._start, len(self._map)) // page * page
        if stop - self._start >= len(self._map):
            last = len(self._map)
        if first < last and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def release_all(self) -> None:
        """Drop all resident pages."""
        self.release(self._start, self._start + len(self._map))

    def release_array(self, array: Array) -> None:
        """Drop the resident pages of an array if it is a view into this file, else do nothing."""
        start, stop = byte_bounds(array)
        if self._start <= start < self._start + len(self._map):
            self.release(start, stop)


def byte_bounds(array: Array) -> tuple[int, int]:
    """The addresses [start, stop) that an array occupies, whatever its strides."""
    start = stop = array.ctypes.data
    for length, stride in zip(array.shape, array.strides, strict=True):
        start += min(0, (length - 1) * stride)
        stop += max(0, (length - 1) * stride)
    return start, stop + array.itemsize


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {what}; download the file again")


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """A tensor's info and its bytes [begin, end) in the data. Raises CheckpointError if its entry is malformed."""
    if not name.isprintable():
        raise _damaged(path, f"has the tensor name {name!r}, which cannot be printed")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"describes {name!r} without exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _damaged(path, f"gives {name!r} the unknown dtype {dtype!r}")
    if not _are_natural(shape) or not _are_natural(offsets) or len(offsets) != 2:
        raise _damaged(path, f"gives {name!r} a shape or offsets that are not lists of natural numbers")
    if len(shape) > 8:
        raise _damaged(path, f"gives {name!r} {len(shape)} dimensions")
    info = TensorInfo(name, dtype, tuple(shape))
    begin, end = offsets
    if end - begin != info.nbytes:
        raise _damaged(path, f"gives {name!r} {end - begin} bytes where {dtype} {list(shape)} takes {info.nbytes}")
    return info, begin, end


def _are_natural(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_spans(path: Path, spans: list[tuple[TensorInfo, int, int]], data_bytes: int) -> None:
    """Raise CheckpointError unless the tensors fill the data exactly, without a gap or an overlap."""
    at = 0
    for info, begin, end in sorted(spans, key=lambda span: span[1:]):
        if begin != at:
            raise _damaged(path, f"has a gap or an overlap before {info.name!r} (at byte {begin} instead of {at})")
        at = end
    if at > data_bytes:
        raise _damaged(path, f"is truncated: it has {data_bytes} of {at} bytes of tensors")
    if at < data_bytes:
        raise _damaged(path, f"has {data_bytes - at} bytes that belong to no tensor")
