"""Search engines for the browser: SearXNG, Exa and Brave. A new one is a function and a line in ENGINES."""

from __future__ import annotations

import asyncio
import html
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .errors import ToolError
from .packages import load_package
from .pages import MAX_URL_CHARS, Page, clean, clean_line, link
from .settings import BrowserSettings

MAX_ANSWER_BYTES = 8 << 20
MAX_SNIPPET_CHARS = 1000
_TAG = re.compile(r"</?[a-zA-Z][^>]{0,200}>")


@dataclass(frozen=True)
class Query:
    """The HTTP request of one search. body: for POST."""

    url: str
    params: Mapping[str, str]
    headers: Mapping[str, str]
    body: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Engine:
    """One search engine: its usual address, its request, and the results in its answer, with their text's field."""

    url: str
    query: Callable[[str, str, str, int], Query]  # address, key, query, number of results
    path: tuple[str, ...]
    text_fields: tuple[str, ...]


def _searxng(url: str, key: str, query: str, count: int) -> Query:
    return Query(f"{url}/search", {"q": query, "format": "json"}, {"Authorization": f"Bearer {key}"} if key else {})


def _brave(url: str, key: str, query: str, count: int) -> Query:
    params = {"q": query[:400], "count": str(min(count, 20))}
    return Query(f"{url}/res/v1/web/search", params, {"X-Subscription-Token": key})


def _exa(url: str, key: str, query: str, count: int) -> Query:
    body = {"query": query, "numResults": count, "contents": {"summary": True, "text": {"maxCharacters": 500}}}
    return Query(f"{url}/search", {}, {"x-api-key": key}, body)


ENGINES = {
    "searxng": Engine("", _searxng, ("results",), ("content",)),
    "brave": Engine("https://api.search.brave.com", _brave, ("web", "results"), ("description",)),
    "exa": Engine("https://api.exa.ai", _exa, ("results",), ("summary", "text")),
}


class SearchEngine:
    """Searches by the [browser] settings. Close it in the end. Raises GptOssError if httpx is not installed."""

    def __init__(self, settings: BrowserSettings) -> None:
        self._settings = settings
        self._engine = ENGINES[settings.search]
        self._httpx = load_package("httpx", "browser")
        self._http = self._httpx.AsyncClient(timeout=settings.timeout_s, headers={"Accept": "application/json"})

    async def search(self, query: str, count: int) -> Page:
        """The results as a page, at most `count` of them. Raises ToolError if there is no answer."""
        count = max(1, min(count, self._settings.max_results))
        address = (self._settings.url or self._engine.url).rstrip("/")
        request = self._engine.query(address, self._settings.key or "", query, count)
        name = self._settings.search
        try:
            answer = await asyncio.wait_for(self._send(request), self._settings.timeout_s)
        except asyncio.TimeoutError:
            raise ToolError(f"{name} did not answer within {self._settings.timeout_s:g} seconds") from None
        except self._httpx.HTTPError as error:
            raise ToolError(f"{name} cannot be reached: {type(error).__name__}") from error
        for step in self._engine.path:
            answer = answer.get(step) if isinstance(answer, dict) else None
        if not isinstance(answer, list):
            raise ToolError(f"{name} sent no list of results")
        return self._page(query, [result for result in answer if isinstance(result, dict)][:count])

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _send(self, query: Query) -> Any:
        name = self._settings.search
        request = self._http.build_request(
            "GET" if query.body is None else "POST",
            query.url,
            params=query.params,
            headers=query.headers,
            json=query.body,
        )
        response = await self._http.send(request, stream=True)
        try:
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_ANSWER_BYTES:
                    raise ToolError(f"{name} sent more than {MAX_ANSWER_BYTES >> 20} MiB")
        finally:
            await response.aclose()
        if response.status_code != 200:
            raise ToolError(f"{name} answered with the status {response.status_code}")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ToolError(f"{name} sent no JSON: is its JSON format switched on?") from error

    def _page(self, query: str, results: list[dict[str, Any]]) -> Page:
        links: dict[int, str] = {}
        lines = ["", "URL: ", "# Search Results", ""]
        for result in results:
            url = result.get("url")
            if not isinstance(url, str) or not url.startswith(("http://", "https://")) or len(url) > MAX_URL_CHARS:
                continue
            id = len(links)
            links[id] = url
            title = clean_line(_plain(result.get("title"))) or url
            texts = (_plain(result.get(name)) for name in self._engine.text_fields)
            text = " ".join(clean(next((text for text in texts if text), "")).split())[:MAX_SNIPPET_CHARS]
            lines.append(f"  * {link(id, title, urlsplit(url).netloc)} {text}".rstrip())
        if not links:
            lines.append("No results.")
        return Page("", clean_line(query), "\n".join(lines) + "\n", links, is_results=True)


def _plain(value: Any) -> str:
    """A text of the answer, without the tags that mark what was found in it."""
    return html.unescape(_TAG.sub("", value)) if isinstance(value, str) else ""
