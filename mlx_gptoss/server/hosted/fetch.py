"""Fetching web pages for the browser: http and https, with limits, and never from the server's own network.

The address that is connected to is the one that was checked, for every redirect again. Proxies from the environment
are not used, since they would resolve the name once more.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urljoin, urlsplit

from .errors import ToolError
from .packages import load_package
from .pages import MAX_URL_CHARS, Page, html_page, text_page
from .settings import BrowserSettings, Network

if TYPE_CHECKING:
    import httpx

MAX_REDIRECTS = 5
MAX_ADDRESSES = 4  # of one name that are tried
USER_AGENT = "Mozilla/5.0 (compatible; mlx-gptoss; +https://pypi.org/project/mlx-gptoss/)"
HTML_TYPES = ("text/html", "application/xhtml+xml")
TEXT_TYPES = re.compile(r"text/.+|application/(.+\+)?(json|xml|yaml|javascript|toml)|application/x-ndjson")
TRANSLATED = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))  # NAT64: IPv4 inside

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Fetcher:
    """Fetches pages by the [browser] settings. Close it in the end."""

    def __init__(self, settings: BrowserSettings) -> None:
        self._settings = settings
        self._networks = settings.networks
        self._httpx = load_package("httpx", "browser")
        load_package("lxml.html", "browser")
        self._http = self._httpx.AsyncClient(
            follow_redirects=False,
            trust_env=False,
            timeout=settings.timeout_s,
            limits=self._httpx.Limits(max_keepalive_connections=0),  # a connection is for one name, not for an address
            headers={"User-Agent": USER_AGENT, "Accept": "text/html,text/*;q=0.9,*/*;q=0.5", "Accept-Encoding": "gzip"},
        )

    async def page(self, url: str, source: bool = False) -> Page:
        """Fetch a page. source: return its source instead of its text. Raises ToolError if it cannot be had."""
        try:
            final, kind, encoding, content = await asyncio.wait_for(self._fetch(url), self._settings.timeout_s)
        except asyncio.TimeoutError:
            raise ToolError(f"no answer from {url} within {self._settings.timeout_s:g} seconds") from None
        except self._httpx.HTTPError as error:
            raise ToolError(f"cannot fetch {url}: {type(error).__name__}: {error}") from error
        if kind in HTML_TYPES and not source:
            return await asyncio.to_thread(html_page, final, content, encoding)
        if kind in HTML_TYPES or TEXT_TYPES.fullmatch(kind):
            name = f"view-source:{final}" if source else final
            return text_page(name, _decode(content, encoding), urlsplit(final).netloc)
        raise ToolError(f"{final} is of the type {kind or 'unknown'}, which has no text to show")

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _fetch(self, url: str) -> tuple[str, str, str | None, bytes]:
        """Follow redirects. Returns the URL that answered, the content's type and encoding, and the content."""
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._get(url)
            try:
                if response.is_redirect and "location" in response.headers:
                    url = urljoin(url, response.headers["location"])
                    continue
                if response.status_code != 200:
                    raise ToolError(f"{url} answered with the status {response.status_code}")
                kind = response.headers.get("content-type", "text/html").partition(";")[0].strip().lower()
                return url, kind, response.charset_encoding, await self._read(response)
            finally:
                await response.aclose()
        raise ToolError(f"more than {MAX_REDIRECTS} redirects")

    async def _get(self, url: str) -> httpx.Response:
        """Connect to a checked address of the URL's host, and return the response before its body."""
        parts = _checked_url(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        assert parts.hostname is not None
        addresses = await self._addresses(parts.hostname, port)
        for address in addresses:
            host = f"[{address}]" if address.version == 6 else str(address)
            target = parts._replace(netloc=f"{host}:{port}", fragment="").geturl()
            request = self._http.build_request(
                "GET",
                target,
                headers={"Host": parts.netloc.rpartition("@")[2]},
                extensions={"sni_hostname": parts.hostname},
            )
            try:
                response: httpx.Response = await self._http.send(request, stream=True)
                return response
            except self._httpx.ConnectError:
                if address == addresses[-1]:
                    raise
        raise AssertionError("there is at least one address")

    async def _addresses(self, host: str, port: int) -> Sequence[Address]:
        """The addresses of a host that may be connected to. Raises ToolError if there is none."""
        loop = asyncio.get_running_loop()
        try:
            infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise ToolError(f"there is no host {host!r}: {error}") from error
        found = dict.fromkeys(ipaddress.ip_address(str(info[4][0]).partition("%")[0]) for info in infos)
        allowed = [address for address in found if is_allowed(address, self._networks)]
        if not allowed:
            raise ToolError(f"{host} is not on the public internet; only the server's operator can allow it")
        return allowed[:MAX_ADDRESSES]

    async def _read(self, response: httpx.Response) -> bytes:
        """The body, decompressed, up to the limit. What is beyond it is left out."""
        limit = self._settings.max_page_bytes
        coding = response.headers.get("content-encoding", "identity").lower()
        if coding not in ("identity", "gzip", "x-gzip", "deflate", ""):
            raise ToolError(f"the page is compressed as {coding}, which was not asked for")
        inflate = None if coding in ("identity", "") else zlib.decompressobj(wbits=47)
        content = bytearray()
        async for chunk in response.aiter_raw():
            try:
                content += chunk if inflate is None else inflate.decompress(chunk, limit - len(content) + 1)
            except zlib.error as error:
                raise ToolError(f"the page is not compressed as it says: {error}") from error
            if len(content) > limit:
                break
        return bytes(content[:limit])


def is_allowed(address: Address, networks: Sequence[Network]) -> bool:
    """Whether pages may be fetched from an address: a public one, or one of `networks`."""
    if any(address.version == network.version and address in network for network in networks):
        return True
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and any(address in network for network in TRANSLATED):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_allowed(inner, networks)
    return address.is_global and not address.is_multicast and not address.is_reserved


def _checked_url(url: str) -> SplitResult:
    """The parts of a URL. Raises ToolError for one that is not http or https, or is malformed."""
    if len(url) > MAX_URL_CHARS or not url.isprintable():
        raise ToolError(f"the URL {url[:100]!r} is malformed")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ToolError(f"the URL {url[:100]!r} is malformed: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ToolError(f"only http and https URLs can be opened, not {url[:100]!r}")
    return parts


def _decode(content: bytes, encoding: str | None) -> str:
    try:
        return content.decode(encoding or "utf-8", errors="replace")
    except LookupError:
        return content.decode("utf-8", errors="replace")
