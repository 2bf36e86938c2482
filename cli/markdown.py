"""Markdown on a terminal while it streams: finished blocks are printed once, only the last, open one is redrawn."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from .terminal import new_console

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

REFRESH_S = 0.05
SHARE = 0.1  # of the time that drawing may take
CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)))  # the model may not write escape codes


class MarkdownWriter:
    """Shows one text after another on stdout, which is a terminal. It follows the terminal's size.

    A thread of its own draws, so that all of the text is there when no more comes for a while.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or new_console()
        # As rich parses it, but HTML is text: rich would leave it out.
        self._parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
        self._live: Live | None = None
        self._open = ""  # text of the blocks that may still change
        self._printed = 0  # lines of the open block that have scrolled out of the redrawn part
        self._above = False  # whether there is a block above
        self._arrived: deque[str] = deque()
        self._more, self._ended = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None  # that ended the thread

    def write(self, text: str) -> None:
        """Take in more text. Raises what an earlier drawing raised, such as PipeClosed."""
        if self._error is not None:
            raise self._error
        self._arrived.append(text.translate(CONTROLS))
        self._more.set()
        if self._thread is None:
            self._ended.clear()
            self._thread = threading.Thread(target=self._run, name="markdown", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Draw what is left; the next text begins anew."""
        try:
            if self._thread is not None:
                self._ended.set()
                self._more.set()
                self._thread.join()
                self._take()
                self._finish(self._blocks(self._open))
        finally:
            if self._live is not None:
                self._live.stop()
            self._live = self._thread = None
            self._open, self._above, self._printed = "", False, 0

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                self._more.clear()
                started = time.monotonic()
                self._draw()
                self._ended.wait(max(REFRESH_S, (time.monotonic() - started) / SHARE))
                self._more.wait()
        except Exception as error:
            self._error = error

    def _take(self) -> None:
        with suppress(IndexError):
            while True:
                self._open += self._arrived.popleft()

    def _draw(self) -> None:
        self._take()
        if self._live is None:
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
                vertical_overflow="visible",
            )
            self._live.start()
        # A line that is not complete decides nothing: "2" may become "2." and go on with a list.
        self._finish(self._blocks(self._open[: self._open.rfind("\n") + 1])[:-1])
        lines = self._lines(self._open)
        room = max(1, self._console.height - 2)
        if len(lines) > room:
            self._print(lines[: len(lines) - room])
            self._printed += len(lines) - room
            lines = lines[-room:]
        self._live.update(_Lines(lines), refresh=True)

    def _blocks(self, text: str) -> list[str]:
        """The text, cut where its paragraphs, lists, tables and so on begin."""
        starts = sorted({token.map[0] for token in self._parser.parse(text) if token.map and token.level == 0})
        lines = text.split("\n")
        ends = [*starts[1:], len(lines)]
        parts = ["\n".join([*lines[start:end], ""]) for start, end in zip([0, *starts[1:]], ends, strict=True)]
        parts[-1] = parts[-1][:-1]
        return parts

    def _finish(self, blocks: list[str]) -> None:
        """Print blocks, with which the open text begins, for good."""
        for block in blocks:
            lines = self._lines(block)
            self._open = self._open[len(block) :]
            if self._live is not None:
                self._live.update(_Lines([]))
            self._print(lines)
            self._above |= bool(lines) or self._printed > 0
            self._printed = 0

    def _lines(self, text: str) -> list[list[Segment]]:
        """The rendered text, without the lines that are already printed: spaces at line ends and empty lines around it
        are left out, one that parts it from the block above is added."""
        width = self._console.width
        markdown = Markdown("", code_theme="ansi_dark", hyperlinks=False)
        markdown.parsed = self._parser.parse(text)
        options = self._console.options.update(width=width)
        lines = [_stripped(line) for line in self._console.render_lines(markdown, options, pad=False)]
        while lines and not lines[-1]:
            lines.pop()
        while lines and not lines[0]:
            lines.pop(0)
        return ([[], *lines] if lines and self._above else lines)[self._printed :]

    def _print(self, lines: list[list[Segment]]) -> None:
        if lines:
            self._console.print(_Lines(lines), end="")


class _Lines:
    """Rendered lines. None is wider than the terminal, whose last column stays free of a line break of its own."""

    def __init__(self, lines: list[list[Segment]]) -> None:
        self._lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self._lines:
            yield from Segment.adjust_line_length(line, min(options.max_width, Segment.get_line_length(line)))
            yield Segment.line()


def _stripped(line: Iterable[Segment]) -> list[Segment]:
    """The line without spaces at its end."""
    kept = [segment for segment in line if not segment.control]
    while kept and not kept[-1].text.rstrip():
        kept.pop()
    if kept:
        kept[-1] = Segment(kept[-1].text.rstrip(), kept[-1].style)
    return kept
