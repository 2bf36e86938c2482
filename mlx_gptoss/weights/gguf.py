"""The GGUF container, llama.cpp's single file: a header reader for untrusted files. Read only.

A file is: "GGUF", the version, the numbers of tensors and of metadata entries; the metadata (key, type, value); the
tensors' descriptions (name, dimensions with the fastest first, type, offset); padding; the tensors' bytes. All numbers
are little-endian. Source: the GGUF specification in ggml's docs/gguf.md.

The `gguf` package is not used: it takes 26 s and 1 GB for the vocabulary of a published file (this reader takes 0.3 s),
and it appends to a list forever if an array claims more numbers than the file has.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from ..errors import CheckpointError
from .gguf_blocks import BLOCK_TYPES
from .safetensors import Header, TensorInfo
from .tensor import Array

MAGIC = b"GGUF"
MAX_HEADER_BYTES = 32 * 2**20  # that of a published file takes 14 MB, nearly all of it vocabulary
MAX_ENTRIES = 4096
MAX_TENSORS = 2**16
MAX_STRINGS = 2**20  # in one array

_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

# ggml's types of single values, as safetensors names them. Blocks (gguf_blocks.py) stay bytes: Q8_0 of shape [..., K]
# becomes U8 [..., K / 32, 34].
_FLOATS = {0: "F32", 1: "F16", 30: "BF16"}
_OTHER_TYPES = {9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}


class StringArray(Sequence[str]):
    """An array of strings inside a header. Each string is decoded when it is accessed."""

    def __init__(self, data: bytes, starts: array[int]) -> None:
        """data: the header. starts: the offset of each string's length, which precedes its bytes."""
        self._data, self._starts = data, starts

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._text(start) for start in self._starts[index]]
        return self._text(self._starts[index])

    def __iter__(self) -> Iterator[str]:
        return map(self._text, self._starts)

    def _text(self, start: int) -> str:
        (length,) = _LENGTH.unpack_from(self._data, start)
        return _utf8(self._data[start + 8 : start + 8 + length])


Value = int | float | bool | str | Array | StringArray
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class GgufHeader:
    """The header of one file. tensors: dtypes, shapes and offsets, as in a safetensors header."""

    metadata: Mapping[str, Value]
    tensors: Header


