"""The browser: pages as text, displays, cursors, search engines, and what may be fetched."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
from dataclasses import replace

import pytest

from mlx_gptoss.server.hosted.browser import BrowserSession
from mlx_gptoss.server.hosted.errors import ToolError
from mlx_gptoss.server.hosted.fetch import Fetcher, is_allowed
from mlx_gptoss.server.hosted.pages import Page, find_in, html_page, without_links
from mlx_gptoss.server.hosted.search import SearchEngine


@pytest.fixture
def browse(browser_settings):
    """Runs calls of the browser, (name, arguments) each, in one session, and returns the displays or errors."""

    def run(*calls, settings=browser_settings, session=None):
        async def work():
            fetcher, engine = Fetcher(settings), SearchEngine(settings)
            browser = session or BrowserSession(fetcher, engine, lambda text: len(text) // 4, settings.view_tokens)
            shown = []
            for name, arguments in calls:
                given = arguments if isinstance(arguments, str) else json.dumps(arguments)
                try:
                    shown.append((await browser.run(f"browser.{name}", given))[0])
                except ToolError as error:
                    shown.append(error)
            await fetcher.close()
            await engine.close()
            return shown, browser

        return asyncio.run(work())

    return run


def text_of(html, url="https://example.com/a/page"):
    return html_page(url, html.encode(), "utf-8")


def test_html_as_text():
    page = text_of(
        """<html><head><title> A
        title </title><script>bad()</script></head><body><h2>Head</h2>
        <p>One <em>two</em>
        three.<br>Four</p><ul><li>first<li>second <a href="b">here</a></ul>
        <table><tr><th>a<th>b<tr><td>1<td>2</table><pre>  x
    y</pre><img src=x alt="A cat"><img src=y>
        <a href="https://other.org/x?q=1">Other † site</a> <a href="#top">top</a> <a href="javascript:x()">js</a>
        <a href="/b"><img src=z></a> 【5†fake】 x<sup>2</sup></body></html>"""
    )
    assert page.title == "A title"
    assert page.links == {0: "https://example.com/a/b", 1: "https://other.org/x?q=1"}
    assert page.text.split("\n") == [
        "",
        "URL: https://example.com/a/page",
        "## Head",
        "",
        "One two three.",
        "Four",
        "",
        "  * first",
        "  * second 【0†here】",
        "",
        "a | b",
        "1 | 2",
        "",
        "  x",
        "    y",
        "",
        "[Image 0: A cat][Image 1] 【1†Other ‡ site†other.org】 top js 〖5†fake〗 x^2",
        "",
    ]


@pytest.mark.parametrize(
    "html",
    [
        "",
        "<",
        "<div>" * 100_000 + "deep",
        "<a href='http://[bad'>x</a>",
        "<p>\x00\ud800</p>".encode("utf-8", "replace").decode(),
        "<a href=x>" + "y" * 10_000 + "</a>",
        "<base href='http://[::1'><a href='z'>x</a>",
    ],
    ids=range(7),
)
def test_strange_html(html):
    page = text_of(html)
    assert all(len(line) <= 80 for line in page.lines) and all(url.startswith("http") for url in page.links.values())


def test_an_unknown_encoding_and_bytes_that_are_no_text():
    assert "x" in html_page("http://a/", b"<p>x \xff", "no-such-encoding").text
    assert "é" in html_page("http://a/", b"<meta charset=latin-1><p>\xe9", None).text


def test_a_page_is_shown_in_pieces(browse, web):
    shown, _ = browse(
        ("open", {"id": f"{web.url}/planets"}),
        ("open", {"loc": 20, "num_lines": 3}),
        ("open", {"cursor": 0, "id": 0}),
        ("open", {"cursor": 0.0, "loc": "5", "num_lines": 2}),
        ("open", {"loc": 1000}),
    )
    first = shown[0].split("\n")
    assert first[:6] == [
        f"[0] The planets ({web.url}/planets)",
        f"**viewing lines [0 - {len(first) - 4}] of 128**",
        "",
        "L0: ",
        f"L1: URL: {web.url}/planets",
        "L2: # Planets",
    ]
    assert first[7] == "L4: There are eight planets. See 【0†the moons】 or 【1†the sun†example.org】."
    assert 20 < len(first) < 100  # view_tokens
    assert shown[1].split("\n")[:2] == [f"[1] The planets ({web.url}/planets)", "**viewing lines [20 - 22] of 128**"]
    assert shown[2].startswith(f"[2] Moons ({web.url}/moons)")
    assert shown[3].startswith("[3] The planets") and "viewing lines [5 - 6]" in shown[3]
    assert str(shown[4]) == "Invalid location parameter: `1000`. Cannot exceed page maximum of 128."


def test_num_lines_is_limited(browse, web):
    web.answers["/long"] = (200, {"Content-Type": "text/plain"}, b"word " * 100_000)
    (shown,), _ = browse(("open", {"id": f"{web.url}/long", "num_lines": 10_000_000}))
    assert 3000 < len(shown) < 8000  # four times view_tokens


def test_find_and_open_a_match(browse, web):
    shown, browser = browse(
        ("open", {"id": f"{web.url}/planets"}),
        ("find", {"pattern": "PLANET 7"}),
        ("open", {"id": 3}),
        ("find", {"pattern": "x", "cursor": 1}),
        ("find", {"pattern": "no such text", "cursor": 0}),
    )
    lines = shown[1].split("\n")
    assert (
        lines[0] == f"[1] Find results for text: `PLANET 7` in `The planets` ({web.url}/planets/find?pattern=PLANET 7)"
    )
    assert lines[3] == "L0: # 【0†match at L23】" and lines[4] == "L1: Line 7 about planet 7."
    assert shown[2].startswith("[2] The planets") and "L71: Line 31 about planet 7." in shown[2]
    assert shown[2].split("\n")[3].startswith("L67: ")
    assert str(shown[3]) == "Cannot run `find` on search results page or find results page"
    assert "No `find` results for pattern: `no such text`" in shown[4]
    assert browser.cited_page(1, 0) == (f"{web.url}/planets", "The planets")


@pytest.mark.parametrize("engine", ["searxng", "brave", "exa"])
def test_search_engines(browse, web, browser_settings, engine, query):
    settings = replace(browser_settings, search=engine, key="K")
    (shown, page), browser = browse(
        ("search", {"query": "planets & moons", "topn": 5, "source": "web"}), ("open", {"id": 1}), settings=settings
    )
    host = web.url.removeprefix("http://")
    assert shown.split("\n") == [
        "[0] planets & moons",
        "**viewing lines [0 - 6] of 6**",
        "",
        "L0: ",
        "L1: URL: ",
        "L2: # Search Results",
        "L3: ",
        f"L4:   * 【0†The planets†{host}】 Eight of them & no more.",
        f"L5:   * 【1†Moons†{host}】 Many.",
        "L6: ",
    ]
    assert page.startswith(f"[1] Moons ({web.url}/moons)")
    path, headers, body = web.seen[0]
    if engine == "exa":
        assert headers["x-api-key"] == "K" and body["query"] == "planets & moons" and body["numResults"] == 5
    else:
        assert query(path)["q"] == ["planets & moons"]
        key = "X-Subscription-Token" if engine == "brave" else "Authorization"
        assert headers[key].endswith("K")
    assert browser.cited_page(0, 5) == (f"{web.url}/moons", "Moons")
    assert browser.cited_page(0, 4) == (f"{web.url}/planets", "The planets") and browser.cited_page(0, 1) is None


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((200, {}, b"<html>"), "sent no JSON"),
        ((200, {}, b'{"results": 3}'), "no list of results"),
        ((200, {}, b"[" * 100_000), "sent no JSON"),
        ((429, {}, b"slow down"), "status 429"),
        ((200, {}, b'{"results": [1, {"url": 5}, {"title": "no url"}]}'), None),
    ],
)
def test_search_engines_that_misbehave(browse, web, answer, error):
    web.answers["/search"] = answer
    (shown,), _ = browse(("search", {"query": "x"}))
    assert error in str(shown) if error else "No results." in shown


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/zipped", "There are eight planets"),
        ("/to-planets", "There are eight planets"),
        ("/text", "Größe"),
        ("/loop", "more than 5 redirects"),
        ("/image", "image/png, which has no text"),
        ("/missing", "status 404"),
        ("/slow", "within 2 seconds"),
        ("/to-file", "only http and https"),
    ],
)
def test_fetching(browse, web, path, text):
    web.answers["/to-file"] = (302, {"Location": "file:///etc/passwd"}, b"")
    (shown,), _ = browse(("open", {"id": web.url + path}))
    assert text in str(shown)


def test_the_source_of_a_page(browse, web):
    (_, shown), _ = browse(("open", {"id": f"{web.url}/moons"}), ("open", {"view_source": True}))
    assert shown.startswith(f"[1] {web.url[7:]} (view-source:{web.url}/moons)") and "<title>Moons</title>" in shown


def test_a_compressed_page_is_read_up_to_the_limit(browser_settings, web):
    async def work():
        fetcher = Fetcher(replace(browser_settings, max_page_bytes=100_000))
        page = await fetcher.page(f"{web.url}/bomb")
        await fetcher.close()
        return page

    assert 99_000 < len(asyncio.run(work()).text.replace("\n", "")) < 101_000


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),  # the metadata of clouds
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::5db8:d822", True),
        ("2002:7f00:1::", False),
    ],
)
def test_addresses(address, allowed):
    assert is_allowed(ipaddress.ip_address(address), ()) is allowed
    assert is_allowed(ipaddress.ip_address(address), (ipaddress.ip_network(address),))


def test_the_servers_own_network_is_out_of_reach(browse, web, browser_settings):
    port = web.url.rpartition(":")[2]
    hosts = ["127.0.0.1", "localhost", "0", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "127.1"]
    shown, _ = browse(
        *(("open", {"id": f"http://{host}:{port}/planets"}) for host in hosts),
        settings=replace(browser_settings, allow_addresses=()),
    )
    assert all(isinstance(one, ToolError) for one in shown) and not web.seen


def test_a_redirect_into_the_servers_own_network(browse, web, browser_settings):
    """The page is on an address that is allowed, and sends the browser to one that is not."""
    web.answers["/inward"] = (302, {"Location": web.url.replace("127.0.0.1", "127.0.0.2") + "/planets"}, b"")
    settings = replace(browser_settings, allow_addresses=("127.0.0.1/32",))
    (shown,), _ = browse(("open", {"id": f"{web.url}/inward"}), settings=settings)
    assert "not on the public internet" in str(shown) and [path for path, _, _ in web.seen] == ["/inward"]


def test_the_checked_address_is_the_one_that_is_used(browse, web, browser_settings, monkeypatch):
    """A name that resolves to another address the second time gives an attacker nothing: it is resolved once."""
    real, asked = socket.getaddrinfo, []

    def rebinding(host, port, *rest, **named):
        if host == "rebind.example":
            asked.append(host)
            address = "127.0.0.1" if len(asked) == 1 else "10.0.0.1"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]
        return real(host, port, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    url = web.url.replace("127.0.0.1", "rebind.example")
    (shown,), _ = browse(("open", {"id": f"{url}/planets"}))
    assert "There are eight planets" in shown and len(asked) == 1
    assert web.seen[0][1]["Host"] == url.removeprefix("http://")


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("open", "", "No pages to access!"),
        ("open", "[1]", "Invalid function arguments"),
        ("open", "[" * 100_000, "Invalid function arguments"),
        ("open", {"cursor": 3}, "No pages to access!"),
        ("open", {"id": "ftp://example.com/"}, "only http and https"),
        ("open", {"id": "http://exa mple/\n"}, "no host|malformed"),
        ("open", {"id": "http://[::1/"}, "malformed"),
        ("open", {"id": "https://" + "a" * 5000}, "too long"),
        ("open", {"id": {}}, "should be an integer"),
        ("open", {"id": 1e400}, "should be an integer"),
        ("open", {"id": True}, "should be an integer"),
        ("search", {}, "`query` must be a text"),
        ("search", {"query": "x" * 3000}, "`query` must be a text"),
        ("find", {"pattern": 3}, "No pages to access!"),
        ("click", {}, "Unknown function: click"),
    ],
)
def test_wrong_calls(browse, name, arguments, error):
    (shown,), browser = browse((name, arguments))
    assert isinstance(shown, ToolError)
    assert any(part in str(shown) for part in error.split("|")), shown
    assert browser.action(f"browser.{name}", arguments if isinstance(arguments, str) else json.dumps(arguments))


def test_wrong_cursors_and_links(browse, web):
    shown, _ = browse(
        ("open", {"id": f"{web.url}/moons"}), ("open", {"cursor": 7}), ("open", {"id": 9}), ("open", {"id": "0"})
    )
    assert str(shown[1]) == "Cursor `7` is out of range. Available cursor indices: [0 - 0]."
    assert str(shown[2]) == "Invalid link id `9`." and str(shown[3]) == "Invalid link id `0`."


def test_a_copy_goes_its_own_way(browse, web):
    _, browser = browse(("open", {"id": f"{web.url}/moons"}))
    twin = browser.copy()
    (shown,), _ = browse(("find", {"pattern": "moons"}), session=twin)
    assert shown.startswith("[1] ") and browser.cited_page(1, 0) is None and twin.cited_page(1, 0) is not None


def test_old_pages_are_dropped(browse):
    class Big:
        async def page(self, url, source=False):
            return Page(url, url, "x" * 900_000)

    session = BrowserSession(Big(), Big(), len, 100)
    shown, _ = browse(*(("open", {"id": f"https://a.example/{n}"}) for n in range(4)), session=session)
    assert shown[3].startswith("[3]")
    assert session.cited_page(0, 0) is None and session.cited_page(3, 0) is not None
    (error,), _ = browse(("open", {"cursor": 0}), session=session)
    assert "no longer held" in str(error)


def test_links_cut_by_lines():
    assert without_links("moons】 and 【3†the sun†x.org】 or 【4†Ven") == " and the sun or Ven"
    page = Page("u", "t", "a\nb match\nc\nd\ne\nf match")
    assert find_in(page, "match").lines_of_links == {0: 1, 1: 5}
