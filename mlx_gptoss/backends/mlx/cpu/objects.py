"""Machine code of kernels on disk, so that kernels are not compiled anew in every process.

A file: MAGIC, the SHA-256 of its key and machine code, the machine code. Its name is the digest of the key, which is
everything that the code depends on. A file that is damaged, or that another user could have written, is compiled anew.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

MAGIC = b"mlx-gptoss kernel 1\n"
SUFFIX = ".kernel"
MAX_BYTES = 8 << 20  # of a file; kernels have some 50 kB
MAX_FILES = 64  # older ones, of other versions and machines, are removed


class ObjectFiles:
    """The files in a folder. A folder that cannot be read or written costs compiling at every start, and no error."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, key: str) -> bytes | None:
        """The machine code of this key; None if there is none that can be trusted."""
        path, size = self._path(key), len(MAGIC) + hashlib.sha256().digest_size
        try:
            with path.open("rb") as file:
                if not _own(os.fstat(file.fileno())):
                    return None
                found = file.read(MAX_BYTES + 1)
        except OSError:
            return None
        code = found[size:]
        return code if len(found) <= MAX_BYTES and found[:size] == MAGIC + _digest(key, code) else None

    def put(self, key: str, code: bytes) -> None:
        """Write a file. Other processes see all of it or nothing."""
        with suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self._folder)  # mode 0600
            try:
                with open(descriptor, "wb") as file:
                    file.write(MAGIC + _digest(key, code) + code)
                os.replace(temporary, self._path(key))
            except BaseException:
                os.unlink(temporary)
                raise
            self._prune()

    def _path(self, key: str) -> Path:
        return self._folder / (hashlib.sha256(key.encode()).hexdigest()[:32] + SUFFIX)

    def _prune(self) -> None:
        files = sorted(self._folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime)
        for path in files[:-MAX_FILES]:
            path.unlink()


def _own(status: os.stat_result) -> bool:
    """Whether the file is this user's, and nobody else could have written it."""
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _digest(key: str, code: bytes) -> bytes:
    return hashlib.sha256(hashlib.sha256(key.encode()).digest() + code).digest()
