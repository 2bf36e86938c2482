"""`mlx-gptoss chat` in a real pseudo-terminal, as a person sees it: what pyte makes of what the program writes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pexpect
import pyte

UP, ENTER, TAB, ESCAPE, CTRL_C, CTRL_D, CTRL_J, CTRL_R = "\x1b[A", "\r", "\t", "\x1b", "\x03", "\x04", "\n", "\x12"
PROMPT = "> "
PACED = (sys.executable, str(Path(__file__).with_name("paced_chat.py")))
PATIENCE_S = 120.0  # a machine may be busy; nothing waits this long otherwise


class _Screen(pyte.HistoryScreen):
    """A screen that answers the program's questions, such as where the cursor is."""

    answer: Callable[[str], object]

    def write_process_input(self, data: str) -> None:
        self.answer(data)


class Terminal:
    """A chat. environment: variables to set, or to unset where None."""

    def __init__(
        self,
        *words: str | Path,
        columns: int = 80,
        rows: int = 24,
        cwd: Path | None = None,
        program: Sequence[str] = (sys.executable, "-m", "mlx_gptoss_cli"),
        **environment: str | None,
    ) -> None:
        changed = {"TERM": "xterm-256color", "NO_COLOR": None, "COLUMNS": None, "LINES": None, **environment}
        kept = {**os.environ, **{name: value for name, value in changed.items() if value is not None}}
        env = {name: value for name, value in kept.items() if name not in changed or changed[name] is not None}
        self.program = pexpect.spawn(
            program[0],
            [*program[1:], "chat", "--model", "nano", *map(str, words)],
            dimensions=(rows, columns),
            env=env,
            cwd=cwd,
            timeout=PATIENCE_S,
        )
        self.program.delaybeforesend = None
        self.screen = _Screen(columns, rows, history=100_000, ratio=0.5)
        self.screen.answer = self.program.send
        self.bytes = bytearray()
        self._stream = pyte.ByteStream(self.screen)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        try:
            self.program.close(force=True)
        except pexpect.ExceptionPexpect:  # it was killed, which takes longer than 0.1 s on a busy machine
            self.program.wait()
            self.program.close()

    @property
    def text(self) -> str:
        """All lines, those scrolled away first, without trailing spaces."""
        scrolled = ["".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in (*scrolled, *self.screen.display)).rstrip()

    def send(self, *keys: str) -> None:
        for key in keys:
            self.program.send(key)

    def paste(self, text: str) -> None:
        """Paste as a terminal does that the program has asked for bracketed paste."""
        assert b"\x1b[?2004h" in self.bytes
        self.send(f"\x1b[200~{text}\x1b[201~")

    def wait(self, wanted: str | Callable[[], bool]) -> str:
        """Read until the text is there, or the condition holds. Returns all text."""
        end = time.monotonic() + PATIENCE_S
        while not (wanted() if callable(wanted) else wanted in self.text):
            assert time.monotonic() < end, f"no {wanted!r} in\n{self.text}"
            self.read()
        return self.text

    def read(self, timeout: float = 0.2) -> bool:
        """Take in what there is; False if there was nothing. Fails at the end of the program."""
        try:
            piece = self.program.read_nonblocking(1 << 16, timeout=timeout)
        except pexpect.TIMEOUT:
            return False
        except pexpect.EOF:
            raise AssertionError(f"the program has ended:\n{self.text}") from None
        self.bytes += piece
        self._stream.feed(piece)
        return True

    def prompt(self) -> None:
        """Wait until the cursor stands behind an empty prompt."""
        self.wait(lambda: self.line == PROMPT.rstrip() and self.screen.cursor.x == len(PROMPT))

    @property
    def line(self) -> str:
        """The line that the cursor is in."""
        return self.screen.display[self.screen.cursor.y].rstrip()

    def ask(self, text: str) -> str:
        """Enter a line and wait for the next prompt. Returns what was written between the two."""
        self.prompt()
        before = len(self.text)
        self.send(text)
        self.wait(lambda: len(self.text) > before)
        self.send(ENTER)
        self.wait(lambda: self.line != PROMPT + text)
        self.prompt()
        return self.text[before:].removesuffix(PROMPT.rstrip()).partition("\n")[2].strip()

    def resize(self, rows: int, columns: int) -> None:
        self.screen.resize(rows, columns)
        self.program.setwinsize(rows, columns)

    def interrupt(self) -> None:
        """Ctrl-C where the program does not read keys."""
        self.program.kill(signal.SIGINT)

    def end(self) -> int:
        """Read to the end of the program and return its exit code."""
        while True:
            try:
                self.read(PATIENCE_S)
            except AssertionError:
                break
        self.program.wait()
        return self.program.exitstatus if self.program.exitstatus is not None else -self.program.signalstatus