def read_header(path: Path) -> GgufHeader:
    """Read the header of one GGUF file and check it against the file's length.

    Raises CheckpointError for a file that is not a complete little-endian GGUF file of version 2 or 3: lengths and
    counts past the end, duplicate names, unknown types, tensors that overlap or do not fit.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            reader = _Reader(path, file.read(MAX_HEADER_BYTES), size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    tensors, entries = _read_counts(reader)
    metadata: dict[str, Value] = {}
    for _ in range(entries):
        key = reader.string()
        if key in metadata:
            raise reader.error(f"has the metadata {key[:80]!r} twice")
        metadata[key] = _read_value(reader, key, reader.integer("<u4"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise reader.error(f"has the alignment {alignment!r}, which is not a power of two")
    described = [_read_tensor(reader) for _ in range(tensors)]
    data_start = reader.at + -reader.at % alignment
    _check_offsets(reader, described, data_start, alignment)
    infos = {info.name: info for info, _ in described}
    if len(infos) != len(described):
        raise reader.error("has two tensors of one name")
    offsets = {info.name: data_start + offset for info, offset in described}
    return GgufHeader(metadata, Header(infos, offsets, {}))


class _Reader:
    """Reads numbers and strings in sequence. Raises CheckpointError at the end of the header."""

    def __init__(self, path: Path, data: bytes, size: int) -> None:
        """data: the first bytes of the file, at most MAX_HEADER_BYTES. size: the length of the file."""
        self.path, self.data, self.size, self.at = path, data, size, 0

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {what}; download the file again")

    def take(self, length: int) -> int:
        """Advance by `length` bytes and return the offset of the first."""
        start, self.at = self.at, self.at + length
        if self.at > len(self.data):
            if self.size > len(self.data):
                raise self.error(f"has a header of more than {MAX_HEADER_BYTES} bytes or lengths that run past it")
            raise self.error("is truncated: it ends inside its header")
        return start

    def integer(self, dtype: str) -> int:
        """An unsigned integer of a numpy dtype, such as "<u4"."""
        length = int(dtype[-1])
        start = self.take(length)
        return int.from_bytes(self.data[start : start + length], "little")

    def string(self) -> str:
        length = self.integer("<u8")
        start = self.take(length)
        return _utf8(self.data[start : start + length])

    def numbers(self, dtype: str, count: int) -> Array:
        """[count] numbers, as a view."""
        numpy_dtype = np.dtype(dtype)
        return np.frombuffer(self.data, numpy_dtype, count, self.take(count * numpy_dtype.itemsize))

    def strings(self, count: int) -> StringArray:
        if count > MAX_STRINGS:
            raise self.error(f"has an array of {count} strings; no vocabulary is that large")
        starts, at, last = array("q"), self.at, len(self.data) - 8
        for _ in range(count):
            if at > last:
                at += 8
                break
            starts.append(at)
            at += 8 + _LENGTH.unpack_from(self.data, at)[0]
        self.take(at - self.at)
        return StringArray(self.data, starts)


def _read_counts(reader: _Reader) -> tuple[int, int]:
    """The numbers of tensors and of metadata entries, after the magic and the version."""
    if reader.data[:4] != MAGIC:
        raise CheckpointError(f"{reader.path} is not a GGUF file")
    reader.take(4)
    version = reader.integer("<u4")
    if version not in (2, 3):
        why = "is big-endian" if version and not version & 0xFFFF else f"has GGUF version {version}"
        raise CheckpointError(f"{reader.path} {why}; only little-endian files of versions 2 and 3 can be read")
    tensors, entries = reader.integer("<u8"), reader.integer("<u8")
    if tensors > MAX_TENSORS or entries > MAX_ENTRIES:
        raise reader.error(f"claims {tensors} tensors and {entries} metadata entries")
    return tensors, entries


def _read_value(reader: _Reader, key: str, kind: int) -> Value:
    """A metadata value of GGUF's type number `kind`."""
    if kind == _STRING:
        return reader.string()
    if kind == _ARRAY:
        element, count = reader.integer("<u4"), reader.integer("<u8")
        if element == _STRING:
            return reader.strings(count)
        if element in _SCALARS:
            return reader.numbers(_SCALARS[element], count)
        raise reader.error(f"has an array of the unknown type {element} as {key[:80]!r}")
    if kind not in _SCALARS:
        raise reader.error(f"has metadata of the unknown type {kind} as {key[:80]!r}")
    value: int | float | bool = reader.numbers(_SCALARS[kind], 1)[0].item()
    return value


def _read_tensor(reader: _Reader) -> tuple[TensorInfo, int]:
    """The description of one tensor, with its shape in numpy's order, and its offset from the start of the data."""
    name = reader.string()
    rank = reader.integer("<u4")
    if not 1 <= rank <= 4:
        raise reader.error(f"gives {name[:80]!r} {rank} dimensions")
    if not name.isprintable():
        raise reader.error(f"has the tensor name {name[:80]!r}, which cannot be printed")
    shape = [reader.integer("<u8") for _ in range(rank)][::-1]
    kind, offset = reader.integer("<u4"), reader.integer("<u8")
    block = BLOCK_TYPES.get(kind)
    if block is None and kind not in _FLOATS:
        known = _OTHER_TYPES.get(kind, f"of the unknown type {kind}")
        raise CheckpointError(
            f"{reader.path}: {name[:80]} is {known}, which cannot be read; Q1_0 to Q8_0, Q2_K to Q6_K, IQ1 to IQ4, "
            "TQ1_0, TQ2_0, MXFP4, NVFP4, BF16, F16 and F32 can: take the file whose name says one of these"
        )
    if not all(shape) or (block is not None and shape[-1] % block.values):
        raise reader.error(f"gives {name[:80]!r} the shape {shape}")
    if block is None:
        return TensorInfo(name, _FLOATS[kind], tuple(shape)), offset
    return TensorInfo(name, "U8", (*shape[:-1], shape[-1] // block.values, block.size), block.name), offset


def _check_offsets(reader: _Reader, tensors: Sequence[tuple[TensorInfo, int]], data_start: int, alignment: int) -> None:
    """Raise CheckpointError if tensors overlap, are unaligned or end past the file."""
    end = 0
    for info, offset in sorted(tensors, key=lambda tensor: tensor[1]):
        name = info.name[:80]
        if offset % alignment or offset < end:
            raise reader.error(f"puts {name!r} at {offset}, inside another tensor or unaligned")
        end = offset + info.nbytes
        if data_start + end > reader.size:
            raise reader.error(f"is truncated: {name!r} ends at {data_start + end}, the file at {reader.size}")


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"a GGUF file has the text {data[:40]!r}, not UTF-8; download it again") from error
