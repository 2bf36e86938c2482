"""Markdown on a terminal, rendered while it streams."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt
from rich.markdown import Markdown
from rich.text import Text

from .terminal import new_console

if TYPE_CHECKING:
    from rich.live import Live

REFRESH_S = 0.08


class MarkdownWriter:
    """Writes one answer. A block (a paragraph, a table, code) is printed for good once the next one begins; the open
    one is drawn again as it grows, its last lines only if it is taller than the terminal."""

    def __init__(self) -> None:
        self._console = new_console(highlight=False)
        self._tail = ""  # the source of the open block
        self._live: Live | None = None
        self._drawn_at = 0.0
        self._begun = False  # whether a block has been printed

    def write(self, text: str) -> None:
        self._tail += text
        if "\n" in text:
            self._print_finished()
        now = time.monotonic()
        if now - self._drawn_at >= REFRESH_S:
            self._drawn_at = now
            self._draw()

    def close(self) -> None:
        """Print what is left. The next write begins another answer."""
        self._print(self._tail)
        self._tail, self._begun = "", False

    def _print_finished(self) -> None:
        """Print all blocks but the last."""
        tokens = _parser().parse(self._tail)
        starts = [token.map[0] for token in tokens if token.level == 0 and token.map and token.nesting >= 0]
        lines = self._tail.splitlines(keepends=True)
        for first, end in pairwise(starts):
            self._print("".join(lines[first:end]))
        if len(starts) > 1:
            self._tail = "".join(lines[starts[-1] :])

    def _print(self, source: str) -> None:
        self._hide()
        if source.strip():
            if self._begun:
                self._console.print()
            self._console.print(_rendered(source))
            self._begun = True

    def _draw(self) -> None:
        from rich.live import Live

        if not self._tail.strip():
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop")
            self._live.start()
        lines = self._console.render_lines(_rendered(self._tail), pad=False)
        most = max(1, self._console.height - 2 - self._begun)
        shown = Text("\n" if self._begun else "")
        for number, line in enumerate(lines[-most:]):
            shown.append("\n" if number else "")
            for segment in line:
                shown.append(segment.text, segment.style)
        self._live.update(shown, refresh=True)

    def _hide(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _parser() -> MarkdownIt:
    """Tables and strikethrough as on GitHub. HTML is shown as text: rich would leave it out."""
    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


def _rendered(source: str) -> Markdown:
    shown = Markdown("", code_theme="ansi_dark", hyperlinks=False)
    shown.parsed = _parser().parse(source)
    return shown
