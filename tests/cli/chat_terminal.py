"""A real pseudo-terminal with `mlx-gptoss chat` in it, and what a person would see there."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable

import pexpect
import pyte

WAIT_S = 20  # beside other programs
ENTER, ALT_ENTER, TAB, UP = "\r", "\x1b\r", "\t", "\x1b[A"
CTRL_C, CTRL_D, CTRL_J, CTRL_R = "\x03", "\x04", "\n", "\x12"


def pasted(text: str) -> str:
    """What a terminal sends for a paste (bracketed)."""
    return f"\x1b[200~{text}\x1b[201~"


class Terminal:
    """chat at its first prompt."""

    def __init__(self, *options: str, columns: int = 80, rows: int = 30, **environment: str) -> None:
        self._screen = pyte.HistoryScreen(columns, rows, history=5000)
        self._stream = pyte.ByteStream(self._screen)
        self.output = b""
        self.process = pexpect.spawn(
            sys.executable,
            ["-m", "mlx_gptoss_cli", "chat", "-m", "nano", "-t", "0", "--hide-reasoning", *options],
            dimensions=(rows, columns),
            env={**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "NO_COLOR": "", **environment},
        )
        self.process.delaybeforesend = None
        self.see("/help lists")
        self.see("\n>")

    def type(self, keys: str) -> None:
        self.process.send(keys)

    def enter(self, text: str) -> None:
        """Type a line and wait until it is on the screen, then send it: a slow terminal would take it for a paste."""
        self.type(text)
        self.see(text[-20:])
        self.type(ENTER)

    def text(self) -> str:
        """The screen and what has scrolled off it."""
        above = ["".join(line[x].data for x in range(self._screen.columns)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self._screen.display]).rstrip()

    def see(self, text: str | Callable[[str], bool]) -> str:
        """Wait until the text (or what the function wants) is there, and return everything."""
        wanted = (lambda all: text in all) if isinstance(text, str) else text
        end = time.monotonic() + WAIT_S
        while not wanted(self.text()):
            assert time.monotonic() < end, f"{text!r} never appeared:\n{self.text()}"
            assert self._read(), f"chat ended before {text!r}:\n{self.text()}"
        return self.text()

    def see_prompts(self, count: int) -> str:
        """Wait until there are that many prompts, the last of them empty."""
        return self.see(lambda all: len(re.findall(r"^>", all, re.M)) >= count and all.splitlines()[-1].strip() == ">")

    def resize(self, columns: int, rows: int = 30) -> None:
        self._screen.resize(rows, columns)
        self.process.setwinsize(rows, columns)

    def end(self) -> int:
        """Wait for chat to end, and return its exit code."""
        end = time.monotonic() + WAIT_S
        while self._read():
            assert time.monotonic() < end, self.text()
        self.process.close()
        return int(self.process.exitstatus)

    def close(self) -> None:
        self.process.close(force=True)

    def _read(self) -> bool:
        """Take what has arrived; False after the end."""
        try:
            piece = self.process.read_nonblocking(1 << 16, timeout=0.1)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.output += piece
        self._stream.feed(piece)
        return True
