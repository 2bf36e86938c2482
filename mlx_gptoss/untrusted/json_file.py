"""Read JSON from files that may come from anywhere: sizes, nesting and duplicate keys are checked."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


def read_file(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file. Raises CheckpointError for anything else, and for more than max_bytes.

    A named pipe does not block it, and no more than max_bytes are read of a file that grows meanwhile.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise CheckpointError(f"{path} is not a regular file; download it again")
            data = file.read(max_bytes + 1) if state.st_size <= max_bytes else b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    if max(len(data), state.st_size) > max_bytes:
        raise CheckpointError(
            f"{path} has more than {max_bytes} bytes, more than the {path.name} of any checkpoint; download it again"
        )
    return data


def parse_json(data: bytes, name: str, max_items: int) -> Any:
    """Parse JSON. Raises CheckpointError if it is invalid, has a duplicate key or has more than max_items items.

    name: the file's name, for the error. An item is a comma, a list or an object: they are counted before parsing.
    """
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > max_items:
        raise CheckpointError(f"{name} has more items than any gpt-oss checkpoint; it is damaged or malicious")

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{name} has the key {duplicate!r:.200} twice; download the file again")
        return found

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=without_duplicates)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{name} is not UTF-8 text; download the file again") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not valid JSON ({str(error)[:80]}); download the file again") from error
