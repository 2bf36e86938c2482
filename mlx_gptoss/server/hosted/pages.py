"""Web pages as the text that gpt-oss was trained to browse: links as 【id†text†domain】, lines of 80 characters.

The format is that of the simple browser in openai/gpt-oss.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

WIDTH = 80
MAX_PAGE_CHARS = 500_000
MAX_TITLE_CHARS = 300
MAX_LINK_CHARS = 500
MAX_URL_CHARS = 4096
MAX_LINKS = 20_000
MAX_DEPTH = 300
MAX_MATCHES, MATCH_LINES = 50, 4  # of find

_SKIPPED = {"script", "style", "noscript", "template", "head", "svg", "math", "iframe", "object", "select", "button"}
_BLOCKS = {
    "address",
    "article",
    "aside",
    "blockquote",
    "body",
    "center",
    "details",
    "dd",
    "div",
    "dl",
    "dt",
    "fieldset",
}
_BLOCKS |= {"figcaption", "figure", "footer", "form", "header", "hr", "html", "legend", "main", "nav", "p", "section"}
_BLOCKS |= {
    "summary",
    "table",
    "tbody",
    "tfoot",
    "thead",
    "tr",
    "ul",
    "ol",
    "li",
    "pre",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
}
_PARAGRAPHS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table", "pre", "blockquote", "figure"}
_LIKE_LINKS = str.maketrans({"【": "〖", "】": "〗", "◼": "◾", "\u200b": None})  # text that would look like a link
_ANY_LINK = re.compile(r"【\d+†([^†】]+)(?:†[^†】]+)?】")
_CUT_START, _CUT_END = re.compile(r"^[^【】]*】"), re.compile(r"【\d*(?:†([^†】]*)(?:†[^†】]*)?)?$")


@dataclass(frozen=True, eq=False)
class Page:
    """What a cursor points at: a web page, or the results of a search or of find.

    url: "" for the results of a search. links: id -> URL. lines_of_links: for the results of find, id -> the line to
    show. is_results: whether these are results, in which find cannot search.
    """

    url: str
    title: str
    text: str
    links: Mapping[int, str] = field(default_factory=dict)
    lines_of_links: Mapping[int, int] = field(default_factory=dict)
    is_results: bool = False

    @cached_property
    def lines(self) -> tuple[str, ...]:
        """The text in lines of at most 80 characters."""
        return tuple(piece for line in self.text.split("\n") for piece in _wrap(line))


def text_page(url: str, text: str, title: str | None = None) -> Page:
    """A page of plain text."""
    return Page(url, clean_line(title or urlsplit(url).netloc), f"\nURL: {url}\n{clean(text)[:MAX_PAGE_CHARS]}")


def html_page(url: str, content: bytes, encoding: str | None) -> Page:
    """A page of HTML. url: where it came from. encoding: that of the HTTP header; None to take the page's own word."""
    from lxml import etree, html

    try:
        parser = html.HTMLParser(encoding=encoding, recover=True, no_network=True, huge_tree=False)
    except LookupError:  # an encoding that nobody knows
        parser = html.HTMLParser(recover=True, no_network=True, huge_tree=False)
    try:
        root = html.document_fromstring(content, parser=parser)
    except (etree.ParserError, etree.XMLSyntaxError, ValueError):
        return text_page(url, "(the page is empty)")
    base = root.find(".//base[@href]")
    writer = _Writer(url, url if base is None else _join(url, base.get("href", "")))
    writer.write(root)
    title = root.findtext(".//title")
    return Page(
        url, clean_line(title or urlsplit(url).netloc), f"\nURL: {url}\n{writer.text[:MAX_PAGE_CHARS]}", writer.links
    )


def clean(text: str) -> str:
    """Text without characters that would look like links or that break lines."""
    return text.translate(_LIKE_LINKS).replace("\r\n", "\n").replace("\r", "\n")


def clean_line(text: str) -> str:
    """A title or a link's text on one line, cut to a length."""
    line = " ".join(clean(text).replace("†", "‡").split())
    return line if len(line) <= MAX_TITLE_CHARS else f"{line[:MAX_TITLE_CHARS]}..."


def link(id: int, text: str, domain: str | None) -> str:
    """A link as the model sees it. domain: None for one within the same site."""
    return f"【{id}†{text}】" if domain is None else f"【{id}†{text}†{domain}】"


def without_links(text: str) -> str:
    """The text with the links' texts in place of the links, also of those that begin or end outside of it."""
    text = _CUT_END.sub(lambda match: match[1] or "", _CUT_START.sub("", text))
    return _ANY_LINK.sub(r"\1", text)


