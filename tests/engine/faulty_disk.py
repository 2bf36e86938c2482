"""A folder whose system calls fail when they are told to. Calls on other paths are not touched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

BY_PATH = ("open", "lstat", "stat", "listdir", "scandir", "mkdir", "replace", "rename", "unlink", "utime")
BY_HANDLE = ("read", "write", "fstat", "close", "utime")
CALLS = tuple(dict.fromkeys((*BY_PATH, *BY_HANDLE)))


class FaultyDisk:
    """Patches the functions of `os` for paths in a folder, and for descriptors opened there.

    counts: calls so far, by name. short: every read and write moves at most this many bytes.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = str(folder)
        self._handles: set[int] = set()
        self._errors: dict[str, tuple[range, int]] = {}  # by call: the numbers of those that fail, and their errno
        self.counts: dict[str, int] = dict.fromkeys(CALLS, 0)
        self.raised = 0
        self.short: int | None = None
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))
        # os.supports_fd holds the functions themselves.
        monkeypatch.setattr(os, "supports_fd", {*os.supports_fd, os.utime})

    def fail(self, name: str, error: int, count: int = 1 << 30) -> None:
        """Make the next `count` calls raise OSError."""
        self._errors[name] = (range(self.counts[name], self.counts[name] + count), error)

    def mend(self) -> None:
        self._errors.clear()

    def _wrapped(self, name: str, real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if not args or not self._is_inside(args[0]):
                return real(*args, **options)
            number = self.counts[name]
            self.counts[name] += 1
            if name in self._errors and number in self._errors[name][0]:
                self.raised += 1
                if name == "close":  # the descriptor is closed all the same, as on Linux
                    self._handles.discard(args[0])
                    real(*args)
                raise OSError(self._errors[name][1], os.strerror(self._errors[name][1]))
            if self.short is not None and name == "read":
                args = (args[0], min(args[1], self.short))
            elif self.short is not None and name == "write":
                args = (args[0], memoryview(args[1])[: self.short])
            result = real(*args, **options)
            if name == "open":
                self._handles.add(result)
            elif name == "close":
                self._handles.discard(args[0])
            return result

        return call

    def _is_inside(self, path: Any) -> bool:
        if isinstance(path, int):
            return path in self._handles
        return os.fspath(path).startswith(self._folder) if isinstance(path, (str, os.PathLike)) else False
