"""Standard streams that may be closed, and terminals that take no escape codes."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

BROKEN_PIPE_EXIT = 141  # as of a program that SIGPIPE ended


class PipeClosed(Exception):
    """The reader of stdout or stderr has closed it."""


def open_streams() -> None:
    """Open standard streams that were closed (`<&-`, `>&-`) on /dev/null, so that no file gets their descriptor."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is `number`
        if getattr(sys, name) is None:
            stream = open(number, mode, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115 - stays open
            setattr(sys, name, stream)


def discard_streams() -> None:
    """Send what is still in the buffers of stdout and stderr to /dev/null: there is no reader any more."""
    null = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        try:
            (sys.stdout, sys.stderr)[number - 1].flush()
        except (OSError, ValueError):
            os.dup2(null, number)


def no_codes() -> bool:
    """Whether no escape code may be written: NO_COLOR is set and not empty (no-color.org), or TERM is "dumb"."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


class StatusLine:
    """The bottom line of a terminal, kept free of what scrolls above it, as apt does for its progress.

    Only the thread that prints may use it. It writes to stderr; without a terminal there, or where no escape code may
    be written, it does nothing.
    """

    def __init__(self) -> None:
        self.active = sys.stderr.isatty() and not no_codes()
        self._rows = 0  # of the terminal when the line was set up

    def show(self, text: str) -> None:
        """Replace the line. Follows the terminal's size."""
        if not self.active:
            return
        columns, rows = os.get_terminal_size(sys.stderr.fileno())
        if rows < 3:
            return
        if rows != self._rows:
            # Index (ESC D) makes room at the bottom and keeps the column. Setting the region moves the cursor.
            self._write(f"\x1bD\x1b[A\x1b7\x1b[1;{rows - 1}r\x1b8")
            self._rows = rows
        self._write(f"\x1b7\x1b[{rows};1H\x1b[2K\x1b[2m{text[: columns - 1]}\x1b[m\x1b8")

    def clear(self) -> None:
        """Give the line back."""
        if self._rows:
            self._write(f"\x1b7\x1b[{self._rows};1H\x1b[2K\x1b[r\x1b8")
            self._rows = 0

    def _write(self, codes: str) -> None:
        sys.stdout.flush()
        sys.stderr.write(codes)
        sys.stderr.flush()


def new_console(**options: Any) -> Console:
    """A rich console. Where no escape code may be written it is like one on a file, so it has no spinner either."""
    from rich.console import Console

    class PipeConsole(Console):
        def on_broken_pipe(self) -> None:  # rich itself would exit with 1
            raise PipeClosed

    return PipeConsole(**options, force_terminal=False if no_codes() else None)
