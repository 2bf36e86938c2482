"""The GGUF container, llama.cpp's single file: a header reader that trusts nothing. Read only.

A file is: "GGUF", version, the numbers of tensors and of metadata entries, the metadata (key, type, value), the
tensors' descriptions (name, dimensions with the fastest first, type, offset), padding, the tensors' bytes. All numbers
are little-endian. Source: the GGUF specification in ggml's docs/gguf.md.

The `gguf` package is not used: it takes 26 s and 1 GB for the vocabulary of a published file (this reader 0.3 s) and
appends to a list for ever where an array claims more numbers than the file has.
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
from .safetensors import Header, TensorInfo
from .tensor import Array

MAGIC = b"GGUF"
MAX_HEADER_BYTES = 32 * 2**20  # a published one takes 14 MB, nearly all of it vocabulary
MAX_ENTRIES = 4096
MAX_TENSORS = 2**16
MAX_STRINGS = 2**20  # of one array

_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

# ggml's types: (dtype of the tensor as it is handed over, values a block, bytes a block). Blocks keep their bytes:
# [..., K] of Q8_0 becomes U8 [..., K / 32, 34].
TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    8: ("U8", 32, 34),  # Q8_0: a float16 scale and 32 int8
    30: ("BF16", 1, 2),
    39: ("U8", 32, 17),  # MXFP4: an e8m0 scale and 16 bytes
}
_OTHER_TYPES = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
}  # fmt: skip


class StringArray(Sequence[str]):
    """An array of strings inside a header, decoded one by one when asked for."""

    def __init__(self, data: bytes, starts: array[int]) -> None:
        """starts: where in `data` each string's length stands."""
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
    """One file's header. tensors: their places, as in a safetensors file."""

    metadata: Mapping[str, Value]
    tensors: Header


def read_header(path: Path) -> GgufHeader:
    """The header of one GGUF file, held against the file's length.

    Raises CheckpointError for whatever is not a whole little-endian GGUF file of version 2 or 3: lengths and counts
    past the end, duplicate names, unknown types, tensors that overlap or do not fit.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            cursor = _Cursor(path, file.read(MAX_HEADER_BYTES), size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    tensors, entries = _counts(cursor)
    metadata: dict[str, Value] = {}
    for _ in range(entries):
        key = cursor.string()
        if key in metadata:
            raise cursor.error(f"has the metadata {key[:80]!r} twice")
        metadata[key] = _value(cursor, key, cursor.number("<u4"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise cursor.error(f"has the alignment {alignment!r}, which is not a power of two")
    described = [_tensor(cursor) for _ in range(tensors)]
    start = cursor.at + -cursor.at % alignment
    _check_offsets(cursor, described, start, alignment)
    infos = {info.name: info for info, _ in described}
    if len(infos) != len(described):
        raise cursor.error("has two tensors of one name")
    return GgufHeader(metadata, Header(infos, {info.name: start + offset for info, offset in described}, {}))


class _Cursor:
    """Reads numbers and strings one behind the other; raises where they end."""

    def __init__(self, path: Path, data: bytes, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 0

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {what}; download the file again")

    def take(self, length: int) -> int:
        """The place of the next `length` bytes, which must be there."""
        start, self.at = self.at, self.at + length
        if self.at > len(self.data):
            if self.size > len(self.data):
                raise self.error(f"has a header of more than {MAX_HEADER_BYTES} bytes or lengths that run past it")
            raise self.error("is truncated: it ends inside its header")
        return start

    def number(self, dtype: str) -> int:
        """An unsigned integer."""
        length = int(dtype[-1])
        start = self.take(length)
        return int.from_bytes(self.data[start : start + length], "little")

    def string(self) -> str:
        length = self.number("<u8")
        start = self.take(length)
        return _utf8(self.data[start : start + length])

    def numbers(self, dtype: str, count: int) -> Array:
        """Numbers as a view."""
        kind = np.dtype(dtype)
        return np.frombuffer(self.data, kind, count, self.take(count * kind.itemsize))

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


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """The numbers of tensors and of metadata entries."""
    if cursor.data[:4] != MAGIC:
        raise CheckpointError(f"{cursor.path} is not a GGUF file")
    cursor.take(4)
    version = cursor.number("<u4")
    if version not in (2, 3):
        why = "is big-endian" if version and not version & 0xFFFF else f"has GGUF version {version}"
        raise CheckpointError(f"{cursor.path} {why}; only little-endian files of versions 2 and 3 can be read")
    tensors, entries = cursor.number("<u8"), cursor.number("<u8")
    if tensors > MAX_TENSORS or entries > MAX_ENTRIES:
        raise cursor.error(f"claims {tensors} tensors and {entries} metadata entries")
    return tensors, entries


def _value(cursor: _Cursor, key: str, kind: int) -> Value:
    if kind == _STRING:
        return cursor.string()
    if kind == _ARRAY:
        element, count = cursor.number("<u4"), cursor.number("<u8")
        if element == _STRING:
            return cursor.strings(count)
        if element in _SCALARS:
            return cursor.numbers(_SCALARS[element], count)
        raise cursor.error(f"has an array of the unknown type {element} as {key[:80]!r}")
    if kind not in _SCALARS:
        raise cursor.error(f"has metadata of the unknown type {kind} as {key[:80]!r}")
    value: int | float | bool = cursor.numbers(_SCALARS[kind], 1)[0].item()
    return value


def _tensor(cursor: _Cursor) -> tuple[TensorInfo, int]:
    """One tensor's description: as numpy sees it, and its offset from the start of all tensors' bytes."""
    name = cursor.string()
    rank = cursor.number("<u4")
    if not 1 <= rank <= 4:
        raise cursor.error(f"gives {name[:80]!r} {rank} dimensions")
    if not name.isprintable():
        raise cursor.error(f"has the tensor name {name[:80]!r}, which cannot be printed")
    shape = [cursor.number("<u8") for _ in range(rank)][::-1]
    kind, offset = cursor.number("<u4"), cursor.number("<u8")
    if kind not in TENSOR_TYPES:
        known = _OTHER_TYPES.get(kind, f"of the unknown type {kind}")
        raise CheckpointError(
            f"{cursor.path}: {name[:80]} is {known}, which cannot be read; MXFP4, Q8_0, BF16, F16 and F32 can: "
            "take the file whose name says MXFP4, F16 or BF16"
        )
    dtype, values, size = TENSOR_TYPES[kind]
    if not all(shape) or shape[-1] % values:
        raise cursor.error(f"gives {name[:80]!r} the shape {shape}")
    if values > 1:
        shape[-1:] = [shape[-1] // values, size]
    return TensorInfo(name, dtype, tuple(shape)), offset


def _check_offsets(cursor: _Cursor, tensors: Sequence[tuple[TensorInfo, int]], start: int, alignment: int) -> None:
    end = 0
    for info, offset in sorted(tensors, key=lambda tensor: tensor[1]):
        if offset % alignment or offset < end:
            raise cursor.error(f"puts {info.name[:80]!r} at {offset}, inside another tensor or unaligned")
        end = offset + info.nbytes
        if start + end > cursor.size:
            raise cursor.error(f"is truncated: {info.name[:80]!r} ends at {start + end}, the file at {cursor.size}")


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"a GGUF file holds {data[:40]!r}, which is not UTF-8; download it again") from error
