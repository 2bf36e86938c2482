"""The model's citations, such as 【6†L9-L11】, in the text of an answer: a link, and an event with its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from urllib.parse import quote, urlsplit

from ...chat.reply import TextDelta
from ...engine import Token
from .events import Citation

MAX_CITATION = 200  # characters; an opened bracket that is longer is plain text
_CITATION = re.compile(r"【\[?(\d{1,9})\]?†(?:L(\d{1,9}))?[^【】]*】")

FindPage = Callable[[int, int], "tuple[str, str] | None"]


class CitationReader:
    """Rewrites the text of one message as it arrives: 【cursor†lines】 becomes ([domain](url)).

    Text that may be the beginning of a citation is held back. A citation of a page that was never shown stays as it is.
    """

    def __init__(self, find_page: FindPage) -> None:
        """find_page: given a cursor and a line, returns the URL and the title of the page that is cited, or None."""
        self._find_page = find_page
        self._held = ""
        self._tokens: tuple[Token, ...] = ()
        self._length = 0  # of the text so far, in characters
        self._last = ""  # its last character

    def push(self, delta: TextDelta) -> Iterator[TextDelta | Citation]:
        """Take in more text, and yield what can be shown."""
        self._held += delta.text
        self._tokens += delta.tokens
        yield from self._show(delta.preamble)

    def flush(self, preamble: bool) -> Iterator[TextDelta | Citation]:
        """End the message, and yield what was held back."""
        yield from self._show(preamble, complete=True)

    def _show(self, preamble: bool, complete: bool = False) -> Iterator[TextDelta | Citation]:
        while match := _CITATION.search(self._held):
            page = self._find_page(int(match[1]), int(match[2] or 0))
            if page is None:
                yield from self._text(self._held[: match.end()], preamble)
            else:
                yield from self._text(self._held[: match.start()], preamble)
                yield from self._citation(*page, preamble)
            self._held = self._held[match.end() :]
        begin = self._held.rfind("【")
        keep = len(self._held) if complete or begin < 0 or len(self._held) - begin > MAX_CITATION else begin
        yield from self._text(self._held[:keep], preamble)
        self._held = self._held[keep:]

    def _citation(self, url: str, title: str, preamble: bool) -> Iterator[TextDelta | Citation]:
        link = f"([{urlsplit(url).hostname or url}]({quote(url, safe=':/?#[]@!$&*+,;=%~')}))"
        if self._last and not self._last.isspace():
            yield from self._text(" ", preamble)
        start = self._length
        yield from self._text(link, preamble)
        yield Citation(start, self._length, url, title)

    def _text(self, text: str, preamble: bool) -> Iterator[TextDelta]:
        if text:
            tokens, self._tokens = self._tokens, ()
            self._length += len(text)
            self._last = text[-1]
            yield TextDelta(text, tokens, preamble)
