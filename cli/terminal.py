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


def new_console(**options: Any) -> Console:
    """A rich console. Where no escape code may be written it is like one on a file, so it has no spinner either."""
    from rich.console import Console

    class PipeConsole(Console):
        def on_broken_pipe(self) -> None:  # rich itself would exit with 1
            raise PipeClosed

    return PipeConsole(**options, force_terminal=False if no_codes() else None)