def find_in(page: Page, pattern: str) -> Page:
    """The places of a page that hold `pattern`, in any case, each with the lines after it."""
    lines = without_links("\n".join(page.lines)).split("\n")
    found: list[str] = []
    links: dict[int, str] = {}
    starts: dict[int, int] = {}
    line = 0
    while line < len(lines) and len(found) < MAX_MATCHES:
        if pattern.lower() not in lines[line].lower():
            line += 1
            continue
        id = len(found)
        links[id] = page.url
        starts[id] = line
        found.append("\n".join([f"# {link(id, f'match at L{line}', None)}", *lines[line : line + MATCH_LINES]]))
        line += MATCH_LINES
    text = "\n\n".join(found) or f"No `find` results for pattern: `{pattern}`"
    title = f"Find results for text: `{pattern}` in `{page.title}`"
    url = f"{page.url}/find?pattern={quote(pattern)}"
    return Page(url, title, text, links, starts, is_results=True)


def _wrap(line: str) -> list[str]:
    if len(line) <= WIDTH:
        return [line]
    return textwrap.wrap(line, WIDTH, replace_whitespace=False, drop_whitespace=False) or [""]


def _join(base: str, target: str) -> str:
    try:
        return urljoin(base, target)
    except ValueError:
        return base


class _Writer:
    """Writes the elements of a page as text. links: id -> URL, in the order of the page."""

    def __init__(self, url: str, base: str) -> None:
        self.links: dict[int, str] = {}
        self._ids: dict[str, int] = {}
        self._base = base
        self._domain = urlsplit(url).netloc
        self._pieces: list[str] = []
        self._images = 0

    @property
    def text(self) -> str:
        """The text so far, without empty lines in a row and space at the ends of lines."""
        text = re.sub(r"[ \t]+\n", "\n", "".join(self._pieces))
        return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"

    def write(self, element: Any, depth: int = 0, pre: bool = False) -> None:
        """Write an element and what is in it, without the text behind it."""
        tag = element.tag
        if not isinstance(tag, str) or tag in _SKIPPED or depth > MAX_DEPTH:
            return
        if tag == "br":
            self._pieces.append("\n")
        elif tag == "img":
            self._image(element)
        elif tag == "a" and element.get("href") is not None:
            self._link(element)
        else:
            self._element(element, tag, depth, pre or tag == "pre")

    def _element(self, element: Any, tag: str, depth: int, pre: bool) -> None:
        if tag in _BLOCKS:
            self._break(2 if tag in _PARAGRAPHS else 1)
        if tag in ("td", "th") and self._pieces and not self._pieces[-1].endswith("\n"):
            self._pieces.append(" | ")
        if tag == "hr":
            self._pieces.append("* * *")
        elif tag == "li":
            self._pieces.append("  * ")
        elif tag == "blockquote":
            self._pieces.append("> ")
        elif len(tag) == 2 and tag[0] == "h" and tag[1] in "123456":
            self._pieces.append(f"{'#' * int(tag[1])} ")
        elif tag in ("sup", "sub"):
            self._pieces.append("^" if tag == "sup" else "_")
        self._text(element.text, pre)
        for child in element:
            self.write(child, depth + 1, pre)
            self._text(child.tail, pre)
        if tag in _BLOCKS:
            self._break(2 if tag in _PARAGRAPHS else 1)

    def _text(self, text: str | None, pre: bool) -> None:
        if not text:
            return
        if pre:
            self._pieces.append(clean(text))
            return
        words = re.sub(r"\s+", " ", clean(text))
        at_start = not self._pieces or self._pieces[-1].endswith(("\n", " "))
        words = words.lstrip(" ") if at_start else words
        if words:
            self._pieces.append(words)

    def _break(self, lines: int) -> None:
        """End the line, and leave lines - 1 empty ones."""
        end = "".join(self._pieces[-3:])
        missing = lines - (len(end) - len(end.rstrip("\n"))) if end else 0
        self._pieces.append("\n" * missing) if missing > 0 else None

    def _link(self, element: Any) -> None:
        target, text = element.get("href").strip(), clean_line(" ".join(element.itertext()))[:MAX_LINK_CHARS]
        if not text:  # most are images
            return
        url = "" if target.startswith("#") else _join(self._base, target)
        try:
            parts = urlsplit(url)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or len(url) > MAX_URL_CHARS or len(self.links) >= MAX_LINKS:
            self._text(text, pre=False)
            return
        id = self._ids.setdefault(url, len(self._ids))
        self.links[id] = url
        self._pieces.append(link(id, text, None if parts.netloc == self._domain else parts.netloc))

    def _image(self, element: Any) -> None:
        name = clean_line(element.get("alt") or element.get("title") or "")
        self._pieces.append(f"[Image {self._images}: {name}]" if name else f"[Image {self._images}]")
        self._images += 1
