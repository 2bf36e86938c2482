"""The tool browser of one conversation: search, open and find, with the pages seen so far under cursors.

The displays are those that gpt-oss was trained on (the simple browser in openai/gpt-oss).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import unquote

from .errors import ToolError
from .pages import MAX_URL_CHARS, Page, clean_line, find_in

FUNCTIONS = ("search", "open", "find")
SOURCE_PREFIX = "view-source:"
MAX_TEXT_CHARS = 2_000_000  # of the pages of one conversation; the oldest ones go first
MAX_CURSORS = 1000
MAX_QUERY_CHARS = 2000
MAX_VIEWS = 4  # num_lines shows at most this many times the usual tokens
LINES_BEFORE = 4  # shown before a match


class Pages(Protocol):
    """Where pages come from (fetch.py)."""

    async def page(self, url: str, source: bool = False) -> Page: ...


class Searches(Protocol):
    """Where search results come from (search.py)."""

    async def search(self, query: str, count: int) -> Page: ...


class BrowserSession:
    """The pages of one conversation. A page's cursor is its place in the order in which pages were shown.

    count_tokens: the tokens of a text. view_tokens: how many are shown of a page at once.
    """

    def __init__(
        self, pages: Pages, searches: Searches, count_tokens: Callable[[str], int], view_tokens: int = 1024
    ) -> None:
        self._pages, self._searches = pages, searches
        self._count_tokens = count_tokens
        self._view_tokens = view_tokens
        self._stack: list[Page | None] = []  # None for a page that was dropped

    def copy(self) -> BrowserSession:
        """Another session that goes on from here."""
        twin = BrowserSession(self._pages, self._searches, self._count_tokens, self._view_tokens)
        twin._stack = list(self._stack)
        return twin

    def cited_page(self, cursor: int, line: int) -> tuple[str, str] | None:
        """The URL and the title of what a citation means. In the results of a search, it is the result at that line."""
        page = self._stack[cursor] if 0 <= cursor < len(self._stack) else None
        if page is None:
            return None
        if page.lines_of_links:  # the results of find
            return next(iter(page.links.values())), clean_line(page.title.rpartition(" in `")[2].rstrip("`"))
        if page.url:
            return page.url, page.title
        upto = "\n".join(page.lines[: line + 1])
        ids = [id for id in page.links if f"【{id}†" in upto]
        if not ids:
            return None
        url = page.links[ids[-1]]
        title = page.text.partition(f"【{ids[-1]}†")[2].partition("†")[0]
        return url, clean_line(title)

    def action(self, name: str, arguments: str) -> Mapping[str, Any]:
        """What a call is about to do, in the words of OpenAI's web_search_call."""
        try:
            given = _arguments(arguments)
            function = name.partition(".")[2]
            if function == "search":
                return {"type": "search", "query": _text(given, "query")}
            if function == "find":
                page = self._page(_number(given, "cursor"))
                return {"type": "find_in_page", "url": page.url, "pattern": _text(given, "pattern")}
            return {"type": "open_page", "url": self._target(given)[0]}
        except ToolError:
            return {"type": "search", "query": ""} if name.endswith(".search") else {"type": "open_page", "url": None}

    async def run(self, name: str, arguments: str) -> tuple[str, Sequence[str]]:
        """Run a call. Returns the display for the model, and the URLs that a search found. Raises ToolError."""
        function = name.partition(".")[2]
        if function not in FUNCTIONS:
            raise ToolError(f"Unknown function: {function[:40]}")
        if len(self._stack) >= MAX_CURSORS:
            raise ToolError("too many pages were opened in this conversation")
        given = _arguments(arguments)
        if function == "search":
            page = await self._searches.search(_text(given, "query"), _number(given, "topn", 10))
            return await self._show(page, 0, -1), list(page.links.values())
        if function == "find":
            page = self._page(_number(given, "cursor"))
            if page.is_results:
                raise ToolError("Cannot run `find` on search results page or find results page")
            return await self._show(find_in(page, _text(given, "pattern")), 0, -1), ()
        return await self._open(given), ()

    async def _open(self, given: Mapping[str, Any]) -> str:
        """Open a URL or a link, or show the same page again, from a line on."""
        url, page, line = self._target(given)
        if page is None or given.get("view_source") is True:
            page = await self._pages.page(url.removeprefix(SOURCE_PREFIX), source=given.get("view_source") is True)
        location = _number(given, "loc")
        return await self._show(page, line if location < 0 else location, _number(given, "num_lines"))

    def _target(self, given: Mapping[str, Any]) -> tuple[str, Page | None, int]:
        """What to open: its URL, the page if it was seen before, and the line to begin at."""
        id = given.get("id", -1)
        if isinstance(id, str) and not id.strip().lstrip("-").isdigit():
            url = id.strip().removeprefix(SOURCE_PREFIX)
            if len(url) > MAX_URL_CHARS:
                raise ToolError("the URL is too long")
            return (url if "://" in url else f"https://{url}"), None, 0
        number = _number(given, "id")
        page = self._page(_number(given, "cursor"))
        if number < 0:
            return page.url, page, 0
        if number not in page.links:
            raise ToolError(f"Invalid link id `{number}`.")
        url = page.links[number]
        line = page.lines_of_links.get(number, 0)
        seen = (one for one in reversed(self._stack) if one is not None and one.url == url and not one.is_results)
        return url, next(seen, None), line - LINES_BEFORE if line > LINES_BEFORE else line

    def _page(self, cursor: int) -> Page:
        """The page at a cursor; the latest for a negative one."""
        if not self._stack:
            raise ToolError("No pages to access!")
        if cursor >= len(self._stack):
            raise ToolError(
                f"Cursor `{cursor}` is out of range. Available cursor indices: [0 - {len(self._stack) - 1}]."
            )
        page = self._stack[cursor if cursor >= 0 else -1]
        if page is None:
            raise ToolError(f"The page at cursor `{cursor}` is no longer held; open it again by its URL.")
        return page

    async def _show(self, page: Page, first: int, count: int) -> str:
        """Put a page under the next cursor, and return its display from a line on."""
        total = len(page.lines)
        if first >= total:
            raise ToolError(f"Invalid location parameter: `{first}`. Cannot exceed page maximum of {total - 1}.")
        last = await asyncio.to_thread(self._last_line, page, first, count)
        self._stack.append(page)
        self._drop_old_pages()
        name = unquote(page.url)
        name = name if len(name) <= 1024 else f"{name[:1021]}..."
        header = f"[{len(self._stack) - 1}] {page.title}" + (f" ({name})" if name else "")
        body = "\n".join(f"L{number}: {page.lines[number]}" for number in range(first, last + 1))
        return f"{header}\n**viewing lines [{first} - {last}] of {total - 1}**\n\n{body}"

    def _last_line(self, page: Page, first: int, count: int) -> int:
        """The last line to show: `count` of them, or as many as view_tokens hold."""
        budget = self._view_tokens if count <= 0 else MAX_VIEWS * self._view_tokens
        last = len(page.lines) - 1 if count <= 0 else min(first + count, len(page.lines)) - 1
        used = 0
        for number in range(first, last + 1):
            used += self._count_tokens(f"L{number}: {page.lines[number]}\n")
            if used > budget:
                return number
        return last

    def _drop_old_pages(self) -> None:
        held = sum(len(page.text) for page in set(filter(None, self._stack)))
        for cursor, page in enumerate(self._stack[:-1]):
            if held <= MAX_TEXT_CHARS:
                return
            if page is not None:
                self._stack[cursor] = None
                held -= 0 if page in self._stack else len(page.text)


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a call. Raises ToolError unless they are a JSON object."""
    if not text.strip():
        return {}
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise ToolError("Invalid function arguments: they must be a JSON object")
    return given


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_QUERY_CHARS:
        raise ToolError(f"`{name}` must be a text of 1 to {MAX_QUERY_CHARS} characters")
    return value


def _number(given: Mapping[str, Any], name: str, default: int = -1) -> int:
    """A whole number among the arguments. The model also writes 3.0 and "3"."""
    value = given.get(name)
    if value is None:
        return default
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or isinstance(value, bool) or abs(number) > 10**9:
        raise ToolError(f"`{name}` should be an integer, not `{str(value)[:40]}`")
    return number
